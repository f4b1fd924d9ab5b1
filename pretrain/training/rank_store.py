"""What the ranks leave each other outside of collectives, which hang or break together with a rank."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoAnswer
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")
STORE_TIMEOUT = 10.0
"""Seconds that the store has to answer in."""


class StoreUnreachable(Exception):
    """The common store does not answer: rank 0, or the launcher, which keep it, is gone."""


class RankStore:
    """JSON values by key in the ranks' common store, with a connection of its own. Every call may raise Unreachable."""

    def __init__(self, store: dist.Store):
        self._store = store.clone()  # type: ignore[attr-defined]  # not in the stubs of torch
        self._calls = ThreadPoolExecutor(1, "notes")  # a store on a node that is gone may block for ever

    def put(self, key: str, value: Any) -> None:
        """Store a value under a key."""
        self._ask(lambda: self._store.set(key, json.dumps(value)))

    def get(self, keys: list[str]) -> list[Any]:
        """None for a key that was not put."""
        return self._ask(
            lambda: [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]
        )

    def count(self, key: str) -> int:
        """How often this was called for the key, by all ranks together."""
        return self._ask(lambda: self._store.add(key, 1))

    def _ask(self, call: Callable[[], Result]) -> Result:
        try:
            return self._calls.submit(call).result(STORE_TIMEOUT)
        except (NoAnswer, RuntimeError):
            raise StoreUnreachable from None


class LocalRankStore:
    """The same for a single rank, which has no common store."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def put(self, key: str, value: Any) -> None:
        """Store a value under a key."""
        self._values[key] = value

    def get(self, keys: list[str]) -> list[Any]:
        """Return the values of keys, None for a key that was not put."""
        return [self._values.get(key) for key in keys]

    def count(self, key: str) -> int:
        """Return how often this was called for the key."""
        self._values[key] = self._values.get(key, 0) + 1
        return self._values[key]
