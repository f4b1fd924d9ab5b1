"""Invariants 3 and 4: a run that is stopped, killed and damaged ends bitwise equal to an undisturbed run."""

import json
import os
import shutil
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.run_folder import list_steps, read_status, step_name
from pretrain.training.checkpoint import check
from tests.commands import (
    ROOT,
    BackgroundCommand,
    prepare_corpus,
    ranks_command,
    run_command,
    tiny_config,
    write_config,
)
from tests.pretrain.training.checkpoint_equality import assert_same_checkpoints
from tests.pretrain.training.pause_points import release_file

STEPS = 60
CLIPPING = 1.35
"""Norm between the gradient norms of steps 7 and 8: the run is stopped after step 7 and logs the fraction at step 9."""
OBJECTIVE = {"name": "nitp", "regularizers": [{"name": "coding_rate", "weight": 0.1}], "active": [0, 0.55]}
"""An objective with weights, a hidden state of an inner layer, and pairs of all ranks in a part of the run."""
FAULTY_RUN = ROOT / "tests" / "pretrain" / "training" / "faulty_run.py"


def last_step(run_dir) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Train an undisturbed and a disturbed run, and return what happened.

    The disturbed run is stopped by a signal to one rank, interrupted by Ctrl-C, and killed during a save. Its newest
    checkpoint is then damaged. It resumes after each of these events.
    """
    folder = tmp_path_factory.mktemp("survival")
    commands, runs = {}, {}
    for name in ("undisturbed", "disturbed"):
        values = tiny_config(
            folder,
            name=name,
            train__steps=STEPS,
            objective=OBJECTIVE,
            train__micro_batch_rows=2,
            checkpoint={"every": 10, "keep": 3},
            model__shape__attention_dropout=0.1,
            monitor__log_every=3,
            monitor__validate_every=15,
            monitor__layers_every=4,
            train__gradient_clipping=CLIPPING,
            train__z_loss=1e-3,
        )
        commands[name] = ranks_command(2, "launcher/run.py", write_config(folder, values))
        runs[name] = folder / "runs" / name
    prepare_corpus(folder / "undisturbed.yaml")
    run_command(commands["undisturbed"])

    run_dir, config = runs["disturbed"], folder / "disturbed.yaml"
    running = BackgroundCommand(ranks_command(2, FAULTY_RUN, "hold:8", config), folder / "stopped.log")
    running.wait_until(lambda: last_step(run_dir) >= 6, "step 6")
    running.ranks()[1].send_signal(signal.SIGTERM)
    release_file(config, 8).touch()
    running.end()
    stopped = {"status": read_status(run_dir), "steps": list_steps(run_dir / "checkpoints")}

    running = BackgroundCommand(ranks_command(2, FAULTY_RUN, "hold:14", config), folder / "interrupted.log")
    running.wait_until(lambda: last_step(run_dir) >= 12, "some more steps")
    # as with Ctrl-C, the ranks get the signal directly and also from the launcher
    os.killpg(running.process.pid, signal.SIGINT)
    running.end()
    interrupted = read_status(run_dir)

    running = BackgroundCommand(ranks_command(2, FAULTY_RUN, "save:40", config), folder / "killed.log")
    saving = run_dir / "checkpoints" / f".{step_name(40)}.tmp"
    running.wait_until(lambda: saving.exists(), "the save of step 40")
    running.kill()
    kept = {step: check(run_dir / "checkpoints" / step_name(step)) for step in list_steps(run_dir / "checkpoints")}
    newest = list_steps(run_dir / "checkpoints")[-1]
    shard = next((run_dir / "checkpoints" / step_name(newest)).glob("*rank_1*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    resumed = run_command(commands["disturbed"])
    return {
        "runs": runs,
        "stopped": stopped,
        "interrupted": interrupted,
        "kept": kept,
        "newest": newest,
        "resumed": resumed.stdout,
        "commands": commands,
    }


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_of_the_current_step(story):
    status = story["stopped"]["status"]
    assert status["status"] == "resumable" and 6 <= status["step"] < STEPS
    assert status["step"] in story["stopped"]["steps"]


def test_ctrl_c_saves_and_stops(story):
    assert (
        story["interrupted"]["status"] == "resumable"
        and story["interrupted"]["step"] > story["stopped"]["status"]["step"]
    )


def test_a_kill_during_a_save_leaves_only_complete_checkpoints(story):
    assert len(story["kept"]) >= 2 and set(story["kept"].values()) == {None}


def test_a_damaged_checkpoint_is_reported_and_set_aside_and_the_previous_one_is_used(story):
    before = sorted(story["kept"])[-2]
    assert f"{step_name(story['newest'])} is corrupt" in story["resumed"]
    assert f"resuming from step {before}" in story["resumed"]
    assert (story["runs"]["disturbed"] / "checkpoints" / f"damaged-{step_name(story['newest'])}").exists()


def test_the_end_state_is_bitwise_equal_to_an_undisturbed_run(story):
    assert_same_checkpoints(*(run / "checkpoints" / step_name(STEPS) for run in story["runs"].values()))


def test_no_step_is_repeated_or_lost_in_metrics_and_tensorboard(story):
    tables, fractions = [], set()
    for run in story["runs"].values():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        tables.append(
            [
                {
                    tag: value
                    for tag, value in line.items()
                    if tag not in ("seconds", "processor_seconds") and "throughput" not in tag
                }
                for line in lines
            ]
        )
        fractions |= {line["optimizer/clipped_fraction"] for line in lines if "optimizer/clipped_fraction" in line}
        events = EventAccumulator(str(run / "tensorboard" / "train"))
        events.Reload()
        logged = [line["step"] for line in lines if "loss/jepa" in line]
        assert [event.step for event in events.Scalars("loss/jepa")] == logged
        assert [event.step for event in events.Scalars("loss/lm")] == logged == sorted(set(logged))
    assert 1 / 3 in fractions, "without the counts of step 7, the fraction at step 9 would be 0"
    assert any("layers/gradient_norm" in line for line in tables[0])
    assert tables[0] == [line for line in tables[1] if line["step"] in {line["step"] for line in tables[0]}]


def test_a_finished_run_reports_it_and_does_nothing(story):
    assert "is already finished" in run_command(story["commands"]["disturbed"]).stdout


@pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "flip"])
def test_every_damage_to_every_file_is_detected(story, tmp_path, damage):
    source = story["runs"]["undisturbed"] / "checkpoints" / step_name(STEPS)
    assert check(source) is None
    for path in source.iterdir():
        copy = tmp_path / path.name
        shutil.copytree(source, copy)
        file = copy / path.name
        content = file.read_bytes()
        match damage:
            case "truncate":
                file.write_bytes(content[:-1])
            case "empty":
                file.write_bytes(b"")
            case "delete":
                file.unlink()
            case "flip":
                middle = len(content) // 2
                file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert check(copy), (damage, path.name)


def test_the_configured_number_of_checkpoints_is_kept_and_latest_names_the_newest(story):
    folder = story["runs"]["undisturbed"] / "checkpoints"
    assert list_steps(folder) == [40, 50, 60]
    assert (folder / "latest").read_text().strip() == step_name(60)
    assert not list(folder.glob(".step-*"))
