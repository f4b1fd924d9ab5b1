"""Options that tasks have in common."""

import difflib
import glob
import importlib.util
import os
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from data_prep.config import DataConfig, HubSource, JsonSource, TaskSource, task_source
from data_prep.config_file import LocalPath, Section
from data_prep.console import UserError
from data_prep.tasks import public_row_format
from pretrain.sections import LoraConfig, TrainConfig

if TYPE_CHECKING:
    from data_prep.task_rows import Row


class TaskConfig(Section):
    """A downstream task of the evaluation job, see docs/evaluation.md."""

    name: str
    label: str | None = Field(default=None, pattern=r"^\w[\w.+-]*$", max_length=100)
    """Name of the task in results and tables; default its name. It distinguishes two tasks of one name."""
    rows: int | None = Field(default=None, gt=0)
    """Number of test rows used, from the first on; default all."""

    @property
    def title(self) -> str:
        """Name of the task in results and tables."""
        return self.label or self.name

    @property
    def sources(self) -> dict[str, str | JsonSource | HubSource]:
        """The rows of the task, by the key that names them."""
        return {}

    @property
    def paths(self) -> list[str]:
        """Files and folders of the task that do not hold rows."""
        return []

    @property
    def finetunes(self) -> bool:
        """Whether the task finetunes the checkpoint first."""
        return False

    def reports_metric(self, metric: str, views: tuple[str, ...]) -> bool:
        """Return whether a metric that the task declares is among its results with these options and views."""
        return True

    def check_views(self, views: tuple[str, ...]) -> None:
        """Raise ValueError if the task cannot be evaluated on records of these views."""

    def check_requirements(self, data: DataConfig, where: str) -> None:
        """Raise UserError, with the dotted key below `where`, for a file or package that the task needs and that is not there."""
        for key, given in self.sources.items():
            if isinstance(given, str) and not os.path.lexists(given) and not glob.has_magic(given):
                raise UserError(f"{where}.{key}: there is no file {given} ({key} of {self.title})")
            self.first_rows(data, where, key, self.rows if key == "test" else None)

    def first_rows(self, data: DataConfig, where: str, key: str, count: int | None) -> "list[Row]":
        """Return the first `count` rows that a key names, or all, as the task reads them; none of a data set that would have to be fetched.

        Raises UserError.
        """
        from data_prep.task_rows import RowReader  # which loads pyarrow

        source = task_source(data, self.sources[key])
        reader = RowReader(
            source,
            data.views,
            f"{where}.{key}",
            public_row_format(self.name),
            allow_missing_views=data.missing_views == "keep",
        )
        if isinstance(source, HubSource) and not source.path.startswith((".", "/")) and not os.path.isdir(source.path):
            return []
        found = list(islice(reader.rows(), count))
        if not found:
            raise UserError(f"{where}.{key}: {source.path} has no rows")
        return found


class RowTask(TaskConfig):
    """A task on rows of its own."""

    test: LocalPath | TaskSource | None = None
    """Rows to score: a file of JSON lines, or a source of type json or hub as in data.sources."""

    HAS_DEFAULT_TEST_ROWS: ClassVar[bool] = False
    """Whether the task has rows without `test`."""

    @property
    def sources(self) -> dict[str, str | JsonSource | HubSource]:
        """The rows of the task, by the key that names them."""
        return {} if self.test is None else {"test": self.test}

    @field_validator("test", "train", check_fields=False)
    @classmethod
    def _read_once(cls, source: Any) -> Any:
        if isinstance(source, JsonSource | HubSource) and (source.weight != 1 or source.split != "train"):
            raise ValueError("weight and split are for data.sources: leave them out of a task's train and test")
        return source

    @model_validator(mode="after")
    def _has_rows(self) -> "RowTask":
        if self.test is None and not self.HAS_DEFAULT_TEST_ROWS:
            raise ValueError(f"the task {self.name} needs rows: test (on the command line task.test=FILE)")
        return self


class AnswerTask(RowTask):
    """A task that scores an answer, the second view, to a context, the first; the checkpoint may be finetuned on such rows first."""

    train: LocalPath | TaskSource | None = None
    """Rows to finetune on, like `test`."""
    finetune: dict[str, Any] | None = None
    """Keys of `train` of the run that the finetuning on the rows of `train` changes; null evaluates the checkpoint as it is."""
    finetune_objective: dict[str, Any] | None = None
    """Objective of the finetuning: keys of `objective`; default next_token."""
    finetune_lora: LoraConfig | None = None
    """Finetune adapters alone, instead of the whole model."""

    @property
    def sources(self) -> dict[str, str | JsonSource | HubSource]:
        """The rows of the task, by the key that names them."""
        return super().sources | ({} if self.train is None else {"train": self.train})

    @property
    def finetunes(self) -> bool:
        """Whether the task finetunes the checkpoint first."""
        return self.finetune is not None

    def check_views(self, views: tuple[str, ...]) -> None:
        """Raise ValueError unless there are two views."""
        if len(views) != 2:
            raise ValueError(
                f"the task {self.name} takes the second of two views for the answer to the first, but data.views are {list(views)}"
            )

    def check_requirements(self, data: DataConfig, where: str) -> None:
        """Raise UserError, see `TaskConfig.check_requirements`."""
        super().check_requirements(data, where)
        if self.finetune_lora:
            check_package("peft", "lora", f"{where}.finetune_lora")

    @field_validator("finetune")
    @classmethod
    def _keys_of_train(cls, finetune: dict[str, Any] | None) -> dict[str, Any] | None:
        for key in finetune or {}:
            if key not in TrainConfig.model_fields:
                nearest = difflib.get_close_matches(key, TrainConfig.model_fields, 1, 0.0)[0]
                raise ValueError(f"unknown key {key!r} of train; the nearest known one is {nearest!r}")
        return finetune

    @model_validator(mode="after")
    def _finetuning_is_complete(self) -> "AnswerTask":
        if self.test is not None and self.finetune is not None and self.train is None:
            raise ValueError("finetune needs rows to train on that belong to test: give train too")
        if self.finetune is None and (self.finetune_objective is not None or self.finetune_lora is not None):
            raise ValueError(
                "finetune_objective and finetune_lora act with finetune only: give it too, such as finetune: {epochs: 2}"
            )
        return self


class PairTask(RowTask):
    """A task that compares the embeddings of two views."""

    def check_views(self, views: tuple[str, ...]) -> None:
        """Raise ValueError unless there are two views or more."""
        if len(views) < 2:
            raise ValueError(f"the task {self.name} compares two views, but data.views are {list(views)}")

    @field_validator("rows")
    @classmethod
    def _enough_rows(cls, rows: int | None) -> int | None:
        if rows == 1:
            raise ValueError("the task compares rows: give at least 2, or leave it out")
        return rows


def check_package(package: str, extra: str, key: str) -> None:
    """Raise UserError, naming the key and the extra, for a package that is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{key} needs the package {package}: pip install '.[{extra}]' in the project's folder")
