"""Packing of records into rows of fixed length, by their lengths alone."""

import numpy as np


def pack(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Return the row of each record by best-fit decreasing, (N,) -> (N,); rows are numbered in the order of opening.

    The longest record is placed first. Each record goes into the fullest row that has room for it, or opens a new row.
    The result depends on the lengths alone: equal lengths keep their order, and a length may be 0. A checkpoint holds a
    position in these rows, so a change of the packing makes older runs resume at other records. Raises ValueError if a
    record is longer than a row.
    """
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"a record of {lengths.max()} positions does not fit a row of {row_length}")
    rows_with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # by free positions
    has_room = 0  # bit f: some row has f free positions
    opened = 0
    row_of: list[int] = []  # in the order of placement
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        # Fill the fullest rows completely: a row that has taken a record remains the fullest as long as it has room.
        while count:
            fitting = has_room >> length
            free = length + (fitting & -fitting).bit_length() - 1 if fitting else row_length
            each = free // length if length else count
            needed = -(-count // each)
            if fitting:
                rows = rows_with_room[free][-needed:][::-1]
                del rows_with_room[free][-needed:]
                if not rows_with_room[free]:
                    has_room ^= 1 << free
            else:
                rows = list(range(opened, opened + needed))
                opened += needed
            placed = min(count, each * len(rows))
            row_of += rows if each == 1 else [row for row in rows for _ in range(each)][:placed]
            last = placed - each * (len(rows) - 1)
            for left, these in ((free - each * length, rows[:-1]), (free - last * length, rows[-1:])):
                if left and these:
                    rows_with_room[left] += these
                    has_room |= 1 << left
            count -= placed
    out = np.empty(len(lengths), np.int64)
    out[np.argsort(-lengths, kind="stable")] = row_of
    return out
