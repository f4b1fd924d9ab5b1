"""probe: read a label from the embedding of a view with a linear classifier.

pretrain/evaluation/model_tasks/probe.py fits and scores it.
"""

from typing import TYPE_CHECKING, Any, Literal

from data_prep.config import DataConfig, HubSource, JsonSource, TaskSource
from data_prep.utils.config_file import LocalPath
from data_prep.utils.console import UserError
from pretrain.tasks.directions import MetricDirections, higher
from pretrain.tasks.options import RowTask, check_package

if TYPE_CHECKING:
    from data_prep.task_rows import Row

METRICS: MetricDirections = higher("accuracy") | {"majority": "neither"}


class Config(RowTask):
    """Options of the task that reads a label from the embedding of a view; it needs the extra `probe`."""

    name: Literal["probe"]
    train: LocalPath | TaskSource
    """Rows to fit the classifier on, like `test`."""
    column: str
    """Column of the rows that has the label."""
    view: str | None = None
    """View whose embedding is read; default: the first view."""

    @property
    def sources(self) -> dict[str, str | JsonSource | HubSource]:
        """Sources of the task's rows, by option."""
        return super().sources | {"train": self.train}

    def view_number(self, views: tuple[str, ...]) -> int:
        """Return the number of the view whose embedding is read."""
        return views.index(self.view) if self.view else 0

    def check_views(self, views: tuple[str, ...]) -> None:
        """Raise ValueError unless the view whose embedding is read is one of the views."""
        if self.view and self.view not in views:
            raise ValueError(f"the task probe reads the view {self.view!r}, but data.views is {list(views)}")

    def check_requirements(self, data: DataConfig, where: str) -> None:
        """Raise UserError if a file or the column is missing, or if scikit-learn is not installed."""
        check_package("sklearn", "probe", f"{where}.name: the task probe")
        super().check_requirements(data, where)

    def first_rows(self, data: DataConfig, where: str, key: str, count: int | None) -> "list[Row]":
        """Return the first rows of a source; see TaskConfig. Raises UserError if one has no label."""
        rows = super().first_rows(data, where, key, count)
        self.labels(rows, f"{where}.{key}")
        return rows

    def labels(self, rows: "list[Row]", key: str) -> list[str]:
        """Return the label of each row. Raises UserError if a row has no text or number in the column.

        `key` is the dotted key of the rows.
        """
        return [self._label(row.columns, f"{key}: row {number}") for number, row in enumerate(rows, start=1)]

    def _label(self, columns: dict[str, Any], where: str) -> str:
        value = columns.get(self.column)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # columns of integers with gaps are often written as 1.0
        if not isinstance(value, str | int | float) or value == "" or value != value:
            others = ", ".join(name for name in columns if name != self.column)
            raise UserError(
                f"{where} has no label in the column {self.column!r}; add it, remove the row, or choose another column "
                f"({others})"
            )
        return str(value)
