"""The commands `python -m pretrain.data inspect` and `stats`, their errors, and the display of records."""

import itertools
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from data_prep.__main__ import main as data_prep_main
from data_prep.shards import FORMAT, MANIFEST
from data_prep.tokenizer import Tokenizer
from data_prep.tools.show import display_width, printable, shortened, show_record
from data_prep.utils.console import exit_on_user_error
from data_prep.utils.files import write_json
from pretrain.data.__main__ import main
from tests.commands import ROOT
from tests.processes import TIMEOUT


@pytest.fixture
def run_cli(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command and returns its exit code, output and error output."""

    def run(*arguments: str, main: Callable[[], None] = main) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        code = 0
        try:
            exit_on_user_error(main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def parse_pieces(text: str) -> tuple[list[str], list[int]]:
    """Return the pieces and the ids below them in the lines of a record."""
    found: tuple[list[str], list[int]] = ([], [])
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    for above, below in itertools.pairwise(lines):
        if re.fullmatch(r"[\d ]+", below) and not re.fullmatch(r"[\d ]+", above):
            starts = [match.start() for match in re.finditer(r"\d+", below)]
            found[0].extend(above[start:stop].strip() for start, stop in zip(starts, [*starts[1:], None], strict=True))
            found[1].extend(map(int, below.split()))
    return found


def test_inspect(prepared, corpus, run_cli):
    code, out, error = run_cli(
        "inspect", prepared, "2", "--record", "5", "--row-length", "256", "--predictor-tokens", "2"
    )
    assert (code, error) == (0, "")
    first, second, row = re.split(r"\n\n(?=record|A row)", out, maxsplit=2)
    for number, shown in ((5, first), (6, second)):
        record = corpus.tokens_by_view(number)
        assert shown.startswith(f"record {number}: {sum(map(len, record.values()))} tokens\n")
        assert parse_pieces(shown)[1] == [token for ids in record.values() for token in ids.tolist()]
        assert parse_pieces(shown)[0] == [corpus.tokenizer.piece(token) for token in parse_pieces(shown)[1]]
        for view, ids in record.items():
            assert f"  {view}: {len(ids)} tokens" in shown and corpus.tokenizer.decode(ids)[:60] in shown
    assert row.startswith("A row of 256 positions, joint layout, k = 2") and "\n   0  " in row and " 5  text" in row


def test_inspect_draws_only_the_first_records_of_a_long_row(prepared, run_cli):
    code, out, _ = run_cli("inspect", prepared, "0", "--row-length", "1024")
    assert code == 0 and "A row of 1,024 positions" in out and "no token sees a token of another record" in out
    assert "a smaller --row-length draws a complete row" in " ".join(out.split()) and len(out.splitlines()) <= 65


def test_inspect_the_validation_split_in_the_independent_layout(prepared, run_cli):
    code, out, _ = run_cli("inspect", prepared, "--split", "validation", "--layout", "independent")
    assert code == 0 and out.count("\nrecord ") == 2 and "A row of 128 positions, independent layout, k = 1" in out
    assert out.splitlines()[0].startswith("record 0: ")


def test_stats(prepared, run_cli):
    code, out, _ = run_cli("stats", prepared)
    assert code == 0 and "train: 400 records" in out and "validation: 40 records" in out
    assert out.count("row length") == 2 and out.count("records by tokens") == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["inspect", "PATH", "--split", "test"], "has no test split"),
        (["inspect", "PATH", "--record", "400"], "--record 400: the train split has the records 0 to 399"),
        (["inspect", "PATH", "--record", "-1"], "--record -1"),
        (["inspect", "PATH", "-1"], ""),
        (
            ["inspect", "PATH", "--row-length", "9"],
            "positions in this layout, but the row has 9; choose another --record or --row-length",
        ),
        (["inspect", "PATH", "--predictor-tokens", "-1"], "--predictor-tokens must be 0 or more"),
        (["inspect", "elsewhere"], "there is no prepared corpus in elsewhere"),
        (["stats", "elsewhere"], "there is no prepared corpus in elsewhere"),
        (["stats"], "the following arguments are required: path"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_errors(arguments, expected, prepared, run_cli):
    code, _, error = run_cli(*[prepared if argument == "PATH" else argument for argument in arguments])
    assert code == 2 and expected in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["verify", "elsewhere"], "there is no prepared corpus in elsewhere"),
        (["verify"], "the following arguments are required: path"),
        (["verification"], "cannot read the configuration verification"),
        (
            ["inspect", "elsewhere"],
            "error: python -m data_prep inspect has moved: run python -m pretrain.data inspect PATH\n",
        ),
        (["stats"], "error: python -m data_prep stats has moved: run python -m pretrain.data stats PATH\n"),
    ],
)
def test_errors_of_data_prep(arguments, expected, run_cli):
    code, _, error = run_cli(*arguments, main=data_prep_main)
    assert code == 2 and expected in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("called", "shown"), [("bin/jepa-prepare", "jepa-prepare"), ("data_prep/__main__.py", "python -m data_prep")]
)
def test_the_usage_of_data_prep_shows_how_it_was_called(called, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [called])
    with pytest.raises(SystemExit):
        data_prep_main()
    error = capsys.readouterr().err
    assert f"usage: {shown} [-h] config [key=value ...]" in error and error.endswith("required: config\n")


def test_unusual_text_is_shown_in_columns(prepared, tokenizer):
    text = "a\x1b[31m\n\u202e日本語 \u200b" * 9
    ids = tokenizer.encode_batch([text])[0]
    shown = show_record(tokenizer, 3, {"text": np.array(ids), "code": np.array([])}, 80)
    assert all(char.isprintable() for line in shown.splitlines() for char in line)
    assert max(map(display_width, shown.splitlines())) <= 80
    assert "code: null (missing in this record)" in shown and printable(text)[:30] in shown


@pytest.mark.parametrize("text", ["", "abc", "日本語のテキスト" * 3, "e\u0301" * 30, "x" * 100])
@pytest.mark.parametrize("room", [1, 2, 5, 24])
def test_shortened(text, room):
    short = shortened(text, room)
    assert display_width(short) <= room
    if display_width(text) <= room:
        assert short == text
    else:
        head, _, tail = short.partition("…")
        assert text.startswith(head) and text.endswith(tail) and "…" in short


def test_pieces(prepared):
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    assert "".join(map(tokenizer.piece, tokenizer.encode_batch(["a b"])[0])).replace("\u2581", " ") == "a b"
    assert tokenizer.piece(tokenizer.bos_id) == "<s>" and tokenizer.piece(tokenizer.eos_id) == "</s>"


def test_a_closed_pipe_is_not_an_error(prepared):
    command = f"{sys.executable} -m pretrain.data inspect {prepared} 200 | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.stdout.startswith("record 0: ") and done.stderr == ""


@pytest.mark.parametrize("command", ["inspect", "stats", "verify"])
@pytest.mark.parametrize("remaining", [{}, {"views": ["text"], "splits": []}])
def test_an_incomplete_manifest_is_reported_in_one_line(tmp_path, run_cli, command, remaining):
    write_json(tmp_path / MANIFEST, {"format": FORMAT} | remaining)
    code, _, error = run_cli(command, tmp_path, main=data_prep_main if command == "verify" else main)
    assert (
        code == 2
        and error.startswith(f"error: {tmp_path / MANIFEST} is corrupt: it has no ")
        and error.count("\n") == 1
    )
