"""Muon: the orthogonalised update, its state, and what a run with it survives."""

import shutil

import pytest
import torch

from pretrain.config import load_config
from pretrain.data.corpus import Corpus
from pretrain.models.hidden_matrices import hidden_matrices
from pretrain.planning.plan import make_plan
from pretrain.planning.rank_memory import model_states_per_rank
from pretrain.run_folder import list_steps, step_name
from pretrain.training.checkpoint_loading import consolidate
from pretrain.training.muon import COEFFICIENTS, orthogonalize, update_scale
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
STEPS, RATE = 7, 2e-3
MATRIX = ("self_attn", "mlp", "objective")
"""Parts of the names of hidden matrices."""


def write_run(folder, name, **changes):
    settings = {
        "train__steps": STEPS,
        "train__optimizer": {"name": "muon"},
        "train__learning_rate": RATE,
        "train__warmup_fraction": 0,
        "train__schedule": "warmup_stable_decay",
        "train__weight_decay": 0.1,
        "model__shape__tie_word_embeddings": False,
        "checkpoint": {"every": 1, "keep": 9, "background": False},
        "objective": {"name": "llm_jepa", "predictor_mlp": 24, "distance": "cosine"},
        "model__shape__intermediate_size": 80,
    }
    return write_config(folder, tiny_config(folder, name=name, **settings | changes))


def weights(folder, name, step):
    return consolidate(folder / "runs" / name / "checkpoints" / step_name(step))


def is_matrix(name, weight):
    return weight.ndim == 2 and any(part in name for part in MATRIX)


def losses(folder, name):
    return [line["loss/total"] for line in read_complete_lines(folder / "runs" / name / "metrics.jsonl")]


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40), (1, 7)])
def test_the_iteration_changes_only_the_singular_values(shape):
    """Compare with a decomposition and the polynomial of each singular value."""
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    scaled = values / matrix.norm()
    for _ in range(5):
        scaled = sum(factor * scaled**power for factor, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    torch.testing.assert_close(orthogonalize(matrix), left * scaled @ right, rtol=1e-6, atol=1e-6)
    assert ((scaled > 0.65) & (scaled < 1.25)).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train the same run on one and on two ranks, and a run that is not disturbed on two."""
    folder = tmp_path_factory.mktemp("muon")
    one = write_run(folder, "one", train__micro_batch_rows=8)
    prepare_corpus(one)
    run_command(["python", "launcher/run.py", str(one)])
    run_command(ranks_command(2, "launcher/run.py", write_run(folder, "two")))
    return folder


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_the_update_of_a_matrix_is_orthogonalised_and_other_updates_are_not(folder, ranks):
    before, after = weights(folder, ranks, 2), weights(folder, ranks, 3)
    matrices = [name for name in before if is_matrix(name, before[name])]
    assert len(matrices) == 2 * 7 + 2
    for name in matrices:
        update = (before[name] * (1 - RATE * 0.1) - after[name]) / (RATE * update_scale(before[name].shape))
        values = torch.linalg.svdvals(update)
        assert values.max() < 1.25 and values.median() > 0.65, name
    outer = [name for name in before if any(part in name for part in ("embed_tokens", "lm_head", "predictor.weight"))]
    assert len(outer) == 3
    for name in outer:  # AdamW changes each element by about the learning rate
        update = (before[name] - after[name]) / RATE
        assert update.abs().max() < 3 and update.abs().max() > 0.7, name
        assert name.startswith("predictor") or torch.linalg.svdvals(update).max() > 3


def test_one_and_two_ranks_train_alike(folder):
    assert losses(folder, "two") == pytest.approx(losses(folder, "one"), rel=1e-4)
    one, two = weights(folder, "one", STEPS), weights(folder, "two", STEPS)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_an_update_equals_the_update_of_pytorch(folder, ranks):
    """Apply PyTorch's Muon, which computes in bf16, with the gradient that follows from the saved momenta."""
    checkpoints = folder / "runs" / ranks / "checkpoints"
    before, after = weights(folder, ranks, 3), weights(folder, ranks, 4)
    first, second = (momenta(checkpoints / step_name(step), before) for step in (3, 4))
    assert len(first) == 2 * 7 + 2
    for name in first:
        matrix = torch.nn.Parameter(before[name].clone())
        muon = torch.optim.Muon([matrix], lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        muon.state[matrix]["momentum_buffer"] = first[name]
        matrix.grad = (second[name] - 0.95 * first[name]) / 0.05
        muon.step()
        expected, difference = before[name] - matrix.data, before[name] - after[name]
        assert (expected - difference).norm() < 0.06 * expected.norm(), name


def tensors(value):
    """Return all tensors in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in tensors(part)]


def momenta(checkpoint, shapes):
    """Return the momenta of the hidden matrices in a checkpoint under ZeRO stage 3, by name."""
    files = sorted(checkpoint.glob("*optim_states.pt"))
    states = [torch.load(file, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"] for file in files]
    model = torch.load(next(checkpoint.glob("*rank_0_*model_states.pt")), weights_only=False)
    found, offset = {}, 0
    for name, shape in model["param_shapes"][0].items():
        size = -(-shape.numel() // len(files))
        parts = [state["state"][0]["exp_avg"][offset : offset + size] for state in states]
        found[name.removeprefix("model.")] = torch.cat(parts)[: shape.numel()].view(shape)
        offset += size
    return found


def test_a_killed_run_with_a_damaged_checkpoint_ends_bitwise_equal(folder, tmp_path):
    path = write_run(folder, "killed")
    running = BackgroundCommand(ranks_command(2, TESTS / "faulty_run.py", "hold:5", path), tmp_path / "log")
    checkpoints = folder / "runs" / "killed" / "checkpoints"
    running.wait_until(lambda: 4 in list_steps(checkpoints), "the fourth checkpoint")
    running.kill()
    shard = next((checkpoints / step_name(4)).glob("*rank_1*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "resuming from step 3" in run_command(ranks_command(2, "launcher/run.py", path)).stdout
    assert_same_checkpoints(checkpoints / step_name(STEPS), folder / "runs" / "two" / "checkpoints" / step_name(STEPS))


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_every_stage_resumes_bitwise_and_on_another_number_of_ranks(folder, stage, precision):
    name = f"stage{stage}-{precision}"
    settings = {"deepspeed": {"zero_optimization": {"stage": stage}}, "train__precision": precision}
    path = write_run(folder, name, **settings)
    run_command(ranks_command(2, "launcher/run.py", path))
    runs = folder / "runs"
    for copy in ("again", "alone"):
        shutil.copytree(runs / name, runs / f"{name}-{copy}")
        (runs / f"{name}-{copy}" / "status.json").unlink()
        for step in range(4, STEPS + 1):
            shutil.rmtree(runs / f"{name}-{copy}" / "checkpoints" / step_name(step))
    again = write_run(folder, f"{name}-again", **settings)
    alone = write_run(folder, f"{name}-alone", train__micro_batch_rows=8, **settings)
    assert "resuming from step 3" in run_command(ranks_command(2, "launcher/run.py", again)).stdout
    assert_same_checkpoints(*(runs / run / "checkpoints" / step_name(STEPS) for run in (name, f"{name}-again")))
    done = run_command(["python", "launcher/run.py", str(alone)])
    assert "converting it" in done.stdout and "resuming from step 3" in done.stdout
    tolerance = 1e-4 if precision == "fp32" else 3e-3
    state = torch.load(
        next((runs / f"{name}-alone" / "checkpoints" / step_name(STEPS)).glob("*optim*")), weights_only=False
    )
    moments = [
        tensor for tensor in tensors(state) if tensor.ndim == 1 and tensor.numel() > 1 and tensor.stride() == (0,)
    ]
    assert moments, "after a conversion the state has a second moment"
    assert losses(folder, f"{name}-alone") == pytest.approx(losses(folder, name), rel=tolerance)


def test_the_plan_counts_the_state_and_the_work_of_muon(folder):
    config = load_config(folder / "two.yaml")
    corpus = Corpus(config.data.path, "train")
    plan = make_plan(config, corpus, 2)
    adamw = make_plan(load_config(folder / "two.yaml", ["train.optimizer.name=adamw"]), corpus, 2)
    numbers = [matrix.numel() for matrix in hidden_matrices(plan.model, plan.objective)]
    states, other = (model_states_per_rank(one, 3, 2) for one in (plan, adamw))
    assert other.optimizer - states.optimizer == 4 * sum(numbers) / 2
    checkpoint = folder / "runs" / "two" / "checkpoints" / step_name(STEPS)
    saved = sum(path.stat().st_size for path in checkpoint.glob("*optim_states.pt"))
    assert saved == pytest.approx(2 * states.optimizer, rel=0.25)
    products = sum(
        5 * (4 * m * m * n + 2 * m**3)
        for m, n in map(sorted, (w.shape for w in hidden_matrices(plan.model, plan.objective)))
    )
    assert plan.flops - adamw.flops == pytest.approx(products) and plan.flops_by_part["Muon"] == products


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.optimizer={name: muon, momentum: 1}"], "train.optimizer.momentum: Input should be less than 1"),
        (["train.optimizer.name=lion"], "train.optimizer"),
        (
            ["deepspeed.zero_optimization.offload_optimizer={device: nvme, nvme_path: /tmp}"],
            "muon cannot gather matrices whose states are on NVMe",
        ),
        (
            ["deepspeed.zero_optimization={stage: 2, round_robin_gradients: true}"],
            "muon does not find its matrices with deepspeed.zero_optimization.round_robin_gradients",
        ),
        (
            ["model={init_from: somewhere, lora: {rank: 2, alpha: 4}}"],
            "muon trains whole matrices; use adamw with model.lora",
        ),
    ],
)
def test_what_muon_cannot_do_is_refused(folder, overrides, expected):
    done = run_command(["python", "launcher/run.py", str(folder / "two.yaml"), *overrides, "--dry-run"], check=False)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
