"""Plain documents are the same wherever a file is cut, and invalid documents are reported."""

import random
import re

import pytest

from data_prep.sources import files, text
from data_prep.utils.console import UserError
from tests.data_prep.sources.source_helpers import (
    SHARED,
    needs_shared,
    open_reader,
    read_views,
    read_with_locations,
    write,
)

END = "<|endoftext|>"


def reader(path, separator=None, names=("text", "code"), **more):
    return open_reader(names, type="text", path=path, separator=separator, **more)


def split_naively(content: bytes, separator: str) -> list[tuple[int, str]]:
    """Return the first line number and the text of each document, from the lines of the complete file."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    documents: list[tuple[int, str]] = []
    document_lines: list[bytes] = []
    start = 1
    for number, line in enumerate([*lines, None], start=1):
        if line is None:
            is_end = True
        elif separator:
            is_end = line.removesuffix(b"\r") == separator.encode()
        else:
            is_end = not line.strip()
        if not is_end:
            document_lines.append(line + b"\n" * (number < len(lines)))
            continue
        document = re.sub(rb"\r?\n\Z", b"", b"".join(document_lines)).decode()
        if document.strip():
            documents.append((start, document))
        document_lines, start = [], number + 1
    return documents


def read_documents(path, separator: str) -> list[tuple[int, str]]:
    return [
        (int(location.removeprefix(f"{path}:")), views[1])
        for views, location in read_with_locations(reader(path, separator))
    ]


def random_text(rng: random.Random, separator: str) -> bytes:
    lines = [
        "",
        " \t",
        "\f",
        "  ",
        "a",
        "größe 👍",
        "x" * 40,
        separator,
        separator,
        f" {separator}",
        f"{separator}.",
        "\r",
        "end\r",
        "\u2028",
        "\0",
        "\ufeff",
    ]
    parts = [rng.choice(lines) + rng.choice(["\n", "\n", "\n", "\r\n"]) for _ in range(rng.randint(0, 30))]
    return "".join([*parts, rng.choice(["", "last", separator, "last\r", "\r"])]).encode()


@pytest.mark.parametrize("separator", ["", END, "-", "größe 👍"])
def test_documents_do_not_depend_on_where_the_file_is_cut(tmp_path, separator, set_piece_size):
    rng = random.Random(separator)
    for trial in range(150):
        content = rng.choice([b"", b"", b"\xef\xbb\xbf"]) + random_text(rng, separator)
        path = write(tmp_path / "a.txt", content)
        expected = split_naively(content, separator)
        for _ in range(4):
            length, block = rng.randint(1, len(content) + 2), rng.choice([3, 5, 64, files.BLOCK_BYTES])
            set_piece_size(length, block)
            assert read_documents(path, separator) == expected, (trial, length, block, content)


@pytest.mark.parametrize("width", [4095, 4096, 4097, 4098, 4099, 9000])
def test_a_very_long_blank_line_is_read_the_same_for_every_cut(tmp_path, width, set_piece_size):
    content = b"first\n" + b" " * width + b"\nsecond\n\nthird"
    path = write(tmp_path / "a.txt", content)
    expected = (
        [(1, "first"), (3, "second"), (5, "third")]
        if width <= 4096
        else [(1, f"first\n{' ' * width}\nsecond"), (5, "third")]
    )
    for length in (1, 6, 7, 1000, width + 6, width + 7, width + 8, width + 15):
        set_piece_size(max(length, 50), 700)
        assert read_documents(path, "") == expected, length


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("separator", ["", END])
def test_compressed_files_are_read_like_plain_ones(tmp_path, suffix, separator):
    content = b"".join(random_text(random.Random(seed), END) for seed in range(20))
    path = write(tmp_path / f"a.txt{suffix}", content)
    assert read_documents(path, separator) == split_naively(content, separator)


@pytest.mark.parametrize(
    "content, document",
    [
        (b"one\n\ntwo\n", "one\n\ntwo"),
        (b"one", "one"),
        (b"\n\n a \r\n\r\n", "\n\n a \r\n"),
        (b"\xef\xbb\xbfx\n", "x"),
        (b"a\r", "a\r"),
        (b"a\0b", "a\0b"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_is_a_document(tmp_path, content, document, suffix):
    path = write(tmp_path / f"a.md{suffix}", content)
    assert read_with_locations(reader(path)) == [(("", document), f"{path}:1")]


def test_a_folder_yields_its_non_empty_files_sorted_by_name(tmp_path):
    for name in ("b.txt", "a/c", "a/b.md.gz", "z.rst.zst"):
        write(tmp_path / name, name.encode())
    for name in ("empty.txt", "blank.txt"):
        write(tmp_path / name, b" \n" * (name == "blank.txt"))
    write(tmp_path / ".hidden", b"x")
    source = reader(tmp_path, names=("only",))
    assert read_views(source) == [("a/b.md.gz",), ("a/c",), ("b.txt",), ("z.rst.zst",)] and source.provided_views == (
        True,
    )


def test_a_document_is_the_last_view_unless_it_is_mapped(tmp_path):
    path = write(tmp_path / "a.txt", b"x")
    assert reader(path).provided_views == (False, True)
    assert read_views(reader(path, views={"text": "A page: {text}"})) == [("A page: x", "")]
    with pytest.raises(
        UserError,
        match=r"a text source has no column 'body', only text: set the columns of the views in data\.sources\.0\.views",
    ):
        reader(path, views={"text": "{body}"})


@pytest.mark.parametrize(
    "content, separator, expected",
    [
        (
            b"good\n\nb\xffd\n\ngood",
            "",
            {1: "good", 3: "not UTF-8 (invalid start byte at byte 1 of the document)", 5: "good"},
        ),
        (
            b"good\n\nok\nbad \xe2\x82\n\ngood",
            "",
            {1: "good", 4: "not UTF-8 (unexpected end of data at byte 7 of the document)", 6: "good"},
        ),
        (
            b"a\n<|endoftext|>\n\xed\xa0\xbd\n<|endoftext|>\nb",
            END,
            {1: "a", 3: "not UTF-8 (invalid continuation byte at byte 0 of the document)", 5: "b"},
        ),
        ("größe".encode("latin-1"), None, {1: "not UTF-8 (invalid start byte at byte 2 of the document)"}),
        ("hello".encode("utf-16"), None, {1: "not UTF-8 (invalid start byte at byte 0 of the document)"}),
    ],
)
def test_a_document_that_is_not_utf8_is_malformed_and_does_not_affect_other_documents(
    tmp_path, content, separator, expected
):
    path = write(tmp_path / "a.txt", content)
    found = {
        int(location.removeprefix(f"{path}:")): views[1]
        for views, location in read_with_locations(reader(path, separator))
    }
    assert found == expected


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", [None, END])
def test_a_document_that_is_too_long_is_malformed_and_does_not_affect_other_documents(
    tmp_path, suffix, separator, monkeypatch
):
    monkeypatch.setattr(text, "LONGEST_DOCUMENT", 3 << 20)
    long = ("malformed", "a document of more than 3 MiB; split it with `separator`")
    for size in (3 << 20, (3 << 20) + 1, 9 << 20):
        document = b"x" * (size - 5) + b"\nwxyz"
        content = document if separator is None else b"a\n<|endoftext|>\r\n" + document + b"\r\n<|endoftext|>\nb\n"
        path = write(tmp_path / f"a.txt{suffix}", content)
        middle = (("", document.decode()) if size <= 3 << 20 else long, f"{path}:{1 if separator is None else 3}")
        neighbours = ([], []) if separator is None else ([(("", "a"), f"{path}:1")], [(("", "b"), f"{path}:6")])
        assert read_with_locations(reader(path, separator)) == [*neighbours[0], middle, *neighbours[1]]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("separator", [None, "", END])
@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"", lambda data: b"no packed file"])
def test_a_corrupt_compressed_file_is_reported(tmp_path, suffix, separator, damage):
    between = "\n" + (separator or "") + "\n"
    documents = [f"document {number}" for number in range(80_000)]
    path = write(tmp_path / f"a.txt{suffix}", between.join(documents).encode())
    path.write_bytes(damage(path.read_bytes()))
    *good, (problem, _) = read_with_locations(reader(path, separator))
    assert [views[1] for views, _ in good] == documents[: len(good)]
    assert problem[0] == "damaged" and "the compressed file is" in problem[1]
    assert bool(good) == (separator is not None and path.stat().st_size > 100)


@needs_shared
@pytest.mark.parametrize("separator", ["", "======"])
def test_a_real_manual_cut_into_small_pieces_yields_the_same_documents(separator, set_piece_size):
    path = SHARED / "text" / "sqlite3-doc.txt"
    expected = split_naively(path.read_bytes(), separator)
    set_piece_size(77_777, 1 << 16)
    assert read_documents(path, separator) == expected
