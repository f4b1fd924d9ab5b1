"""The interface of hooks: parts of a run that act at its events, such as loggers and validation."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

Ending = Literal["finished", "resumable", "failed", "crashed"]
"""Ending of the training. failed: all ranks raise the same UserError. crashed: only this rank raises an error."""


class StopTraining(Exception):
    """Raised by a hook on all ranks together: the run ends without another checkpoint, and can be resumed."""


@dataclass
class StepReport:
    """A trained step, as hooks see it."""

    values: dict[str, float] = field(default_factory=dict)
    """Values of the step by metric tag. A hook may add values for the hooks after it."""
    progress_line: bool = False
    """Whether the step has a progress line (monitor.log_every). Loggers use `values` instead: skipped steps have values
    too, and a step whose validation was interrupted gets its values only in the next launch."""
    spike_score: float = 0.0
    """Highest spike score of the loss terms."""
    repeated: bool = False
    """Whether the previous launch trained this step, but a signal interrupted its validation."""


class Hook:
    """A part of a run that acts at its events. Every method does nothing by default.

    All ranks call a method at the same point of the run, hook by hook in the order of `Trainer.hooks`. Loggers exist on
    the main rank only, so they must not communicate with other ranks. An exception of a hook ends the run.
    """

    def start(self, run: "Trainer") -> None:
        """Act before the first step of a launch; `run.progress.step` is the last trained step."""

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """Act after a step. Raises StopTraining to end the run."""

    def after_validation(self, run: "Trainer", values: dict[str, float]) -> None:
        """Act on the values of a validation, by metric tag."""

    def before_save(self, run: "Trainer") -> None:
        """Act before the checkpoint of the step `run.progress.step` is saved."""

    def after_save(self, run: "Trainer", step: int) -> None:
        """Act when the checkpoint of `step` is complete; later steps may have been trained in the meantime."""

    def end(self, run: "Trainer", ending: Ending) -> None:
        """Act after the last step of a launch, also if an error ends it, but only if `start` has returned."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must contain to resume this hook, JSON-serializable, with unique keys."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint. The keys of this hook are absent if it did not exist at that time."""
