"""The evaluation job on a real run: in the background, as a command, with finetuning, and only from the export."""

import json
import sqlite3
import time

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.nlrx_grammar import generate
from data_prep.tokenizer import Tokenizer
from data_prep.utils.progress import saved_progress
from pretrain.evaluation.checkpoints import evaluation_lock
from pretrain.run_folder import EVALUATION_PROGRESS, PINS
from tests.commands import prepare_corpus, ranks_command, run_command, tiny_config, write_config
from tests.processes import TIMEOUT

STEPS = 20


def write_pairs(path, split, rows):
    pairs = (generate(0, split, index) for index in range(rows))
    path.write_text("".join(json.dumps({"text": text, "code": code}) + "\n" for text, code in pairs))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Return the folder of a run whose checkpoints are evaluated in the background with its validation pairs."""
    folder = tmp_path_factory.mktemp("evaluation")
    pairs = write_pairs(folder / "pairs.jsonl", "validation", 60)
    values = tiny_config(
        folder,
        train__steps=STEPS,
        train__micro_batch_rows=4,
        objective__distance="cosine",
        objective__predictor_tokens=2,
        objective__predictor_mlp=24,
        checkpoint={"every": 10, "keep": 1},
        monitor__validate_every=10,
        evaluation={"every": 10, "tasks": [{"name": "loss", "test": str(pairs)}]},
    )
    config = write_config(folder, values)
    prepare_corpus(config)
    run_command(ranks_command(2, "launcher/run.py", config))
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def background(run_dir):
    """Return the results after the background jobs have handled all requests.

    Retention would have removed the checkpoint of step 10 in the meantime.
    """
    deadline = time.monotonic() + TIMEOUT
    while list((run_dir / "checkpoints" / PINS).iterdir()):
        assert time.monotonic() < deadline, (run_dir / "evaluation" / "log.txt").read_text()
        time.sleep(0.2)
    return read_lines(run_dir / "evaluation" / "results.jsonl")


@pytest.fixture(scope="module")
def by_hand(run_dir, background):
    """Run the same nl_rx command twice, finetuned on 200 rows and scored on 30, and return both processes."""
    train, test = write_pairs(run_dir / "train.jsonl", "finetune", 200), write_pairs(run_dir / "test.jsonl", "test", 30)
    command = [
        "python",
        "launcher/evaluate.py",
        str(run_dir),
        "--task",
        "nl_rx",
        f"task.train={train}",
        f"task.test={test}",
        "task.finetune={steps: 3}",
    ]
    return [run_command(command), run_command(command)]


def test_every_requested_checkpoint_is_evaluated_once(background):
    assert [(result["task"], result["step"]) for result in background] == [("loss", 10), ("loss", 20)]


def test_the_status_shows_an_evaluation_while_it_is_running(run_dir, background):
    command = ["python", "launcher/status.py", str(run_dir)]
    path = run_dir / EVALUATION_PROGRESS
    with evaluation_lock(run_dir), saved_progress(path, "evaluating loss at step 20"):
        assert "run: evaluating loss at step 20\n" in run_command(command).stdout
        left = path.read_text()
    path.write_text(left)  # as after a kill
    assert "evaluating" not in run_command(command).stdout
    path.unlink()


def test_evaluating_only_the_export_yields_the_losses_of_the_validation(run_dir, background):
    validation = {line["step"]: line for line in read_lines(run_dir / "metrics.jsonl") if "validation/loss/lm" in line}
    for result in background:
        assert result["rows"] == 60 and result["directions"].keys() == result["metrics"].keys()
        for name, value in result["metrics"].items():
            tag = f"validation/loss/{name}" if name in ("lm", "jepa") else f"validation/embedding/{name}"
            assert value == pytest.approx(validation[result["step"]][tag], rel=1e-4), tag


def test_the_export_loads_with_transformers_without_the_project(run_dir, background):
    folder = run_dir / "export" / "step-00000020"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("lines with a vowel")["input_ids"]]])
    assert model(ids).logits.isfinite().all()
    assert json.loads((folder / "jepa.json").read_text())["objective"]["predictor_tokens"] == 2
    assert (folder / "jepa.safetensors").exists()


def test_finetuning_and_generation_are_scored_and_recorded(run_dir, by_hand):
    result = read_lines(run_dir / "evaluation" / "results.jsonl")[-1]
    assert (result["task"], result["step"], result["rows"], result["finetune"]) == ("nl_rx", 20, 30, {"steps": 3})
    assert {"exact", "equal", "prefix", "contains", "stopped", "equal_unseen", "undecided"} <= set(result["metrics"])
    assert result["counts"]["unseen"] == 30  # the splits of the grammar have no target in common
    assert result["pretrain_seed"] == result["finetune_seed"] == 3
    answers = read_lines(run_dir / "evaluation" / "answers" / "nl_rx-step-00000020.jsonl")
    assert [(row["context"], row["target"]) for row in answers] == [generate(0, "test", index) for index in range(30)]
    tokenizer = Tokenizer.load(run_dir / "export" / "step-00000020")
    longest = max(map(len, tokenizer.encode_batch([row["target"] for row in answers])))
    cut_lengths = [len(ids) for ids in tokenizer.encode_batch([row["answer"] for row in answers if not row["stopped"]])]
    assert 1.5 * longest < min(cut_lengths) <= max(cut_lengths) < 3 * longest, (
        "about twice the longest target: a text that is encoded again may have a different number of tokens"
    )
    finetuning = read_lines(run_dir / "evaluation" / "finetune" / "nl_rx-step-00000020" / "metrics.jsonl")
    assert [line["step"] for line in finetuning] == [1, 2, 3] and "loss/jepa" not in finetuning[0]
    config = yaml.safe_load((run_dir / "evaluation" / "finetune" / "nl_rx-step-00000020" / "config.yaml").read_text())
    assert config["model"]["init_from"] == str(run_dir / "export" / "step-00000020")
    assert config["data"]["lm_views"] == "last" and config["objective"]["name"] == "next_token"
    assert (run_dir / "tensorboard" / "evaluation").exists()


def test_an_evaluation_is_not_repeated_but_its_table_is_shown(run_dir, by_hand):
    assert "has already been evaluated" in by_hand[1].stdout
    assert len(read_lines(run_dir / "evaluation" / "results.jsonl")) == 3
    assert "validation/embedding/retrieval_at_1" in by_hand[1].stdout and "tensorboard --logdir" in by_hand[1].stdout


def test_no_tensorboard_file_is_written_if_the_run_disables_it(run_dir, background):
    before = set((run_dir / "tensorboard" / "evaluation").iterdir())
    pairs = write_pairs(run_dir / "other_pairs.jsonl", "validation", 40)
    run_command(
        [
            "python",
            "launcher/evaluate.py",
            str(run_dir),
            "--task",
            "loss",
            f"task.test={pairs}",
            "monitor.loggers=[]",
        ]
    )
    results = run_dir / "evaluation" / "results.jsonl"
    *earlier, last = results.read_text().splitlines(True)
    assert json.loads(last)["rows"] == 40
    assert set((run_dir / "tensorboard" / "evaluation").iterdir()) == before
    results.write_text("".join(earlier))  # restore the file for the other tests


def test_different_settings_finetune_again_and_rows_of_the_training_file_are_not_unseen(run_dir, by_hand):
    overlapping = run_dir / "overlapping.jsonl"
    overlapping.write_text(
        (run_dir / "train.jsonl").read_text() + "".join((run_dir / "test.jsonl").read_text().splitlines(True)[:10])
    )
    run_command(
        [
            "python",
            "launcher/evaluate.py",
            str(run_dir),
            "--task",
            "nl_rx",
            f"task.train={overlapping}",
            f"task.test={run_dir / 'test.jsonl'}",
            "task.finetune={steps: 2}",
        ]
    )
    result = read_lines(run_dir / "evaluation" / "results.jsonl")[-1]
    assert (result["finetune"], result["counts"]["unseen"]) == ({"steps": 2}, 20)
    finetuning = run_dir / "evaluation" / "finetune" / "nl_rx-step-00000020"
    assert [line["step"] for line in read_lines(finetuning / "metrics.jsonl")] == [1, 2]
    assert [path.name for path in (finetuning / "export").iterdir()] == ["step-00000002"]


def write_tasks_of_every_kind(folder):
    """Write small files in the formats of the public data sets, and return the settings of tasks on them."""
    connection = sqlite3.connect(folder / "shop.sqlite")
    connection.execute("CREATE TABLE t (a)")
    connection.executemany("INSERT INTO t VALUES (?)", [(1,), (2,)])
    connection.commit()
    connection.close()
    rows = {
        "gsm8k": [{"question": f"{number} + 1?", "answer": f"#### {number + 1}"} for number in range(6)],
        "spider": [
            {"db_id": "shop", "question": f"above {number}", "query": f"SELECT a FROM t WHERE a > {number}"}
            for number in range(6)
        ],
        "rotten_tomatoes": [{"text": f"lines {number}", "label": number % 2} for number in range(6)],
        "nq_open": [{"question": f"who {number}", "answer": ["one", "two"]} for number in range(6)],
        "hellaswag": [
            {"ctx": f"a man {number}", "endings": ["runs", "walks", "sits", "sleeps"], "label": str(number % 4)}
            for number in range(6)
        ],
    }
    tasks = []
    for name, task_rows in rows.items():
        (folder / name).mkdir()
        (folder / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows))
        tasks.append(
            {"name": name, "test": str(folder / name / "test.jsonl")}
            | ({"databases": str(folder)} if name == "spider" else {})
        )
    tasks[0]["test"] = {"type": "hub", "path": str(folder / "gsm8k"), "hub_split": "test"}
    tasks[2] |= {"train": tasks[2]["test"], "finetune": {"steps": 2}}
    pairs = write_pairs(folder / "pairs.jsonl", "validation", 40)
    reviews = {"type": "json", "path": tasks[2]["test"], "views": {"text": "text", "code": "label"}}
    return [
        *tasks,
        {"name": "retrieval", "test": str(pairs)},
        {"name": "retrieval", "label": "in_context", "test": str(pairs), "target": "in_context"},
        {"name": "geometry", "label": "shape", "test": str(pairs), "rows": 30},
        {"name": "probe", "column": "label", "test": reviews, "train": reviews},
    ]


def test_every_kind_of_task_runs_on_the_export_and_writes_its_result(run_dir, by_hand, tmp_path):
    tasks = write_tasks_of_every_kind(tmp_path)
    done = run_command(["python", "launcher/evaluate.py", str(run_dir), f"evaluation.tasks={json.dumps(tasks)}"])
    results = {result["task"]: result for result in read_lines(run_dir / "evaluation" / "results.jsonl")[-len(tasks) :]}
    assert list(results) == [task.get("label", task["name"]) for task in tasks]
    assert {task: result["rows"] for task, result in results.items()} == dict.fromkeys(results, 6) | {
        "retrieval": 40,
        "in_context": 40,
        "shape": 30,
    }
    for task, result in results.items():
        rates = {name: value for name, value in result["metrics"].items() if task != "shape"}
        assert result["directions"].keys() == result["metrics"].keys(), task
        assert result["metrics"] and all(0 <= value <= 1 for value in rates.values()), (task, result)
    assert results["spider"]["counts"] == {"failed_gold": 0, "missing_database": 0, "empty_results": 4, "unseen": 6}
    assert results["rotten_tomatoes"]["counts"] == {"labels": 2} and results["rotten_tomatoes"]["finetune"] == {
        "steps": 2
    }
    assert len(read_lines(run_dir / "evaluation" / "answers" / "gsm8k-step-00000020.jsonl")) == 6
    assert "recall_at_1" in done.stdout and "effective_rank_context" in done.stdout
    tables = done.stdout[done.stdout.rindex("\ntraining ") :]
    assert max(map(len, tables.splitlines()[:-2])) <= 150, "the final tables should fit the screen"


def test_the_views_of_a_file_are_embedded_with_only_the_export(run_dir, background, tmp_path):
    pairs = write_pairs(tmp_path / "mine.jsonl", "test", 5)
    export = run_dir / "export" / "step-00000020"
    done = run_command(["python", "launcher/evaluate.py", str(export), "--embed", str(pairs)])
    arrays = np.load(export / "embeddings" / "mine.npz")
    assert {name: array.shape for name, array in arrays.items()} == dict.fromkeys(
        ("text", "code", "text_to_code"), (5, 32)
    )
    assert "embeddings/mine.npz" in done.stdout


def test_user_errors_are_one_line_with_exit_code_2(run_dir, background, tmp_path):
    for arguments, expected in {
        ("--checkpoint", "7"): "no checkpoint of step 7; choose one of 10, 20",
        ("--task", "nl_rex"): "task.name: unknown task 'nl_rex': choose one of geometry, gsm8k",
        ("--embed", "x"): "is not an export",
        ("--task", "nl_rx", "task.tset=x"): "nearest known key is 'task.test'",
        ("task.test=x", "--task", "loss", "--task", "nl_rx"): "addresses one task",
        ("--task", "loss", f"task.test={tmp_path / 'none.jsonl'}"): "No such file",
    }.items():
        done = run_command(["python", "launcher/evaluate.py", str(run_dir), *arguments], check=False)
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, (
            arguments,
            done.stderr,
        )
