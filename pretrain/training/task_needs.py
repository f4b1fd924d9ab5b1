"""Checks of the files, databases and packages that `evaluation.tasks` need, because an evaluation would fail only after training."""

import importlib.util
from pathlib import Path

from data_prep.config import JsonSource, task_source
from data_prep.console import UserError
from data_prep.sources.files import find_files
from data_prep.sources.json_lines import SUFFIXES
from data_prep.sources.views import make_mapping
from pretrain.config import RunConfig, TaskConfig


def check_needs_of_tasks(config: RunConfig) -> None:
    """Raise UserError, naming the key, for a file or package that a task or model.lora needs and that is not there."""
    if config.model.lora:
        _check_package("peft", "lora", "model.lora")
    for number, task in enumerate(config.evaluation.tasks):
        _check_task(config, task, f"evaluation.tasks.{number}")


def _check_task(config: RunConfig, task: TaskConfig, where: str) -> None:
    for key, given in (("train", task.train), ("test", task.test)):
        if isinstance(given, str) and not Path(given).is_file():
            raise UserError(f"{where}.{key}: there is no file {given} ({key} of {task.title})")
        if isinstance(given, JsonSource):
            find_files(given, f"{where}.{key}", SUFFIXES)
        if given is not None:
            make_mapping(task_source(config.data, given), config.data.views, f"{where}.{key}", {view: view for view in config.data.views})
    if task.databases is not None:
        _check_databases(Path(task.databases), f"{where}.databases")
    for path in task.harness or []:
        if path.endswith((".yaml", ".yml")) and not Path(path).is_file():
            raise UserError(f"{where}.harness: there is no file {path}; give the YAML file of a task of the harness, or the name of one")
    if task.name == "lm_eval":
        _check_package("lm_eval", "lm-eval", f"{where}.name: the task lm_eval")
    if task.finetune_lora:
        _check_package("peft", "lora", f"{where}.finetune_lora")


def _check_databases(path: Path, key: str) -> None:
    if not path.exists():
        raise UserError(f"{key}: there is no {path}; give a folder of SQLite files, or one file for all rows")
    if path.is_dir() and not any(found for pattern in ("*.sqlite", "*/*.sqlite") for found in path.glob(pattern)):
        raise UserError(f"{key}: {path} has no database DB.sqlite or DB/DB.sqlite; give the folder of SQLite files, or one file for all rows")


def _check_package(package: str, extra: str, key: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{key} needs the package {package}: pip install '.[{extra}]' in the project's folder")
