"""The statistics of a prepared corpus equal the ones that pandas computes from the same shards."""

import itertools
import re

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.ipc
import pytest

from data_prep.make_tokenizer import train
from data_prep.tools.stats import quantile, stats
from tests.data_prep.tools.test_verify import pairs, write

VIEWS = ["text", "code"]


def test_quantiles_match_pandas():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 999):
        values = rng.integers(1, 50, size)
        for probability in (0.0, 0.5, 0.9, 0.99, 1.0):
            assert quantile(np.bincount(values), probability) == pytest.approx(
                pandas.Series(values).quantile(probability)
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Corpus with two shards of one source and one shard of a second, with weight 2. Some records lack a view."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train(["SELECT name FROM dogs"] * 5, 330, folder / "tokenizer")
    shards = [pairs(400, seed) for seed in range(3)]
    for row in range(0, 400, 7):
        shards[0][row] = (shards[0][row][0], [])
    for row in range(0, 400, 50):
        shards[1][row] = (shards[1][row][0] * 60, shards[1][row][1])
    write(
        folder,
        tokenizer,
        {"train": [(source, records, [False] * 400) for source, records in zip((0, 0, 1), shards, strict=True)]},
        [{"type": "json", "path": "a.jsonl"}, {"type": "nlrx"}],
        weights=[1.0, 2.0],
    )
    return folder


@pytest.fixture(scope="module")
def lengths(folder) -> pandas.DataFrame:
    """Token counts of each view of every record; NaN for a null view."""
    tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in sorted(folder.glob("*.arrow"))]
    return pandas.DataFrame(
        {view: pa.concat_tables(tables).column(view).to_pandas().map(len, na_action="ignore") for view in VIEWS}
    ).astype(float)


def numbers(line: str) -> list[float]:
    return [float(text.replace(",", "")) for text in re.findall(r"[\d,]+(?:\.\d+)?", line)]


def test_the_table_of_views(folder, lengths):
    table, *_ = stats(folder, "train")
    head, _, *lines = table.splitlines()
    assert head == (
        f"train: 1,200 records, {int(lengths.sum().sum()):,} tokens; "
        f"{lengths.isna().any(axis=1).mean():.1%} of the records lack a view"
    )
    for view, line in zip(VIEWS, lines, strict=True):
        column = lengths[view].dropna()
        assert line.split()[0] == view
        expected = [
            len(column),
            column.sum(),
            column.mean(),
            column.median(),
            column.quantile(0.9),
            column.quantile(0.99),
            column.max(),
        ]
        assert numbers(line) == [pytest.approx(number, abs=0.051) for number in expected]


@pytest.mark.parametrize("view", VIEWS)
def test_histograms(folder, lengths, view):
    text = next(text for text in stats(folder, "train") if text.startswith(f"train, {view}: "))
    column = lengths[view].dropna()
    bounds: list[list[int]] = []
    counts: list[int] = []
    for line in text.splitlines()[1:]:
        bounds.append([int(bound.replace(",", "")) for bound in line.split()[0].split("–")])
        counts.append(int(line.split()[1].replace(",", "")))
        assert float(line.split()[2].rstrip("%")) == pytest.approx(100 * counts[-1] / len(column), abs=0.051)
    assert all(after[0] == before[-1] + 1 for before, after in itertools.pairwise(bounds))
    assert counts == [int(column.between(low[0], low[-1]).sum()) for low in bounds] and sum(counts) == len(column)
    bars = [line.count("█") for line in text.splitlines()[1:]]
    assert max(bars) == bars[int(np.argmax(counts))] == 40
    assert all(
        bar == pytest.approx(40 * count / max(counts), abs=1.01) for bar, count in zip(bars, counts, strict=True)
    )


def test_tokens_by_source(folder, lengths):
    *_, text = stats(folder, "train")
    tokens = [lengths.iloc[part].sum().sum() for part in (slice(0, 800), slice(800, None))]
    for line, number, weight, records, name in zip(
        text.splitlines()[2:], tokens, (1, 2), (800, 400), ("json a.jsonl", "nlrx"), strict=True
    ):
        assert line.endswith(name)
        expected = [
            records,
            number,
            100 * number / sum(tokens),
            weight,
            100 * weight * number / (tokens[0] + 2 * tokens[1]),
        ]
        assert numbers(line)[:5] == [pytest.approx(value, abs=0.051) for value in expected]
