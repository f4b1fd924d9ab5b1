"""Finetuning: a training run that starts from an export, on a task's training rows, with loss on the answer alone."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from data_prep.config import DataConfig, validate
from data_prep.errors import UserError
from data_prep.files import sha256_file, write_text
from data_prep.pipeline import prepare
from pretrain.config import RunConfig, dump_config
from pretrain.run_folder import list_steps
from pretrain.training.background import single_process_environment

BUDGETS = ("steps", "tokens", "records", "epochs")


def finetune(config: RunConfig, settings: dict[str, Any], export: Path, train_file: Path, folder: Path, name: str) -> Path:
    """Finetune `export` on the pairs of `train_file`; return the run directory, whose newest checkpoint is the result.

    `settings` are keys of `train` that replace those of the pretraining run `config`. Deterministic; goes on where an interrupted one stopped.
    Raises UserError where the run fails.
    """
    data = _data(config, export, train_file, folder)
    prepare(data)
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


def _data(config: RunConfig, export: Path, train_file: Path, folder: Path) -> DataConfig:
    key = sha256_file(train_file)[:12] + "-" + sha256_file(export / "tokenizer.json")[:12]
    return DataConfig(
        path=str(folder / "data" / key), views=config.data.views, sources=[{"type": "json", "path": str(train_file)}],
        tokenizer={"path": str(export)}, sequence_length=config.data.sequence_length, lm_views="last",
    )


def _run_config(config: RunConfig, settings: dict[str, Any], data: DataConfig, export: Path, output_dir: Path, name: str) -> RunConfig:
    train = config.train.model_dump(exclude_none=True)
    if any(budget in settings for budget in BUDGETS):
        train = {key: value for key, value in train.items() if key not in BUDGETS}
    values = yaml.safe_load(dump_config(config))
    values |= {
        "name": name,
        "output_dir": str(output_dir),
        "data": data.model_dump(mode="json", exclude_none=True),
        "model": {"init_from": str(export), "attention": config.model.attention},
        "objective": {"name": "next_token"},
        "train": train | settings,
        "checkpoint": {"every": sys.maxsize, "keep": 1},
        "evaluation": {},
        "monitor": {"log_every": config.monitor.log_every, "tensorboard": False},
    }
    return validate(RunConfig, values, "finetune")
