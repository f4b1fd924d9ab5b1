"""Finetuning: a training run that starts from an export, on a task's training rows, with loss on the answer alone."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from data_prep.config import DataConfig, JsonSource
from data_prep.config_file import validate
from data_prep.console import UserError
from data_prep.files import write_text
from pretrain.config import RunConfig, dump_config
from pretrain.evaluation.pairs import prepare_pairs
from pretrain.run_folder import list_steps
from pretrain.training.background import single_process_environment

BUDGETS = ("steps", "tokens", "records", "epochs")


def finetune(config: RunConfig, settings: dict[str, Any], export: Path, pairs: JsonSource, folder: Path, name: str) -> Path:
    """Finetune `export` on `pairs`; return the run directory, whose newest checkpoint is the result.

    `settings` are keys of `train` that replace those of the pretraining run `config`; an interrupted finetuning starts over.
    Raises UserError where the run fails.
    """
    data = prepare_pairs(config, pairs, folder)
    run = _run_config(config, settings, data, export, folder / "finetune", name)
    path = folder / "finetune" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8") != dump_config(run):
        shutil.rmtree(run.run_dir, ignore_errors=True)  # what an earlier evaluation with other settings left
    write_text(path, dump_config(run))
    done = subprocess.run([sys.executable, "-m", "pretrain.training", str(path)], env=single_process_environment(), check=False)
    if done.returncode or not list_steps(run.run_dir / "checkpoints"):
        raise UserError(f"the finetuning {path} failed with exit code {done.returncode}; what it printed stands above")
    return run.run_dir


def _run_config(config: RunConfig, settings: dict[str, Any], data: DataConfig, export: Path, output_dir: Path, name: str) -> RunConfig:
    train = config.train.model_dump(exclude_none=True)
    if any(budget in settings for budget in BUDGETS):
        train = {key: value for key, value in train.items() if key not in BUDGETS}
    values = yaml.safe_load(dump_config(config))
    values |= {
        "name": name,
        "output_dir": str(output_dir),
        "data": data.model_dump(mode="json", exclude_none=True) | {"lm_views": "last"},
        "model": {"init_from": str(export), "attention": config.model.attention},
        "objective": {"name": "next_token"},
        "train": train | settings,
        "checkpoint": {"every": sys.maxsize, "keep": 1},
        "evaluation": {},
        "monitor": {"log_every": config.monitor.log_every, "tensorboard": False},
    }
    return validate(RunConfig, values, "finetune")
