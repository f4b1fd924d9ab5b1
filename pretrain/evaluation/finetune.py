"""Finetuning: a training run that starts from an export, on a task's training rows, with loss on the answer alone."""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from data_prep.config import DataConfig, JsonSource
from data_prep.config_file import validate
from data_prep.console import UserError
from data_prep.files import write_text
from pretrain.config import BUDGETS, RunConfig, TaskConfig, dump_config
from pretrain.evaluation.export import export_checkpoint
from pretrain.evaluation.pairs import prepare_pairs
from pretrain.run_folder import list_steps
from pretrain.training.background import single_process_environment, tied


def finetune(config: RunConfig, task: TaskConfig, export: Path, pairs: JsonSource, folder: Path, name: str) -> Path:
    """Finetune `export` on `pairs`; return the export of the result.

    `task` says what differs from the pretraining run `config`. A finetuning that was interrupted starts over, one that has come to its export
    is not repeated. Raises UserError where the run fails.
    """
    data = prepare_pairs(config, pairs, folder)
    run = _run_config(config, task, data, export, folder / "finetune", name)
    path, checkpoints = folder / "finetune" / f"{name}.yaml", run.run_dir / "checkpoints"
    path.parent.mkdir(exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8") != dump_config(run):
        shutil.rmtree(run.run_dir, ignore_errors=True)  # what an earlier evaluation with other settings left
    write_text(path, dump_config(run))
    if not (run.run_dir / "export").exists():
        command = tied([sys.executable, "-m", "pretrain.training", str(path)], "KILL")  # or the next evaluation would meet it in its folder
        done = subprocess.run(command, env=single_process_environment(), check=False)
        if done.returncode or not list_steps(checkpoints):
            raise UserError(f"the finetuning {path} failed with exit code {done.returncode}; what it printed stands above")
    steps = list_steps(run.run_dir / "export") or list_steps(checkpoints)
    result = export_checkpoint(run.run_dir, steps[-1])
    shutil.rmtree(checkpoints, ignore_errors=True)  # the export holds the weights
    return result


def _run_config(config: RunConfig, task: TaskConfig, data: DataConfig, export: Path, output_dir: Path, name: str) -> RunConfig:
    assert task.finetune is not None
    train = config.train.model_dump(exclude_none=True)
    if any(budget in task.finetune for budget in BUDGETS):
        train = {key: value for key, value in train.items() if key not in BUDGETS}
    values = yaml.safe_load(dump_config(config))
    values |= {
        "name": name,
        "output_dir": str(output_dir),
        "data": data.model_dump(mode="json", exclude_none=True) | {"lm_views": "last"},
        "model": {"init_from": str(export), "attention": config.model.attention, "lora": task.finetune_lora and task.finetune_lora.model_dump()},
        "objective": task.finetune_objective or {"name": "next_token"},
        "train": train | task.finetune,
        "checkpoint": {"every": sys.maxsize, "keep": 1},
        "evaluation": {},
        "monitor": {"log_every": config.monitor.log_every, "tensorboard": False},
    }
    return validate(RunConfig, values, "finetune")
