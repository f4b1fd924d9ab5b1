"""Inputs and results of scoring a task, and rates over rows."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pretrain.tasks.directions import MetricDirections

if TYPE_CHECKING:
    from data_prep.task_rows import Row  # not imported at run time because it loads pyarrow


class Answer(NamedTuple):
    """An answer that the model generated."""

    text: str
    stopped: bool
    """Whether the answer ended with the end token, not at the length limit."""
    fits: bool = True
    """Whether the model had room for an answer after the context; if not, the text is empty."""


@dataclass(frozen=True)
class TaskResult:
    """Result of a task on one checkpoint."""

    rows: int
    """Number of test rows."""
    metrics: dict[str, float]
    """Metrics by name, the most important first; the table at the end of an evaluation shows the first ones."""
    counts: dict[str, int] = field(default_factory=dict)
    """Numbers of rows: the subsets of rates that do not cover all rows, and unscorable rows, which count as wrong."""
    directions: MetricDirections = field(default_factory=dict)
    """Directions of metrics that the task does not declare in METRICS."""


class TaskRun(Protocol):
    """Evaluation of one task on one checkpoint."""

    @property
    def task(self) -> Any:
        """Options of the task."""

    def read_test(self, *, every: bool = False) -> "list[Row]":
        """Return the first `rows` test rows, or with `every` all of them. Raises UserError."""

    def read_train(self) -> "list[Row]":
        """Return the rows to finetune on, if any. Raises UserError."""

    def generate_answers(self, rows: "Sequence[Row]") -> list[Answer]:
        """Return the model's answers to the contexts; finetune the model first if the task does. Raises UserError."""

    def log_likelihoods(self, options: Sequence[tuple[str, list[str]]]) -> list[list[float]]:
        """Return the log-likelihood of each option given its context, in nats.

        It is -inf for an option that does not fit into the model's positions.
        """

    def unseen(self, rows: "Sequence[Row]", normalize: Callable[[str], str] = str) -> list[bool] | None:
        """Return for each row whether its target, normalised by `normalize`, is new to the model; None if unknown."""


def rate(hits: Iterable[bool]) -> float:
    """Return the fraction of hits."""
    hits = list(hits)
    return sum(hits) / len(hits)


def rate_over_subset(name: str, hits: Sequence[bool], chosen: Sequence[bool] | None) -> dict[str, float]:
    """Return {name: fraction of hits among the chosen rows}; {} if `chosen` is None or no row is chosen."""
    if chosen is None:
        return {}
    among = [hit for hit, is_chosen in zip(hits, chosen, strict=True) if is_chosen]
    return {name: rate(among)} if among else {}


def is_strict_argmax(values: Sequence[float], chosen: int) -> bool:
    """Return whether the chosen value is strictly above all others.

    It is False in a tie, and if any value is -inf: -inf marks a value that could not be measured.
    """
    return min(values) > -math.inf and all(
        values[chosen] > value for index, value in enumerate(values) if index != chosen
    )


def count_too_long_contexts(answers: Sequence[Answer]) -> dict[str, int]:
    """Return {"too_long": number of contexts too long for the model}; {} if all fit."""
    count = sum(not answer.fits for answer in answers)
    return {"too_long": count} if count else {}


def count_too_long_options(likelihoods: Sequence[Sequence[float]]) -> dict[str, int]:
    """Return {"too_long": number of rows with an option too long for the model}; {} if all fit.

    These rows count as wrong.
    """
    count = sum(-math.inf in values for values in likelihoods)
    return {"too_long": count} if count else {}
