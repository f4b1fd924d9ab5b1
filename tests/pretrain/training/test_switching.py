"""A run whose terms are switched off after half of its steps, without an interruption and with interruptions."""

import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.run_folder import list_steps, read_status, step_name
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
STEPS, SWITCH, ROWS = 8, 4, 8
EVERY = 3
"""Interval of the checkpoints: one before the switch, and one after it."""
TERMS = ("jepa", "vicreg", "sigreg", "coding_rate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train on two ranks with the terms in all steps ("plain") and in the first half of the steps ("switched").

    The corpus has fewer records than the run reads, and its only window is longer than the first half of the run.
    """
    folder = tmp_path_factory.mktemp("switching")
    paths = [
        write_run(folder, "plain"),
        write_run(folder, "switched", objective__active=[0, SWITCH / STEPS]),
    ]
    prepare_corpus(paths[0])
    done = run_command(ranks_command(2, TESTS / "several_runs.py", *paths))
    assert done.stdout.count("are switched") == 1
    assert f"the terms other than lm are switched off from step {SWITCH + 1} on" in done.stdout
    return folder


def write_run(folder, name, **changes):
    settings = {
        "train__steps": STEPS,
        "train__global_batch_rows": ROWS,
        "train__micro_batch_rows": ROWS // 2,
        "data__sources": [{"type": "nlrx", "records": 130}, {"type": "nlrx", "split": "validation", "records": 20}],
        "checkpoint": {"every": EVERY, "background": False},
        "monitor__validate_every": 2,
        "objective__regularizers": [{"name": term, "weight": 0.05} for term in TERMS[1:]],
    }
    return write_config(folder, tiny_config(folder, name=name, **settings | changes))


def metrics(folder, name):
    return read_complete_lines(folder / "runs" / name / "metrics.jsonl")


def test_up_to_the_switch_the_run_equals_a_run_without_it(folder):
    plain, switched = metrics(folder, "plain"), metrics(folder, "switched")
    assert [line["step"] for line in switched] == list(range(1, STEPS + 1))
    for one, other in zip(plain[:SWITCH], switched[:SWITCH], strict=True):
        for line in (one, other):
            [line.pop(tag) for tag in list(line) if tag.startswith(("seconds", "processor_seconds", "throughput"))]
        assert one == other and {f"loss/{term}" for term in TERMS} <= one.keys()


def test_after_the_switch_steps_hold_more_records_and_no_terms_but_validation_shows_them(folder):
    plain, switched = metrics(folder, "plain"), metrics(folder, "switched")
    for line in switched[SWITCH:]:
        assert {tag for tag in line if tag.startswith("loss/")} == {"loss/lm", "loss/total", "loss/spike_score"}
        assert line["loss/total"] == line["loss/lm"] and np.isfinite(line["optimizer/grad_norm"])
        assert "embedding/paired_cosine" not in line
    assert switched[-1]["records"] - switched[SWITCH - 1]["records"] > 1.1 * (
        plain[-1]["records"] - plain[SWITCH - 1]["records"]
    )
    for step in (2, 4, 6, 8):
        tags = switched[step - 1].keys()
        assert {f"validation/loss/{term}" for term in ("lm", *TERMS)} <= tags
        assert "validation/embedding/retrieval_at_1" in tags
    events = EventAccumulator(str(folder / "runs" / "switched" / "tensorboard" / "train")).Reload()
    assert [event.step for event in events.Scalars("loss/jepa")] == list(range(1, SWITCH + 1))


def test_a_run_that_is_killed_before_and_after_the_switch_ends_bitwise_equal(folder):
    path = write_run(folder, "killed", objective__active=[0, SWITCH / STEPS])
    for step in (SWITCH, STEPS - 1):
        run_command(ranks_command(2, TESTS / "faulty_run.py", f"abort:{step}", path), check=False)
        assert list_steps(folder / "runs" / "killed" / "checkpoints")[-1] == (step - 1) // EVERY * EVERY
    run_command(ranks_command(2, "launcher/run.py", path))
    assert read_status(folder / "runs" / "killed")["status"] == "finished"
    assert_same_checkpoints(
        *(folder / "runs" / name / "checkpoints" / step_name(STEPS) for name in ("switched", "killed"))
    )


def test_a_run_that_resumes_on_other_numbers_of_ranks_reads_the_same_records(folder):
    active = {"objective__active": [0, SWITCH / STEPS]}
    path = write_run(folder, "elastic", **active)
    run_command(ranks_command(2, TESTS / "faulty_run.py", f"abort:{SWITCH}", path), check=False)
    path = write_run(folder, "elastic", **active, train__micro_batch_rows=ROWS)
    run_command(ranks_command(1, TESTS / "faulty_run.py", f"abort:{STEPS - 1}", path), check=False)
    path = write_run(folder, "elastic", **active)
    done = run_command(ranks_command(2, "launcher/run.py", path))
    assert "was written by 1 rank, this run has 2" in done.stdout
    switched, elastic = metrics(folder, "switched"), metrics(folder, "elastic")
    for tag in ("step", "records", "tokens", "positions", "optimizer/lr", "epoch"):
        assert [line[tag] for line in elastic] == [line[tag] for line in switched]
    for one, other in zip(switched, elastic, strict=True):
        assert one.keys() == other.keys()
        losses = [tag for tag in one if tag.startswith("loss/") and tag != "loss/spike_score"]
        np.testing.assert_allclose([other[tag] for tag in losses], [one[tag] for tag in losses], rtol=1e-4)


def test_a_report_shows_the_terms_and_the_cost_of_the_whole_run(folder):
    runs = [folder / "runs" / name for name in ("plain", "switched")]
    run_command(
        ["python", "launcher/report.py", *runs, "--baseline", "llm_jepa", "--metric", "validation/loss/lm:lower"]
    )
    report = (folder / "runs" / "REPORT.md").read_text()
    assert "validation/loss/jepa" in report
    # 1 with the terms in all steps, 0.8 without them
    assert 0.85 < float(re.search(r"needs (0\.\d+) times the FLOPs", report)[1]) < 0.95
