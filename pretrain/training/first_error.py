"""Of all ranks that fail, which one was the first: the others only lose their connection to it."""

import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

from pretrain.training.distributed import World
from pretrain.training.rank_store import StoreUnreachable
from pretrain.training.watchdog import HEARTBEAT_INTERVAL, last_heartbeats

SEEN = 4 * HEARTBEAT_INTERVAL
"""Seconds in which every rank that fails has noted it, and every one that lives has noted a beat."""
PEER_IS_GONE = re.compile("gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)


@dataclass
class Failure:
    """What ended a rank."""

    order: int
    """Which one to fail it was, from 1 on."""
    rank: int
    host: str
    step: int
    what: str
    trace: str
    peer_is_gone: bool
    """It only lost its connection to another rank."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} at step {self.step}: {self.what}"


def report_first_error(world: World, error: Exception, step: int, tell: Callable[[str], None]) -> str | None:
    """Report the first rank that failed. Each rank that fails calls this: one of them reports and returns that line, the others return None.

    A rank that was killed leaves no note: it is the one whose watchdog does not beat any more.
    """
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(PEER_IS_GONE.search(what)))
    rank_store = world.rank_store
    assert rank_store is not None  # there are other ranks
    try:
        order, trace = rank_store.count("failures"), "".join(traceback.format_exception(error))
        mine = Failure(order, world.rank, world.hosts[world.rank], step, what, trace, lost)
        rank_store.put(_key(world.rank), asdict(mine))
        before = last_heartbeats(rank_store, world.hosts)
        time.sleep(SEEN)
        failures = [
            Failure(**values) for values in rank_store.get([_key(rank) for rank in range(world.size)]) if values
        ]
        silent = [
            now
            for now, earlier in zip(last_heartbeats(rank_store, world.hosts), before, strict=True)
            if now.beats == earlier.beats
        ]
    except StoreUnreachable:
        line = f"error: rank 0 on {world.hosts[0]} does not answer; rank {world.rank} on {world.hosts[world.rank]} ended at step {step} with {what}"
        tell(line)
        return line
    if world.rank != min(failure.rank for failure in failures):
        return None
    failed = {failure.rank for failure in failures}
    gone = [f"rank {beat.rank} on {beat.host} at step {beat.step}" for beat in silent if beat.rank not in failed]
    first = min(failures, key=lambda failure: (failure.peer_is_gone, failure.order))
    if gone and first.peer_is_gone:
        line = (
            f"error: without a sign of life: {', '.join(gone[:8])}{' and others' if len(gone) > 8 else ''}; "
            f"the first to notice was rank {first.rank} on {first.host} at step {first.step}"
        )
    else:
        tell(first.trace.rstrip())
        line = f"error: the first to fail was {first}"
    tell(line)
    return line


def _key(rank: int) -> str:
    return f"failure/{rank}"
