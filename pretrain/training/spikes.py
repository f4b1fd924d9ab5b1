"""Loss spikes: found by a robust z-score, answered by a warning, by leaving the step out, or by going back to before it."""

import shutil
import statistics
from pathlib import Path

from data_prep.files import write_json
from pretrain.run_folder import PINS, REWINDS, list_steps, rewinds, step_name

WINDOW, ENOUGH = 100, 20
"""Steps that a loss is compared with, and as many as that takes."""
LEAST_SPREAD = 0.005
"""Of the median: a loss that hardly varies is not compared with its noise alone."""
MOST_REWINDS = 3
"""Times that a run goes back to one checkpoint."""


class SpikeRule:
    """The total losses of the last steps.

    The score of a loss is (loss - median) / (1.4826 MAD), MAD the median absolute deviation from the median, which estimates the standard
    deviation whatever the outliers are (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993).
    """

    def __init__(self) -> None:
        self.losses: list[float] = []

    def score(self, loss: float) -> float:
        """How far a loss stands above the last ones, in standard deviations; 0 while there are too few."""
        if len(self.losses) < ENOUGH:
            return 0.0
        median = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(before - median) for before in self.losses)
        return (loss - median) / max(spread, LEAST_SPREAD * abs(median), 1e-12)

    def add(self, loss: float) -> None:
        """Note a loss, which is finite."""
        self.losses = [*self.losses[1 - WINDOW:], loss]


def left_out(run_dir: Path) -> set[int]:
    """Return the steps whose records train nothing."""
    return {step for rewind in rewinds(run_dir) for step in rewind["left_out"]}


def rewind(run_dir: Path, step: int, score: float) -> int | None:
    """Note that the next start goes back to before the step before this one, and leaves both out; return the step it goes on from.

    None where no checkpoint is old enough, or the run went back to it too often.
    """
    checkpoints = run_dir / "checkpoints"
    culprits = [step - 1, step]
    to = max((saved for saved in list_steps(checkpoints) if saved < culprits[0]), default=None)
    before = rewinds(run_dir)
    if to is None or sum(one["to"] == to for one in before) >= MOST_REWINDS:
        return None
    write_json(run_dir / REWINDS, [*before, {"step": step, "score": score, "to": to, "left_out": culprits}])
    for folder in (checkpoints, run_dir / "export"):
        for saved in list_steps(folder):
            if saved > to:
                (folder / step_name(saved)).rename(folder / f".{step_name(saved)}.tmp")
                (checkpoints / PINS / step_name(saved)).unlink(missing_ok=True)  # it is asked for anew when it is saved anew
    for export in (run_dir / "export").glob(".*.tmp"):
        shutil.rmtree(export, ignore_errors=True)
    return to
