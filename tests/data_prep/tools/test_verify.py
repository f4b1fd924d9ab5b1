"""`verify` reports each fault of a corrupt corpus in one line with exit code 2, never with a traceback."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from data_prep.__main__ import main
from data_prep.make_tokenizer import train
from data_prep.shards import CHECKSUM, CONTINUES, FORMAT, MANIFEST, write_shard
from data_prep.tokenizer import Tokenizer
from data_prep.tools.verify import verify
from data_prep.utils.console import exit_on_user_error
from data_prep.utils.files import sha256_file, write_json

VIEWS = ["text", "code"]
FIRST = "train-00000.arrow"


def columns(records: list[tuple[list[int], ...]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        view: (
            np.array([token for record in records for token in record[v]], np.int64),
            np.array([len(record[v]) for record in records]),
        )
        for v, view in enumerate(VIEWS)
    }


def write(
    folder: Path,
    tokenizer: Tokenizer,
    shards: dict[str, list[tuple[int, list, list[bool]]]],
    sources: Sequence[dict] = (),
    weights: Sequence[float] = (),
) -> None:
    """Write the shards of each split, given as (source, records, continued flags), and their manifest."""
    splits = {}
    for split, parts in shards.items():
        entries = [
            write_shard(
                folder / f"{split}-{number:05d}.arrow",
                source,
                columns(records),
                np.array(continued),
                tokenizer.vocab_size,
            )
            for number, (source, records, continued) in enumerate(parts)
        ]
        splits[split] = (
            {key: sum(entry[key] for entry in entries) for key in ("records", "incomplete", "continued")}
            | {
                key: {view: combine(entry[key][view] for entry in entries) for view in VIEWS}
                for key, combine in (("tokens", sum), ("longest", max))
            }
            | {"positions_needed": max(entry["positions_needed"] for entry in entries), "shards": entries}
        )
    all_entries = [entry for split in splits.values() for entry in split["shards"]]
    weights = weights or [1.0] * (1 + max(entry["source"] for entry in all_entries))
    tokens = [
        sum(sum(entry["tokens"].values()) for entry in all_entries if entry["source"] == number)
        for number in range(len(weights))
    ]
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "views": VIEWS,
            "settings": {"data": {"sources": list(sources)}},
            "splits": splits,
            "dropped": {},
            "sources": [{"weight": weight, "tokens": count} for weight, count in zip(weights, tokens, strict=True)],
            "tokenizer": {"sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        },
    )


def pairs(count: int, seed: int) -> list[tuple[list[int], ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(5, 340, rng.integers(1, 9)).tolist() for _ in VIEWS) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train(["SELECT name FROM dogs", "all the names of dogs"] * 5, 340, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def valid_corpus(tokenizer, tmp_path_factory) -> Path:
    """Corpus of three training shards from two sources, and a validation shard.

    The training shards hold pairs, some of which lack a view, and documents in pieces.
    """
    folder = tmp_path_factory.mktemp("valid")
    shutil.copytree(tokenizer.folder, folder / "tokenizer")
    first = pairs(40, 1)
    first[7], first[9] = (first[7][0], []), ([], first[9][1])
    documents = [([], record[1]) for record in pairs(6, 3)]
    write(
        folder,
        tokenizer,
        {
            "train": [
                (0, first, [False] * 40),
                (0, pairs(30, 2), [False] * 30),
                (1, documents, [False, True, True, False, True, False]),
            ],
            "validation": [(0, pairs(10, 4), [False] * 10)],
        },
    )
    return folder


@pytest.fixture
def folder(valid_corpus, tmp_path) -> Path:
    return Path(shutil.copytree(valid_corpus, tmp_path / "corpus"))


@pytest.fixture
def run_verify(monkeypatch, capsys) -> Callable[..., tuple[int, list[str], str]]:
    """Function that runs `verify` and returns the exit code, the output lines, and standard error.

    With `processes`, it runs the command as a user does, with several processes.
    """

    def run_verify(folder: Path, processes: bool = False) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["data_prep", "verify", str(folder)])
        code = 0
        try:
            exit_on_user_error(main if processes else lambda: verify(folder, workers=1))
        except SystemExit as end:
            code = end.code
        output = capsys.readouterr()
        return code, output.out.splitlines(), output.err

    return run_verify


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    write_json(folder / MANIFEST, manifest)


def entries(manifest: dict, split: str = "train") -> list[dict]:
    return manifest["splits"][split]["shards"]


def update_digest(folder: Path, file: str = FIRST) -> None:
    """Write the size and SHA-256 of a changed shard to the manifest, so only the contents reveal the damage."""

    def change(manifest: dict) -> None:
        for split in manifest["splits"].values():
            for entry in split["shards"]:
                if entry["file"] == file:
                    entry |= {"bytes": (folder / file).stat().st_size, "sha256": sha256_file(folder / file)}

    edit(folder, change)


def flip(folder: Path, column: str, buffer: int, byte: int, bit: int = 0, file: str = FIRST) -> None:
    """Flip a bit in a buffer of a column.

    A list column has the buffers validity, offsets, validity of the tokens, and tokens. A flat column has validity and
    values.
    """
    data = pa.py_buffer(bytearray((folder / file).read_bytes()))
    position = pa.ipc.open_file(data).get_batch(0).column(column).buffers()[buffer].address - data.address + byte
    content = bytearray(data.to_pybytes())
    content[position] ^= 1 << bit
    (folder / file).write_bytes(content)


def rewrite_columns(
    folder: Path, change: Callable[[dict[str, pa.Array]], dict[str, pa.Array]], file: str = FIRST
) -> None:
    """Rewrite a shard with changed columns, using pyarrow directly."""
    batch = pa.ipc.open_file((folder / file).read_bytes()).get_batch(0)
    new = pa.record_batch(change({name: batch.column(name) for name in batch.schema.names}))
    with pa.OSFile(str(folder / file), "wb") as sink, pa.ipc.new_file(sink, new.schema) as writer:
        writer.write_batch(new)


def lists(rows: list, dtype=None) -> pa.Array:
    return pa.array(rows, pa.list_(dtype or pa.uint16()))


def replace_tokens(folder: Path, row: int, tokens: list[int] | None, view: str = "text") -> None:
    """Replace the tokens in a row of the first shard, but keep the checksum of the record."""

    def change(batch: dict) -> dict:
        rows = batch[view].to_pylist()
        rows[row] = tokens
        return batch | {view: lists(rows)}

    rewrite_columns(folder, change)


def rewrite_with_checksums(folder: Path, row: int, tokens: list[int], view: int) -> None:
    """Rewrite the first shard with these tokens in a row, with valid checksums as a preparation writes them."""
    batch = pa.ipc.open_file((folder / FIRST).read_bytes()).get_batch(0)
    records = [
        tuple(ids or [] for ids in record)
        for record in zip(*(batch.column(name).to_pylist() for name in VIEWS), strict=True)
    ]
    records[row] = tuple(tokens if v == view else ids for v, ids in enumerate(records[row]))
    entry = write_shard(folder / FIRST, 0, columns(records), np.zeros(len(records), bool), 340)
    edit(folder, lambda manifest: entries(manifest)[0].update(entry))


def swap(folder: Path, one: int, other: int) -> None:
    def change(manifest: dict) -> None:
        shards = entries(manifest)
        shards[one], shards[other] = shards[other], shards[one]

    edit(folder, change)


def replace_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    train(["quite another text " * 9, "with other words"], 340, folder / "tokenizer")


def with_updated_digest(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a function that applies the damage and updates the digest in the manifest."""

    def damage_and_update(folder: Path) -> None:
        damage(folder)
        update_digest(folder)

    return damage_and_update


def set_value(*path, value) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        def change(manifest: dict) -> None:
            node = manifest
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value

        edit(folder, change)

    return damage


def split_batches(folder: Path) -> None:
    table = pa.ipc.open_file((folder / FIRST).read_bytes()).read_all()
    with pa.OSFile(str(folder / FIRST), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)


SHARD = ("splits", "train", "shards", 0)
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / FIRST).unlink(), f"{FIRST}: it is missing"),
    "empty": (lambda f: (f / FIRST).write_bytes(b""), f"{FIRST}: it has 0 bytes instead of"),
    "truncated": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-100]), "its Arrow structure is corrupt"),
    "a folder instead of the shard": (lambda f: ((f / FIRST).unlink(), (f / FIRST).mkdir()), f"{FIRST}: it"),
    "bit of a token": (
        lambda f: flip(f, "text", 3, 4),
        "SHA-256 does not match the manifest; row 0, counted from 0: its checksum",
    ),
    "bit of an offset": (lambda f: flip(f, "text", 1, 4, 4), f"{FIRST}: its SHA-256 does not match the manifest"),
    "bit of validity": (
        lambda f: flip(f, "text", 0, 0, 3),
        "its Arrow structure is corrupt (In column 0: Invalid: null_count value",
    ),
    "bit of a token, digest updated": (
        with_updated_digest(lambda f: flip(f, "code", 3, 2)),
        f"{FIRST}: row 0, counted from 0: its checksum does not match its tokens",
    ),
    "bit of an offset, digest updated": (
        with_updated_digest(lambda f: flip(f, "text", 1, 20, 0)),
        "row 4, counted from 0 (and 1 others): its checksum does not match",
    ),
    "bits of validity, digest updated": (
        with_updated_digest(lambda f: (flip(f, "text", 0, 0, 3), flip(f, "text", 0, 1, 1))),
        "row 9, counted from 0: text is empty, but not null; row 3, counted from 0: text is null, but has tokens",
    ),
    "bit of a checksum, digest updated": (
        with_updated_digest(lambda f: flip(f, CHECKSUM, 1, 8)),
        f"{FIRST}: row 2, counted from 0: its checksum",
    ),
    "bit of continues, digest updated": (
        with_updated_digest(lambda f: flip(f, CONTINUES, 1, 0, 5)),
        "row 5, counted from 0: its checksum",
    ),
    "last record continues": (
        with_updated_digest(lambda f: flip(f, CONTINUES, 1, 4, 7)),
        "row 39, counted from 0: it continues in the next record",
    ),
    "garbage": (
        with_updated_digest(lambda f: (f / FIRST).write_bytes(b"ARROW1\0\0" + bytes(range(256)) * 20)),
        "its Arrow structure is corrupt",
    ),
    "a different shard of the corpus": (
        with_updated_digest(lambda f: shutil.copy(f / "train-00001.arrow", f / FIRST)),
        "it has records 30 instead of 40",
    ),
    "tokens of a different record": (
        with_updated_digest(lambda f: replace_tokens(f, 3, [11, 12, 13])),
        "row 3, counted from 0: its checksum",
    ),
    "a view emptied": (
        with_updated_digest(lambda f: replace_tokens(f, 4, [])),
        "row 4, counted from 0: text is empty, but not null",
    ),
    "a view lost": (with_updated_digest(lambda f: replace_tokens(f, 4, None)), "incomplete 3 instead of 2"),
    "a record emptied": (
        with_updated_digest(lambda f: replace_tokens(f, 9, None, "code")),
        "row 9, counted from 0: no view has a token",
    ),
    "records in a different order": (
        with_updated_digest(lambda f: rewrite_columns(f, lambda b: b | {"text": lists(b["text"].to_pylist()[::-1])})),
        "(and",
    ),
    "a view omitted": (
        with_updated_digest(lambda f: rewrite_columns(f, lambda b: {n: c for n, c in b.items() if n != "code"})),
        "its columns are text: list<",
    ),
    "views exchanged": (
        with_updated_digest(lambda f: rewrite_columns(f, lambda b: b | {"text": b["code"], "code": b["text"]})),
        "(and 39 others): its checksum",
    ),
    "a different token type": (
        with_updated_digest(
            lambda f: rewrite_columns(f, lambda b: b | {"text": lists(b["text"].to_pylist(), pa.uint32())})
        ),
        "its columns are text: list<item: uint32>",
    ),
    "a null token": (
        with_updated_digest(lambda f: replace_tokens(f, 3, [11, None])),
        "it has nulls in place of tokens",
    ),
    "no record": (
        with_updated_digest(lambda f: rewrite_columns(f, lambda b: {n: c[:0] for n, c in b.items()})),
        "it has no records",
    ),
    "two batches": (with_updated_digest(split_batches), "it has 2 record batches instead of one"),
    "id beyond the vocabulary": (
        lambda f: rewrite_with_checksums(f, 6, [20, 340], 0),
        f"{FIRST}: row 6, counted from 0: text has an id beyond the vocabulary",
    ),
    "a special token": (
        lambda f: rewrite_with_checksums(f, 8, [20, 3, 21], 1),
        f"{FIRST}: row 8, counted from 0: code has a special token",
    ),
    "an unlisted shard": (
        lambda f: shutil.copy(f / FIRST, f / "train-00009.arrow"),
        "train-00009.arrow: the manifest does not list this shard",
    ),
    "leftover file": (
        lambda f: (f / ".train-00000.arrow.77.tmp").write_bytes(b""),
        "leftover of an interrupted preparation",
    ),
    "leftover folder": (lambda f: (f / ".partial").mkdir(), ".partial: leftover of an interrupted preparation"),
    "count of a shard": (set_value(*SHARD, "records", value=39), "it has records 40 instead of 39"),
    "count of a split": (
        set_value("splits", "train", "records", value=77),
        "splits.train.records is 77, but its shards have 76",
    ),
    "tokens of a shard": (set_value(*SHARD, "tokens", "text", value=5), f"{FIRST}: it has tokens {{'text'"),
    "longest": (set_value(*SHARD, "longest", "code", value=500), f"{FIRST}: it has longest {{'text'"),
    "positions": (set_value(*SHARD, "positions_needed", value=5), "it has positions_needed"),
    "continued": (
        set_value("splits", "train", "shards", 2, "continued", value=0),
        "train-00002.arrow: it has continued 3 instead of 0",
    ),
    "checksum": (set_value(*SHARD, "sha256", value="0" * 64), f"{FIRST}: its SHA-256 does not match the manifest"),
    "size": (set_value(*SHARD, "bytes", value=1), f"{FIRST}: it has"),
    "a file outside": (set_value(*SHARD, "file", value="../train-00000.arrow"), "splits.train.shards.0.file"),
    "order of shards": (lambda f: swap(f, 0, 1), "the shards are not in the order in which they were written"),
    "listed twice": (
        lambda f: edit(f, lambda m: entries(m).insert(1, entries(m)[0])),
        f"the shard {FIRST} is listed twice",
    ),
    "views of the manifest": (set_value("views", value=["code", "text"]), "its columns are"),
    "view renamed": (
        set_value("views", value=["text", "sql"]),
        "has views ['code', 'text'], but the corpus has ['sql', 'text']",
    ),
    "key missing": (
        lambda f: edit(f, lambda m: entries(m)[0].pop("tokens")),
        "is corrupt: splits.train.shards.0.tokens: Field required",
    ),
    "no split": (set_value("splits", value={}), "is corrupt: splits"),
    "a negative count": (set_value(*SHARD, "records", value=-1), "is corrupt: splits.train.shards.0.records"),
    "not JSON": (lambda f: (f / MANIFEST).write_text('{"format": 3,'), "cannot read"),
    "a list as manifest": (lambda f: (f / MANIFEST).write_text("[]"), MANIFEST),
    "a different format": (set_value("format", value=2), "has format 2"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "there is no prepared corpus"),
    "tokenizer replaced": (replace_tokenizer, "tokenizer: it is not the tokenizer of the shards"),
    "tokenizer lost": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer: "),
    "vocabulary size": (
        set_value("tokenizer", "vocab_size", value=341),
        "tokenizer: it is not the tokenizer of the shards",
    ),
}


@pytest.mark.parametrize("processes", [False, True])
def test_a_valid_corpus_is_reported_in_one_line(processes, valid_corpus, run_verify):
    tokens = sum(
        split["tokens"][view]
        for split in json.loads((valid_corpus / MANIFEST).read_text())["splits"].values()
        for view in VIEWS
    )
    assert run_verify(valid_corpus, processes) == (0, [f"4 shards, 86 records, {tokens} tokens: all valid"], "")


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_reported(kind, folder, run_verify):
    damage, expected = DAMAGES[kind]
    damage(folder)
    code, lines, error = run_verify(folder)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert expected in "\n".join([*lines, error]), lines
    assert "Traceback" not in error and not any("all valid" in line for line in lines)


def test_all_damaged_shards_are_reported(folder, run_verify):
    for file in (FIRST, "train-00002.arrow", "validation-00000.arrow"):
        (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    code, lines, error = run_verify(folder, processes=True)
    assert code == 2 and [line.split(":")[0] for line in lines] == [
        FIRST,
        "train-00002.arrow",
        "validation-00000.arrow",
    ]
    assert "3 of 4 shards are corrupt" in error


def test_every_flipped_byte_is_detected(tokenizer, tmp_path, run_verify):
    """Verify one copy of a shard per byte, with that byte flipped.

    SHA-256 detects every flip. The checksums of the records also detect the flips in bytes that carry data.
    """
    shutil.copytree(tokenizer.folder, tmp_path / "tokenizer")
    records = pairs(24, 5)
    records[3] = (records[3][0], [])
    continued = [False] * 24
    continued[10] = True
    write(tmp_path, tokenizer, {"train": [(0, records, continued)]})
    content = (tmp_path / FIRST).read_bytes()
    data = pa.py_buffer(content)
    batch = pa.ipc.open_file(data).get_batch(0)
    data_bytes = set()
    for name, sizes in (
        ("text", (0, 4 * 25, 0, 2)),
        ("code", (3, 4 * 25, 0, 2)),
        (CONTINUES, (0, 3)),
        (CHECKSUM, (0, 4 * 24)),
    ):
        for buffer, size in zip(batch.column(name).buffers(), sizes, strict=True):
            size = size if size != 2 else 2 * len(batch.column(name).values)
            data_bytes |= (
                set(range(buffer.address - data.address, buffer.address - data.address + size)) if buffer else set()
            )
    for digest_updated in (False, True):
        manifest = json.loads((tmp_path / MANIFEST).read_text())
        shards, (entry, *_) = [], entries(manifest)
        for byte in range(len(content)):
            file = f"train-{byte:05d}.arrow"
            (tmp_path / file).write_bytes(content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :])
            shards.append(entry | {"file": file} | ({"sha256": sha256_file(tmp_path / file)} if digest_updated else {}))
        manifest["splits"]["train"]["shards"] = shards
        write_json(tmp_path / MANIFEST, manifest)
        code, lines, _ = run_verify(tmp_path, processes=digest_updated)
        named = {int(line[6:11]) for line in lines if line.startswith("train-")}
        assert code == 2
        assert named == set(range(len(content))) if not digest_updated else data_bytes <= named


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda manifest: manifest["sources"][1].update(tokens=1), r"sources\.1\.tokens is 1, but its shards have \d+"),
        (lambda manifest: manifest["sources"].pop(), r"train-00002\.arrow has source 1, but `sources` has length 1"),
    ],
)
def test_sources_of_the_manifest_are_checked_against_its_shards(folder, run_verify, change, expected):
    edit(folder, change)
    code, lines, _ = run_verify(folder)
    assert code == 2 and re.search(expected, "\n".join(lines))
