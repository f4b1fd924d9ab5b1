"""Weight sums of a checkpoint match its weights and detect a load that permutes them."""

import json

import numpy as np
import pytest
import torch

from data_prep.utils.console import UserError
from pretrain.run_folder import step_name
from pretrain.training.checkpoint_loading import consolidate
from pretrain.training.distributed import World
from pretrain.training.weight_sums import PERIOD, check_weights, weight_sums
from tests.commands import prepare_corpus, ranks_command, run_command, tiny_config, write_config

ALONE = World(0, 1, torch.device("cpu"))


def frozen_module(**tensors) -> torch.nn.Module:
    """Return a module with frozen parameters, which need no engine."""
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return module


def test_a_changed_a_permuted_and_a_missing_weight_are_found(tmp_path):
    weights = {"one": torch.randn(7, 5), "other": torch.randn(11)}
    saved = weight_sums(frozen_module(**weights), ALONE)
    check_weights(saved, json.loads(json.dumps(saved)), tmp_path)
    check_weights(None, saved, tmp_path)  # a checkpoint of an earlier version, which has no sums
    broken = weight_sums(frozen_module(one=torch.tensor([1.0, torch.nan]), other=torch.tensor([torch.inf, 1.0])), ALONE)
    check_weights(broken, json.loads(json.dumps(broken)), tmp_path)
    changed = {
        "changed": {"one": weights["one"] + 1e-6},
        "permuted": {"one": weights["one"].flip(0)},
        "swapped": {"other": weights["other"].roll(1)},
    }
    for wrong in changed.values():
        with pytest.raises(UserError, match=f"{next(iter(wrong))} differs; start with the number of ranks"):
            check_weights(saved, weight_sums(frozen_module(**weights | wrong), ALONE), tmp_path)
    with pytest.raises(UserError, match=r"one differs, and 1 more"):
        check_weights(saved, {}, tmp_path)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_sums_of_a_checkpoint_match_its_full_weights(tmp_path, stage):
    path = write_config(
        tmp_path, tiny_config(tmp_path, train__steps=1, deepspeed={"zero_optimization": {"stage": stage}})
    )
    prepare_corpus(path)
    run_command(ranks_command(2, "launcher/run.py", path))
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / step_name(1)
    saved = json.loads((checkpoint / "manifest.json").read_text())["state"]["weights"]
    full = consolidate(checkpoint)
    assert {name.removeprefix("model.") for name in saved} <= full.keys()
    for name, sums in saved.items():
        flat = full[name.removeprefix("model.")].numpy().astype(np.float64).ravel()
        weighted = [value * (1 + index % PERIOD) for index, value in enumerate(flat)]
        np.testing.assert_allclose(sums, [sum(weighted), sum(map(abs, weighted))] * 2, rtol=1e-9, atol=1e-12)


def test_weights_that_deepspeed_permutes_are_detected_after_the_conversion(tmp_path):
    # With round robin gradients, DeepSpeed loads the fp32 copies correctly on other ranks. The weights that the model
    # computes with are wrong.
    robin = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    path = write_config(tmp_path, tiny_config(tmp_path, train__steps=2, train__micro_batch_rows=8, deepspeed=robin))
    prepare_corpus(path)
    run_command(["python", "launcher/run.py", path])
    (tmp_path / "runs" / "run" / "status.json").unlink()
    path = write_config(tmp_path, tiny_config(tmp_path, train__steps=2, deepspeed=robin))
    done = run_command(ranks_command(2, "tests/pretrain/training/faulty_run.py", "robin:0", path), check=False)
    assert done.returncode == 2 and done.stderr.count("error:") == 1, done.stderr
    assert "DeepSpeed did not load the weights" in done.stderr and "differs, and" in done.stderr


def test_round_robin_gradients_can_be_neither_switched_nor_moved_to_other_ranks(tmp_path):
    robin = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    plain = {"zero_optimization": {"stage": 2}}
    path = write_config(tmp_path, tiny_config(tmp_path, train__steps=4, checkpoint={"every": 2}, deepspeed=robin))
    prepare_corpus(path)
    run_command(ranks_command(2, "launcher/run.py", path))
    (tmp_path / "runs" / "run" / "status.json").unlink()
    for key in ("sub_group_size=1000", "parameter_alignment=true"):
        done = run_command(ranks_command(2, "launcher/run.py", path, f"deepspeed.zero_optimization.{key}"), check=False)
        assert done.returncode == 2 and f"different deepspeed.zero_optimization.{key.split('=')[0]}" in done.stderr, (
            done.stderr
        )
    switched = write_config(tmp_path, tiny_config(tmp_path, train__steps=4, checkpoint={"every": 2}, deepspeed=plain))
    done = run_command(ranks_command(2, "launcher/run.py", switched), check=False)
    assert (
        done.returncode == 2
        and "different deepspeed.zero_optimization.round_robin_gradients (True, now False)" in done.stderr
    ), done.stderr
    path = write_config(
        tmp_path,
        tiny_config(tmp_path, train__steps=4, train__micro_batch_rows=8, checkpoint={"every": 2}, deepspeed=robin),
    )
    done = run_command(["python", "launcher/run.py", path], check=False)
    assert done.returncode == 2 and "round_robin_gradients" in done.stderr and "2 ranks" in done.stderr, done.stderr
