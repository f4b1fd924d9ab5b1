"""A key-value store to exchange values between ranks without collectives, which hang or fail if any rank does."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoAnswer
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")
STORE_TIMEOUT = 10.0
"""Time within which the store must answer, in seconds."""


class StoreUnreachable(Exception):
    """An unanswered call to the common store: rank 0 or the launcher, which hosts the store, has ended."""


class RankStore:
    """JSON values in the ranks' common store, over a separate connection. Every call may raise StoreUnreachable."""

    def __init__(self, store: dist.Store):
        self._store = store.clone()  # type: ignore[attr-defined]  # not in the stubs of torch
        self._executor = ThreadPoolExecutor(1, "notes")  # a call to a store on a failed node may block forever

    def put(self, key: str, value: Any) -> None:
        """Store a value under a key."""
        self._call(lambda: self._store.set(key, json.dumps(value)))

    def get(self, keys: list[str]) -> list[Any]:
        """Return the values of keys, None for a key without a value."""
        return self._call(
            lambda: [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]
        )

    def count(self, key: str) -> int:
        """Increment a counter that all ranks share, and return its value."""
        return self._call(lambda: self._store.add(key, 1))

    def _call(self, call: Callable[[], Result]) -> Result:
        try:
            return self._executor.submit(call).result(STORE_TIMEOUT)
        except (NoAnswer, RuntimeError):
            raise StoreUnreachable from None


class LocalRankStore:
    """The counterpart of RankStore for a single rank, which has no common store."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def put(self, key: str, value: Any) -> None:
        """Store a value under a key."""
        self._values[key] = value

    def get(self, keys: list[str]) -> list[Any]:
        """Return the values of keys, None for a key without a value."""
        return [self._values.get(key) for key in keys]

    def count(self, key: str) -> int:
        """Increment a counter and return its value."""
        self._values[key] = self._values.get(key, 0) + 1
        return self._values[key]
