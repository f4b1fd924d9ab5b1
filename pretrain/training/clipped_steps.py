"""The fraction of steps whose gradient was clipped."""

from typing import TYPE_CHECKING, Any

import torch

from pretrain.training.hooks import Hook, StepReport

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

UNREAD = 100
"""Largest number of gradient norms that stay on the device before they are read."""


class ClippedSteps(Hook):
    """A hook that adds the fraction of clipped steps since the last progress line, among the steps with an update.

    Reading a norm would make the host wait for the device, so the norms of several steps are read together.
    """

    def __init__(self) -> None:
        self._updates = self._clipped = self._skipped_before = 0
        self._norms: list[torch.Tensor | float] = []
        self._limit = 0.0

    def start(self, run: "Trainer") -> None:
        """Note the limit and the number of steps without an update."""
        self._limit, self._skipped_before = run.config.train.gradient_clipping, run.progress.skipped_steps

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """Count the step, and add the fraction if the step has a progress line."""
        if report.repeated:  # the values already have the fraction
            return
        if run.progress.skipped_steps == self._skipped_before:
            self._norms.append(run.engine.get_global_grad_norm())
        self._skipped_before = run.progress.skipped_steps
        if report.progress_line or len(self._norms) >= UNREAD:
            self._read()
        if report.progress_line and self._updates:
            report.values["optimizer/clipped_fraction"] = self._clipped / self._updates
            self._updates = self._clipped = 0

    def _read(self) -> None:
        self._updates += len(self._norms)
        self._clipped += sum(float(norm) > self._limit for norm in self._norms)
        self._norms.clear()

    def state(self) -> dict[str, Any]:
        """Return the counts since the last progress line."""
        self._read()
        return {"clipped_steps": [self._clipped, self._updates]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the counts, which checkpoints of earlier versions do not contain."""
        self._clipped, self._updates = state.get("clipped_steps", (0, 0))
