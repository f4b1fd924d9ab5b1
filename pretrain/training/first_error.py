"""Detection of the first rank that failed. Its peers fail later, because they lose their connection to that rank."""

import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

from pretrain.training.distributed import World
from pretrain.training.rank_store import StoreUnreachable
from pretrain.training.watchdog import HEARTBEAT_INTERVAL, last_heartbeats

SETTLE_SECONDS = 4 * HEARTBEAT_INTERVAL
"""Seconds to wait until every failing rank has stored its failure and every live rank has stored another heartbeat."""
PEER_IS_GONE = re.compile("gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)


@dataclass
class Failure:
    """The failure of a rank."""

    order: int
    """Position of this failure among the failures of all ranks, counted from 1."""
    rank: int
    host: str
    step: int
    what: str
    trace: str
    peer_is_gone: bool
    """Whether the rank only lost its connection to a peer."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} at step {self.step}: {self.what}"


def report_first_error(world: World, error: Exception, step: int, report: Callable[[str], None]) -> str | None:
    """Report the first rank that failed.

    Each failing rank calls this. The lowest of them passes a message on the first failure to `report`, which prints it,
    and returns the message; its peers return None. A caller that cannot reach the store reports that instead. A killed
    rank cannot store its failure, so missing heartbeats identify it.
    """
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    peer_is_gone = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(PEER_IS_GONE.search(what))
    )
    rank_store = world.rank_store
    assert rank_store is not None  # the run has several ranks
    try:
        order = rank_store.count("failures")
        trace = "".join(traceback.format_exception(error))
        failure = Failure(order, world.rank, world.hosts[world.rank], step, what, trace, peer_is_gone)
        rank_store.put(_key(world.rank), asdict(failure))
        before = last_heartbeats(rank_store, world.hosts)
        time.sleep(SETTLE_SECONDS)
        failures = [
            Failure(**values) for values in rank_store.get([_key(rank) for rank in range(world.size)]) if values
        ]
        silent = [
            now
            for now, earlier in zip(last_heartbeats(rank_store, world.hosts), before, strict=True)
            if now.beats == earlier.beats
        ]
    except StoreUnreachable:
        line = (
            f"error: rank 0 on {world.hosts[0]} does not answer; rank {world.rank} on {world.hosts[world.rank]} ended "
            f"at step {step} with {what}"
        )
        report(line)
        return line
    if world.rank != min(failure.rank for failure in failures):
        return None
    failed = {failure.rank for failure in failures}
    gone = [f"rank {beat.rank} on {beat.host} at step {beat.step}" for beat in silent if beat.rank not in failed]
    first = min(failures, key=lambda failure: (failure.peer_is_gone, failure.order))
    if gone and first.peer_is_gone:
        line = (
            f"error: no heartbeat from {', '.join(gone[:8])}{' and others' * (len(gone) > 8)}; "
            f"first noticed by rank {first.rank} on {first.host} at step {first.step}"
        )
    else:
        report(first.trace.rstrip())
        line = f"error: the first to fail was {first}"
    report(line)
    return line


def _key(rank: int) -> str:
    return f"failure/{rank}"
