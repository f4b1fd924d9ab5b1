"""The input and result of scoring a task, and rates over rows."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pretrain.tasks.directions import MetricDirections

if TYPE_CHECKING:
    from data_prep.task_rows import Row  # which loads pyarrow


class Answer(NamedTuple):
    """An answer of the model."""

    text: str
    stopped: bool
    """Whether it ended with the end token, rather than at the limit."""
    fits: bool = True
    """Whether the context left the model room for an answer; otherwise the text is empty."""


@dataclass(frozen=True)
class TaskResult:
    """The outcome of a task on one checkpoint."""

    rows: int
    """Test rows."""
    metrics: dict[str, float]
    """The most telling ones first, which the closing table shows."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows behind rates that are not over all rows, and rows that could not be scored as meant, which count as wrong."""
    directions: MetricDirections = field(default_factory=dict)
    """Directions of metrics that the task does not declare in METRICS."""


class TaskRun(Protocol):
    """One task on one checkpoint."""

    @property
    def task(self) -> Any:
        """The options of the task."""

    def read_test(self, *, every: bool = False) -> "list[Row]":
        """Return the rows to score; with `every` also those beyond the option `rows`. Raises UserError."""

    def read_train(self) -> "list[Row]":
        """Return the rows to finetune on; none if the task has none. Raises UserError."""

    def generate_answers(self, rows: "Sequence[Row]") -> list[Answer]:
        """Return the model's answers to the contexts, after the finetuning if the task has one. Raises UserError."""

    def log_likelihoods(self, options: Sequence[tuple[str, list[str]]]) -> list[list[float]]:
        """Return the log-likelihood of each option after its context, in nats; -inf for one that does not fit into the model's positions."""

    def unseen(self, rows: "Sequence[Row]", normal: Callable[[str], str] = str) -> list[bool] | None:
        """Return whether the target of each row, in its `normal` form, is new to the model; None if that is not known."""


def rate(hits: Iterable[bool]) -> float:
    """Return the fraction of hits."""
    hits = list(hits)
    return sum(hits) / len(hits)


def rate_over_subset(name: str, hits: Sequence[bool], chosen: Sequence[bool] | None) -> dict[str, float]:
    """Return the fraction of hits among the chosen rows, by its name; nothing if none is chosen, or if it is not known which are (None)."""
    if chosen is None:
        return {}
    among = [hit for hit, is_chosen in zip(hits, chosen, strict=True) if is_chosen]
    return {name: rate(among)} if among else {}


def is_strict_argmax(values: Sequence[float], chosen: int) -> bool:
    """Return whether the chosen value is above all others. In a tie none is, nor if a value is -inf, which could not be measured."""
    return min(values) > -math.inf and all(
        values[chosen] > value for place, value in enumerate(values) if place != chosen
    )


def count_too_long_contexts(answers: Sequence[Answer]) -> dict[str, int]:
    """Return how many contexts were too long for the model, as a count of the result; nothing if all had room."""
    count = sum(not answer.fits for answer in answers)
    return {"too_long": count} if count else {}


def count_too_long_options(likelihoods: Sequence[Sequence[float]]) -> dict[str, int]:
    """Return how many rows have an option that does not fit into the model's positions, which makes them wrong; as `count_too_long_contexts`."""
    count = sum(-math.inf in values for values in likelihoods)
    return {"too_long": count} if count else {}
