"""Test rows for data without a test split: some of the training rows. The preparation drops these from training."""

import hashlib
from collections import defaultdict
from typing import NamedTuple

from data_prep.inspection.find import as_source
from data_prep.inspection.look import Inspection
from data_prep.inspection.raw_rows import TEXT_COLUMNS
from data_prep.selection.contamination import Contamination
from data_prep.sources.views import make_mapping
from data_prep.task_rows import Columns

MOST_ROWS, FEWEST_ROWS = 500, 20
"""Largest and smallest number of test rows. With fewer rows, scores are too uncertain."""
FRACTION, FRACTION_OF_FEW, FEW = 0.05, 0.1, 1000
"""Fraction of the rows that is held out, and the fraction if there are fewer than FEW."""
SALT = b"test row:"
"""Start of a hashed context. The preparation draws validation records by the hash of a text alone, which would choose
the same rows."""
BATCH = 4096
"""Number of records that are compared with the test contexts at a time."""


class HeldOut(NamedTuple):
    """Training rows that become test rows."""

    rows: list[Columns]
    """Unchanged rows of the training split."""
    similar: int
    """Number of other training records that the preparation drops, because they share a long passage with a row."""


def hold_out(inspection: Inspection) -> HeldOut | None:
    """Return test rows from the training rows; None if there is a test split, or if there are too few rows.

    A hash of the context decides whether a row is held out. All rows with the same context are held out together,
    because the preparation drops every training record with a test context.
    """
    values = inspection.found.splits["train"]
    if "test" in inspection.samples or values["type"] in TEXT_COLUMNS:
        return None
    choice, rows = inspection.choice, inspection.samples["train"].rows
    source = as_source(values | {"views": choice.mapping})  # type: ignore[arg-type]
    mapping = make_mapping(source, choice.views, "data.sources.0", {})
    groups: dict[bytes, list[Columns]] = defaultdict(list)
    contexts: dict[bytes, set[str]] = defaultdict(set)
    for number, row in enumerate(rows, start=1):
        views = [record.views for record in mapping.records(row, number)]
        complete = [texts for texts in views if texts is not None and all(texts)]
        if complete and len(complete) == len(views):
            key = hashlib.sha256(SALT + complete[0][0].encode()).digest()
            groups[key].append(row)
            contexts[key] |= {text for texts in complete for text in (texts[:-1] or texts)}
    wanted = min(MOST_ROWS, round(len(rows) * (FRACTION if len(rows) >= FEW else FRACTION_OF_FEW)))
    chosen: list[bytes] = []
    held_out: list[Columns] = []
    for key in sorted(groups):
        if len(held_out) + len(groups[key]) <= wanted:
            chosen.append(key)
            held_out += groups[key]
    if len(held_out) < FEWEST_ROWS:
        return None
    texts = set().union(*(contexts[key] for key in chosen))
    return HeldOut(held_out, _count_similar(texts, [record for record in inspection.records if record[0] not in texts]))


def _count_similar(contexts: set[str], records: list[tuple[str, ...]]) -> int:
    """Return the number of records that the preparation drops because of these test contexts."""
    contamination = Contamination(sorted(contexts))
    batches = (records[first : first + BATCH] for first in range(0, len(records), BATCH))
    return sum(bool(line) for batch in batches for line in contamination.find(batch))
