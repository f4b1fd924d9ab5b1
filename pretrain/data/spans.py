"""Spans of documents for Semantic Tube Prediction (arXiv 2602.22617).

A document has the positions 0 to n, and position 0 is its first token (BOS). A span consists of three stretches
(from, to). The loss compares the difference of hidden states over the first stretch with the sum of the differences
over the other two. Each form draws one span per document:

    three_points    s < r < t at random: (r, t) with (s, r)                          the paper's form
    sub_span        0 <= a < b <= n at random, not (0, n): (a, b) with (0, a), (b, n)  the form of the released code
    views           ends of the first and of the second view, e and f: (e, f) with (0, e)
"""

import numpy as np

from data_prep.layout import Layout
from data_prep.utils.ragged import splitmix64

STRETCHES = 3


def draw_spans(layout: Layout, starts: np.ndarray, segment_lengths: np.ndarray, random_bits: np.ndarray) -> np.ndarray:
    """Return the stretches of all documents that have spans, as (S, 3, 2) positions.

    `starts` (N, segments) are the first positions of the segments. `random_bits` (N,) uint64 contains a random number
    per record.
    """
    stretches = [np.zeros((0, STRETCHES, 2), np.int64)]
    for index, document in enumerate(layout.documents):
        lengths = segment_lengths[:, list(document)]
        if layout.spans == "views":
            if len(document) > 1:
                members = np.flatnonzero(lengths[:, 1])
                stretches.append(_views(lengths[members]) + starts[members, document[0]][:, None, None])
            continue
        last = lengths.sum(axis=1) - 1
        members = np.flatnonzero(last > 1)
        random = splitmix64(random_bits[members] + np.uint64(index))
        form = _three_points if layout.spans == "three_points" else _sub_span
        stretches.append(form(last[members], random) + starts[members, document[0]][:, None, None])
    return np.concatenate(stretches)


def _three_points(last: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Draw three different positions from 0 to `last`, uniformly: (N,), (N,) -> (N, 3, 2)."""
    points = np.empty((len(last), 3), np.int64)
    for number in range(3):
        point = _below(last + 1 - number, random, number)
        drawn = np.sort(points[:, :number], axis=1)
        for column in range(number):  # skip the positions that have been drawn, the smallest first
            point += point >= drawn[:, column]
        points[:, number] = point
    s, r, t = np.sort(points, axis=1).T
    return _stretches(r, t, s, r, r, r)


def _sub_span(last: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Draw two different positions from 0 to `last`, but not both ends, uniformly: (N,), (N,) -> (N, 3, 2)."""
    excluded = last * (last - 1) // 2  # the index of (0, last) in the order (0, 1), (0, 2), (1, 2), (0, 3), ...
    number = _below(last * (last + 1) // 2 - 1, random, 0)
    number += number >= excluded
    b = ((1 + np.sqrt(8.0 * number + 1)) // 2).astype(np.int64)
    a = number - b * (b - 1) // 2
    zero = np.zeros_like(a)
    return _stretches(a, b, zero, a, b, last)


def _views(lengths: np.ndarray) -> np.ndarray:
    first = lengths[:, 0] - 1
    second = first + lengths[:, 1]
    return _stretches(first, second, np.zeros_like(first), first, first, first)


def _stretches(*ends: np.ndarray) -> np.ndarray:
    return np.stack(ends, axis=1).reshape(-1, STRETCHES, 2)


def _below(limit: np.ndarray, random: np.ndarray, number: int) -> np.ndarray:
    """Return the `number`-th uniform integer below `limit` derived from a random number: (N,), (N,) uint64 -> (N,)."""
    return (splitmix64(random ^ splitmix64(np.array([number], np.uint64))[0]) % limit.astype(np.uint64)).astype(
        np.int64
    )
