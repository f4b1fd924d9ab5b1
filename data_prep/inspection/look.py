"""Inspection of the data of a user: splits, columns, views, records and lengths in tokens."""

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.config import Split
from data_prep.inspection.choose_views import TARGET, ViewChoice, choose_views
from data_prep.inspection.columns import Column, describe_columns, header_questions
from data_prep.inspection.find import Found, Values, as_source, find_splits
from data_prep.inspection.raw_rows import TEXT_COLUMNS, Sample, read_sample
from data_prep.make_tokenizer import train
from data_prep.sources.files import TO_UTF_8
from data_prep.sources.views import ViewMapping, make_mapping
from data_prep.utils.console import UserError

FEWEST_RECORDS = 20
"""Smallest number of training records for which a configuration is written."""
MOST_UNREADABLE = 0.05
"""Largest fraction of rows that cannot be read."""
MOST_UNUSABLE = 0.5
"""Largest fraction of rows whose views are not text, such as conversations with several turns."""
FEW_DOCUMENTS = 20
"""Number of documents below which paragraphs become the documents, because validation needs several of them."""
PIECE_TOKENS = 500
"""Smallest mean number of tokens in the corpus per piece of the vocabulary. A piece is well trained from about 100
occurrences on (Gowda and May, arXiv 2004.02334), and most pieces are rarer than the mean."""
CHARACTERS_PER_TOKEN = 3
"""Assumed length of a token when the size of the vocabulary is chosen."""
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 512, 32_768
RESERVED_PIECES = 261
"""Number of special tokens and bytes in a vocabulary."""
SMALLEST_STEP = 64
"""Step by which the vocabulary of a tiny corpus is lowered until it can be trained."""
TRAINING_CHARACTERS = 8 << 20
"""Number of characters on which a tokenizer is trained to measure lengths."""
MEASURED_RECORDS = 20_000
"""Number of records whose lengths are measured."""
LARGEST_MEASURED = 8192
"""Largest vocabulary that is trained here. With a larger one, texts have fewer tokens."""


@dataclass
class Inspection:
    """Splits, columns, views, records and lengths of data."""

    where: str
    found: Found
    samples: dict[Split, Sample]
    columns: list[Column]
    choice: ViewChoice
    records: list[tuple[str, ...]]
    """Views of the training records in the sample."""
    malformed: list[str]
    """Locations and reasons of the rows of the training split that are not valid records."""
    incomplete: int
    """Number of rows that lack a view."""
    vocabulary: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.int64))
    """Lengths in tokens of a part of the records, (N, views)."""

    @property
    def is_text(self) -> bool:
        """Whether the records are plain documents."""
        return len(self.choice.views) == 1

    @property
    def total(self) -> int:
        """Number of different training records, estimated if the sample is not complete."""
        sample = self.samples["train"]
        different = len(self.records) - self.repeated
        return different if sample.complete else round(sample.total * different / len(sample.rows))

    @property
    def tokens(self) -> int:
        """Number of tokens of the different training records, estimated from the measured ones."""
        return round(float(self.lengths.sum(axis=1).mean()) * self.total)

    @cached_property
    def repeated(self) -> int:
        """Number of training records in the sample that equal an earlier one."""
        return len(self.records) - len(set(self.records))

    def records_of(self, split: Split) -> list[tuple[str, ...]]:
        """Return the complete records in the sample of a split; empty if the split does not have the columns."""
        if split == "train":
            return self.records
        return _records(self.samples[split], self.found.splits[split], self.choice)[0]

    def seen_contexts(self, split: Split) -> int:
        """Return the number of records of a split whose context is also the context of a training record."""
        contexts = {record[0] for record in self.records}
        return sum(record[0] in contexts for record in self.records_of(split))


def inspect(where: str, config: str | None = None) -> Inspection:
    """Look at a file, a folder or a data set on the hub. Raises UserError if no configuration could use it."""
    found = find_splits(where, config)
    samples = {split: _checked_sample(values, split) for split, values in found.splits.items()}
    if found.kind == "text" and len(samples["train"].rows) < FEW_DOCUMENTS:
        for split, values in found.splits.items():
            values["separator"] = ""
            samples[split] = _checked_sample(values, split)
    columns = describe_columns(samples["train"].rows)
    if found.kind == "text":
        choice = ViewChoice({"text": "text"}, ("text",), None, "plain documents, so there are no pairs")
    elif found.kind == "python":
        choice = ViewChoice(
            {"context": "docstring", TARGET: "code"},
            ("context", TARGET),
            columns[-1],
            "functions with their docstrings",
        )
    else:
        choice = choose_views(columns, where)
        choice.questions += header_questions(columns)
    if found.kind not in TEXT_COLUMNS:
        for split, sample in samples.items():
            sample.require(_mapping(found.splits[split], choice).columns)
            _check_readable(sample, split)
    records, malformed, incomplete = _records(samples["train"], found.splits["train"], choice)
    rows = len(samples["train"].rows)
    if len(malformed) > MOST_UNUSABLE * rows:
        raise UserError(f"{where}: {len(malformed):,} of {rows:,} rows cannot be used: {malformed[0]}; change the rows")
    if len(records) < FEWEST_RECORDS:
        raise UserError(
            f"{where} has {len(records):,} usable records; a model needs at least {FEWEST_RECORDS} and learns from "
            "thousands: add data"
        )
    problems = [*samples["train"].problems, *samples.get("validation", Sample()).problems, *malformed]
    inspection = Inspection(where, found, samples, columns, choice, records, problems, incomplete)
    _measure(inspection)
    return inspection


def _checked_sample(values: Values, split: Split) -> Sample:
    """Return the sample of a split. Raises UserError if too many of its rows cannot be read."""
    sample = read_sample(as_source(values), "data.sources.0")
    if not sample.rows and not sample.problems:
        raise UserError(f"{values['path']} has no rows ({split}): give a file with rows")
    _check_readable(sample, split)
    return sample


def _check_readable(sample: Sample, split: Split) -> None:
    """Raise UserError if too many rows of a sample cannot be read."""
    limit = 0.0 if split == "test" else MOST_UNREADABLE  # an evaluation skips no rows
    if sample.unreadable > limit:
        problem = sample.problems[0]
        remedy = "fix these rows"
        if "UTF-8" in problem or "utf-8" in problem:
            remedy = TO_UTF_8
        raise UserError(f"{problem} ({sample.unreadable:.0%} of the rows of {split} cannot be read): {remedy}")


def _mapping(values: Values, choice: ViewChoice) -> ViewMapping:
    """Return the mapping of the rows of a split to records."""
    source = as_source(values | {"views": choice.mapping})  # type: ignore[arg-type]
    return make_mapping(source, choice.views, "data.sources.0", {})


def _records(sample: Sample, values: Values, choice: ViewChoice) -> tuple[list[tuple[str, ...]], list[str], int]:
    """Return the complete records of a sample, the problems of rows that are malformed, and the number without a view.

    A problem names the row by its number among the readable ones.
    """
    if values["type"] in TEXT_COLUMNS:
        texts = [tuple(row.values()) for row in sample.rows]
        complete = [record for record in texts if all(view.strip() for view in record)]
        return complete, [], len(texts) - len(complete)
    mapping = _mapping(values, choice)
    records, malformed, incomplete = [], [], 0
    for number, row in enumerate(sample.rows, start=1):
        for record in mapping.records(row, number):
            if record.views is None:
                malformed.append(f"row {number}: {record.problem}")
            elif all(record.views):
                records.append(record.views)
            else:
                incomplete += 1
    return records, malformed, incomplete


def _measure(inspection: Inspection) -> None:
    """Choose the size of the vocabulary, and measure the lengths of records with a tokenizer of about this size."""
    records = list(dict.fromkeys(inspection.records))
    measured = records[:: max(1, len(records) // MEASURED_RECORDS)][:MEASURED_RECORDS]
    characters = sum(len(view) for record in measured for view in record) / len(measured) * inspection.total
    wanted = characters / CHARACTERS_PER_TOKEN / PIECE_TOKENS
    letters = len({letter for record in measured for view in record for letter in view})
    least = max(SMALLEST_VOCABULARY, _power_of_two(RESERVED_PIECES + 2 * letters, up=True))
    inspection.vocabulary = min(max(least, _power_of_two(wanted)), max(least, LARGEST_VOCABULARY))
    # Without every fifth record, because validation and duplicates reduce the texts of the real tokenizer too.
    texts = [view for number, record in enumerate(measured) if number % 5 for view in record]
    with tempfile.TemporaryDirectory() as folder:
        size = min(inspection.vocabulary, max(LARGEST_MEASURED, least))
        largest = 0
        while True:
            try:
                tokenizer = train(_shortened(texts), size, Path(folder))
                break
            except UserError as error:
                if maximum := re.search(r"too large for the corpus: the maximum is (\d+)", str(error)):
                    largest = int(maximum[1])
                    size -= -(-(size - largest) // SMALLEST_STEP) * SMALLEST_STEP
                elif size < largest:  # the step was too large, because bytes and characters need pieces too
                    size = largest
                else:
                    raise UserError(
                        f"{inspection.where}: the texts are too few or too similar to train a tokenizer ({error}): "
                        "add data"
                    ) from None
                inspection.vocabulary = size
        flat = [view[: TRAINING_CHARACTERS // 8] for record in measured for view in record]
        counts = tokenizer.encode_ragged(flat)[1].astype(np.int64)
        full = np.array([len(view) for record in measured for view in record])
        cut = np.array([max(1, len(view)) for view in flat])
        inspection.lengths = np.ceil(counts * (full / cut)).astype(np.int64).reshape(len(measured), -1)


def _shortened(texts: Sequence[str]) -> Iterable[str]:
    """Yield texts up to a number of characters, spread evenly."""
    size = sum(map(len, texts))
    step = max(1, -(-size // TRAINING_CHARACTERS))
    if len(texts) < 100 * step:  # few long documents
        return (text[: len(text) // step + 1] for text in texts)
    return texts[::step]


def _power_of_two(value: float, up: bool = False) -> int:
    """Return the power of two at or below a value, or at or above it."""
    power = 1 << (max(1, int(value)).bit_length() - 1)
    return 2 * power if up and power < value else power
