"""Launchers and user errors: deepspeed, torchrun and srun give the same run, and a user error is one line."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.run_folder import list_steps, read_metrics, read_status
from pretrain.training.main import main
from tests.commands import (
    ROOT,
    BackgroundCommand,
    deepspeed_command,
    environment,
    free_port,
    prepare_corpus,
    run_command,
    tiny_config,
    write_config,
)
from tests.processes import TIMEOUT

FAULTY_RUN = ROOT / "tests" / "pretrain" / "training" / "faulty_run.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    prepare_corpus(write_config(folder, tiny_config(folder)))
    return folder


def losses(folder: Path, name: str) -> list[float]:
    return [
        json.loads(line)["loss/total"] for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    ]


def test_torchrun_starts_a_single_rank(folder):
    path = write_config(folder, tiny_config(folder, name="single", train__steps=1))
    run_command(
        [
            str(Path(sys.executable).parent / "torchrun"),
            "--nproc-per-node",
            "1",
            "--master-port",
            str(free_port()),
            "launcher/run.py",
            str(path),
        ]
    )
    assert len(losses(folder, "single")) == 1


def test_deepspeed_torchrun_and_srun_give_the_same_run(folder):
    paths = {
        name: write_config(folder, tiny_config(folder, name=name, train__steps=2))
        for name in ("deepspeed", "torchrun", "srun")
    }
    run_command(deepspeed_command(2, "launcher/run.py", paths["deepspeed"]))
    run_command(
        [
            str(Path(sys.executable).parent / "torchrun"),
            "--nproc-per-node",
            "2",
            "--master-port",
            str(free_port()),
            "launcher/run.py",
            str(paths["torchrun"]),
        ]
    )
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_JOB_ID": "77",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "launcher/run.py", str(paths["srun"])],
            cwd=ROOT,
            env=environment(
                **slurm, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **{"NCCL_DEBUG": "WARN"} if rank else {}
            ),
        )
        for rank in range(2)
    ]
    assert [rank.wait(TIMEOUT) for rank in ranks] == [0, 0]
    log = (folder / "runs" / "srun" / "logs" / "rank-00000.log").read_text()
    assert "WARNING: NCCL_DEBUG is None for rank 0" in log and "but 'WARN' for rank 1" in log
    assert losses(folder, "deepspeed") == losses(folder, "torchrun") == losses(folder, "srun")
    assert json.loads((folder / "runs" / "srun" / "environment.json").read_text())["ranks"] == 2


INVALID_CONFIGS = {
    "unknown key": (
        {"objective__wieght": 1},
        "unknown key 'objective.wieght'; the nearest known key is 'objective.weight'",
    ),
    "two budgets": ({"train__epochs": 2}, "the budget must be exactly one of"),
    "option without effect": (
        {"objective__distance": "cosine", "objective__temperature": 0.1},
        "temperature has an effect only with distance info_nce",
    ),
    "layer that the model lacks": (
        {"objective": {"name": "nitp", "layer": 3}},
        "objective: nitp reads the hidden states of layer 3, but the model has 2 layers; choose one of them",
    ),
    "computed key": ({"deepspeed": {"train_batch_size": 8}}, "set train.global_batch_rows instead"),
    "DeepSpeed key without effect": (
        {"deepspeed": {"activation_checkpointing": {}}},
        "set train.activation_checkpointing instead",
    ),
    "gradients of compiled layers": (
        {"train__compile": True, "monitor__gradients_every": 10},
        "monitor.gradients_every cannot measure layers that train.compile has compiled under ZeRO stage 3",
    ),
    "unknown DeepSpeed key": ({"deepspeed": {"zero_optimization": {"stge": 3}}}, "deepspeed: zero_optimization.stge"),
    "communication type": (
        {"deepspeed": {"communication_data_type": "fp8"}},
        "deepspeed: communication_data_type must be one of fp16, bf16, fp32, not 'fp8'",
    ),
    "accumulation type": (
        {"deepspeed": {"data_types": {"grad_accum_dtype": "fp8"}}},
        "deepspeed: data_types.grad_accum_dtype must be one of fp16, ",
    ),
    "number instead of options": ({"deepspeed": {"aio": 3}}, "deepspeed: aio must be a mapping of options, not 3"),
    "ZenFlow": (
        {"deepspeed": {"zero_optimization": {"stage": 2, "zenflow": {}}}},
        "deepspeed: zero_optimization.zenflow does not work with",
    ),
    "the old stage 1": (
        {"deepspeed": {"zero_optimization": {"stage": 1, "legacy_stage1": True}}},
        "deepspeed: zero_optimization.legacy_stage1 is no longer supported by DeepSpeed",
    ),
    "no gradient norm": (
        {"deepspeed": {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}},
        "deepspeed: zero_optimization.compute_grad_norm must be true: gradients are clipped",
    ),
    "granularity": (
        {"deepspeed": {"zero_optimization": {"stage3_module_granularity_threshold": 10**9}}},
        "deepspeed: zero_optimization.stage3_module_granularity_threshold "
        "can leave the gradients of a module unreduced",
    ),
    "partitions of no whole size": (
        {"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": True}}},
        "deepspeed: zero_optimization.zero_hpz_partition_size must be an integer above 0, not True",
    ),
    "partitions at stage 2": (
        {"deepspeed": {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}},
        "deepspeed: zero_optimization.zero_hpz_partition_size has an effect under stage 3 only",
    ),
    "partitions larger than the run": (
        {"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}}},
        "deepspeed.zero_optimization.zero_hpz_partition_size (2) must divide the number of ranks (1)",
    ),
    "elastic checkpoints": (
        {"deepspeed": {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}},
        "deepspeed: zero_optimization.elastic_checkpoint cannot resume a run of stage 2",
    ),
    "pipelined loading of checkpoints": (
        {"deepspeed": {"zero_optimization": {"stage": 1, "pipeline_loading_checkpoint": True}}},
        "deepspeed: zero_optimization.pipeline_loading_checkpoint cannot resume a run of stage 1",
    ),
    "nvme without nvme_path": (
        {"deepspeed": {"zero_optimization": {"offload_param": {"device": "nvme"}}}},
        "deepspeed: zero_optimization.offload_param: device nvme needs nvme_path",
    ),
    "partial offloading": (
        {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}},
        "deepspeed: zero_optimization.offload_optimizer.ratio does not work with",
    ),
    "boolean instead of a stage": (
        {"deepspeed": {"zero_optimization": {"stage": True}}},
        "with stage 1, 2 or 3 (default)",
    ),
    "nvme_path that is a file": (
        {"deepspeed": {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/dev/null"}}}},
        "deepspeed: zero_optimization.offload_param.nvme_path: /dev/null is not a folder",
    ),
    "value of a wrong type": (
        {"deepspeed": {"comms_logger": {"enabled": "maybe"}}},
        "deepspeed: comms_logger.enabled: Input should be a valid boolean (given: 'maybe')",
    ),
    "nested value of a wrong type": (
        {"deepspeed": {"timers": {"throughput": {"enabled": "x"}}}},
        "deepspeed: timers.throughput.enabled: Input",
    ),
    "value that DeepSpeed would ignore": (
        {"deepspeed": {"aio": {"block_size": "x"}}},
        "deepspeed: aio.block_size: Input should be a valid int",
    ),
    "string instead of a boolean": (
        {"deepspeed": {"wall_clock_breakdown": "false"}},
        "deepspeed: wall_clock_breakdown: Input should be a valid bool",
    ),
    "misspelt option": (
        {"deepspeed": {"data_types": {"grad_acum_dtype": "fp32"}}},
        "deepspeed: unknown key 'data_types.grad_acum_dtype'; the nearest known key is 'data_types.grad_accum_dtype'",
    ),
    "evaluation between checkpoints": (
        {"evaluation": {"every": 30, "tasks": [{"name": "nl_rx"}]}, "checkpoint": {"every": 20}},
        "must be a multiple of checkpoint.every",
    ),
    "batch that does not divide": (
        {"train__micro_batch_rows": 3},
        "(8) must be a multiple of train.micro_batch_rows x ranks (3 x 1)",
    ),
    "no corpus": ({"data__path": "nowhere"}, "there is no prepared corpus in nowhere"),
    "row too short": ({"data__sequence_length": 16}, "data.sequence_length is 16, too short for the records"),
    "model too short": ({"model__shape__max_position_embeddings": 64}, "the model shape allows 64 positions"),
    "unknown shape key": ({"model__shape__hiden_size": 64}, "llama has no option 'hiden_size'"),
    "impossible shape": ({"model__shape__hidden_size": 33}, "model.shape: llama cannot be built with these values"),
    "heads that do not divide": (
        {"model__shape__num_key_value_heads": 3, "model__shape__num_attention_heads": 4},
        "must be a multiple of num_key_value_heads",
    ),
    "unknown activation": ({"model__shape__hidden_act": "nonsense"}, "unknown hidden_act 'nonsense'"),
    "misspelt DeepSpeed key": (
        {"deepspeed": {"zero_optimisation": {}}},
        "the nearest known key is 'zero_optimization'",
    ),
    "misspelt finetune key": (
        {"evaluation": {"tasks": [{"name": "nl_rx", "finetune": {"learnin_rate": 1}}]}},
        "nearest known key is 'learning_rate'",
    ),
    "finetuning without its rows": (
        {"evaluation": {"tasks": [{"name": "nl_rx", "test": "x", "finetune": {}}]}},
        "set train too",
    ),
    "missing task file": (
        {"evaluation": {"tasks": [{"name": "nl_rx", "test": "nowhere"}]}},
        "evaluation.tasks.0.test: there is no file nowhere",
    ),
    "name that is not a folder name": ({"name": ".."}, "name: String should match pattern"),
    "output that is not a folder": ({"output_dir": "/dev/null"}, "cannot write to /dev/null/run"),
    "no checkpoint": ({"checkpoint": {"resume": "must"}}, "contains no checkpoint"),
    "missing init_from": ({"model": {"init_from": "nowhere"}}, "model.init_from: cannot load nowhere"),
}


CUDA_ONLY = {
    "quantized weights": {"zero_quantized_weights": True},
    "quantized frozen weights": {"zero_quantized_nontrainable_weights": True},
    "super offload": {"offload_optimizer.super_offload": True},
}
"""ZeRO options that work only on CUDA."""


@pytest.mark.parametrize("option", CUDA_ONLY)
def test_an_option_that_needs_cuda_is_an_error_on_cpu_but_not_in_a_dry_run(
    folder, tmp_path, monkeypatch, capsys, option
):
    ((key, value),) = CUDA_ONLY[option].items()
    zero = (
        {key: value}
        if "." not in key
        else {"offload_optimizer": {"device": "cpu", "pin_memory": False, "super_offload": True}}
    )
    path = write_config(tmp_path, tiny_config(folder, output_dir=str(tmp_path), deepspeed={"zero_optimization": zero}))
    run_main(path, monkeypatch)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: deepspeed: zero_optimization.{key} does not work on CPU: remove it"]
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), "--dry-run"])
    main()


def write_invalid_config(folder, tmp_path, mistake):
    """Write a configuration with the mistake, and return its path and a part of the error line."""
    changes, expected = INVALID_CONFIGS[mistake]
    values = tiny_config(folder, **({"output_dir": str(tmp_path)} | changes))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path, expected


@pytest.mark.parametrize("script", ["run", "evaluate", "study", "doctor"])
def test_overrides_are_not_required(script):
    error = run_command(["python", f"launcher/{script}.py"], check=False).stderr
    assert "[key=value ...]" in error and "required: " in error and ", key=value" not in error


@pytest.mark.parametrize("mistake", INVALID_CONFIGS)
def test_a_configuration_error_is_one_line_with_exit_code_2(folder, tmp_path, monkeypatch, capsys, mistake):
    path, expected = write_invalid_config(folder, tmp_path, mistake)
    run_main(path, monkeypatch)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0], lines


def run_main(path, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), *options])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2


def test_resume_never_refuses_a_folder_with_checkpoints(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "run" / "checkpoints" / "step-00000005").mkdir(parents=True)
    run_main(
        write_config(tmp_path, tiny_config(folder, output_dir=str(tmp_path), checkpoint={"resume": "never"})),
        monkeypatch,
    )
    assert "checkpoint.resume is never" in capsys.readouterr().err


def test_a_changed_zero_stage_or_a_corrupt_run_file_is_an_error(folder, tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path, tiny_config(folder, output_dir=str(tmp_path), train__steps=1))
    run_command(["python", "launcher/run.py", str(path)])
    values = tiny_config(
        folder, output_dir=str(tmp_path), train__steps=1, deepspeed={"zero_optimization": {"stage": 2}}
    )
    run_main(write_config(tmp_path, values), monkeypatch, "--dry-run")
    assert "different deepspeed.zero_optimization.stage (3, now 2)" in capsys.readouterr().err
    for file in ("environment.json", "config.yaml"):
        (tmp_path / "run" / file).write_text("")
        run_main(
            write_config(tmp_path, tiny_config(folder, output_dir=str(tmp_path), train__steps=1)),
            monkeypatch,
            "--dry-run",
        )
        assert f"{file}, which describes the run, is corrupt" in capsys.readouterr().err


def test_a_run_does_not_resume_with_different_settings(folder, monkeypatch, capsys):
    finished = write_config(folder, tiny_config(folder, name="finished", train__steps=1))
    run_command(["python", "launcher/run.py", str(finished)])
    run_main(write_config(folder, tiny_config(folder, name="finished", train__steps=1, seed=4)), monkeypatch)
    assert "contains a run with a different seed" in capsys.readouterr().err
    values = tiny_config(folder, name="finished", train__steps=1)
    values["data"]["sources"][0]["weight"] = 2.0
    # a dry run, because this process still holds the lock of the folder
    run_main(write_config(folder, values), monkeypatch, "--dry-run")
    assert "the weights of data.sources are [2.0, 1.0], but" in capsys.readouterr().err
    del values["data"]["sources"][1]
    run_main(write_config(folder, values), monkeypatch, "--dry-run")
    assert "data.sources has length 1, but the corpus was prepared from 2" in capsys.readouterr().err


def test_shards_or_a_tokenizer_of_a_different_corpus_are_refused(folder, tmp_path, monkeypatch, capsys):
    corpora = {name: tmp_path / name for name in ("first", "second")}
    sources = {name: [{"type": "nlrx", "records": 300, "seed": seed}] for seed, name in enumerate(corpora)}

    def config(name):
        return write_config(tmp_path, tiny_config(tmp_path, data__path=str(corpora[name]), data__sources=sources[name]))

    for name in corpora:
        prepare_corpus(config(name))
    shard = next(corpora["first"].glob("train-*.arrow"))
    (corpora["second"] / shard.name).write_bytes(shard.read_bytes())
    run_main(config("second"), monkeypatch)
    assert "is corrupt or from a different preparation" in capsys.readouterr().err
    for file in (corpora["second"] / "tokenizer").iterdir():
        (corpora["first"] / "tokenizer" / file.name).write_bytes(file.read_bytes())
    run_main(config("first"), monkeypatch)
    assert "is not the tokenizer that was used to make the shards" in capsys.readouterr().err


def test_a_mistake_on_two_ranks_is_reported_once_and_keeps_its_exit_code(folder):
    path = write_config(folder, tiny_config(folder, name="mistaken", data__sequence_length=16))
    done = run_command(deepspeed_command(2, "launcher/run.py", path), check=False)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: data.sequence_length is 16") == 1
    assert "Traceback" not in done.stderr


def test_ctrl_c_at_the_terminal_of_deepspeed_saves_and_stops(folder):
    """Signal the process group, as a terminal does. The launcher then also forwards the signal to the ranks."""
    path = write_config(folder, tiny_config(folder, name="interrupted", train__steps=1000))
    running = BackgroundCommand(deepspeed_command(2, FAULTY_RUN, "hold:3", path), folder / "interrupted.log")
    run_dir = folder / "runs" / "interrupted"
    running.wait_until(lambda: len(read_metrics(run_dir)) == 2, "two steps")
    os.killpg(running.process.pid, signal.SIGINT)
    running.end()
    status = read_status(run_dir)
    assert (status["status"], list_steps(run_dir / "checkpoints")) == ("resumable", [status["step"]]), (
        running.log.read_text()
    )


def test_ranks_that_cannot_connect_report_one_line_and_the_retryable_exit_code_1(folder):
    path = write_config(folder, tiny_config(folder, name="alone"))
    with socket.create_server(("", 0)) as occupied:
        done = run_command(
            ["python", "launcher/run.py", str(path)],
            check=False,
            RANK="0",
            WORLD_SIZE="2",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(occupied.getsockname()[1]),
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [
        line for line in done.stderr.splitlines() if line.startswith("error: the ranks cannot connect at 127.0.0.1:")
    ]
