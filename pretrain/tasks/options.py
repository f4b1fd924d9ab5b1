"""Options that several tasks share."""

import glob
import importlib.util
import os
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import yaml
from pydantic import Field, field_validator, model_validator

from data_prep.config import DataConfig, HubSource, JsonSource, TaskSource, task_source
from data_prep.tasks import public_row_format
from data_prep.utils.config_file import LocalPath, Section, parse_yaml, unknown_key, validate
from data_prep.utils.console import UserError
from pretrain.sections import LoraConfig, TrainConfig

if TYPE_CHECKING:
    from data_prep.task_rows import Row
    from pretrain.objectives.configs import ObjectiveConfig


class TaskConfig(Section):
    """Options of a downstream task of the evaluation job; see docs/evaluation.md."""

    name: str
    label: str | None = Field(default=None, pattern=r"^\w[\w.+-]*$", max_length=100)
    """Name of the task in results and tables; default: `name`. Labels distinguish two tasks of the same name."""
    rows: int | None = Field(default=None, gt=0)
    """Number of test rows used, starting with the first; default: all."""

    @property
    def title(self) -> str:
        """Name of the task in results and tables."""
        return self.label or self.name

    @property
    def sources(self) -> dict[str, str | JsonSource | HubSource]:
        """Sources of the task's rows, by option (`test`, `train`)."""
        return {}

    @property
    def paths(self) -> list[str]:
        """Files and folders of the task other than its rows."""
        return []

    @property
    def finetunes(self) -> bool:
        """Whether the task finetunes the checkpoint before scoring."""
        return False

    def reports_metric(self, metric: str, views: tuple[str, ...]) -> bool:
        """Return whether the task reports a declared metric with its options and these views."""
        return True

    def check_views(self, views: tuple[str, ...]) -> None:
        """Raise ValueError if the task cannot be evaluated on records of these views."""

    def check_objective(self, objective: "ObjectiveConfig") -> None:
        """Raise ValueError if the task cannot be evaluated on models that are trained with an objective."""

    def check_requirements(self, data: DataConfig, where: str) -> None:
        """Raise UserError if a file or package of the task is missing; `where` is the dotted key of the task."""
        for key, source in self.sources.items():
            self._check_source(data, where, key, source)

    def _check_source(self, data: DataConfig, where: str, key: str, source: str | JsonSource | HubSource) -> None:
        if isinstance(source, str) and not os.path.lexists(source) and not glob.has_magic(source):
            raise UserError(f"{where}.{key}: there is no file {source} ({key} of {self.title}); correct the path")
        self.first_rows(data, where, key, self.rows if key == "test" else None)

    def first_rows(self, data: DataConfig, where: str, key: str, count: int | None) -> "list[Row]":
        """Return the first `count` rows of the source `key`, or all if `count` is None.

        The result is empty for a Hub data set that would have to be downloaded. Raises UserError if the rows cannot be
        read or there are none.
        """
        from data_prep.task_rows import RowReader  # imported late because it loads pyarrow

        source = task_source(data, getattr(self, key))
        reader = RowReader(
            source,
            data.views,
            f"{where}.{key}",
            public_row_format(self.name),
            allow_missing_views=data.missing_views == "keep",
        )
        if isinstance(source, HubSource) and not source.path.startswith((".", "/")) and not os.path.isdir(source.path):
            return []
        rows = list(islice(reader.rows(), count))
        if not rows:
            raise UserError(f"{where}.{key}: {source.path} has no rows; give a file with rows")
        return rows


class RowTask(TaskConfig):
    """Options of a task with test rows."""

    test: LocalPath | TaskSource | None = None
    """Rows to score: a JSON, CSV or Parquet file, or a source of type json or hub as in data.sources."""

    validation: LocalPath | TaskSource | None = None
    """Rows that decide the tuning of a study, like `test`; by default the validation split of the corpus."""

    HAS_DEFAULT_TEST_ROWS: ClassVar[bool] = False
    """Whether the task has test rows even if `test` is not set."""

    @property
    def sources(self) -> dict[str, str | JsonSource | HubSource]:
        """Sources of the task's rows, by option."""
        return {} if self.test is None else {"test": self.test}

    def check_requirements(self, data: DataConfig, where: str) -> None:
        """Raise UserError if a file or package of the task is missing; see TaskConfig."""
        super().check_requirements(data, where)
        if self.validation is not None:
            self._check_source(data, where, "validation", self.validation)

    @field_validator("test", "train", "validation", check_fields=False)
    @classmethod
    def _no_weight_or_split(cls, source: Any) -> Any:
        if isinstance(source, JsonSource | HubSource) and (source.weight != 1 or source.split != "train"):
            raise ValueError("weight and split apply to data.sources only; remove them from the rows of the task")
        return source

    @model_validator(mode="after")
    def _has_rows(self) -> "RowTask":
        if self.test is None and not self.HAS_DEFAULT_TEST_ROWS:
            raise ValueError(f"the task {self.name} needs test rows; set test (on the command line: task.test=FILE)")
        return self


class AnswerTask(RowTask):
    """Options of a task whose context is the first view of a row, and whose target is the second.

    The checkpoint may be finetuned on rows of the same form before it is scored.
    """

    train: LocalPath | TaskSource | None = None
    """Rows to finetune on, like `test`. Without `finetune`, only classification tasks and tasks with metrics on unseen
    targets read them."""
    finetune: dict[str, Any] | None = None
    """Settings of the finetuning: keys of the top-level `train` section and their new values.

    null: no finetuning.
    """
    finetune_objective: dict[str, Any] | None = None
    """Objective of the finetuning: keys of `objective`; default: next_token."""
    finetune_lora: LoraConfig | None = None
    """LoRA settings; if set, only adapters are finetuned, not the whole model."""

    SCORING_READS_TRAIN: ClassVar[bool] = False
    """Whether the scoring reads the train rows too, so `train` has an effect without `finetune`."""

    @property
    def sources(self) -> dict[str, str | JsonSource | HubSource]:
        """Sources of the task's rows, by option."""
        return super().sources | ({} if self.train is None else {"train": self.train})

    @property
    def finetunes(self) -> bool:
        """Whether the task finetunes the checkpoint before scoring."""
        return self.finetune is not None

    def check_views(self, views: tuple[str, ...]) -> None:
        """Raise ValueError unless there are two views."""
        if len(views) != 2:
            raise ValueError(
                f"the task {self.name} needs two views, a context and its answer, but data.views is {list(views)}; "
                "list two views"
            )

    def check_requirements(self, data: DataConfig, where: str) -> None:
        """Raise UserError if a file is missing, or if peft is needed and not installed."""
        super().check_requirements(data, where)
        if self.finetune_lora:
            check_package("peft", "lora", f"{where}.finetune_lora")

    @field_validator("finetune")
    @classmethod
    def _keys_of_train(cls, finetune: dict[str, Any] | None) -> dict[str, Any] | None:
        for key in finetune or {}:
            if key not in TrainConfig.model_fields:
                raise ValueError(unknown_key(key, TrainConfig.model_fields, "train"))
        return finetune

    @model_validator(mode="after")
    def _finetuning_is_complete(self) -> "AnswerTask":
        if self.test is not None and self.finetune is not None and self.train is None:
            raise ValueError("finetune needs training rows for the same task as test; set train too")
        if self.finetune is None and self.train is not None and not self.SCORING_READS_TRAIN:
            raise ValueError(
                f"train has no effect on {self.name} without finetune; set finetune too, for example {{epochs: 2}}, "
                "or remove train"
            )
        if self.finetune is None and (self.finetune_objective is not None or self.finetune_lora is not None):
            raise ValueError(
                "finetune_objective and finetune_lora have no effect without finetune; set it too, for example "
                "finetune: {epochs: 2}"
            )
        return self


class PairTask(RowTask):
    """Options of a task that compares the embeddings of two views."""

    def check_views(self, views: tuple[str, ...]) -> None:
        """Raise ValueError unless there are at least two views."""
        if len(views) < 2:
            raise ValueError(
                f"the task {self.name} compares two views, but data.views is {list(views)}; list at least two"
            )

    @field_validator("rows")
    @classmethod
    def _enough_rows(cls, rows: int | None) -> int | None:
        if rows == 1:
            raise ValueError("the task compares rows with each other, so rows must be at least 2; raise or remove it")
        return rows


def check_package(package: str, extra: str, key: str) -> None:
    """Raise UserError if a package is not installed, naming the key that needs it and the extra to install."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{key} needs the package {package}, which is not installed; "
            f"run pip install '.[{extra}]' in the project's folder"
        )


def parse_source(text: str, key: str) -> JsonSource | HubSource:
    """Return the source that an option of a command names: a file, or a mapping in YAML. Raises UserError.

    `key` is the name of the option.
    """
    if not text.startswith("{"):
        return JsonSource(type="json", path=text)
    try:
        values = parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"{key}: {text} is not valid YAML; fix it, or pass a file") from None
    source = validate(RowTask, {"name": "retrieval", "test": values}, key).test
    assert isinstance(source, JsonSource | HubSource)  # YAML that starts with a brace is a mapping
    return source
