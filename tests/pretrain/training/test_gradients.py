"""Gradient diagnostics equal the gradients of a plain process, and measuring them does not change the training."""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.objectives.base import ObjectiveOutput
from pretrain.run_folder import step_name
from pretrain.training.distributed import World
from pretrain.training.gradients import gradient_diagnostics
from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, tiny_config, write_config
from tests.pretrain.training.checkpoint_equality import assert_same_checkpoints
from tests.pretrain.training.plain_process import plain_third_step

WORKER = ROOT / "tests/pretrain/training/several_runs.py"
PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
RUNS = {  # ranks, rows of a micro batch (8 rows per step), changes
    "r1-m8": (1, 8, {}),
    "r1-m4": (1, 4, {}),
    "r2-m4": (2, 4, {"deepspeed": PARTITIONED, "objective__distance": "info_nce"}),
    "r2-m2": (2, 2, {"deepspeed": PARTITIONED}),
    "stage1": (2, 2, {"deepspeed": {"zero_optimization": {"stage": 1}}}),
    "stage2": (2, 2, {"deepspeed": {"zero_optimization": {"stage": 2}}}),
    "recomputed": (2, 2, {"deepspeed": PARTITIONED, "train__activation_checkpointing": True}),
    "nitp": (2, 2, {"deepspeed": PARTITIONED, "objective": {"name": "nitp", "weight": 0.3}}),
    "nextlat": (2, 4, {"objective": {"name": "nextlat"}}),
    "bf16": (2, 2, {"train__precision": "bf16"}),
    "dropout": (2, 2, {"model__shape__attention_dropout": 0.2}),
}
NEVER = 10**6
"""Interval that no run reaches.

With 0, ZeRO stage 3 would gather complete layers and sum the gradient norm in a different order (see test_layers.py).
"""
IN_FP32 = ["r1-m8", "r1-m4", "r2-m4", "r2-m2", "stage1", "stage2", "recomputed", "nitp", "nextlat"]


def metrics(folder, name) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train each run with and without diagnostics, in two launches, and return the folder.

    A run has four steps; the third one is measured.
    """
    folder = tmp_path_factory.mktemp("gradients")
    paths: dict[int, list[str]] = {1: [], 2: []}

    def add(name, ranks, micro, prefix="", **changes):
        values = tiny_config(
            folder,
            **{
                "name": name,
                "train__micro_batch_rows": micro,
                **({} if "objective" in changes else {"objective__distance": "cosine"}),
                "checkpoint": {"every": 2},
                "monitor__loggers": ["tensorboard"] * (name == "r1-m8"),
            }
            | changes,
        )
        paths[ranks].append(prefix + str(write_config(folder, values)))

    for name, (ranks, micro, changes) in RUNS.items():
        add(name, ranks, micro, monitor__gradients_every=3, **changes)
        add(f"{name}-without", ranks, micro, monitor__gradients_every=NEVER, **changes)
    for weight in (0.5, 1.0):
        add(f"weight-{weight}", 2, 4, train__steps=1, objective__weight=weight, monitor__gradients_every=1)
    add("nan-in-training", 2, 4, prefix="nan:", monitor__gradients_every=4)
    add("nan-in-diagnostics", 2, 4, prefix="nan:", monitor__gradients_every=3)
    prepare_corpus(paths[1][0])
    for ranks, files in paths.items():
        run_command(ranks_command(ranks, WORKER, *files))
    return folder


def plain_gradients(folder, name: str) -> dict[str, torch.Tensor]:
    """Return the full gradient of each weighted term at the third step, by torch.autograd.grad.

    The weights come from the checkpoint after the second step.
    """
    step = plain_third_step(folder, name)
    module, objective = step.module, step.module.objective
    terms = module(step.batch).terms
    flat_gradients = {}
    for term, value in terms.items():
        gradients = torch.autograd.grad(
            objective.weights[term] * value / step.counts[term],
            list(module.parameters()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        flat_gradients[term] = torch.cat([gradient.flatten() for gradient in gradients])
    return flat_gradients


@pytest.mark.parametrize("name", IN_FP32)
def test_norms_and_cosines_match_a_plain_process(folder, name):
    measured = metrics(folder, name)[2]
    plain = plain_gradients(folder, name)
    for term, gradient in plain.items():
        assert measured[f"gradient/norm/{term}"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert measured["gradient/cosine/jepa"] == pytest.approx(
        torch.cosine_similarity(plain["lm"], plain["jepa"], dim=0).item(), abs=1e-4
    )


@pytest.mark.parametrize("name", [*IN_FP32, "dropout"])
def test_the_measured_gradients_add_up_to_the_gradient_of_the_step(folder, name):
    # the run `dropout` also needs the same dropout masks for both
    step = metrics(folder, name)[2]
    lm, jepa = step["gradient/norm/lm"], step["gradient/norm/jepa"]
    assert lm**2 + jepa**2 + 2 * lm * jepa * step["gradient/cosine/jepa"] == pytest.approx(
        step["optimizer/grad_norm"] ** 2, rel=1e-4
    )


@pytest.mark.parametrize("name", RUNS)
def test_training_is_bitwise_the_same_without_diagnostics(folder, name):
    def comparable(line: dict) -> dict:
        excluded = ("seconds", "processor_seconds", "throughput/", "gradient/")
        return {tag: value for tag, value in line.items() if not tag.startswith(excluded)}

    measured, unmeasured = (list(map(comparable, metrics(folder, run))) for run in (name, f"{name}-without"))
    assert len(measured) == 4 and measured == unmeasured
    assert_same_checkpoints(
        *(folder / "runs" / run / "checkpoints" / step_name(4) for run in (name, f"{name}-without"))
    )


def test_metrics_and_tensorboard_have_the_tags_for_the_measured_step_only(folder):
    tags = {"gradient/norm/lm", "gradient/norm/jepa", "gradient/cosine/jepa"}
    assert [{tag for tag in line if tag.startswith("gradient/")} for line in metrics(folder, "r1-m8")] == [
        set(),
        set(),
        tags,
        set(),
    ]
    events = EventAccumulator(str(folder / "runs" / "r1-m8" / "tensorboard" / "train"))
    events.Reload()
    assert {tag: [event.step for event in events.Scalars(tag)] for tag in tags} == {tag: [3] for tag in tags}


def test_doubling_the_weight_doubles_the_norm_and_keeps_the_direction(folder):
    once, twice = (metrics(folder, f"weight-{weight}")[0] for weight in (0.5, 1.0))
    assert twice["gradient/norm/jepa"] == pytest.approx(2 * once["gradient/norm/jepa"], rel=1e-6)
    for tag in ("gradient/norm/lm", "gradient/cosine/jepa"):
        assert twice[tag] == pytest.approx(once[tag], rel=1e-6)


def test_a_non_finite_step_is_skipped_as_without_diagnostics(folder):
    lines = metrics(folder, "nan-in-training")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1]
    assert all(math.isfinite(value) for tag, value in lines[3].items() if tag.startswith("gradient/"))


def test_non_finite_diagnostics_do_not_skip_a_step(folder):
    lines = metrics(folder, "nan-in-diagnostics")
    assert lines[2]["gradient/norm/lm"] is None and lines[3]["skipped_steps"] == 0
    assert [line["loss/total"] for line in lines] == pytest.approx(
        [line["loss/total"] for line in metrics(folder, "r1-m8")], rel=1e-5
    )


class Linear(torch.nn.Module):
    """A model with two terms of a batch (N,): the sum and the sum of squares, each times a weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch: torch.Tensor) -> ObjectiveOutput:
        return ObjectiveOutput({"lm": self.weight * batch.sum(), "jepa": self.weight * batch.square().sum()}, None)


def test_each_micro_batch_reports_progress_and_a_term_without_pairs_is_absent():
    batches, progress = [torch.ones(3), 2 * torch.ones(3)], []
    weights, world = {"lm": 1.0, "jepa": 0.5}, World(0, 1, torch.device("cpu"))
    values = gradient_diagnostics(Linear(), batches, {"lm": 3, "jepa": 6}, weights, world, lambda: progress.append(1))
    assert len(progress) == 2 * 2
    assert values == {"gradient/norm/lm": 3.0, "gradient/norm/jepa": 1.25, "gradient/cosine/jepa": 1.0}
    assert gradient_diagnostics(Linear(), batches, {"lm": 3, "jepa": 0}, weights, world) == {"gradient/norm/lm": 3.0}
