"""With any accepted DeepSpeed options, a run resumes, changes its number of ranks, is exported and evaluated."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pretrain.run_folder import step_name
from tests.commands import prepare_corpus, ranks_command, run_command, tiny_config, write_config
from tests.pretrain.training.checkpoint_equality import assert_same_checkpoints

FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
CPU = {"device": "cpu"}
CELLS = {  # stage, precision, options of zero_optimization, other keys of deepspeed, with or without adapters
    "1-fp32": (1, "fp32", {}, {}, False),
    "1-bf16": (1, "bf16", {}, {}, False),
    "1-bf16-sums": (1, "bf16", {}, FP32_SUMS, False),
    "1-bf16-sums-lora": (1, "bf16", {}, FP32_SUMS, True),
    "1-fp32-offload-lora": (1, "fp32", {"offload_optimizer": CPU}, {}, True),
    "1-bf16-sums-robin": (1, "bf16", {"round_robin_gradients": True}, FP32_SUMS, False),
    "2-fp32-lora": (2, "fp32", {}, {}, True),
    "2-fp32-robin": (2, "fp32", {"round_robin_gradients": True}, {}, False),
    "2-bf16-sums-offload": (2, "bf16", {"offload_optimizer": CPU}, FP32_SUMS, False),
    "2-bf16-robin-lora": (2, "bf16", {"round_robin_gradients": True}, {}, True),
    "2-fp32-robin-offload": (2, "fp32", {"round_robin_gradients": True, "offload_optimizer": CPU}, {}, False),
    "3-fp32": (3, "fp32", {}, {}, False),
    "3-bf16-sums": (3, "bf16", {}, FP32_SUMS, False),
    "3-bf16-lora": (3, "bf16", {}, {}, True),
    "3-fp32-offload": (3, "fp32", {"offload_optimizer": CPU, "offload_param": CPU}, {}, False),
    "3-bf16-sums-offload-lora": (3, "bf16", {"offload_optimizer": CPU}, FP32_SUMS, True),
}
FAST = ("1-bf16-sums-lora",)
"""Cells that are not marked slow. Few other cells have the optimizer, frozen weights and accumulation of this one."""
CANNOT_CHANGE_RANKS = {"1-bf16-sums-robin", "2-fp32-robin", "2-bf16-robin-lora", "2-fp32-robin-offload"}
"""Cells whose checkpoints cannot be converted: a start on a different number of ranks is refused."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepare a corpus, test rows and an export for training adapters, and return their folder."""
    folder = tmp_path_factory.mktemp("options")
    path = write_config(folder, tiny_config(folder, name="base", train__steps=1))
    prepare_corpus(path)
    run_command(["python", "launcher/run.py", path])
    run_command(
        ["python", "launcher/evaluate.py", folder / "runs" / "base", "--task", "geometry", f"task.test={_rows(folder)}"]
    )
    return folder


def _rows(folder):
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": f"lines with {word}", "code": f".*{word}.*"}) + "\n"
            for word in ("dog", "cat", "ring", "truck")
        )
    )
    return path


def cell_config(folder, cell: str, name: str, **changes):
    stage, precision, zero, others, lora = CELLS[cell]
    model = (
        {"init_from": str(folder / "runs" / "base" / "export" / step_name(1)), "lora": {"rank": 2, "alpha": 4}}
        if lora
        else None
    )
    return write_config(
        folder,
        tiny_config(
            folder,
            name=name,
            train__precision=precision,
            checkpoint={"every": 2},
            monitor__loggers=[],
            deepspeed=others | {"zero_optimization": {"stage": stage} | zero},
            **({"model": model} if model else {}),
            **changes,
        ),
    )


def losses(folder, name: str) -> list[float]:
    return [
        json.loads(line)["loss/total"] for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    ]


def exported(folder, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / name / "export" / step_name(4) / "model.safetensors")


@pytest.mark.parametrize("cell", [pytest.param(cell, marks=() if cell in FAST else pytest.mark.slow) for cell in CELLS])
def test_a_combination_works_or_is_refused(folder, cell):
    if CELLS[cell][4]:
        pytest.importorskip("peft", reason="there is no package peft (the extra lora)")
    uninterrupted, resumed, other = (f"{cell}-{name}" for name in ("uninterrupted", "resumed", "other"))
    run_command(ranks_command(2, "launcher/run.py", cell_config(folder, cell, uninterrupted)))
    for name in (resumed, other):
        shutil.copytree(folder / "runs" / uninterrupted, folder / "runs" / name)
        shutil.rmtree(folder / "runs" / name / "checkpoints" / step_name(4))
        (folder / "runs" / name / "status.json").unlink()

    run_command(ranks_command(2, "launcher/run.py", cell_config(folder, cell, resumed)))
    assert_same_checkpoints(
        *(folder / "runs" / name / "checkpoints" / step_name(4) for name in (uninterrupted, resumed))
    )

    command = ["python", "launcher/run.py", cell_config(folder, cell, other, train__micro_batch_rows=8)]
    if cell in CANNOT_CHANGE_RANKS:
        done = run_command(command, check=False)
        assert done.returncode == 2 and "round_robin_gradients" in done.stderr, done.stderr
        assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    else:
        run_command(command)
        tolerance = 1e-5 if CELLS[cell][1] == "fp32" else 1e-2
        np.testing.assert_allclose(losses(folder, other), losses(folder, uninterrupted), rtol=tolerance)

    task_arguments = ["--task", "geometry", f"task.test={folder / 'rows.jsonl'}"]
    run_command(["python", "launcher/evaluate.py", folder / "runs" / uninterrupted, *task_arguments])
    exports = [exported(folder, uninterrupted)]
    if cell not in CANNOT_CHANGE_RANKS:
        run_command(["python", "launcher/evaluate.py", folder / "runs" / other, *task_arguments])
        exports.append(exported(folder, other))
    first, *others = exports
    for tensors in others:
        assert tensors.keys() == first.keys()
        for key in first:
            torch.testing.assert_close(
                tensors[key], first[key], rtol=0, atol=1e-4 if CELLS[cell][1] == "fp32" else 2e-2
            )
