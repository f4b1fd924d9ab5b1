"""The lines that a run logs about its progress."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from data_prep.utils.console import duration
from pretrain.planning.budget import Progress
from pretrain.training.hooks import Hook, StepReport

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

logger = logging.getLogger(__name__)

EMBEDDING_GROUPS = {"embedding": "", "embedding_in_context": "in context: "}
"""Groups of embedding monitors in the metric tags, and their names in the line of a validation."""


class ProgressLines(Hook):
    """A hook that logs a line for some steps (monitor.log_every), for each validation, and if terms are switched."""

    def start(self, run: "Trainer") -> None:
        """Note whether the terms other than lm are switched off in the next step."""
        self._off = _is_off(run)

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """Log the progress line of a step, and whether the terms are switched in the next step."""
        if report.progress_line:
            logger.info(progress_line(run.progress, run.fraction, report.values, run.objective.units))
        was_off, self._off = self._off, _is_off(run)
        if self._off != was_off and not run.at_end:
            state = "off" if self._off else "on"
            logger.info(f"the terms other than lm are switched {state} from step {run.progress.step + 1} on")

    def after_validation(self, run: "Trainer", values: dict[str, float]) -> None:
        """Log the line of a validation."""
        logger.info(validation_line(run.progress, values, run.objective.units))


def _is_off(run: "Trainer") -> bool:
    return run.config.objective.record_dropout(run.fraction) == 1


def progress_line(progress: Progress, fraction: float, values: dict[str, float], terms: Iterable[str]) -> str:
    """Return the line of a logged step: progress, loss terms, cosines of the embeddings, speed, and time left."""
    parts = [f"step {progress.step:>6}", f"{fraction:>4.0%}"]
    parts += [f"{term} {values[f'loss/{term}']:.4f}" for term in terms if f"loss/{term}" in values]
    for group in EMBEDDING_GROUPS:
        if f"{group}/shuffled_cosine" in values:
            parts.append(f"cos {values[f'{group}/paired_cosine']:.2f}/{values[f'{group}/shuffled_cosine']:.2f}")
    parts += [
        f"lr {values['optimizer/lr']:.2e}",
        f"|g| {values['optimizer/grad_norm']:.2f}",
        f"{values['throughput/tokens_per_second']:,.0f} tokens/s",
    ]
    if "throughput/mfu" in values:
        parts.append(f"mfu {values['throughput/mfu']:.0%}")
    parts.append(
        f"{duration(progress.seconds / fraction * (1 - fraction))} left"
        if fraction < 1
        else f"done in {duration(progress.seconds)}"
    )
    return "  ".join(parts)


def validation_line(progress: Progress, values: dict[str, float], terms: Iterable[str]) -> str:
    """Return the line of a validation: loss terms and embedding monitors."""
    names = {f"validation/loss/{term}": term for term in terms}
    for group, where in EMBEDDING_GROUPS.items():
        names |= {
            f"validation/{group}/paired_cosine": f"{where}paired cosine",
            f"validation/{group}/shuffled_cosine": "shuffled",
            f"validation/{group}/retrieval_at_1": "retrieval@1",
            f"validation/{group}/effective_rank": "effective rank",
        }
    return f"validation at step {progress.step}: " + ", ".join(
        f"{name} {values[tag]:.4f}" for tag, name in names.items() if tag in values
    )
