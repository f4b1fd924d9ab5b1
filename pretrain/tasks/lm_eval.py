"""lm_eval: tasks of the Language Model Evaluation Harness; run by pretrain/evaluation/model_tasks/lm_eval.py."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from data_prep.config import DataConfig
from data_prep.config_file import LocalPath
from data_prep.console import UserError
from pretrain.tasks.directions import MetricDirections
from pretrain.tasks.options import TaskConfig, check_package

METRICS: MetricDirections = {}
"""The harness reports the directions together with its results."""


class Config(TaskConfig):
    """Run tasks of the Language Model Evaluation Harness, which brings its own rows; `rows` limits each of them."""

    name: Literal["lm_eval"]
    harness: list[LocalPath] = Field(min_length=1)
    """The harness' names of its tasks, or YAML files of tasks."""

    def check_requirements(self, data: DataConfig, where: str) -> None:
        """Raise UserError, see `TaskConfig.check_requirements`."""
        for path in self.harness:
            if path.endswith((".yaml", ".yml")) and not Path(path).is_file():
                raise UserError(
                    f"{where}.harness: there is no file {path}; give the YAML file of a task of the harness, or the name of one"
                )
        check_package("lm_eval", "lm-eval", f"{where}.name: the task lm_eval")
