"""A run with a larger budget continues before its decay, bitwise like a run that had this budget from the start."""

import shutil

import pytest
import yaml

from data_prep.utils.files import read_json
from pretrain.run_folder import PINS, list_steps, read_rewinds, step_name
from pretrain.training.extension import DECAYED
from tests.commands import (
    ROOT,
    prepare_corpus,
    ranks_command,
    read_complete_lines,
    run_command,
    tiny_config,
    write_config,
)
from tests.pretrain.training.checkpoint_equality import assert_same_checkpoints

TESTS = ROOT / "tests" / "pretrain" / "training"
STABLE = {
    "train__schedule": "warmup_stable_decay",
    "train__warmup_steps": 2,
    "train__decay_steps": 3,
    "train__learning_rate": 1e-2,
    "checkpoint": {"every": 4, "keep": 1, "background": False},
    "monitor__validate_every": 100,
}
SHORT, LONG = 9, 13
TOKENS = {"train__steps": None, "train__warmup_steps": None, "train__decay_steps": None}
TOKENS |= {"train__warmup_tokens": 1500, "train__decay_tokens": 2500}


def write_run(folder, name, **changes):
    return write_config(folder, tiny_config(folder, name=name, **STABLE | changes))


def metrics(folder, name):
    lines = read_complete_lines(folder / "runs" / name / "metrics.jsonl")
    for line in lines:
        [line.pop(tag) for tag in list(line) if tag.startswith(("seconds", "processor_seconds", "throughput"))]
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train "long" at once, and "short" with a smaller budget, on two ranks; the same with budgets in tokens."""
    folder = tmp_path_factory.mktemp("extension")
    paths = [
        write_run(folder, "long", train__steps=LONG),
        write_run(folder, "short", train__steps=SHORT),
        write_run(folder, "long-tokens", **TOKENS | {"train__tokens": 9500}),
        write_run(folder, "short-tokens", **TOKENS | {"train__tokens": 7000}),
    ]
    prepare_corpus(paths[0])
    run_command(ranks_command(2, TESTS / "several_runs.py", *paths))
    return folder


def copy_of_short(folder, tmp_path, name="short"):
    shutil.copytree(folder / "runs" / "short", tmp_path / "runs" / name)
    return tmp_path / "runs" / name


def test_the_last_checkpoint_before_the_decay_is_saved_and_kept(folder):
    for name, last in (("short", SHORT), ("long", LONG)):
        assert list_steps(folder / "runs" / name / "checkpoints") == [last - 3, last]
        rates = {line["step"]: line["optimizer/lr"] for line in metrics(folder, name)}
        assert [step for step in rates if rates[step] == 1e-2] == list(range(2, last - 2))
        assert rates[1] == 5e-3 and rates[last] == pytest.approx(1e-3)


def test_an_extended_run_equals_a_long_run_bitwise(folder, tmp_path):
    run_dir = copy_of_short(folder, tmp_path)
    export = run_dir / "export" / step_name(SHORT)
    export.mkdir(parents=True)
    results = run_dir / "evaluation" / "results.jsonl"
    results.parent.mkdir()
    results.write_text(f'{{"step": {SHORT}, "task": "loss", "metrics": {{}}, "rewinds": 0}}\n')
    path = write_run(folder, "short", train__steps=LONG, output_dir=str(tmp_path / "runs"))
    done = run_command(ranks_command(2, "launcher/run.py", path))
    assert f"note: resuming with a changed setting: train.steps is {LONG}, was {SHORT}" in done.stdout
    assert f"resuming from step {SHORT - 3}" in done.stdout
    checkpoints = run_dir / "checkpoints"
    assert_same_checkpoints(checkpoints / step_name(LONG), folder / "runs" / "long" / "checkpoints" / step_name(LONG))
    assert metrics(tmp_path, "short") == metrics(folder, "long")
    # the end of the shorter run is kept under another name, and its evaluation is not mistaken for the new one
    assert (checkpoints / (DECAYED + step_name(SHORT)) / "manifest.json").exists()
    assert (export.parent / (DECAYED + step_name(SHORT))).exists() and not export.exists()
    assert read_rewinds(run_dir)[0]["to"] == SHORT - 3
    assert read_json(run_dir / "status.json")["status"] == "finished"


def test_with_a_budget_in_tokens_the_decay_is_left_too(folder, tmp_path):
    run_dir = tmp_path / "runs" / "short-tokens"
    shutil.copytree(folder / "runs" / "short-tokens", run_dir)
    last_stable, end = list_steps(run_dir / "checkpoints")
    rates = {line["step"]: line["optimizer/lr"] for line in metrics(tmp_path, "short-tokens")}
    assert rates[last_stable] == 1e-2 > rates[last_stable + 1] and end == max(rates) > last_stable + 2
    path = write_run(folder, "short-tokens", output_dir=str(tmp_path / "runs"), **TOKENS | {"train__tokens": 9500})
    assert f"resuming from step {last_stable}" in run_command(ranks_command(2, "launcher/run.py", path)).stdout
    assert metrics(tmp_path, "short-tokens") == metrics(folder, "long-tokens")


def test_a_stopped_run_is_extended_without_going_back(folder, tmp_path):
    run_dir = copy_of_short(folder, tmp_path)
    shutil.rmtree(run_dir / "checkpoints" / step_name(SHORT))
    path = write_run(folder, "short", train__steps=LONG, output_dir=str(tmp_path / "runs"))
    shown = run_command(["python", "launcher/run.py", str(path), "--dry-run"])
    assert shown.returncode == 0
    run_command(ranks_command(2, "launcher/run.py", path))
    assert metrics(tmp_path, "short") == metrics(folder, "long") and not read_rewinds(run_dir)


def test_a_corrupt_checkpoint_before_the_decay_is_not_used(folder, tmp_path):
    run_dir = copy_of_short(folder, tmp_path)
    shard = next((run_dir / "checkpoints" / step_name(SHORT - 3)).glob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    path = write_run(folder, "short", train__steps=LONG, output_dir=str(tmp_path / "runs"))
    done = run_command(ranks_command(2, "launcher/run.py", path), check=False)
    assert done.returncode == 2 and "its last checkpoint from before the decay" in done.stderr + done.stdout
    assert list_steps(run_dir / "checkpoints") == [SHORT - 3, SHORT] and not read_rewinds(run_dir)


@pytest.mark.parametrize(
    ("before", "changes", "expected"),
    [
        ({"train__schedule": "cosine", "train__decay_steps": None}, {}, "every learning rate depends on the budget"),
        ({"objective__active": [0, 0.5]}, {}, "objective has a schedule over fractions of the budget"),
        ({"objective__weight_schedule": [[0, 0], [0.1, 1]]}, {}, "objective has a schedule over fractions"),
        ({"objective__dropout": [[0, 0], [1, 0.5]]}, {}, "objective has a schedule over fractions"),
        (
            {"train__warmup_steps": None, "train__warmup_fraction": 2 / SHORT},
            {},
            "set train.warmup_fraction=null train.warmup_steps=2 to keep it",
        ),
        ({}, {"train__learning_rate": 2e-2}, "contains a run with a different train.learning_rate"),
        ({}, TOKENS | {"train__tokens": 10**6}, "contains a run with a different train.decay_steps"),
        ({}, {"train__steps": SHORT - 1}, f"different train.steps ({SHORT}, now {SHORT - 1})"),
    ],
)
def test_what_would_change_earlier_steps_is_refused(folder, tmp_path, before, changes, expected):
    run_dir = copy_of_short(folder, tmp_path)
    written = tiny_config(
        folder, name="short", output_dir=str(tmp_path / "runs"), **STABLE | {"train__steps": SHORT} | before
    )
    (run_dir / "config.yaml").write_text(yaml.safe_dump(written))
    values = tiny_config(
        folder, name="short", output_dir=str(tmp_path / "runs"), **STABLE | {"train__steps": LONG} | before | changes
    )
    done = run_command(["python", "launcher/run.py", str(write_config(tmp_path, values)), "--dry-run"], check=False)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
    if "branch_from" not in expected and not changes:
        assert f"branch_from.run={run_dir}" in done.stderr


def test_earlier_checkpoints_of_the_decay_are_removed_and_the_last_stable_one_is_used(folder, tmp_path):
    output = {"output_dir": str(tmp_path / "runs"), "checkpoint": {"every": 1, "keep": 9, "background": False}}
    for steps in (SHORT, SHORT + 3):
        done = run_command(["python", "launcher/run.py", str(write_run(folder, "many", train__steps=steps, **output))])
        checkpoints = tmp_path / "runs" / "many" / "checkpoints"
    assert f"resuming from step {SHORT - 3}" in done.stdout
    assert (checkpoints / (DECAYED + step_name(SHORT))).exists()
    # the run is killed early in its next decay, extended again, and has the same step as its first end again
    for step in (SHORT + 1, SHORT + 2, SHORT + 3):
        shutil.rmtree(checkpoints / step_name(step))
    path = write_run(folder, "many", train__steps=LONG, train__decay_steps=7, **output)
    pin = checkpoints / PINS / f"{step_name(SHORT)}.branch-0"
    pin.parent.mkdir(exist_ok=True)
    pin.touch()
    done = run_command(["python", "launcher/run.py", str(path)], check=False)
    assert done.returncode == 2 and f"while a branch starts from {step_name(SHORT)}" in done.stderr
    pin.unlink()
    done = run_command(["python", "launcher/run.py", str(path)])
    # the new decay is longer, and a run with it from the start would decay from step 7 on
    assert f"resuming from step {LONG - 7}" in done.stdout
    rates = [line["optimizer/lr"] for line in metrics(tmp_path, "many")]
    assert rates[LONG - 8] == 1e-2 > rates[LONG - 7] and len(rates) == LONG
    assert not list(checkpoints.glob(f"{DECAYED}{step_name(SHORT + 1)}")) and len(read_rewinds(checkpoints.parent)) == 2


def test_a_run_without_a_checkpoint_before_the_decay_is_not_extended(folder, tmp_path):
    run_dir = copy_of_short(folder, tmp_path)
    shutil.rmtree(run_dir / "checkpoints" / step_name(SHORT - 3))
    path = write_run(folder, "short", train__steps=LONG, output_dir=str(tmp_path / "runs"))
    done = run_command(["python", "launcher/run.py", str(path)], check=False)
    assert done.returncode == 2 and "it has no checkpoint from before the decay" in done.stderr
    planned = run_command(["python", "launcher/run.py", str(path), "--dry-run"], check=False)
    assert (planned.returncode, planned.stderr) == (2, done.stderr)
    assert list_steps(run_dir / "checkpoints") == [SHORT]
