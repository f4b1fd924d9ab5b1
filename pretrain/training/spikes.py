"""Loss spikes: detection by a robust z-score, and the rewind to a checkpoint before the spike."""

import contextlib
import logging
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.utils.console import UserError
from data_prep.utils.files import write_json
from pretrain.run_folder import REWIND_REASON_PREFIX, REWINDS, list_steps, read_rewinds, remove_later_steps
from pretrain.training.hooks import Hook, StepReport, StopTraining

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

logger = logging.getLogger(__name__)

WINDOW = 100
"""Largest number of steps with which a loss is compared."""
MIN_HISTORY = 20
"""Smallest number of steps with which a loss is compared."""
MAX_COUNT_RATIO = 2
"""Largest ratio of the numbers of tokens or pairs in two comparable steps. A mean over few pairs varies more, and a
contrastive loss grows with the number of pairs."""
MIN_SPREAD = 0.005
"""Smallest spread, as a fraction of the median; it keeps noise in a nearly constant loss from counting as a spike."""
MAX_REWINDS_PER_CHECKPOINT = 3
"""Largest number of rewinds to the same checkpoint."""
MAX_REWINDS = 20
"""Largest number of rewinds of a run. Without it, a diverging run would rewind after each new checkpoint."""


class CannotRewind(Exception):
    """The reason why a run cannot rewind. The step of the spike is skipped instead."""


class SpikeRule:
    """The recent unweighted losses of each term, each with the number of tokens or pairs in its mean.

    The score of a loss is (loss - median) / (1.4826 MAD). MAD is the median absolute deviation from the median. 1.4826
    MAD is an estimate of the standard deviation that is robust to outliers (Iglewicz and Hoaglin, How to Detect and
    Handle Outliers, 1993).
    """

    def __init__(self) -> None:
        self.losses: dict[str, list[tuple[float, int]]] = {}

    def score(self, term: str, loss: float, count: int) -> float:
        """Return the distance of a loss above recent losses with similar counts, in standard deviations.

        The score is 0 if there are fewer than MIN_HISTORY such losses.
        """
        comparable = [
            past_loss
            for past_loss, past_count in self.losses.get(term, [])
            if past_count <= MAX_COUNT_RATIO * count and count <= MAX_COUNT_RATIO * past_count
        ]
        if len(comparable) < MIN_HISTORY:
            return 0.0
        median = statistics.median(comparable)
        spread = 1.4826 * statistics.median(abs(past_loss - median) for past_loss in comparable)
        return (loss - median) / max(spread, MIN_SPREAD * abs(median), 1e-12)

    def add(self, term: str, loss: float, count: int) -> None:
        """Add a finite loss."""
        recent = [*self.losses.get(term, [])[1 - WINDOW :], (loss, count)]
        # a new dictionary, because a checkpoint that is being written may still refer to the old one
        self.losses = self.losses | {term: recent}

    def judge(
        self, losses: Mapping[str, float], counts: Mapping[str, int], weights: Mapping[str, float]
    ) -> tuple[float, str]:
        """Add the losses of a step; return the highest score among the terms with a nonzero weight, and that term.

        `counts` are the numbers of tokens or pairs over which the losses are means.
        """
        scores = [(self.score(term, loss, counts[term]), term) for term, loss in losses.items() if weights[term]]
        for term, loss in losses.items():
            self.add(term, loss, counts[term])
        return max(scores, default=(0.0, ""))

    def load(self, losses: Any) -> None:
        """Restore the losses from a checkpoint. Total losses, which earlier versions saved, are dropped."""
        self.losses = (
            {term: [(loss, count) for loss, count in recent] for term, recent in losses.items()}
            if isinstance(losses, dict)
            else {}
        )


class SpikeGuard(Hook):
    """A hook that reports loss spikes, and skips their steps or goes back to an earlier checkpoint (train.on_spike)."""

    def __init__(self, run_dir: Path, pool_rows: int):
        self.rule = SpikeRule()
        self.excluded_steps = excluded_steps(run_dir)
        """Steps that earlier rewinds exclude from training."""
        self._pool_rows = pool_rows

    def judge(self, run: "Trainer", losses: Mapping[str, float], counts: Mapping[str, int]) -> tuple[float, bool]:
        """Return the highest spike score of the terms of a step, and whether to skip the step.

        `counts` are the numbers of tokens, pairs or spans over which the losses are means. All ranks return the same.
        """
        train, step = run.config.train, run.progress.step
        if not math.isfinite(run.total_loss(losses)) or step in self.excluded_steps:
            return 0.0, True
        score, highest = self.rule.judge(losses, counts, run.weights)
        if score > train.spike_score:
            logger.warning(
                f"the loss of step {step} is a spike: loss/{highest} is {losses[highest]:.4f}, {score:.1f} standard "
                "deviations above its recent values"
            )
        return score, score > train.spike_score and train.on_spike != "warn"

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """Go back to a checkpoint before a spike, if so configured and possible."""
        if report.spike_score > run.config.train.spike_score and run.config.train.on_spike == "rewind":
            self._rewind(run, report.spike_score)

    def _rewind(self, run: "Trainer", score: float) -> None:
        """Make the next launch resume from a checkpoint before this step. The step is skipped in any case."""
        run.finish_save()
        step = run.progress.step
        resume_step = 0
        problem = ""
        if run.world.is_main:
            try:
                resume_step = rewind(run.config.run_dir, step, score)
            except CannotRewind as error:
                problem = str(error)
        resume_step, problem = run.world.gather_objects((resume_step, problem))[0]
        if problem:
            logger.warning(
                f"cannot rewind before the spike of step {step} (score {score:.1f}): {problem}; skipping only this step"
            )
            return
        reason = (
            f"{REWIND_REASON_PREFIX}: the loss of step {step} is a spike (score {score:.1f}); the next launch resumes "
            f"from step {resume_step} and skips steps {step - 1} and {step}"
        )
        logger.warning(reason)
        raise StopTraining(reason)

    def state(self) -> dict[str, Any]:
        """Return the recent losses."""
        return {"losses": self.rule.losses, "pool_rows": self._pool_rows}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the recent losses from a checkpoint.

        A contrastive loss depends on the size of the pool, so its old values are comparable only with the same size.
        """
        if state.get("pool_rows", self._pool_rows) == self._pool_rows:
            self.rule.load(state["losses"])


def excluded_steps(run_dir: Path) -> set[int]:
    """Return the steps whose records are excluded from training by rewinds."""
    return {step for rewind in read_rewinds(run_dir) for step in rewind["left_out"]}


def rewind(run_dir: Path, step: int, score: float) -> int:
    """Make the next launch resume from a checkpoint before `step` and the preceding step, and skip these two steps.

    Return the step from which the next launch resumes. Raises CannotRewind; the next launch then resumes from the
    newest checkpoint.
    """
    skipped = [step - 1, step]
    resume_step = max((saved for saved in list_steps(run_dir / "checkpoints") if saved < skipped[0]), default=None)
    try:
        earlier_rewinds = read_rewinds(run_dir)
    except (OSError, UserError) as error:
        raise CannotRewind(f"cannot read {run_dir / REWINDS}: {error}") from None
    if resume_step is None:
        raise CannotRewind("no checkpoint is older than the preceding step")
    if (
        sum(earlier["to"] == resume_step and bool(earlier["left_out"]) for earlier in earlier_rewinds)
        >= MAX_REWINDS_PER_CHECKPOINT
    ):
        raise CannotRewind(f"the run has already gone back to step {resume_step} {MAX_REWINDS_PER_CHECKPOINT} times")
    if sum(bool(earlier["left_out"]) for earlier in earlier_rewinds) >= MAX_REWINDS:
        raise CannotRewind(
            f"the run has already gone back {MAX_REWINDS} times and may be diverging: lower train.learning_rate"
        )
    try:
        this_rewind = {"step": step, "score": score, "to": resume_step, "left_out": skipped}
        write_json(run_dir / REWINDS, [*earlier_rewinds, this_rewind])
        remove_later_steps(run_dir, resume_step)
    except OSError as error:
        with contextlib.suppress(OSError):
            if read_rewinds(run_dir) != earlier_rewinds:
                write_json(run_dir / REWINDS, earlier_rewinds)
        raise CannotRewind(f"cannot write to {run_dir}: {error.strerror}") from None
    return resume_step
