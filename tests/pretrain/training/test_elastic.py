"""A run resumes on a different number of ranks with the same records, order, losses and optimizer state."""

import signal
from pathlib import Path

import numpy as np
import pytest

from pretrain.run_folder import list_steps, read_status
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
from tests.pretrain.training.pause_points import release_file

STEPS = 24
OBJECTIVE = {"name": "nitp", "regularizers": [{"name": "coding_rate", "weight": 0.1}], "active": [0, 0.55]}
"""An objective with weights, a hidden state of an inner layer, and pairs of all ranks in a part of the run."""
FAULTY_RUN = ROOT / "tests" / "pretrain" / "training" / "faulty_run.py"
ROWS = 8
CHAIN = (1, 2, 4, 1)
"""Number of ranks of each start, in order."""


def metrics(folder: Path, name: str) -> list[dict]:
    return read_complete_lines(folder / "runs" / name / "metrics.jsonl")


@pytest.fixture(scope="module", params=[3, pytest.param(2, marks=pytest.mark.slow)], ids=lambda stage: f"ZeRO {stage}")
def story(tmp_path_factory, request) -> dict:
    """Train a run on two ranks, and a run whose starts have different numbers of ranks.

    All starts have the same number of rows per micro step. Return the folder, and the last step and log of each start.
    """
    folder = tmp_path_factory.mktemp("elastic")
    values = tiny_config(
        folder,
        train__steps=STEPS,
        train__global_batch_rows=ROWS,
        checkpoint={"every": 50},
        monitor__log_every=1,
        objective=OBJECTIVE,
        deepspeed={"zero_optimization": {"stage": request.param}},
    )
    fixed = write_config(folder, values | {"name": "fixed", "train": values["train"] | {"micro_batch_rows": ROWS // 2}})
    prepare_corpus(fixed)
    run_command(ranks_command(2, "launcher/run.py", fixed))
    stops, logs = [], []
    for number, ranks in enumerate(CHAIN):
        config = write_config(
            folder, values | {"name": "elastic", "train": values["train"] | {"micro_batch_rows": ROWS // ranks}}
        )
        stop = 6 * (number + 1)
        running = BackgroundCommand(ranks_command(ranks, FAULTY_RUN, f"hold:{stop}", config), folder / f"{number}.log")
        if number == len(CHAIN) - 1:
            release_file(config, stop).touch()
        if number < len(CHAIN) - 1:
            running.wait_until(
                lambda number=number: len(metrics(folder, "elastic")) >= 5 * (number + 1), "five more steps"
            )
            running.ranks()[-1].send_signal(signal.SIGTERM)
            release_file(config, stop).touch()
        running.end()
        logs.append(running.log.read_text())
        stops.append(read_status(folder / "runs" / "elastic")["step"])
    return {"folder": folder, "stops": stops, "logs": logs}


def test_the_losses_match_an_uninterrupted_run(story):
    fixed, elastic = (metrics(story["folder"], name) for name in ("fixed", "elastic"))
    assert [line["step"] for line in elastic] == [line["step"] for line in fixed] == list(range(1, STEPS + 1))
    assert story["stops"][-1] == STEPS and sorted(set(story["stops"])) == story["stops"]
    for tag in ("loss/lm", "loss/jepa", "optimizer/grad_norm"):
        one, other = (np.array([line[tag] for line in lines]) for lines in (fixed, elastic))
        first = [stop for stop in story["stops"][:-1]]  # the index of the first step of the next start
        np.testing.assert_allclose(other[first], one[first], rtol=1e-5)
        np.testing.assert_allclose(other, one, rtol=1e-4)


def test_the_records_and_their_order_are_the_same(story):
    fixed, elastic = (metrics(story["folder"], name) for name in ("fixed", "elastic"))
    for tag in ("records", "tokens", "positions", "optimizer/lr", "epoch"):
        assert [line[tag] for line in elastic] == [line[tag] for line in fixed]


def test_each_change_of_ranks_is_reported_and_leaves_no_files(story):
    for before, now, log in zip(CHAIN, CHAIN[1:], story["logs"][1:], strict=False):
        assert f"was written by {before} rank{'s' * (before > 1)}, this run has {now}: converting it" in log
        assert (
            f"note: resuming with a changed setting: train.micro_batch_rows is {ROWS // now}, was {ROWS // before}"
            in log
        )
        assert "a micro step has" not in log and "Traceback" not in log
    checkpoints = story["folder"] / "runs" / "elastic" / "checkpoints"
    assert not list(checkpoints.glob(".*")) and list_steps(checkpoints)[-1] == STEPS
