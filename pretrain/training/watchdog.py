"""Detection of hanging runs: the run ends, and its log names the missing rank with its host and step.

If a rank is stopped, dead on another node or stuck in a loop, its peers wait silently in a collective until its
timeout. That timeout must be long enough for the slowest startup. Every rank therefore has a watchdog thread, which
stores the rank's progress as heartbeats in the ranks' common store. If the training thread of the rank makes no
progress for too long, the watchdog reads the heartbeats of all ranks. It also watches the heartbeats of the next rank
all the time. A dead process thus ends the run sooner, even under NCCL, where the peers do not notice.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pretrain.training import heartbeat_killer
from pretrain.training.hooks import Ending, Hook, StepReport
from pretrain.training.rank_store import STORE_TIMEOUT, LocalRankStore, RankStore, StoreUnreachable

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

HEARTBEAT_INTERVAL = 1.0
"""Time between two heartbeats, in seconds."""
MIN_MISSED_BEATS = 10
"""Number of missed heartbeats after which a rank counts as stopped or unreachable."""
DEAD_FRACTION = 1 / 10
"""Fraction of monitor.hang_seconds after which a rank without a heartbeat counts as dead: a minute by default, and at
least MIN_MISSED_BEATS heartbeats."""
KILL_DELAY = 15.0
"""Time after which a stopped rank is killed, counted from the end of its peers, in seconds."""
SLOW_LIMIT = 1800.0
"""Time allowed for the first step or for a save, in seconds."""
EXIT_CODE_HUNG = 70
"""Exit code of a rank that ends because the run hangs."""
STORE_GONE = "rank 0 or the launcher, which hosts the ranks' common store, has not answered"


@dataclass
class Beat:
    """A heartbeat: the progress of a rank."""

    rank: int
    host: str
    beats: int = 0
    moves: int = 0
    """Number of progress reports from the rank's training thread."""
    step: int = 0
    ended: bool = False
    """Whether the rank has finished its work and its process may end."""


def last_heartbeats(
    rank_store: RankStore | LocalRankStore, hosts: tuple[str, ...], ranks: list[int] | None = None
) -> list[Beat]:
    """Return the last heartbeat of each of the `ranks`, by default all; `beats` is 0 for a rank that has stored none.

    Raises StoreUnreachable.
    """
    ranks = list(range(len(hosts))) if ranks is None else ranks
    stored = rank_store.get([_key(rank) for rank in ranks])
    return [Beat(**values) if values else Beat(rank, hosts[rank]) for rank, values in zip(ranks, stored, strict=True)]


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _describe(beat: Beat) -> str:
    return f"rank {beat.rank} on {beat.host} at step {beat.step}"


class Watchdog(Hook):
    """The watchdog thread of one rank.

    It watches from `begin` on, or from the start of the training. If the run hangs, the first rank that detects this
    calls `report` with a line that names the missing ranks. Then every rank that detects this ends its process.
    """

    def __init__(
        self,
        rank_store: RankStore | LocalRankStore,
        rank: int,
        hosts: tuple[str, ...],
        hang_seconds: float,
        report: Callable[[str], None],
    ):
        self._rank_store = rank_store
        self._hosts = hosts
        self._hang_seconds = hang_seconds
        self._report = report
        self._own_beat = Beat(rank, hosts[rank], beats=1)  # 0 means that nothing is stored yet
        self._next_rank = (rank + 1) % len(hosts)
        self._next_beats = 0
        self._silence = 0.0
        self._limit = SLOW_LIMIT
        self._stop = threading.Event()
        self._killer: subprocess.Popen[bytes] | None = None
        self._killer_input = -1
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def begin(self) -> None:
        """Start to watch."""
        self._killer = subprocess.Popen(
            [sys.executable, "-S", heartbeat_killer.__file__, str(os.getpid())], stdin=subprocess.PIPE
        )
        assert self._killer.stdin is not None
        self._killer_input = self._killer.stdin.fileno()
        os.set_blocking(self._killer_input, False)
        with contextlib.suppress(StoreUnreachable):  # the thread tries again
            self._store_heartbeat()
        self._thread.start()

    def start(self, run: "Trainer") -> None:
        """Start to watch, if that has not happened yet."""
        if self._killer is None:
            self.begin()

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """Apply monitor.hang_seconds from here on, because the slow first step is done."""
        if not report.repeated and self._limit != self._hang_seconds:
            self._limit = self._hang_seconds
            self._send_heartbeat()

    def report_progress(self, step: int) -> None:
        """Record that the training thread is making progress in `step`."""
        self._own_beat.step = step
        self._own_beat.moves += 1

    @contextmanager
    def extended_timeout(self) -> Iterator[None]:
        """Allow SLOW_LIMIT seconds without progress within this context, as for the first step."""
        limit, self._limit = self._limit, SLOW_LIMIT
        try:
            yield
        finally:
            self._own_beat.moves += 1
            self._limit = limit
            self._send_heartbeat()

    def end(self, run: "Trainer", ending: Ending) -> None:
        """Stop watching. Unless this rank has crashed, its peers must not treat it as dead."""
        self.close(ended=ending != "crashed")

    def close(self, ended: bool) -> None:
        """Stop watching. `ended` means that all ranks end together, so peers must not treat this rank as dead."""
        if self._killer is None:
            return
        self._stop.set()
        self._thread.join(STORE_TIMEOUT + HEARTBEAT_INTERVAL)
        self._own_beat.ended = ended
        with contextlib.suppress(StoreUnreachable):
            self._store_heartbeat()
        self._killer.kill()
        self._killer.wait()

    def _watch(self) -> None:
        moves = -1
        last_progress = 0.0
        compared_from = 0.0
        before: list[Beat] | None = None
        while not self._stop.wait(HEARTBEAT_INTERVAL):
            if self._own_beat.moves != moves:
                moves = self._own_beat.moves
                last_progress = time.monotonic()
                before = None
            self._own_beat.beats += 1
            began = time.monotonic()
            waited = began - last_progress
            try:
                self._store_heartbeat()
                dead = self._dead_peer()
                if waited > self._limit - MIN_MISSED_BEATS * HEARTBEAT_INTERVAL and before is None:
                    before = self._beats()
                    compared_from = waited
                late = waited > self._limit and waited - compared_from >= (MIN_MISSED_BEATS - 1) * HEARTBEAT_INTERVAL
                missing = self._missing(before, self._beats()) if late and before is not None else ""
            except StoreUnreachable:
                silent_seconds = min(time.monotonic() - began, STORE_TIMEOUT + HEARTBEAT_INTERVAL)
                dead = STORE_GONE if self._count_silence(silent_seconds / HEARTBEAT_INTERVAL) else ""
                missing = STORE_GONE if waited > self._limit else ""
            if missing and self._own_beat.moves == moves and not self._stop.is_set():
                self._end_process(f"the run has been hanging for {waited:.0f} s: {missing}")
            if dead and not self._stop.is_set():
                self._end_process(f"{dead} for {self._silence * HEARTBEAT_INTERVAL:.0f} s")

    def _send_heartbeat(self) -> None:
        """Send a heartbeat to the heartbeat killer, with the time until the next one is due."""
        timeout = self._limit if len(self._hosts) == 1 else self._max_missed_beats * HEARTBEAT_INTERVAL
        with contextlib.suppress(OSError):  # the killer has ended, or has not been started
            os.write(self._killer_input, b"%f\n" % (timeout + KILL_DELAY))

    def _store_heartbeat(self) -> None:
        self._send_heartbeat()
        self._rank_store.put(_key(self._own_beat.rank), asdict(self._own_beat))

    def _dead_peer(self) -> str:
        """Return a description of the next rank if it counts as dead, else an empty text."""
        peer = last_heartbeats(self._rank_store, self._hosts, [self._next_rank])[0]
        silent = peer.rank != self._own_beat.rank and not peer.ended and 0 < peer.beats == self._next_beats
        self._next_beats = peer.beats
        return f"{_describe(peer)} has sent no heartbeat" if self._count_silence(float(silent)) else ""

    def _count_silence(self, beats: float) -> bool:
        """Add missed heartbeats, with 0 resetting the count; return whether the limit is reached.

        Missed heartbeats are counted in heartbeats of this rank, not in seconds, so the time for which the machine is
        suspended is not counted.
        """
        self._silence = self._silence + beats if beats else 0.0
        return self._silence >= self._max_missed_beats

    @property
    def _max_missed_beats(self) -> float:
        """Number of missed heartbeats after which the peers end the run."""
        return max(MIN_MISSED_BEATS, DEAD_FRACTION * self._hang_seconds / HEARTBEAT_INTERVAL)

    def _missing(self, before: list[Beat], now: list[Beat]) -> str:
        """Return a description of the missing ranks from the heartbeats `now` and MIN_MISSED_BEATS `before`."""
        silent = [beat for beat, earlier in zip(now, before, strict=True) if beat.beats == earlier.beats]
        slowest = [beat for beat in now if beat.step == min(other.step for other in now)]
        late = silent or (slowest if len(slowest) < len(now) else [])
        if len(now) == 1:
            return f"the process on {now[0].host} is not getting past step {now[0].step}"
        if not late:
            return f"all {len(now)} ranks are waiting in step {self._own_beat.step}"
        named = ", ".join(map(_describe, late[:8])) + " and others" * (len(late) > 8)
        return f"{named} {'without a heartbeat' if silent else 'not progressing'}"

    def _beats(self) -> list[Beat]:
        return last_heartbeats(self._rank_store, self._hosts)

    def _end_process(self, line: str) -> None:
        """End this process; the first rank that calls this reports `line`."""
        try:
            first = self._rank_store.count("hung") == 1
        except StoreUnreachable:
            first = True
        if first:
            self._report(line)
        else:
            # the reporting rank must print its line before the launcher sees a process end
            time.sleep(HEARTBEAT_INTERVAL)
        os._exit(EXIT_CODE_HUNG)
