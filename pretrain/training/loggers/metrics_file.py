"""The logger that writes metrics.jsonl, which stays complete over any number of restarts."""

import contextlib
import json
import logging
import math
import os
from typing import TYPE_CHECKING, Any

from data_prep.utils.files import write_text
from pretrain.run_folder import LAYERS, parse_metrics_line, warn_about_corrupt_lines
from pretrain.training.hooks import Ending, Hook, StepReport

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

logger = logging.getLogger(__name__)

NEWLINE = b"\n"


class Logger(Hook):
    """A hook that writes one line for each step that has values.

    A run that resumes removes the lines of later steps, so no step is repeated or missing. If the disk is full, lines
    are kept in memory and written once the disk has room.
    """

    def __init__(self) -> None:
        self._file: Any = None
        self._unwritten = b""

    def start(self, run: "Trainer") -> None:
        """Open the file, without the lines of the steps that this launch repeats."""
        path = run.config.run_dir / "metrics.jsonl"
        if path.exists():
            # a kill may truncate the last line
            *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
            parsed = [parse_metrics_line(line) for line in lines]
            corrupt = [number for number, values in enumerate(parsed, 1) if values is None]
            warn_about_corrupt_lines(path, corrupt, "removed")
            earlier_lines = [
                line
                for line, values in zip(lines, parsed, strict=True)
                if values is not None and values["step"] <= run.last_logged_step
            ]
            write_text(path, "".join(line + "\n" for line in earlier_lines))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (stays open during the run)

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """Write the values of a step with the progress counters."""
        if report.values:
            self._unwritten += (json.dumps(run.counters() | line_values(report.values)) + "\n").encode()
            self._write()

    def before_save(self, run: "Trainer") -> None:
        """Write everything to disk: a run that resumes from the checkpoint needs all lines before it."""
        self._write()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def end(self, run: "Trainer", ending: Ending) -> None:
        """Close the file."""
        self.before_save(run)
        self._file.close()

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            logger.warning(
                f"cannot write metrics.jsonl ({error.strerror}); keeping {self._unwritten.count(NEWLINE)} lines in "
                "memory until the disk has room"
            )


def line_values(values: dict[str, float]) -> dict[str, Any]:
    """Return the values of a step as a line has them. In JSON, a value that is not finite is null.

    The values of the layers are objects with one entry for each part of the model, such as `layers/gradient_norm`, with
    four significant digits.
    """
    line: dict[str, Any] = {}
    for tag, value in values.items():
        finite = value if math.isfinite(value) else None
        if tag.startswith(LAYERS):
            measure, _, part = tag.rpartition("/")
            line.setdefault(measure, {})[part] = None if finite is None else float(f"{finite:.4g}")
        else:
            line[tag] = finite
    return line
