"""Behavior of runs on GPUs that can be tested on CPU."""

import json
import os
import shutil

import pytest
import torch

from pretrain.config import RunConfig
from pretrain.planning.settings import engine_settings
from pretrain.run_folder import step_name
from pretrain.training import throughput
from pretrain.training.evaluation_requests import evaluation_environment
from pretrain.training.layers import limit_compile_threads
from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, tiny_config, write_config

WORKER = ROOT / "tests" / "pretrain" / "training" / "fused_resume.py"


@pytest.fixture(scope="module")
def resumable(tmp_path_factory):
    """Train a run on two ranks that looks as if it was stopped after step 2 of 4, and return its folder."""
    folder = tmp_path_factory.mktemp("on-gpus")
    path = write_config(folder, tiny_config(folder, checkpoint={"every": 2}))
    prepare_corpus(path)
    run_command(ranks_command(2, "launcher/run.py", path))
    shutil.rmtree(folder / "runs" / "run" / "checkpoints" / step_name(4))
    (folder / "runs" / "run" / "status.json").unlink()
    return folder


def settings(tmp_path, **changes) -> dict:
    return engine_settings(RunConfig(**tiny_config(tmp_path, **changes)), ranks=1)


def test_gradients_are_accumulated_in_fp32_unless_a_different_type_is_configured(tmp_path):
    assert settings(tmp_path, train__precision="bf16")["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings(tmp_path)["data_types"] == {"grad_accum_dtype": "fp32"}
    chosen = {"data_types": {"grad_accum_dtype": "bf16"}}
    assert settings(tmp_path, train__precision="bf16", deepspeed=chosen)["data_types"] == {"grad_accum_dtype": "bf16"}


def test_the_timer_that_synchronizes_every_micro_step_is_off_by_default(tmp_path):
    assert settings(tmp_path)["timers"] == {"throughput": {"enabled": False}}
    chosen = {"throughput": {"enabled": True, "synchronized": False}}
    assert settings(tmp_path, deepspeed={"timers": chosen})["timers"] == chosen


def test_a_background_evaluation_sees_no_gpu_or_only_the_configured_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    on_cpu, on_gpu = evaluation_environment("cpu"), evaluation_environment("cuda:7")
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == "" and on_cpu["DS_ACCELERATOR"] == "cpu"
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "7" and on_gpu["DS_ACCELERATOR"] == "cuda"
    assert "LOCAL_RANK" not in on_cpu | on_gpu


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:x", "7"])
def test_an_unknown_device_for_evaluations_is_an_error(device):
    done = run_command(["python", "launcher/run.py", "configs/demo.yaml", f"evaluation.device={device}"], check=False)
    assert done.returncode == 2 and "evaluation.device" in done.stderr and "Traceback" not in done.stderr


def test_the_peak_flops_depend_on_the_exact_device_name(monkeypatch):
    # the names of an H100 for PCIe and of the faster H100 for SXM begin alike; an unknown device has no peak
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    peaks = {}
    for name in (
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200",
        "NVIDIA H20",
        "NVIDIA A100-SXM4-80GB",
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        peaks[name] = throughput.peak_flops()
    assert list(peaks.values()) == [989e12, 756e12, 835e12, 989e12, None, 312e12]


def test_ranks_on_a_machine_share_its_cores_for_compiling(monkeypatch):
    import torch._inductor.config as settings

    monkeypatch.setattr(settings, "compile_threads", 32)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(48)))
    limit_compile_threads(8)
    assert settings.compile_threads == 6
    limit_compile_threads(1)
    assert settings.compile_threads == 6, "never more threads than configured"
    limit_compile_threads(100)
    assert settings.compile_threads == 1


@pytest.mark.parametrize("micro_batch_rows", [4, 8])
def test_a_load_keeps_the_optimizer_settings_of_the_run(tmp_path, resumable, micro_batch_rows):
    """Check that the settings in the checkpoint are ignored, with and without a conversion to other ranks.

    The checkpoint may come from a CPU, where AdamW is not fused.
    """
    run_dir = tmp_path / "runs" / "run"
    shutil.copytree(resumable / "runs" / "run", run_dir)
    values = tiny_config(
        resumable, output_dir=str(tmp_path / "runs"), train__micro_batch_rows=micro_batch_rows, checkpoint={"every": 2}
    )
    ranks = 8 // micro_batch_rows
    path = write_config(tmp_path, values)
    done = run_command(["python", str(WORKER), path] if ranks == 1 else ranks_command(ranks, WORKER, path))
    groups = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    assert [group["fused"] for group in groups] == [True, True]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] and groups[0]["betas"] == [0.9, 0.95]
    assert (run_dir / "checkpoints" / step_name(4)).exists()


def test_a_missing_gpu_for_evaluations_is_an_error(tmp_path, resumable):
    evaluation = {"every": 2, "device": "cuda:99", "tasks": [{"name": "loss", "test": str(tmp_path / "rows.jsonl")}]}
    (tmp_path / "rows.jsonl").write_text('{"text": "lines with dog", "code": ".*dog.*"}\n')
    path = write_config(
        tmp_path,
        tiny_config(
            resumable, name="device", checkpoint={"every": 2}, data__decontaminate=False, evaluation=evaluation
        ),
    )
    done = run_command(["python", "launcher/run.py", path], check=False)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert "evaluation.device is cuda:99, but this machine has" in done.stderr
