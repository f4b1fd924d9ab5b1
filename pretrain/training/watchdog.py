"""A run that hangs ends, and its log names the rank, host and step that is missing.

A rank that is stopped, dead on another node, or lost in a loop leaves the others waiting in a collective, silently, for as long as its timeout
is, which must suit the slowest start. So every rank has a thread that notes in the ranks' common store how far it is, and looks there once its
own training thread has not moved for too long. It also watches the notes of the next rank all the time: a rank whose process has died ends the
run sooner, also under NCCL, where the others do not notice.
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

from pretrain.training import heartbeat_killer
from pretrain.training.rank_store import STORE_TIMEOUT, LocalRankStore, RankStore, StoreUnreachable

HEARTBEAT_INTERVAL = 1.0
"""Seconds between two notes."""
SILENT = 10
"""Beats without a note: the rank does not run, or cannot be reached."""
SHARE_OF_THE_DEAD = 1 / 10
"""Fraction of monitor.hang_seconds after which a rank without a heartbeat is taken for dead: a minute by default; at least SILENT beats."""
PATIENCE = 15.0
"""Seconds that a rank which does not run is left beyond those in which the others end."""
SLOW = 1800.0
"""Seconds that the first step may take, or a save."""
EXIT_CODE_HUNG = 70
"""Exit code."""
STORE_GONE = "rank 0, or the launcher, which keep the ranks' common store, do not answer"


@dataclass
class Beat:
    """How far a rank is."""

    rank: int
    host: str
    beats: int = 0
    moves: int = 0
    """Times that its training thread has said so."""
    step: int = 0
    ended: bool = False
    """The rank has done its work, and its process may end."""


def last_heartbeats(
    rank_store: RankStore | LocalRankStore, hosts: tuple[str, ...], ranks: list[int] | None = None
) -> list[Beat]:
    """Return the last beat of each rank, or of these, of none where there was none. Raises Unreachable."""
    ranks = list(range(len(hosts))) if ranks is None else ranks
    found = rank_store.get([_key(rank) for rank in ranks])
    return [Beat(**values) if values else Beat(rank, hosts[rank]) for rank, values in zip(ranks, found, strict=True)]


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _named(beat: Beat) -> str:
    return f"rank {beat.rank} on {beat.host} at step {beat.step}"


class Watchdog:
    """The thread of one rank; `end` is called with the line that names who is missing, on the rank that finds out first, and the process ends."""

    def __init__(
        self,
        rank_store: RankStore | LocalRankStore,
        rank: int,
        hosts: tuple[str, ...],
        seconds: float,
        end: Callable[[str], None],
    ):
        self._rank_store, self._hosts, self._seconds, self._end = rank_store, hosts, seconds, end
        self._mine = Beat(rank, hosts[rank], beats=1)  # a rank that has noted nothing yet has 0
        self._next = (rank + 1) % len(hosts)
        self._next_beats, self._silence = 0, 0.0
        self._limit = SLOW
        self._stop = threading.Event()
        self._guard = subprocess.Popen(
            [sys.executable, "-S", heartbeat_killer.__file__, str(os.getpid())], stdin=subprocess.PIPE
        )
        assert self._guard.stdin is not None
        self._to_guard = self._guard.stdin.fileno()
        os.set_blocking(self._to_guard, False)
        with contextlib.suppress(StoreUnreachable):  # the thread notes again
            self._note()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def report_progress(self, step: int) -> None:
        """The training thread works at this step."""
        self._mine.step = step
        self._mine.moves += 1

    def first_step_done(self) -> None:
        """The first step is done: from here on a step takes what it takes."""
        if self._limit != self._seconds:
            self._limit = self._seconds
            self._show_life()

    @contextmanager
    def extended_timeout(self) -> Iterator[None]:
        """What may take as long as the start did."""
        limit, self._limit = self._limit, SLOW
        try:
            yield
        finally:
            self._mine.moves += 1
            self._limit = limit
            self._show_life()

    def close(self, ended: bool) -> None:
        """Watch no more. `ended`: so do the other ranks, which must not take this one for dead."""
        self._stop.set()
        self._thread.join(STORE_TIMEOUT + HEARTBEAT_INTERVAL)
        self._mine.ended = ended
        with contextlib.suppress(StoreUnreachable):
            self._note()
        self._guard.kill()
        self._guard.wait()

    def _watch(self) -> None:
        moves, since, asked = -1, 0.0, 0.0
        before: list[Beat] | None = None
        while not self._stop.wait(HEARTBEAT_INTERVAL):
            if self._mine.moves != moves:
                moves, since, before = self._mine.moves, time.monotonic(), None
            self._mine.beats += 1
            began = time.monotonic()
            waited = began - since
            try:
                self._note()
                dead = self._dead()
                if waited > self._limit - SILENT * HEARTBEAT_INTERVAL and before is None:
                    before, asked = self._beats(), waited
                late = waited > self._limit and waited - asked >= (SILENT - 1) * HEARTBEAT_INTERVAL
                missing = self._missing(before, self._beats()) if late and before is not None else ""
            except StoreUnreachable:
                dead = (
                    STORE_GONE
                    if self._count_silence(
                        min(time.monotonic() - began, STORE_TIMEOUT + HEARTBEAT_INTERVAL) / HEARTBEAT_INTERVAL
                    )
                    else ""
                )
                missing = STORE_GONE if waited > self._limit else ""
            if missing and self._mine.moves == moves and not self._stop.is_set():
                self._tell(f"the run hangs since {waited:.0f} s: {missing}")
            if dead and not self._stop.is_set():
                self._tell(f"{dead} for {self._silence * HEARTBEAT_INTERVAL:.0f} s")

    def _show_life(self) -> None:
        """Tell the guard, and for how long it may hear nothing now."""
        with contextlib.suppress(OSError):  # the guard has ended
            os.write(
                self._to_guard,
                b"%f\n"
                % ((self._limit if len(self._hosts) == 1 else self._dead_beats * HEARTBEAT_INTERVAL) + PATIENCE),
            )

    def _note(self) -> None:
        self._show_life()
        self._rank_store.put(_key(self._mine.rank), asdict(self._mine))

    def _dead(self) -> str:
        """Return what to say of the next rank if it has noted nothing for so long that it must be dead, else nothing."""
        peer = last_heartbeats(self._rank_store, self._hosts, [self._next])[0]
        silent = peer.rank != self._mine.rank and not peer.ended and 0 < peer.beats == self._next_beats
        self._next_beats = peer.beats
        return f"{_named(peer)} has given no sign of life" if self._count_silence(float(silent)) else ""

    def _count_silence(self, beats: float) -> bool:
        """Add beats without an answer; 0 starts again. Beats of this rank, not seconds: a machine that was suspended has missed none."""
        self._silence = self._silence + beats if beats else 0.0
        return self._silence >= self._dead_beats

    @property
    def _dead_beats(self) -> float:
        """Beats without a note after which the other ranks end the run."""
        return max(SILENT, SHARE_OF_THE_DEAD * self._seconds / HEARTBEAT_INTERVAL)

    def _missing(self, before: list[Beat], now: list[Beat]) -> str:
        """Who the others wait for, from what the ranks noted SILENT beats ago and what they have noted since."""
        silent = [beat for beat, earlier in zip(now, before, strict=True) if beat.beats == earlier.beats]
        behind = [beat for beat in now if beat.step == min(other.step for other in now)]
        late = silent or (behind if len(behind) < len(now) else [])
        if len(now) == 1:
            return f"the process on {now[0].host} is not getting past step {now[0].step}"
        if not late:
            return f"all {len(now)} ranks wait in step {self._mine.step}"
        named = ", ".join(map(_named, late[:8]))
        return (
            f"{named}{' and others' if len(late) > 8 else ''} {'without a sign of life' if silent else 'not going on'}"
        )

    def _beats(self) -> list[Beat]:
        return last_heartbeats(self._rank_store, self._hosts)

    def _tell(self, line: str) -> None:
        """End this process; the first rank to come here says why."""
        try:
            first = self._rank_store.count("hung") == 1
        except StoreUnreachable:
            first = True
        if first:
            self._end(line)
        else:
            time.sleep(HEARTBEAT_INTERVAL)  # so that its line is there before the launcher sees a process end
        os._exit(EXIT_CODE_HUNG)
