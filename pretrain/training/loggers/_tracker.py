"""The common part of the loggers that send values to an experiment tracker.

A run is one entry of a tracker. The id of the entry is stored in the run folder, so a resumed run continues its entry.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import queue
import threading
import uuid
from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from data_prep.utils.files import read_json_or_none, write_json
from pretrain.config import RunConfig
from pretrain.relevant_env import redact
from pretrain.run_folder import flat_values, list_steps, read_metrics, read_rewinds
from pretrain.training.hooks import Ending, Hook, StepReport

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

logger = logging.getLogger(__name__)

ENTRIES = "trackers"
"""Folder of the run folder with a file for each entry."""
CLOSE_SECONDS = 60.0
"""Longest time to wait at the end of a run until a tracker has received all values, in seconds."""
STOP_SECONDS = 15.0
"""Longest time to wait if the run was stopped or has failed: what ended it may not leave more time, in seconds."""
QUEUE_ROWS = 20_000
"""Largest number of rows that wait for a slow tracker."""
BATCH_ROWS = 100
"""Largest number of rows that are sent together."""
EVALUATION = "evaluation"
"""Name that is appended to a run's name for its entry with the evaluations."""


class Row(NamedTuple):
    """Values of one step, by metric tag."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Entry:
    """The entry of a tracker that a launch or an evaluation continues."""

    id: str
    """Unique id, chosen by this project."""
    name: str
    """Name that the tracker shows."""
    group: str
    """Name of the run, which the entries of its training and its evaluations share."""
    is_new: bool
    """Whether no earlier process has used this entry."""
    keep: int
    """Last step to keep. Later ones are sent again from the files of the run."""
    parameters: dict[str, Any]
    """Configuration of the run, and its environment with the git revision and the lineage of a branch."""


class Tracker(Hook):
    """A logger that sends the values of each step from a separate thread, so it cannot delay or end the run.

    After a failure it logs one warning and sends nothing more. The next launch sends the missing steps, which it reads
    from metrics.jsonl.
    """

    name: str
    """Name in monitor.loggers."""
    can_rewind = False
    """Whether the tracker can remove the last steps of an entry. Otherwise a rewind replaces the entry."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self._rows: queue.Queue[Row | Ending] = queue.Queue(QUEUE_ROWS)
        self._thread: threading.Thread | None = None
        self._failed = False

    @abstractmethod
    def load(self) -> None:
        """Import the library, which may take seconds. It must not use the network."""

    @abstractmethod
    def open(self, entry: Entry) -> int:
        """Open the entry and return the last step that it contains; -1 if there is none."""

    @abstractmethod
    def write(self, rows: list[Row]) -> None:
        """Send rows, in ascending order of their steps."""

    @abstractmethod
    def close(self, ending: Ending) -> None:
        """Wait until everything is sent, and mark the entry as ended."""

    def discard(self, entry_id: str, name: str) -> None:
        """Remove an entry that another one replaces."""

    def write_evaluations(self, results: list[dict[str, Any]]) -> None:
        """Send the evaluations that the entry of the run's evaluations lacks; `results` are all that are valid.

        A rewind makes evaluations invalid. They are removed from the entry, or the entry is replaced.
        """
        key, name = f"{self.name}-{EVALUATION}", f"{self.config.name}-{EVALUATION}"
        stored = read_entry(self.run_dir, key)
        digests = [hashlib.sha256(json.dumps(result).encode()).hexdigest()[:16] for result in results]
        sent = stored.get("sent", [])
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(sent, digests, strict=False))
        common = len(list(same))
        is_complete = common == len(sent) and not stored.get("sending")
        replaced = bool(stored) and not is_complete and not self.can_rewind
        first = 0 if replaced else common
        entry_id = new_id() if replaced or not stored else stored["id"]
        write_entry(self.run_dir, key, {"id": entry_id, "sent": digests[:first], "sending": True})
        self.open(self._entry(entry_id, name, is_new=replaced or not stored, keep=first))
        for position, result in enumerate(results[first:], first + 1):
            self.write([self.evaluation_row(position, result)])
        self.close("finished")
        write_entry(self.run_dir, key, {"id": entry_id, "sent": digests})
        if replaced:
            self.discard(stored["id"], name)

    def evaluation_row(self, position: int, result: dict[str, Any]) -> Row:
        """Return the row of an evaluation; `position` counts the valid results from 1 on."""
        return Row(result["step"], evaluation_values(result))

    def send_evaluations(self, results: list[dict[str, Any]]) -> None:
        """Send the evaluations of the run. A failure, or more than CLOSE_SECONDS, is a warning."""
        self._start_thread(lambda: self.write_evaluations(results))
        self._join_thread(CLOSE_SECONDS)

    def start(self, run: "Trainer") -> None:
        """Start the thread, which opens the entry and sends the steps that it lacks."""
        try:
            self._start(run.last_logged_step, run.counters())
        except OSError as error:
            self._fail(describe_error(error))

    def _start(self, last: int, counters: Collection[str]) -> None:
        rows = [
            Row(line["step"], {tag: math.nan if v is None else v for tag, v in line.items() if tag not in counters})
            for line in map(flat_values, read_metrics(self.run_dir))
            if line["step"] <= last
        ]
        stored = read_entry(self.run_dir, self.name)
        state = {"id": new_id(), "replaces": []} | stored | {"rewinds": len(read_rewinds(self.run_dir))}
        replaced = bool(stored) and not self.can_rewind and stored["rewinds"] != state["rewinds"]
        if replaced:
            state |= {"id": new_id(), "replaces": [*stored["replaces"], stored["id"]]}
        write_entry(self.run_dir, self.name, state)
        # A kill can lose values that were sent shortly before it, so the steps since the last checkpoint but one are
        # sent again.
        saved = [step for step in list_steps(self.run_dir / "checkpoints") if step <= last]
        safe = saved[-2] if len(saved) > 1 else 0
        keep = max((row.step for row in rows if row.step <= safe), default=0)
        entry = self._entry(state["id"], self.config.name, replaced or not stored, keep)
        self._start_thread(lambda: self._send(entry, rows, state))

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """Queue the values of a step."""
        if report.values and not self._failed:
            finite = {tag: value if math.isfinite(value) else math.nan for tag, value in report.values.items()}
            self._put(Row(run.progress.step, finite))

    def end(self, run: "Trainer", ending: Ending) -> None:
        """Wait until the values are sent, but not longer than CLOSE_SECONDS or STOP_SECONDS."""
        self._put(ending)
        self._join_thread(CLOSE_SECONDS if ending == "finished" else STOP_SECONDS)

    def _entry(self, entry_id: str, name: str, is_new: bool, keep: int) -> Entry:
        parameters: dict[str, Any] = yaml.safe_load((self.run_dir / "config.yaml").read_text(encoding="utf-8"))
        environment = read_json_or_none(self.run_dir / "environment.json") or {}
        return Entry(entry_id, name, self.config.name, is_new, keep, parameters | {"environment": environment})

    def _start_thread(self, work: Callable[[], None]) -> None:
        def work_or_warn() -> None:
            try:
                work()
            except (Exception, SystemExit) as error:
                self._fail(describe_error(error))

        try:
            self.load()  # not in the thread: two threads that import at the same time can fail
        except Exception as error:
            self._fail(describe_error(error))
        else:
            self._thread = threading.Thread(target=work_or_warn, name=self.name, daemon=True)
            self._thread.start()

    def _join_thread(self, seconds: float) -> None:
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._fail(f"it did not receive all values within {seconds:.0f} s")

    def _send(self, entry: Entry, rows: list[Row], state: dict[str, Any]) -> None:
        """Open an entry, and send the rows that it lacks and then the rows of the queue until the launch ends."""
        present = self.open(entry)
        missing = [row for row in rows if row.step > present]
        for first in range(0, len(missing), BATCH_ROWS):
            self.write(missing[first : first + BATCH_ROWS])
        if state["replaces"]:
            for replaced_id in state["replaces"]:
                self.discard(replaced_id, entry.name)
            write_entry(self.run_dir, self.name, state | {"replaces": []})
        ending = None
        while ending is None:
            batch, ending = self._take()
            if new := [row for row in batch if row.step > present]:
                self.write(new)
        self.close(ending)

    def _take(self) -> tuple[list[Row], Ending | None]:
        """Wait for a row; return all rows that are available, and the ending if it is one of them."""
        rows: list[Row] = []
        item = self._rows.get()
        while isinstance(item, Row):
            rows.append(item)
            if len(rows) == BATCH_ROWS or self._rows.empty():
                return rows, None
            item = self._rows.get()
        return rows, item

    def _put(self, item: Row | Ending) -> None:
        try:
            self._rows.put_nowait(item)
        except queue.Full:
            self._fail(f"more than {QUEUE_ROWS:,} steps wait to be sent")

    def _fail(self, problem: str) -> None:
        if not self._failed:
            self._failed = True
            logger.warning(
                f"the logger {self.name} failed ({problem}) and is switched off; metrics.jsonl and "
                "evaluation/results.jsonl have all values, and the next launch or evaluation sends the missing ones"
            )


def evaluation_values(result: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of an evaluation by metric tag."""
    return {f"evaluation/{result['task']}/{metric}": value for metric, value in result["metrics"].items()}


def new_id() -> str:
    """Return an id for an entry."""
    return uuid.uuid4().hex[:12]


def read_entry(run_dir: Path, name: str) -> dict[str, Any]:
    """Return what the run folder stores about an entry; empty if there is none."""
    entry: dict[str, Any] = read_json_or_none(run_dir / ENTRIES / f"{name}.json") or {}
    return entry


def write_entry(run_dir: Path, name: str, values: dict[str, Any]) -> None:
    """Store an entry in the run folder."""
    (run_dir / ENTRIES).mkdir(exist_ok=True)
    write_json(run_dir / ENTRIES / f"{name}.json", values)


def describe_error(error: BaseException) -> str:
    """Return an error in one line without secrets."""
    text = redact(" ".join(str(error).split()), os.environ)
    return f"{type(error).__name__}: {text[:300]}"
