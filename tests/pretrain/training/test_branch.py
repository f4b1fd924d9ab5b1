"""Branches: runs that start from a checkpoint of another run."""

import shutil
import signal
from itertools import chain

import pytest
import yaml

from data_prep.layout import SpecialTokenIds
from data_prep.utils.files import read_json
from pretrain.config import load_config
from pretrain.run_folder import PINS, list_steps, read_status, step_name
from pretrain.training.branch import Branch, SourcePin, branch_state, earlier_packings
from pretrain.training.checkpoint_loading import consolidate
from tests.commands import (
    ROOT,
    BackgroundCommand,
    prepare_corpus,
    ranks_command,
    read_complete_lines,
    run_command,
    tiny_config,
    write_config,
)
from tests.pretrain.training.checkpoint_equality import assert_same_checkpoints

TESTS = ROOT / "tests" / "pretrain" / "training"
STEP, SHORT, LONG = 6, 8, 12
"""The step of the branches, and the budgets of the source and of the branches."""
RECORDS = 150
NEXT_TOKEN = {"name": "next_token"}


def write_run(folder, name, branch=True, **changes):
    settings = {
        "train__schedule": "warmup_stable_decay",
        "train__warmup_steps": 2,
        "train__decay_steps": 2,
        "train__steps": LONG,
        "data__sources": [{"type": "nlrx", "records": RECORDS}, {"type": "nlrx", "split": "validation", "records": 20}],
        "checkpoint": {"every": 3, "keep": 9, "background": False},
    }
    if branch:
        settings["branch_from"] = {"run": str(folder / "runs" / "source"), "step": STEP}
    return write_config(folder, tiny_config(folder, name=name, **settings | changes))


def metrics(folder, name):
    lines = read_complete_lines(folder / "runs" / name / "metrics.jsonl")
    for line in lines:
        [line.pop(tag) for tag in list(line) if tag.startswith(("seconds", "processor_seconds", "throughput"))]
    return lines


def records(folder, name):
    """Return the records of each step of a run."""
    return {line["step"]: line["records"] for line in read_complete_lines(folder / "runs" / f"{name}.records")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train a source, a run with a larger budget, and branches of the source, on two ranks."""
    folder = tmp_path_factory.mktemp("branch")
    paths = [
        write_run(folder, "source", branch=False, train__steps=SHORT),
        write_run(folder, "long", branch=False),
        write_run(folder, "same"),
        write_run(folder, "nitp", objective={"name": "nitp"}),
        write_run(folder, "more_tokens", objective__predictor_tokens=3),
    ]
    prepare_corpus(paths[0])
    done = run_command(ranks_command(2, TESTS / "several_runs.py", *paths))
    assert done.stdout.count(f"branching from step {STEP}") == 3
    assert "note: the branch differs from its source: objective.name is nitp, was llm_jepa" in done.stdout
    assert "these weights are not in the checkpoint and start anew: model.predictor.weight" in done.stdout
    return folder


def test_a_branch_without_differences_equals_its_source_bitwise(folder):
    runs = folder / "runs"
    assert_same_checkpoints(*(runs / name / "checkpoints" / step_name(LONG) for name in ("same", "long")))
    assert metrics(folder, "same") == metrics(folder, "long")[STEP:]


def test_weights_that_the_source_lacks_start_anew_and_others_are_kept(folder):
    source = consolidate(folder / "runs" / "source" / "checkpoints" / step_name(STEP))
    for name in ("nitp", "more_tokens"):
        first = consolidate(folder / "runs" / name / "checkpoints" / step_name(STEP + 3))
        for key in source.keys() & first.keys():
            if source[key].shape == first[key].shape:
                assert (source[key] - first[key]).abs().max() < 3 * 3e-3 * 1.5, key  # three steps of Adam
        lines = metrics(folder, name)
        assert lines[0]["step"] == STEP + 1 and all(line["loss/jepa"] > 0 for line in lines)
    assert first["predictor.weight"].shape[0] == 3


def test_the_lineage_is_recorded_and_the_source_is_not_changed(folder):
    for name in ("same", "nitp"):
        (entry,) = read_json(folder / "runs" / name / "environment.json")["lineage"]
        assert (entry["run"], entry["step"]) == (str(folder / "runs" / "source"), STEP)
        assert entry["continues_data"] and f"train.steps is {LONG}, was {SHORT}" in entry["differences"]
    source = folder / "runs" / "source" / "checkpoints"
    assert list_steps(source) == [3, STEP, SHORT] and not list((source / PINS).glob("*"))
    assert not list(source.glob(".*")) and not list((folder / "runs" / "nitp" / "checkpoints").glob(".*universal*"))


@pytest.fixture(scope="module")
def recorded(folder):
    """Train next-token alone on one rank, branch to `llm_jepa` on two ranks, and branch again; record the order."""
    lm = write_run(folder, "lm", branch=False, objective=NEXT_TOKEN, train__steps=None, train__epochs=1)
    values = yaml.safe_load(lm.read_text())
    values["train"] |= {"warmup_steps": None, "warmup_fraction": 0.1, "decay_steps": None}
    values["checkpoint"]["every"] = 1
    lm.write_text(yaml.safe_dump(values))
    run_command(["python", str(TESTS / "recording_run.py"), str(lm)])
    values |= {"name": "pairs", "branch_from": {"run": str(folder / "runs" / "lm"), "step": 1}}
    pairs = write_config(folder, values | {"objective": {"name": "llm_jepa"}})
    run_command(ranks_command(2, TESTS / "recording_run.py", pairs))
    values |= {"name": "lm_again", "branch_from": {"run": str(folder / "runs" / "pairs"), "step": 2}}
    run_command(["python", str(TESTS / "recording_run.py"), str(write_config(folder, values))])
    return folder


def test_each_record_occurs_once_in_an_epoch_across_branches_with_other_packings(recorded):
    first, second, third = (records(recorded, name) for name in ("lm", "pairs", "lm_again"))
    assert min(second) == 2 and min(third) == 3
    assert sorted(chain(first[1], *second.values())) == list(range(RECORDS))
    assert sorted(chain(first[1], second[2], *third.values())) == list(range(RECORDS))
    lineage = read_json(recorded / "runs" / "lm_again" / "environment.json")["lineage"]
    assert [(entry["run"].rpartition("/")[2], entry["step"]) for entry in lineage] == [("lm", 1), ("pairs", 2)]


def test_a_branch_that_is_killed_before_its_first_checkpoint_starts_again(folder, tmp_path):
    path = write_run(folder, "killed", objective=NEXT_TOKEN)
    undisturbed = write_run(folder, "undisturbed", objective=NEXT_TOKEN)
    pins = folder / "runs" / "source" / "checkpoints" / PINS
    running = BackgroundCommand(ranks_command(2, TESTS / "faulty_run.py", f"hold:{STEP + 2}", path), tmp_path / "log")
    running.wait_until(lambda: any(metrics(folder, "killed")), "the first step")
    assert [pin.name.partition(".")[0] for pin in pins.iterdir()] == [step_name(STEP)]
    running.kill()
    assert not list_steps(folder / "runs" / "killed" / "checkpoints")
    for config in (path, undisturbed):
        run_command(ranks_command(2, "launcher/run.py", config))
    checkpoints = (folder / "runs" / name / "checkpoints" / step_name(LONG) for name in ("killed", "undisturbed"))
    assert_same_checkpoints(*checkpoints)
    assert metrics(folder, "killed") == metrics(folder, "undisturbed") and not list(pins.iterdir())


def test_a_resumed_branch_removes_its_pin(folder, tmp_path):
    path = write_run(folder, "pinned")
    config = load_config(path)
    pin = SourcePin(config)
    checkpoints = config.run_dir / "checkpoints"
    running = BackgroundCommand(
        ["python", str(TESTS / "faulty_run.py"), f"hold:{STEP + 4}", str(path)], tmp_path / "log"
    )
    running.wait_until(lambda: list_steps(checkpoints), "the first checkpoint")
    running.kill()
    pin.set()  # as if the kill had come just before its removal
    run_command(["python", "launcher/run.py", str(path)])
    assert not list((folder / "runs" / "source" / "checkpoints" / PINS).iterdir())
    # without its record, the packing of the earlier runs is unknown
    (config.run_dir / "environment.json").unlink()
    (config.run_dir / "status.json").unlink()
    done = run_command(["python", "launcher/run.py", str(path)], check=False)
    assert done.returncode == 2 and "environment.json has no `lineage`" in done.stderr


def test_recent_losses_are_kept_only_if_they_are_comparable(folder):
    state = {"owed": {"loss/lm": 1.0}, "losses": {"lm": [[1.0, 2]]}, "loader": {"epoch": 3}, "clipped_steps": [3, 5]}
    changes = {"owed": None, "clipped_steps": [0, 0]}

    def continued(differences, continues_data):
        return branch_state(
            Branch(folder, load_config(folder / "same.yaml"), differences, continues_data, [], 0.5), state
        )

    assert continued(["train.steps is 12, was 8"], True) == state | changes
    assert continued(["objective.weight is 1, was 2"], True)["losses"] == {}
    assert continued(["data.lm_views is last, was all"], True)["losses"] == {}
    assert continued([], False) == changes | {"losses": {}, "loader": {"epoch": 0, "window": 0, "row": 0}}


def test_packings_before_new_data_are_not_used(folder):
    config = yaml.safe_load((folder / "same.yaml").read_text())
    specials = SpecialTokenIds(1, 2, 3, 4, 5)

    def lengths(*entries):
        lineage = [
            {"config": config | {"data": config["data"] | {"sequence_length": length}}, "continues_data": continues}
            for length, continues in entries
        ]
        return [packing.row_length for packing in earlier_packings(lineage, specials, 2)]

    assert lengths((128, True), (192, True)) == [128, 192]
    assert lengths((128, True), (192, False)) == []
    assert lengths((128, True), (192, False), (256, True)) == [256]


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"data": {}}'])
def test_a_source_with_a_corrupt_environment_is_refused(folder, tmp_path, content):
    (tmp_path / "checkpoints" / step_name(STEP)).mkdir(parents=True)
    shutil.copy(folder / "runs" / "source" / "config.yaml", tmp_path)
    (tmp_path / "environment.json").write_text(content)
    path = write_run(folder, "corrupt_environment", branch_from={"run": str(tmp_path), "step": STEP})
    done = run_command(["python", "launcher/run.py", str(path), "--dry-run"], check=False)
    assert (
        done.returncode == 2 and f"{tmp_path / 'environment.json'}, which describes the run, is corrupt" in done.stderr
    )


def test_a_branch_resumes_without_its_source_on_another_number_of_ranks(folder, tmp_path):
    source = tmp_path / "runs" / "source"
    shutil.copytree(folder / "runs" / "source", source)
    settings = {"output_dir": str(tmp_path / "runs"), "branch_from": {"run": str(source), "step": STEP}}
    path = write_run(folder, "moved", train__micro_batch_rows=8, **settings)
    running = BackgroundCommand(
        ["python", str(TESTS / "faulty_run.py"), f"hold:{STEP + 2}", str(path)], tmp_path / "log"
    )
    running.wait_until(lambda: any(metrics(tmp_path, "moved")), "the first step")
    running.process.send_signal(signal.SIGTERM)
    running.end()
    assert read_status(tmp_path / "runs" / "moved")["status"] == "resumable"
    shutil.rmtree(source)
    run_command(ranks_command(2, "launcher/run.py", write_run(folder, "moved", **settings)))
    lines, expected = metrics(tmp_path, "moved"), metrics(folder, "same")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert [line["loss/lm"] for line in lines] == pytest.approx([line["loss/lm"] for line in expected], rel=1e-4)
    assert len(read_json(tmp_path / "runs" / "moved" / "environment.json")["lineage"]) == 1


def test_other_data_with_the_same_tokenizer_are_read_from_the_beginning(folder, tmp_path):
    changes = {
        "data__path": str(tmp_path / "corpus"),
        "data__tokenizer": {"path": str(folder / "corpus" / "tokenizer")},
        "data__sources": [{"type": "nlrx", "records": 200}, {"type": "nlrx", "split": "validation", "records": 20}],
        "objective": NEXT_TOKEN,
    }
    path = write_run(folder, "other_data", **changes)
    prepare_corpus(path)
    done = run_command(["python", "launcher/run.py", str(path)])
    assert "the data are read from the beginning" in done.stdout
    (entry,) = read_json(folder / "runs" / "other_data" / "environment.json")["lineage"]
    state = read_json(folder / "runs" / "other_data" / "checkpoints" / step_name(9) / "manifest.json")["state"]
    assert not entry["continues_data"] and state["loader"]["row"] == 3 * 8 and state["progress"]["step"] == 9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_weights_can_be_added_under_every_stage(folder, stage, precision):
    name = f"stage{stage}-{precision}"
    settings = {"deepspeed": {"zero_optimization": {"stage": stage}}, "train__precision": precision}
    source = {"run": str(folder / "runs" / name), "step": STEP}
    paths = [
        write_run(folder, name, branch=False, train__steps=STEP + 2, **settings),
        write_run(folder, f"{name}-branch", objective={"name": "nitp"}, branch_from=source, **settings),
    ]
    done = run_command(ranks_command(2, TESTS / "several_runs.py", *paths))
    assert "start anew: objective.projector" in done.stdout
    assert len(metrics(folder, f"{name}-branch")) == LONG - STEP


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"branch_from__step": 5}, "has no checkpoint of step 5; it has checkpoints of steps 3, 6, 8"),
        ({"branch_from__run": "nowhere"}, "there is no folder nowhere"),
        ({"model__shape__hidden_size": 64}, "has a different model.shape.hidden_size (32, now 64); a branch cannot"),
        ({"train__precision": "bf16"}, "has a different train.precision"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "has a different deepspeed.zero_optimization.stage"),
        ({"train__steps": STEP}, f"the budget of `train` is used up at step {STEP}"),
        ({"seed": 4, "train__epochs": 9}, "this branch reads other data"),
    ],
)
def test_an_impossible_branch_is_refused(folder, changes, expected):
    if "train__epochs" in changes:
        changes |= {"train__steps": None, "train__warmup_steps": None, "train__decay_steps": None}
    path = write_run(folder, "impossible", **changes)
    done = run_command(["python", "launcher/run.py", str(path), "--dry-run"], check=False)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


def test_weights_cannot_change_with_round_robin_gradients(folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder / "runs" / "source", source)
    options = {"deepspeed": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}}
    config = yaml.safe_load((source / "config.yaml").read_text())
    (source / "config.yaml").write_text(yaml.safe_dump(config | options))
    settings = options | {"branch_from": {"run": str(source), "step": STEP}}
    for objective, code in (({"name": "nitp"}, 2), ({"name": "llm_jepa", "distance": "info_nce", "weight": 2}, 0)):
        path = write_run(folder, "round_robin", objective=objective, **settings)
        done = run_command(["python", "launcher/run.py", str(path), "--dry-run"], check=False)
        assert done.returncode == code and ("cannot add or drop weights" in done.stderr) == (code == 2)


def test_another_tokenizer_is_refused(folder, tmp_path):
    changes = {"data__path": str(tmp_path / "corpus"), "data__tokenizer": {"vocab_size": 384}}
    path = write_run(folder, "tokenizer", **changes)
    prepare_corpus(path)
    done = run_command(["python", "launcher/run.py", str(path), "--dry-run"], check=False)
    assert done.returncode == 2 and "differs from the tokenizer of" in done.stderr


def test_a_corrupt_checkpoint_of_the_source_is_refused_and_not_moved(folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder / "runs" / "source", source)
    shard = next((source / "checkpoints" / step_name(STEP)).glob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    path = write_run(folder, "corrupt", branch_from={"run": str(source), "step": STEP})
    done = run_command(ranks_command(2, "launcher/run.py", path), check=False)
    assert done.returncode == 2 and "is corrupt" in done.stderr and "choose another step" in done.stderr
    assert list_steps(source / "checkpoints") == [3, STEP, SHORT]
