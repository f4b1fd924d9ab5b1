"""Loss spikes: found by a robust z-score, answered by a warning, by leaving the step out, or by going back to before it."""

import contextlib
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.console import UserError
from data_prep.files import write_json
from pretrain.run_folder import PINS, REWINDS, list_steps, read_rewinds, step_name

WINDOW, MIN_HISTORY = 100, 20
"""Steps that a loss is compared with, and as many as that takes."""
ALIKE = 2
"""Largest ratio of the numbers of tokens or pairs in two steps whose losses are compared: the mean over few pairs varies more, and a
contrastive loss grows with their number."""
LEAST_SPREAD = 0.005
"""Of the median: a loss that hardly varies is not compared with its noise alone."""
MAX_REWINDS_PER_CHECKPOINT = 3
"""Times that a run goes back to one checkpoint."""
MAX_REWINDS = 20
"""Times that a run goes back at all: a run that diverges would otherwise rewind after each new checkpoint."""


class CannotRewind(Exception):
    """Why a run does not go back; the step is skipped instead."""


class SpikeRule:
    """The last losses of each term, unweighted, each with the number of tokens or pairs that it is the mean of.

    The score of a loss is (loss - median) / (1.4826 MAD), MAD the median absolute deviation from the median, which estimates the standard
    deviation whatever the outliers are (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993).
    """

    def __init__(self) -> None:
        self.losses: dict[str, list[tuple[float, int]]] = {}

    def score(self, term: str, loss: float, count: int) -> float:
        """Return how far a loss is above the last ones of similar counts, in standard deviations; 0 while there are too few."""
        comparable = [before for before, of in self.losses.get(term, []) if of <= ALIKE * count and count <= ALIKE * of]
        if len(comparable) < MIN_HISTORY:
            return 0.0
        median = statistics.median(comparable)
        spread = 1.4826 * statistics.median(abs(before - median) for before in comparable)
        return (loss - median) / max(spread, LEAST_SPREAD * abs(median), 1e-12)

    def add(self, term: str, loss: float, count: int) -> None:
        """Note a finite loss."""
        last = [*self.losses.get(term, [])[1 - WINDOW :], (loss, count)]
        self.losses = self.losses | {
            term: last
        }  # a new one: the state of a checkpoint that is being written holds the old one

    def judge(
        self, losses: Mapping[str, float], counts: Mapping[str, int], weights: Mapping[str, float]
    ) -> tuple[float, str]:
        """Note the losses of a step; return the highest score among the terms that have a weight, and its term.

        `counts` are the numbers of tokens or pairs that the losses are means of.
        """
        scores = [(self.score(term, loss, counts[term]), term) for term, loss in losses.items() if weights[term]]
        for term, loss in losses.items():
            self.add(term, loss, counts[term])
        return max(scores, default=(0.0, ""))

    def load(self, losses: Any) -> None:
        """Restore the losses from a checkpoint. Earlier versions saved totals, which cannot be compared with terms."""
        self.losses = (
            {term: [(loss, count) for loss, count in last] for term, last in losses.items()}
            if isinstance(losses, dict)
            else {}
        )


def excluded_steps(run_dir: Path) -> set[int]:
    """Return the steps whose records train nothing."""
    return {step for rewind in read_rewinds(run_dir) for step in rewind["left_out"]}


def rewind(run_dir: Path, step: int, score: float) -> int:
    """Note that the next start goes back to before the step before this one, and leaves both out; return the step it goes on from.

    Raises CannotRewind; the next start then resumes from the newest checkpoint.
    """
    culprits = [step - 1, step]
    to = max((saved for saved in list_steps(run_dir / "checkpoints") if saved < culprits[0]), default=None)
    try:
        before = read_rewinds(run_dir)
    except (OSError, UserError) as error:
        raise CannotRewind(f"cannot read {run_dir / REWINDS}: {error}") from None
    if to is None:
        raise CannotRewind("no checkpoint is older than the step before it")
    if sum(one["to"] == to for one in before) >= MAX_REWINDS_PER_CHECKPOINT:
        raise CannotRewind(f"the run went back to step {to} {MAX_REWINDS_PER_CHECKPOINT} times already")
    if len(before) >= MAX_REWINDS:
        raise CannotRewind(
            f"the run went back {MAX_REWINDS} times already, it may be diverging: lower train.learning_rate"
        )
    try:
        write_json(run_dir / REWINDS, [*before, {"step": step, "score": score, "to": to, "left_out": culprits}])
        _set_aside(run_dir, to)
    except OSError as error:
        with contextlib.suppress(OSError):
            if read_rewinds(run_dir) != before:
                write_json(run_dir / REWINDS, before)
        raise CannotRewind(f"cannot write to {run_dir}: {error.strerror}") from None
    return to


def _set_aside(run_dir: Path, to: int) -> None:
    """Remove the checkpoints and exports of later steps."""
    checkpoints = run_dir / "checkpoints"
    for folder in (checkpoints, run_dir / "export"):
        for saved in list_steps(folder):
            if saved > to:
                (folder / step_name(saved)).rename(folder / f".{step_name(saved)}.tmp")
                (checkpoints / PINS / step_name(saved)).unlink(
                    missing_ok=True
                )  # it is asked for anew when it is saved anew
    for export in (run_dir / "export").glob(".*.tmp"):
        shutil.rmtree(export, ignore_errors=True)
