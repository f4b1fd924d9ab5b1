"""Records into rows of fixed length, by length alone."""

import numpy as np


def pack(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Best-fit decreasing: the row of each record, (N,) -> (N,), rows numbered from 0 in the order of opening.

    The longest record comes first; each goes into the fullest row that still has room for it, or opens a new one.
    Deterministic: equal lengths keep their order. Raises ValueError where a record is longer than a row.
    """
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"a record of {lengths.max()} positions does not fit a row of {row_length}")
    row_of = np.empty(len(lengths), np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # by free positions
    has_room = 0  # bit f: some row has f free positions
    opened = 0
    order = np.argsort(-lengths, kind="stable")
    for record, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = has_room >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[free].pop()
            if not rows_with_room[free]:
                has_room ^= 1 << free
        else:
            free, row = row_length, opened
            opened += 1
        row_of[record] = row
        left = free - length
        if left:
            rows_with_room[left].append(row)
            has_room |= 1 << left
    return row_of
