"""Measurements of layers and logits, and the z-loss, equal a plain process; measuring does not change the training."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.utils.console import UserError
from pretrain.config import load_config
from pretrain.run_folder import step_name
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
from tests.pretrain.training.plain_process import PlainStep, plain_third_step

WORKER = ROOT / "tests/pretrain/training/several_runs.py"
Z_LOSS = 0.05
"""Coefficient that is large enough to change every gradient norm by more than the tolerance."""
LARGE = {"stage3_param_persistence_threshold": 0}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
GEMMA = yaml.safe_load((ROOT / "configs" / "models" / "gemma2_tiny.yaml").read_text())


def zero(stage: int, **options) -> dict:
    return {"deepspeed": {"zero_optimization": {"stage": stage} | options}}


RUNS = {  # ranks, rows of a micro batch (8 rows per step), changes
    "r1-m8": (1, 8, {"monitor__loggers": ["tensorboard"]}),
    "r1-m4": (1, 4, {}),
    "r2-m4": (2, 4, zero(3, **LARGE)),
    "r2-m2": (2, 2, zero(3, **LARGE)),
    "by-module": (2, 2, zero(3, **LARGE) | {"monitor__gradients_every": 3}),
    "stage1": (2, 2, zero(1)),
    "stage2": (2, 2, zero(2)),
    "robin": (2, 2, zero(2, round_robin_gradients=True)),
    "offload2": (2, 2, zero(2, **OFFLOADED)),
    "offload3": (2, 2, zero(3, **OFFLOADED)),
    "recomputed": (2, 2, zero(3, **LARGE) | {"train__activation_checkpointing": True}),
    "untied": (2, 2, {"model__shape__tie_word_embeddings": False}),
    "muon": (2, 2, {"train__optimizer": {"name": "muon"}}),
    "nitp": (2, 2, {"objective": {"name": "nitp", "weight": 0.3}}),
    "next_token": (2, 2, {"objective": {"name": "next_token"}}),
    "gemma2": (2, 2, {"model": {"family": "gemma2", "shape": GEMMA | {"final_logit_softcapping": 3.0}}}),
    "without-z": (2, 2, {"train__z_loss": 0}),
    "bf16": (2, 2, {"train__precision": "bf16"}),
    "bf16-stage1": (2, 2, {"train__precision": "bf16"} | zero(1)),
    "off-and-on": (2, 2, {"objective__active": [0, 0.5]}),
}
IN_FP32 = [name for name in RUNS if not name.startswith(("bf16", "off-and-on"))]
BITWISE = ("r1-m4", "r2-m2", "stage1", "stage2", "recomputed", "bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train each run for four steps, of which the third one is measured, in two launches, and return the folder."""
    folder = tmp_path_factory.mktemp("layers")
    paths: dict[int, list[str]] = {1: [], 2: []}

    def add(name, ranks, micro, changes, **more):
        settings = {
            "name": name,
            "train__micro_batch_rows": micro,
            "train__gradient_clipping": 0.5,  # below every norm: clipped gradients have a different one
            "train__z_loss": Z_LOSS,
            "checkpoint": {"every": 2},
            "monitor__layers_every": 3,
            "monitor__loggers": [],
        }
        if "objective" not in changes:
            settings["objective__distance"] = "cosine"
        paths[ranks].append(str(write_config(folder, tiny_config(folder, **settings | changes | more))))

    for name, (ranks, micro, changes) in RUNS.items():
        add(name, ranks, micro, changes)
        if name in BITWISE:
            add(f"{name}-unmeasured", ranks, micro, changes, monitor__layers_every=None)
    source = {"run": str(folder / "runs" / "without-z"), "step": 2}
    add("branch", 2, 2, {"branch_from": source, "train__steps": 6, "monitor__log_every": 3})
    prepare_corpus(paths[1][0])
    for ranks, files in paths.items():
        run_command(ranks_command(ranks, WORKER, *files))
    return folder


def metrics(folder, name) -> list[dict]:
    return read_complete_lines(folder / "runs" / name / "metrics.jsonl")


def plain_values(step: PlainStep, z_loss: float) -> dict:
    """Return the measurements by torch.autograd on the whole batch, from full logits and without the head's code."""
    module, model, batch = step.module, step.module.model, step.batch
    inner = model.causal_lm.model
    states: dict[str, torch.Tensor] = {}
    inner.layers[0].register_forward_pre_hook(
        lambda layer, arguments: states.update(embedding=arguments[0].detach().flatten(0, 1))
    )
    for number, layer in enumerate(inner.layers, start=1):
        layer.register_forward_hook(
            lambda layer, arguments, output, number=number: states.update(
                {str(number): (output[0] if isinstance(output, tuple) else output).detach().flatten(0, 1)}
            )
        )
    hidden: list[torch.Tensor] = []
    model.register_forward_hook(lambda model, arguments, output: hidden.append(output))
    terms = module(batch).terms
    logits = model.logits(hidden[0][batch.label_index])
    log_z = logits.exp().sum(dim=1).log()
    loss = F.cross_entropy(logits, batch.label_ids) + z_loss * log_z.square().mean()
    for term in terms.keys() - {"lm"}:
        loss = loss + module.objective.weights[term] * terms[term] / step.counts[term]
    loss.backward()

    parts = {"embedding": inner.embed_tokens}
    parts |= {"predictor": model.predictor} if model.predictor else {}
    parts |= {str(number): layer for number, layer in enumerate(inner.layers, start=1)}
    if model.causal_lm.lm_head.weight is not inner.embed_tokens.weight:
        parts["head"] = model.causal_lm.lm_head
    parts |= {"objective": module.objective} if list(module.objective.parameters()) else {}
    parts["norm"] = inner.norm

    row_length = batch.token_ids.shape[1]
    occupied = torch.zeros(batch.token_ids.numel(), dtype=torch.bool)
    for row, start, lengths in zip(step.rows.row, step.rows.start, step.rows.segment_lengths, strict=True):
        first = row * row_length + start
        occupied[first : first + lengths.sum()] = True
    assert not occupied.all(), "the rows must have padding"
    return {
        "gradients": {
            name: sum(weight.grad.double().square().sum() for weight in part.parameters()).sqrt().item()
            for name, part in parts.items()
        },
        "activations": {name: state[occupied].double().square().mean().sqrt().item() for name, state in states.items()},
        "with padding": {name: state.double().square().mean().sqrt().item() for name, state in states.items()},
        "logits/rms": logits.double().square().mean().sqrt().item(),
        "logits/log_z": log_z.double().mean().item(),
        "loss/z": log_z.double().square().mean().item(),
        "loss/lm": F.cross_entropy(logits, batch.label_ids).item(),
    }


@pytest.mark.parametrize("name", IN_FP32)
def test_the_measurements_equal_a_plain_process(folder, name):
    line = metrics(folder, name)[2]
    z_loss = 0.0 if name == "without-z" else Z_LOSS
    plain = plain_values(plain_third_step(folder, name), z_loss)
    assert line["layers/gradient_norm"] == pytest.approx(plain["gradients"], rel=1e-3)
    assert line["layers/activation_rms"] == pytest.approx(plain["activations"], rel=1e-3)
    assert line["layers/activation_rms"] != pytest.approx(plain["with padding"], rel=2e-3)
    tags = ["logits/rms", "logits/log_z", "loss/lm", *(["loss/z"] if z_loss else [])]
    assert {tag: line[tag] for tag in tags} == pytest.approx({tag: plain[tag] for tag in tags}, rel=1e-4)
    assert ("loss/z" in line) == bool(z_loss)


@pytest.mark.parametrize("name", RUNS)
def test_the_parts_add_up_to_the_norm_before_clipping(folder, name):
    line = metrics(folder, name)[2]
    parts = line["layers/gradient_norm"].values()
    assert math.sqrt(sum(part**2 for part in parts)) == pytest.approx(line["optimizer/grad_norm"], rel=2e-3)
    assert line["optimizer/grad_norm"] > 1.5 * 0.5 and line["optimizer/clipped_fraction"] == 1.0


def test_the_measurements_do_not_depend_on_ranks_micro_batches_and_stages(folder):
    # the initial weights depend on whether stage 3 creates them
    for names in (("r1-m8", "r1-m4", "r2-m4", "r2-m2", "recomputed", "offload3"), ("stage1", "stage2", "offload2")):
        first, *others = (metrics(folder, name)[2] for name in names)
        for other in others:
            for tag in ("layers/gradient_norm", "layers/activation_rms"):
                assert other[tag] == pytest.approx(first[tag], rel=1e-3)
            for tag in ("logits/rms", "logits/log_z", "loss/z", "loss/lm"):
                assert other[tag] == pytest.approx(first[tag], rel=1e-5)


def test_in_bf16_the_measurements_are_close_to_fp32(folder):
    for name, exact_name in (("bf16", "r2-m2"), ("bf16-stage1", "stage1")):
        exact, rounded = (metrics(folder, run)[2] for run in (exact_name, name))
        for tag in ("layers/gradient_norm", "layers/activation_rms"):
            assert rounded[tag] == pytest.approx(exact[tag], rel=0.1)
        for tag in ("logits/rms", "logits/log_z", "loss/z"):
            assert rounded[tag] == pytest.approx(exact[tag], rel=0.02)


@pytest.mark.parametrize("name", BITWISE)
def test_training_is_bitwise_the_same_without_measurements(folder, name):
    def comparable(line: dict) -> dict:
        excluded = ("seconds", "processor_seconds", "throughput/", "layers/", "logits/")
        return {tag: value for tag, value in line.items() if not tag.startswith(excluded)}

    measured, unmeasured = (list(map(comparable, metrics(folder, run))) for run in (name, f"{name}-unmeasured"))
    assert len(measured) == 4 and measured == unmeasured
    assert_same_checkpoints(
        *(folder / "runs" / run / "checkpoints" / step_name(4) for run in (name, f"{name}-unmeasured"))
    )


def test_the_z_loss_is_a_separate_term_that_no_schedule_switches_off(folder):
    for name in ("r2-m2", "off-and-on"):
        for line in metrics(folder, name):
            weights = {"loss/lm": 1.0, "loss/z": Z_LOSS, "loss/jepa": 0.5 * line["objective/factor"]}
            total = sum(weight * line.get(term, 0.0) for term, weight in weights.items())
            assert line["loss/total"] == pytest.approx(total, rel=1e-6)
            assert "validation/loss/z" not in line
    assert metrics(folder, "off-and-on")[-1]["objective/factor"] == 0.0


def test_the_term_diagnostics_count_the_z_loss_as_part_of_the_next_token_loss(folder):
    line = metrics(folder, "by-module")[2]
    assert "gradient/norm/z" not in line
    lm, jepa, cosine = (line[f"gradient/{tag}"] for tag in ("norm/lm", "norm/jepa", "cosine/jepa"))
    assert lm**2 + jepa**2 + 2 * lm * jepa * cosine == pytest.approx(line["optimizer/grad_norm"] ** 2, rel=1e-4)


def test_a_branch_can_add_the_z_loss_but_a_resumed_run_cannot_change_it(folder):
    lineage = json.loads((folder / "runs" / "branch" / "environment.json").read_text())["lineage"]
    assert f"train.z_loss is {Z_LOSS}, was None" in lineage[0]["differences"]
    first, last = metrics(folder, "branch")
    plain = plain_values(plain_third_step(folder, "without-z"), Z_LOSS)
    assert first["step"] == 3 and first["layers/gradient_norm"] == pytest.approx(plain["gradients"], rel=1e-3)
    assert first["loss/z"] == pytest.approx(plain["loss/z"], rel=1e-4) and last["loss/z"] < first["loss/z"]
    resumed = run_command(["python", "launcher/run.py", folder / "r1-m4.yaml", "train.z_loss=0.1"], check=False)
    assert resumed.returncode == 2 and f"a different train.z_loss ({Z_LOSS}, now 0.1)" in resumed.stderr


def test_tensorboard_and_metrics_have_the_values_of_the_measured_step_only(folder):
    lines = metrics(folder, "r1-m8")
    assert [{"layers/gradient_norm", "logits/rms"} <= line.keys() for line in lines] == [False, False, True, False]
    events = EventAccumulator(str(folder / "runs" / "r1-m8" / "tensorboard" / "train"))
    events.Reload()
    for measure in ("layers/gradient_norm", "layers/activation_rms"):
        for part, value in lines[2][measure].items():
            (event,) = events.Scalars(f"{measure}/{part}")
            assert event.step == 3 and event.value == pytest.approx(value, rel=1e-3)
    assert [event.step for event in events.Scalars("optimizer/clipped_fraction")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("loss/z")] == [1, 2, 3, 4]


def test_gradients_on_nvme_are_refused(tmp_path):
    nvme = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    with pytest.raises(UserError, match="layers_every cannot measure gradients on NVMe"):
        load_config(write_config(tmp_path, tiny_config(tmp_path, monitor__layers_every=5, **zero(3, **nvme))))


@pytest.mark.parametrize("off", ["0", "null"])
def test_zero_and_null_both_switch_off(tmp_path, off):
    path = write_config(tmp_path, tiny_config(tmp_path))
    config = load_config(path, [f"train.z_loss={off}", f"monitor.layers_every={off}"])
    assert config.train.z_loss is None and config.monitor.layers_every is None
