"""Statistics of packed rows equal the statistics of planned rows, and their sample covers the corpus."""

import re

import numpy as np
import pytest

from data_prep.layout import Pairing, make_layout
from pretrain.data import efficiency as module
from pretrain.data.efficiency import efficiency_table, sample
from pretrain.data.order import BLOCK
from tests.pretrain.data.test_batch import some_records
from tests.row_plans import plan


@pytest.mark.parametrize("views", [1, 2, 3])
def test_percentages_equal_the_percentages_of_planned_rows(views, write_corpus, specials):
    rng = np.random.default_rng(views)
    records = [tuple(rng.integers(5, 512, size).tolist() for size in rng.integers(1, 90, views)) for _ in range(300)]
    corpus = write_corpus(records, shard_records=70)
    lines = efficiency_table(corpus)
    found = {
        int(line.split()[0].replace(",", "")): re.findall(r"([\d.]+)%(?: +([\d.]+)% too long)?", line)
        for line in lines[2:]
    }
    assert list(found)[:2] == [128, 256]
    for row_length, percentages in found.items():
        for kind, (filled, too_long) in zip(("joint", "independent"), percentages, strict=True):
            layout = make_layout(kind, specials, views=views, pairing=Pairing(1) if views > 1 else None)
            numbers = np.arange(len(records))
            fits = layout.positions(corpus.lengths(numbers)) <= row_length
            rows = plan(corpus, numbers[fits], layout, row_length, np.full(fits.sum(), views > 1))
            assert float(filled) == pytest.approx(
                100 * rows.segment_lengths.sum() / (rows.count * row_length), abs=0.051
            )
            assert float(too_long or 0) == pytest.approx(100 * (1 - fits.mean()), abs=0.051)


def test_row_lengths_below_the_length_of_every_record(write_corpus):
    lines = efficiency_table(write_corpus([(list(range(5, 400)), list(range(5, 400)))]))
    assert lines[2].split() == ["128", "0.0%", "100.0%", "too", "long", "0.0%", "100.0%", "too", "long"]


@pytest.mark.parametrize("records", [1, BLOCK - 1, BLOCK, 5 * BLOCK + 7, 10**9 + 3])
def test_the_sample_covers_the_corpus_and_is_bounded(records):
    numbers = sample(records)
    assert len(np.unique(numbers)) == len(numbers) == min(records, len(numbers)) <= 200_000
    assert numbers.min() == 0 and numbers.max() == records - 1
    if records <= module.SAMPLE_BLOCKS * BLOCK:
        assert len(numbers) == records
    else:
        assert np.diff(np.unique(numbers // BLOCK)).max() <= -(-records // BLOCK) / (module.SAMPLE_BLOCKS - 1) + 1


def test_records_with_missing_views(write_corpus):
    assert len(efficiency_table(write_corpus(some_records(1, views=3, incomplete=True)))) > 3
