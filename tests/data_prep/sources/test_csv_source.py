"""CSV and TSV files: every row becomes a record for any block size, and malformed rows are reported."""

import csv
import io
import json
import random

import pytest

from data_prep.pipeline import prepare
from data_prep.sources import files
from data_prep.utils.console import UserError
from tests.data_prep.sources.source_helpers import VIEWS, open_reader, read_views, read_with_locations, write
from tests.small_corpora import data_config, split_rows


def reader(path, views=None, names=VIEWS):
    return open_reader(names, type="csv", path=path, views=views)


def to_csv(rows: list[list[str]], delimiter: str = ",") -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue().encode()


TRICKY_FIELDS = [
    "plain",
    "größe, 犬",
    'a "quoted" word',
    "two\nlines",
    "three\r\n\r\nlines",
    "",
    "  blanks ",
    "tab\there",
    "'",
    "=1+1",
    "2003-04-05",
    "007",
]


@pytest.mark.parametrize("suffix, delimiter", [(".csv", ","), (".tsv", "\t"), (".csv.gz", ","), (".tsv.zst", "\t")])
@pytest.mark.parametrize("block_bytes", [1, 50, files.BLOCK_BYTES])
def test_every_row_is_a_record_with_its_line_number(tmp_path, monkeypatch, suffix, delimiter, block_bytes):
    monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(files, "SMALL_BLOCK", block_bytes)
    rng = random.Random(1)
    rows = [[rng.choice(TRICKY_FIELDS) for _ in range(3)] for _ in range(60)]
    path = write(tmp_path / f"a{suffix}", b"\xef\xbb\xbf" + to_csv([["code", "n", "text"], *rows], delimiter))
    expected, line = [], 2
    for row in rows:
        expected.append(((row[2], row[0]), f"{path}:{line}"))
        line += 1 + sum(field.count("\n") for field in row)
    assert read_with_locations(reader(path)) == expected


def test_columns_are_mapped_to_views_as_in_json_lines(tmp_path):
    path = write(tmp_path / "a.csv", b"name,summary,sql\nx,y,z\n,b,c\n")
    assert read_views(reader(path, {"text": "{name}: {summary}", "code": "sql"})) == [("x: y", "z"), ("", "c")]
    write(tmp_path / "set" / "b.csv", b"text,code\na,b\n")
    write(tmp_path / "set" / "a.tsv", b"code\ttext\nd\tc\n")
    write(tmp_path / "set" / "c.CSV", b"text,code\nx,y\n")
    source = reader(tmp_path / "set")
    assert read_views(source) == [("c", "d"), ("a", "b")]
    assert "skipping 1 file by name: " in source.note and "c.CSV" in source.note


@pytest.mark.parametrize(
    "row, problem",
    [
        (b"only one", "1 fields, but the header has 2"),
        (b"a,b,c", "3 fields, but the header has 2"),
        (b"caf\xe9,b", "not UTF-8"),
        (b'"a"b,c', "not CSV (',' expected after '\"')"),
        (b"a\rb,c", "not CSV (a carriage return (CR) without a line feed)"),
    ],
)
def test_a_malformed_row_does_not_affect_the_next_row(tmp_path, row, problem):
    path = write(tmp_path / "a.csv", b'text,code\n"a\na",b\n' + row + b"\n\nc,d\n")
    first, ((reason, message), location), last = read_with_locations(reader(path))
    assert (first, last) == ((("a\na", "b"), f"{path}:2"), (("c", "d"), f"{path}:6"))
    assert reason == "malformed" and message.startswith(problem) and location == f"{path}:4"


def test_an_unclosed_quote_is_reported_where_it_opens(tmp_path):
    path = write(tmp_path / "a.csv", b'text,code\na,b\nc,"d\ne,f\n')
    (good, _), ((reason, message), location) = read_with_locations(reader(path))
    assert good == ("a", "b") and location == f"{path}:3"
    assert reason == "malformed"
    assert message == "not CSV (unexpected end of data: a quote is not closed, so the rest of the file is one field)"


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", r"a\.csv:1: the first line must name the columns \(it is empty\)"),
        (b"a,b,a\n", r"names 'a' twice"),
        (
            b"question,answer\n",
            r"a\.csv has no column 'text', only question, answer: "
            r"set the columns of the views in data\.sources\.0\.views",
        ),
        (
            b"text;code\na;b\n",
            r"a\.csv:1: the columns are divided by a semicolon, but .* a comma: write a comma between them",
        ),
        (b"text|code\na, b|c\nd|e\n", r"divided by a vertical bar"),
        (b"text\tcode\na\tb\n", r"divided by a tab, but .* a comma: rename the file to end in \.tsv"),
        ("größe,code\na,b\n".encode("latin-1"), r"a\.csv:1: the names of the columns are not UTF-8: .* iconv"),
        ("text,code\r\na,b\r\n".encode("utf-16"), r"a\.csv:1: UTF-16, not UTF-8: .* iconv -f UTF-16 -t UTF-8"),
        ("text,code\na,b\n".encode("utf-16-le"), r"a\.csv:1: UTF-16, not UTF-8"),
        (b"text,code\ra,b\rc,d\r", r"a\.csv:1: a carriage return \(CR\) without a line feed: .* tr"),
        (b'"text","code"\r"a","b"\r', r"a\.csv:1: a carriage return"),
        (b'"text,code\n', r"unexpected end of data"),
    ],
)
def test_an_invalid_header_is_an_error(tmp_path, content, problem):
    with pytest.raises(UserError, match=problem) as raised:
        reader(write(tmp_path / "a.csv", content))
    assert "\n" not in str(raised.value)


def test_a_truncated_compressed_file_loses_no_earlier_row(tmp_path):
    path = write(tmp_path / "a.csv.gz", to_csv([["text", "code"], *(["a", str(number)] for number in range(5000))]))
    path.write_bytes(path.read_bytes()[:-100])
    *good, ((reason, message), _) = read_with_locations(reader(path))
    assert reason == "damaged" and "truncated" in message
    assert [views[1] for views, _ in good] == [str(number) for number in range(len(good))]


def test_csv_and_json_lines_give_the_same_corpus(tmp_path, write_jsonl, pairs):
    rows = pairs(60)
    write(tmp_path / "a.csv", to_csv([["text", "code"], *([row["text"], row["code"]] for row in rows)]))
    write_jsonl(tmp_path / "a.jsonl", rows)
    for kind, file in (("csv", "a.csv"), ("json", "a.jsonl")):
        prepare(data_config(tmp_path / kind, {"type": kind, "path": str(tmp_path / file)}, workers=1))
    assert split_rows(tmp_path / "csv") == split_rows(tmp_path / "json")
    assert json.loads((tmp_path / "csv" / "manifest.json").read_text())["sources"][0]["records"] == 60
