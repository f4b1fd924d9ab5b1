"""lm_eval: tasks of the Language Model Evaluation Harness.

pretrain/evaluation/model_tasks/lm_eval.py runs them.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from data_prep.config import DataConfig
from data_prep.utils.config_file import LocalPath
from data_prep.utils.console import UserError
from pretrain.tasks.directions import MetricDirections
from pretrain.tasks.options import TaskConfig, check_package

METRICS: MetricDirections = {}
"""Empty: the harness reports the directions of its metrics together with its results."""


class Config(TaskConfig):
    """Options of tasks of lm-evaluation-harness, which has its own test rows.

    `rows` limits their number per harness task.
    """

    name: Literal["lm_eval"]
    harness: list[LocalPath] = Field(min_length=1)
    """Names of harness tasks, or YAML files that define tasks."""

    def check_requirements(self, data: DataConfig, where: str) -> None:
        """Raise UserError for a missing YAML file or if lm-eval is not installed."""
        for path in self.harness:
            if path.endswith((".yaml", ".yml")) and not Path(path).is_file():
                raise UserError(
                    f"{where}.harness: there is no file {path}; give a YAML file or the name of a harness task"
                )
        check_package("lm_eval", "lm-eval", f"{where}.name: the task lm_eval")
