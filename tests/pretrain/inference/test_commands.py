"""Generation, search and status on a real run: the commands as a user types them."""

import itertools
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from pyarrow import parquet

from data_prep.nlrx_grammar import generate
from data_prep.utils.console import UserError, duration
from data_prep.utils.files import read_json_lines
from pretrain.evaluation.embed import embed
from pretrain.evaluation.generate import generate_answers
from pretrain.inference import search
from pretrain.inference.export_folder import find_export
from pretrain.inference.generate import _TextPrinter
from pretrain.inference.search import Index, unit
from tests.commands import ROOT, prepare_corpus, run_command, tiny_config, write_config

GENERATE, SEARCH, STATUS = (["python", f"launcher/{name}.py"] for name in ("generate", "search", "status"))
PROMPTS = ["lines with a vowel", "lines ending with the string dog", "a number before a letter"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the directory of a finished run that has not been evaluated, next to a file of pairs."""
    folder = tmp_path_factory.mktemp("inference")
    config = write_config(folder, tiny_config(folder, objective__predictor_tokens=2))
    prepare_corpus(config)
    run_command(["python", "launcher/run.py", str(config)])
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def pairs(run):
    """Return a file of pairs; one code occurs twice."""
    path = run.parents[1] / "pairs.jsonl"
    rows = [{"text": f"lines with {word}", "code": f".*{word}.*"} for word in ("dog", "cat", "bird", "fish")]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "has a dog", "code": ".*dog.*"}]))
    return path


def test_prompts_are_answered_as_in_the_evaluation(run):
    export = find_export(run)
    expected = [answer.text for answer in generate_answers(export, PROMPTS, 12)]
    limit = ["--max-new-tokens", "12"]
    batch = run_command([*GENERATE, str(run), *PROMPTS, *limit])
    assert batch.stdout == "\n".join([*expected, ""]) and "note: 3 of 3 answers are cut off after 12" in batch.stderr
    streamed = run_command([*GENERATE, str(export), PROMPTS[0], *limit])
    assert streamed.stdout == expected[0] + "\n" and "note: the answer was cut off after 12 tokens" in streamed.stderr
    (run / "prompts.txt").write_text("\n".join(PROMPTS))
    line = shlex.join([*GENERATE, str(run), "--json", *limit]) + f" < {shlex.quote(str(run / 'prompts.txt'))}"
    found = [json.loads(row) for row in run_command(["bash", "-c", line]).stdout.split("\n")[:-1]]
    assert [row["prompt"] for row in found] == PROMPTS and [row["answer"] for row in found] == expected


def test_samples_depend_on_the_seed_and_on_top_p(run, pairs):
    def answers(*options, file=pairs):
        words = ["--json", "--file", str(file), "--max-new-tokens", "8", *options]
        return [json.loads(line) for line in run_command([*GENERATE, str(run), *words]).stdout.split("\n")[:-1]]

    def sample(seed, top_p=1.0):
        return answers("--sample", "--temperature", "2", "--seed", str(seed), "--top-p", str(top_p))

    first = sample(1)
    assert len(first) == 5 and first == sample(1) != sample(2)
    parquet.write_table(pa.Table.from_pylist(read_json_lines(pairs)), pairs.with_suffix(".parquet"))
    greedy = answers(file=pairs.with_suffix(".parquet"))
    assert [answer["prompt"] for answer in greedy] == [row["text"] for row in read_json_lines(pairs)]
    assert sample(1, top_p=1e-6) == greedy != first


def test_an_answer_is_printed_while_it_is_generated(capsys):
    """Characters of several tokens are printed when they are complete."""
    printer = _TextPrinter(lambda ids: bytes(ids).decode(errors="replace"), eos_id=0)
    printed = []
    for tokens in ([7, 7], [97], [0xC3], [0xA9], [98], [0]):
        printer.put(torch.tensor(tokens))
        printed.append(capsys.readouterr().out)
    assert printed == ["", "a", "", "é", "b", ""] and printer.printed == "aéb"


def test_prompts_can_be_typed_in_a_terminal(run):
    expected = [answer.text for answer in generate_answers(find_export(run), PROMPTS[:2], 12)]
    terminal, stdin = pty.openpty()
    os.write(terminal, "".join(f"{prompt}\n" for prompt in PROMPTS[:2]).encode() + b"\x04")
    done = subprocess.run(
        [sys.executable, "launcher/generate.py", str(run), "--max-new-tokens", "12"],
        stdin=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    os.close(stdin), os.close(terminal)
    assert done.stdout == "".join(f"> {answer}\n" for answer in expected) + "> "


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", "x"], "nowhere is neither a run directory"),
        (["RUN", "x", "--top-p", "0.5"], "--top-p have an effect with --sample only"),
        (["RUN", "x", "--temperature", "0.5"], "--temperature and --top-p have an effect with --sample only"),
        (["RUN", "x", "--sample", "--temperature", "0"], "--temperature is 0.0; it must be above 0"),
        (["RUN", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["RUN", "x", "--file", "FILE"], "give prompts or --file, not both"),
        (["RUN", "--file", "missing.jsonl"], "missing.jsonl"),
        (["RUN"], "there is no prompt"),
    ],
)
def test_wrong_arguments_of_generate_are_reported_in_one_line(run, pairs, arguments, expected):
    words = [{"RUN": str(run), "FILE": str(pairs)}.get(word, word) for word in arguments]
    done = run_command([*GENERATE, *words], check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("exporting step")]
    assert done.returncode == 2 and len(lines) == 1 and expected in lines[0]


def test_a_prompt_without_room_for_an_answer_is_named(run):
    done = run_command([*GENERATE, str(run), "number " * 2000, PROMPTS[0], "--max-new-tokens", "3", "--json"])
    answers = [json.loads(row)["answer"] for row in done.stdout.split("\n")[:-1]]
    assert "leaves no room for an answer" in done.stderr and answers[0] == "" != answers[1]


def test_the_closest_texts_are_found_exactly(run, pairs):
    export = find_export(run)
    done = run_command([*SEARCH, str(run), "--index", str(pairs), "lines with dog", "--top", "3", "--json"])
    assert "4 texts indexed in" in done.stderr
    codes = list(dict.fromkeys(row["code"] for row in read_json_lines(pairs)))
    embeddings = embed(export, [("lines with dog", code) for code in codes])
    prediction = embeddings.predictions["text", "code"][0]
    cosines = {
        code: float(prediction @ vector / np.linalg.norm(prediction) / np.linalg.norm(vector))
        for code, vector in zip(codes, embeddings.views["code"], strict=True)
    }
    (line,) = done.stdout.splitlines()
    found = json.loads(line)["found"]
    assert [entry["text"] for entry in found] == sorted(cosines, key=cosines.__getitem__, reverse=True)[:3]
    assert [entry["cosine"] for entry in found] == pytest.approx([cosines[entry["text"]] for entry in found], abs=1e-5)

    again = run_command([*SEARCH, str(run), "--index", str(pairs), "lines with dog", "--top", "3", "--json"])
    assert again.stdout == done.stdout and "indexed" not in again.stderr
    path = export / "index" / "pairs-code.npz"
    path.write_bytes(path.read_bytes()[:-9])  # a corrupt index is made again
    assert "4 texts indexed" in run_command([*SEARCH, str(run), "--index", str(pairs), "x"]).stderr
    with open(pairs, "a") as file:
        file.write(json.dumps({"text": "a horse", "code": "horse"}) + "\n")
    changed = run_command([*SEARCH, str(run), "--index", str(pairs), "--top", "9", "x"])
    assert "5 texts indexed" in changed.stderr and len(changed.stdout.splitlines()) == 1 + 5


def test_the_columns_of_an_index_can_be_named(run, pairs, tmp_path):
    lines = [json.dumps({"nl": row["text"], "regex": row["code"]}) for row in read_json_lines(pairs)]
    (tmp_path / "named.jsonl").write_text("\n".join(lines) + "\n")
    source = f"{{type: json, path: {tmp_path / 'named.jsonl'}, views: {{text: nl, code: regex}}}}"
    shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["sources"][0] = {"type": "json", "path": "corpus.jsonl", "views": {"text": "nl", "code": "regex"}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    own = run_command([*SEARCH, str(tmp_path / "run"), "--index", str(tmp_path / "named.jsonl"), "--json", *PROMPTS])
    named, plain = (
        run_command([*SEARCH, str(run), "--index", index, "--json", *PROMPTS]).stdout for index in (source, str(pairs))
    )
    assert own.stdout == named == plain and json.loads(named.splitlines()[0])
    other = run_command([*SEARCH, str(run), "--index", source.replace("code: regex", "code: nl"), "--json", "x"]).stdout
    texts = {row["text"] for row in read_json_lines(pairs)}
    assert {entry["text"] for entry in json.loads(other)["found"]} <= texts


def test_the_queries_of_a_file_are_its_texts_of_the_query_view(run, pairs):
    done = run_command([*SEARCH, str(run), "--index", str(pairs), "--file", str(pairs), "--json"])
    rows = read_json_lines(pairs)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["query"] for result in results] == [row["text"] for row in rows]
    assert {entry["text"] for result in results for entry in result["found"]} <= {row["code"] for row in rows}


def test_a_view_can_be_searched_with_texts_of_the_same_view(run, pairs):
    words = ["--index", str(pairs), "--view", "code", "--query-view", "code", ".*cat.*", "--top", "1"]
    done = run_command([*SEARCH, str(run), *words])
    assert done.stdout.splitlines()[0] == ".*cat.*"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--view", "regex"], "--view is regex, but the views of the model are text, code"),
        (["--top", "0"], "--top is 0"),
        (["--file", "FILE"], "give queries or --file, not both"),
    ],
)
def test_wrong_arguments_of_search_are_reported_in_one_line(run, pairs, arguments, expected):
    words = [str(pairs) if word == "FILE" else word for word in arguments]
    done = run_command([*SEARCH, str(run), "--index", str(pairs), "x", *words], check=False)
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_mean_cosine_of_an_index_equals_a_slow_computation():
    embeddings = unit(np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32) + 1)
    cosines = [one @ other for one, other in itertools.permutations(embeddings, 2)]
    texts = [str(number) for number in range(20)]
    assert Index(texts, embeddings).mean_cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    assert Index(texts[:1], embeddings[:1]).mean_cosine == pytest.approx(0, abs=1e-6)


def test_almost_equal_embeddings_are_reported(run, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    pairs = [generate(3, "test", number) for number in range(12)]
    rows.write_text("".join(json.dumps({"text": text, "code": code}) + "\n" for text, code in pairs))
    for limit, expected in ((-1.0, True), (1.01, False)):
        monkeypatch.setattr(search, "ALMOST_EQUAL", limit)
        monkeypatch.setattr(sys, "argv", ["search.py", str(run), PROMPTS[0], "--index", str(rows)])
        search.main()
        assert ("the embeddings of the texts are almost equal (mean cosine" in capsys.readouterr().err) == expected


def test_search_equals_a_full_sort():
    draw = np.random.default_rng(0)
    texts, queries = draw.standard_normal((2500, 16)).astype(np.float32), draw.standard_normal((1203, 16))
    cosines, numbers = Index([str(n) for n in range(2500)], unit(texts)).search(queries.astype(np.float32), 7)
    table = unit(queries) @ unit(texts).T
    expected = np.argsort(-table, axis=1)[:, :7]
    assert (numbers == expected).mean() > 0.999  # equal up to rounding of ties
    assert np.allclose(cosines, np.take_along_axis(table, expected, axis=1), atol=1e-5)


def test_the_state_of_runs_is_shown(run, tmp_path):
    out = run_command([*STATUS, str(run.parent)]).stdout
    heads, line = (re.split(r"\s{2,}", row) for row in (out.splitlines()[1], out.splitlines()[3]))
    cells = dict(zip(heads, line, strict=True))
    assert (cells["run"], cells["state"], cells["step"], cells["done"]) == ("run", "finished", "4", "100%")
    assert cells["checkpoint"] == "4" and cells["losses"].startswith("lm ") and "ago" in cells["changed"]
    assert run_command([*STATUS, str(run)]).stdout.splitlines()[1].split() == out.splitlines()[1].split()

    for name, status, age in (("active", "running", 0), ("stuck", "running", 500), ("ended", "resumable", 500)):
        copy = tmp_path / "group" / name
        copy.mkdir(parents=True)
        (copy / "config.yaml").write_text((run / "config.yaml").read_text())
        (copy / "status.json").write_text(json.dumps({"status": status, "step": 2, "reason": "disk" * (age > 0)}))
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (copy / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])  # the last line is being written
        (copy / "evaluation").mkdir()
        results = [{"task": "nl", "step": step, "metrics": {"exact": step / 8}} for step in (1, 3, 2)]
        (copy / "evaluation" / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
        for file in copy.iterdir():
            os.utime(file, (time.time() - age,) * 2)
    out = run_command([*STATUS, str(tmp_path)]).stdout
    states = {line.split()[0]: line.split()[1:4] for line in out.splitlines()[3:6]}
    assert states == {
        "active": ["running", "2", "50%"],
        "ended": ["resumable", "2", "50%"],
        "stuck": ["silent", "2", "50%"],
    }
    assert "stuck: disk" in out and "active:" not in out and out.count("nl/exact 0.375 at 3") == 3
    heads, active = (re.split(r"\s{2,}", out.splitlines()[line]) for line in (1, 3))
    assert dict(zip(heads, active, strict=True))["left"] == duration(json.loads(lines[1])["seconds"])


def test_the_table_of_runs_is_repeated(run):
    command = [sys.executable, "launcher/status.py", str(run), "--watch", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        tables = itertools.islice((line for line in process.stdout if "finished" in line), 3)
        assert len(list(tables)) == 3
        process.terminate()


@pytest.mark.parametrize("arguments", [["nowhere"], ["EMPTY"], ["EMPTY", "--watch", "0"]])
def test_status_without_runs_is_an_error(tmp_path, arguments):
    done = run_command([*STATUS, *(str(tmp_path) if word == "EMPTY" else word for word in arguments)], check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_a_run_without_checkpoint_has_no_export(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        find_export(tmp_path)


def test_a_run_stands_for_its_newest_export(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    for step in (9, 10, 2):
        (tmp_path / "export" / f"step-{step:08}").mkdir(parents=True)
    assert find_export(tmp_path).name == "step-00000010"
