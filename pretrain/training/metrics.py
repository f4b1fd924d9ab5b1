"""metrics.jsonl and TensorBoard files that stay complete over any number of restarts."""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.utils.console import print_now
from data_prep.utils.files import write_text
from pretrain.run_folder import parse_metrics_line, warn_about_corrupt_lines

NEWLINE = b"\n"
EVENTS = "events.out.tfevents."
"""Beginning of the names of TensorBoard files."""


class Metrics:
    """The writer of metrics.jsonl and TensorBoard files, used by rank 0 of the training run only.

    A run that resumes from `step` removes everything that was written after that step, so no step is repeated or
    missing. If the disk is full, values are kept in memory and written once the disk has room. The loss `terms` share a
    chart in TensorBoard.
    """

    def __init__(self, run_dir: Path, step: int, tensorboard: bool, terms: Sequence[str]):
        path = run_dir / "metrics.jsonl"
        if path.exists():
            # a kill may truncate the last line
            *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
            parsed = [parse_metrics_line(line) for line in lines]
            corrupt = [number for number, values in enumerate(parsed, 1) if values is None]
            warn_about_corrupt_lines(path, corrupt, "removed")
            earlier_lines = [
                line
                for line, values in zip(lines, parsed, strict=True)
                if values is not None and values["step"] <= step
            ]
            write_text(path, "".join(line + "\n" for line in earlier_lines))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (stays open during the run)
        self._unwritten = b""
        self._terms = terms
        self._folder = run_dir / "tensorboard" / "train" if tensorboard else None
        self._writer: Any = None
        self._unflushed: list[tuple[int, dict[str, float]]] = []
        if self._folder is not None:
            self._open(step + 1)

    def write(self, progress: dict[str, float], values: dict[str, float]) -> None:
        """Write the values of a step with the progress counters. In JSON, a value that is not finite is null."""
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._unwritten += (json.dumps(progress | finite) + "\n").encode()
        self._flush_lines()
        if self._folder is not None:
            self._unflushed.append((int(progress["step"]), values))
            self._add(self._unflushed[-1:])

    def flush(self) -> None:
        """Write everything to disk. Call this before each checkpoint."""
        self._flush_lines()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        if self._folder is not None:
            self._flush_events()

    def close(self) -> None:
        """Flush and close all files."""
        self.flush()
        self._file.close()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    def _flush_lines(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            print_now(
                f"WARNING: cannot write metrics.jsonl ({error.strerror}); keeping {self._unwritten.count(NEWLINE)} "
                "lines in memory until the disk has room"
            )

    def _open(self, step: int) -> None:
        assert self._folder is not None
        _backdate(self._folder)
        self._writer = open_tensorboard(self._folder, purge_step=step)
        _silence_threads()
        charts = {}
        for prefix in ("loss", "validation/loss"):
            tags = [f"{prefix}/{term}" for term in self._terms]
            charts[" and ".join(tags)] = ["Multiline", [f"^{tag}$" for tag in tags]]
        self._writer.add_custom_scalars({"loss": charts})

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

    def _flush_events(self) -> None:
        if self._writer is None and self._unflushed:
            self._add(self._unflushed)
        try:
            if self._writer is not None:
                self._writer.flush()
                self._unflushed.clear()
        except OSError as error:
            self._writer = None
            print_now(
                f"WARNING: cannot write {self._folder} ({error.strerror}); keeping {len(self._unflushed)} steps in "
                "memory until the disk has room"
            )


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
