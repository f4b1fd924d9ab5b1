"""The logger that writes TensorBoard files, which stay complete over any number of restarts."""

import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.objectives.base import Z_LOSS
from pretrain.run_folder import LAYERS
from pretrain.training.hooks import Ending, Hook, StepReport

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

logger = logging.getLogger(__name__)

EVENTS = "events.out.tfevents."
"""Beginning of the names of TensorBoard files."""


class Logger(Hook):
    """A hook that writes the values of each step, and charts that all loss terms and all layers share.

    A run that resumes makes TensorBoard drop the later steps, so no step is repeated or missing. If the disk is full,
    values are kept in memory and written once the disk has room.
    """

    def __init__(self) -> None:
        self._folder = Path()
        self._terms: list[str] = []
        self._has_layers = False
        self._writer: Any = None
        self._unflushed: list[tuple[int, dict[str, float]]] = []

    def start(self, run: "Trainer") -> None:
        """Open a file for the steps of this launch."""
        self._folder = run.config.run_dir / "tensorboard" / "train"
        self._terms = [term for term in run.objective.units if term != Z_LOSS]  # its scale is a different one
        self._has_layers = bool(run.config.monitor.layers_every)
        self._open(run.last_logged_step + 1)

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """Write the values of a step."""
        if report.values:
            self._unflushed.append((run.progress.step, dict(report.values)))
            self._add(self._unflushed[-1:])

    def before_save(self, run: "Trainer") -> None:
        """Write everything to disk: a run that resumes from the checkpoint needs all values before it."""
        if self._writer is None and self._unflushed:
            self._add(self._unflushed)
        try:
            if self._writer is not None:
                self._writer.flush()
                self._unflushed.clear()
        except OSError as error:
            self._writer = None
            logger.warning(
                f"cannot write {self._folder} ({error.strerror}); keeping {len(self._unflushed)} steps in memory until "
                "the disk has room"
            )

    def end(self, run: "Trainer", ending: Ending) -> None:
        """Close the file."""
        self.before_save(run)
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    def _open(self, step: int) -> None:
        _backdate(self._folder)
        self._writer = open_tensorboard(self._folder, purge_step=step)
        _silence_threads()
        charts = {}
        for prefix in ("loss", "validation/loss"):
            tags = [f"{prefix}/{term}" for term in self._terms]
            charts[" and ".join(tags)] = ["Multiline", [f"^{tag}$" for tag in tags]]
        layers = {
            measure: ["Multiline", [f"^{LAYERS}{measure}/"]]
            for measure in ("gradient_norm", "activation_rms")
            if self._has_layers
        }
        self._writer.add_custom_scalars({"loss": charts} | ({"layers": layers} if layers else {}))

    def _add(self, entries: list[tuple[int, dict[str, float]]]) -> None:
        try:
            if self._writer is None:  # the previous writer failed and lost its unwritten values
                entries = self._unflushed
                self._open(entries[0][0])
            for step, values in entries:
                for tag, value in values.items():
                    self._writer.add_scalar(tag, value, step)
        except OSError:
            self._writer = None


def _silence_threads() -> None:
    """Hide tracebacks of TensorBoard's writer thread, because the next call raises its error anyway."""
    default_hook = threading.excepthook
    if default_hook is threading.__excepthook__:
        threading.excepthook = lambda error: (
            None if type(error.thread).__name__ == "_AsyncWriterThread" else default_hook(error)
        )


def _backdate(folder: Path) -> None:
    """Rename the event files of earlier launches to sort them before the next file, even if the clock was set back.

    TensorBoard reads the files of a folder in the order of their names, and a name begins with the time of creation.
    The file of a new launch makes TensorBoard drop the steps after the checkpoint. The renamed files keep their order.
    """
    files = sorted(folder.glob(f"{EVENTS}*"))
    for number, path in enumerate(files, int(time.time()) - len(files)):
        created, _, rest = path.name.removeprefix(EVENTS).partition(".")
        if created.isdecimal() and int(created) > number:
            path.rename(folder / f"{EVENTS}{number:010d}.{rest}")


def open_tensorboard(folder: Path, **options: Any):
    """Return a TensorBoard writer. The import is local because it takes seconds."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), **options)
