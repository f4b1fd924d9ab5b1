"""Packing efficiency by row length, measured by packing a sample of a corpus."""

import numpy as np

from data_prep.layout import Pairing, SpecialTokenIds, make_layout
from pretrain.data.corpus import Corpus
from pretrain.data.order import BLOCK, WINDOW
from pretrain.data.packing import pack

SAMPLE_BLOCKS = 192
"""Blocks of records in the sample: three windows of the training order."""
ROW_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
GAIN = 0.001
"""Smallest gain in fullness for which a doubled row length is worthwhile.

The table ends at the first smaller gain once every record fits.
"""


def efficiency_table(corpus: Corpus) -> list[str]:
    """Return the lines of a table with one line per row length.

    Each line has the fraction of positions that hold tokens and the fraction of records that do not fit, for the joint
    and the independent layout with one predictor token (k = 1).
    """
    records = sample(len(corpus))
    lengths = corpus.lengths(records)
    layouts = [
        make_layout(
            kind, SpecialTokenIds(0, 1, 2, 3, 4), views=corpus.views, pairing=Pairing(1) if corpus.views > 1 else None
        )
        for kind in ("joint", "independent")
    ]
    note = f", a sample in blocks of {BLOCK:,}" if len(records) < len(corpus) else ""
    lines = [
        "  fraction of positions that are not padding, and of records that do not fit a row "
        f"({len(records):,} of {len(corpus):,} records{note})",
        f"  {'row length':>10}  {'joint, k = 1':>23}  {'independent, k = 1':>23}",
    ]
    previous = 0.0
    for row_length in ROW_LENGTHS:
        measured = [packing_fractions(layout.positions(lengths), row_length) for layout in layouts]
        cells = [_format_cell(full, too_long) for full, too_long in measured]
        lines.append(f"  {row_length:>10,}{''.join(cells)}".rstrip())
        lowest = min(full for full, _ in measured)
        if lowest < previous + GAIN and not any(too_long for _, too_long in measured):
            break
        previous = lowest
    return lines


def _format_cell(full: float, too_long: float) -> str:
    note = f"{too_long:.1%} too long" if too_long else ""
    return f"  {full:>7.1%} {note:>15}"


def sample(records: int) -> np.ndarray:
    """Return the numbers (N,) of the records of at most SAMPLE_BLOCKS blocks.

    The blocks are spread evenly over all records, and are in random order, as in training.
    """
    blocks = -(-records // BLOCK)
    chosen = np.linspace(0, blocks - 1, min(blocks, SAMPLE_BLOCKS)).astype(np.int64)
    numbers = (np.random.default_rng(0).permutation(chosen)[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    return numbers[numbers < records]


def packing_fractions(positions: np.ndarray, row_length: int) -> tuple[float, float]:
    """Return the fraction of positions that hold tokens, and the fraction of records longer than a row.

    `positions` (N,) holds the number of positions of each record. The rows are packed window by window.
    """
    fits = positions <= row_length
    rows = 0
    for first in range(0, len(positions), WINDOW):
        window = positions[first : first + WINDOW]
        window = window[window <= row_length]
        rows += int(pack(window, row_length).max()) + 1 if len(window) else 0
    full = float(positions[fits].sum() / (rows * row_length)) if rows else 0.0
    return full, float(1 - fits.mean())
