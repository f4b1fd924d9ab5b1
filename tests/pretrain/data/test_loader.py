"""The loader yields each record once per epoch and the same rows on any number of ranks; a small state resumes it."""

import json
import zlib
from collections import Counter
from dataclasses import fields
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import JsonSource, NlrxSource
from data_prep.layout import Pairing, make_layout
from data_prep.utils.console import UserError
from pretrain.data.batch import micro_batches
from pretrain.data.corpus import source_weights
from pretrain.data.loader import Loader, Packing, Rows
from pretrain.data.order import WINDOW, Order
from tests.row_plans import plan

ROW = 512
LARGE = 2 * WINDOW + 3000
"""Number of records that fill three windows of the order."""


@pytest.fixture(scope="session")
def large(write_corpus):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, (LARGE, 2)).tolist()
    tokens = rng.integers(5, 512, 24).tolist()
    return write_corpus(
        [(tokens[:context], tokens[context : context + target]) for context, target in lengths], shard_records=50_000
    )


@pytest.fixture(scope="session")
def layout(specials):
    return make_layout("joint", specials, pairing=Pairing(1))


def equal_rows(one: Rows, other: Rows) -> bool:
    return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Rows))


def row_contents(rows: Rows) -> list[list[tuple[int, int, bool]]]:
    """Return the records of each row with their starts and pair flags."""
    out = [[] for _ in range(rows.count)]
    for record, row, start, paired in zip(rows.records, rows.row, rows.start, rows.paired, strict=True):
        out[row].append((int(record), int(start), bool(paired)))
    return out


@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_each_record_occurs_once_per_epoch(size, write_corpus, layout):
    rng = np.random.default_rng(size)
    corpus = write_corpus(
        [([5] * int(context), [6] * int(target)) for context, target in rng.integers(1, 20, (size, 2))]
    )
    loader = Loader(corpus, layout, 64, seed=1, epochs=3)
    epochs = [[] for _ in range(3)]
    while not loader.exhausted:
        epoch = loader.epoch
        epochs[epoch] += loader.next_rows(1).records.tolist()
    assert [sorted(records) for records in epochs] == [list(range(size))] * 3
    assert size < 7 or epochs[0] != epochs[1] != epochs[2]


def test_each_record_of_many_windows_occurs_once_per_epoch(large, layout):
    loader = Loader(large, layout, ROW, seed=1, epochs=2)
    assert loader.order.windows(0) == 3
    records = []
    while not loader.exhausted:
        records.append(loader.next_rows(64).records)
    counts = np.bincount(np.concatenate(records), minlength=LARGE)
    assert counts.shape == (LARGE,) and (counts == 2).all()


def test_records_follow_each_other_within_a_row(large, layout):
    rows = Loader(large, layout, ROW, seed=1).next_rows(200)
    positions = rows.segment_lengths.sum(axis=1)
    np.testing.assert_array_equal(rows.lengths, large.lengths(rows.records))
    np.testing.assert_array_equal(rows.segment_lengths, layout.segment_lengths(rows.lengths, rows.paired))
    for row in range(rows.count):
        members = np.flatnonzero(rows.row == row)
        assert rows.start[members].tolist() == [0, *np.cumsum(positions[members])[:-1]]
        assert positions[members].sum() <= ROW


def test_a_small_state_resumes_anywhere(large, layout):
    """Resume within windows and at the edges of windows and epochs, from a state as a checkpoint stores it."""
    loader = Loader(large, layout, ROW, seed=2, dropout=0.25)
    states, stream = [], []
    while loader.epoch < 2:
        states.append(loader.state())
        stream.append(loader.next_rows(1))
    edges = [
        number for number, (before, after) in enumerate(pairwise(states), 1) if before["window"] != after["window"]
    ]
    assert len(edges) == 5 and all(states[edge]["row"] == 0 for edge in edges)
    for first in [0, 1, 17, len(states) // 3, *edges, *(edge - 1 for edge in edges), len(states) - 20]:
        state = json.loads(json.dumps(states[first]))
        assert state.pop("plans") == ([[0.25, 0, 0]] if state["row"] else [])
        assert sorted(state) == ["epoch", "row", "window"] and all(type(value) is int for value in state.values())
        resumed = Loader(large, layout, ROW, seed=2, dropout=0.25)
        resumed.load_state(state)
        count = min(20, len(stream) - first)
        assert equal_rows(resumed.next_rows(count), Rows.join(stream[first : first + count], count))
        if first + count < len(states):
            assert resumed.state() == states[first + count]


def switching(*changes: tuple[int, float]):
    """Return a dropout that changes after numbers of steps. `changes` are (steps, dropout) in order."""
    return lambda consumed: next(dropout for steps, dropout in reversed(changes) if consumed.steps >= steps)


CHANGES = ((0, 0.25), (3, 0.5), (4, 1.0), (10, 0.0), (31, 0.75), (40, 1.0))
"""Changes of the dropout in three epochs of the corpus, with eight rows per step. 1 excludes all records."""


def test_each_record_occurs_once_per_epoch_however_often_the_dropout_changes(corpus, layout):
    loader = Loader(corpus, layout, 128, seed=6, dropout_at=switching(*CHANGES), epochs=3)
    steps = []
    while not loader.exhausted:
        steps.append(loader.next_rows(8))
    assert len(steps) > CHANGES[-1][0] + 2
    assert loader.consumed.steps == len(steps) and loader.consumed.records == 3 * len(corpus)
    assert loader.consumed.tokens == sum(step.lengths.sum() for step in steps)
    records = np.concatenate([step.records for step in steps])
    assert [sorted(epoch.tolist()) for epoch in np.split(records, 3)] == [list(range(len(corpus)))] * 3
    for number, step in enumerate(steps):
        dropout = switching(*CHANGES)(loader.consumed._replace(steps=number))
        expected = step.random_bits.astype(float) >= dropout * 2**64
        np.testing.assert_array_equal(step.paired, expected if dropout < 1 else np.zeros(len(step.records), bool))
        np.testing.assert_array_equal(step.segment_lengths, layout.segment_lengths(step.lengths, step.paired))
        for row in range(step.count):
            lengths = step.segment_lengths[step.row == row].sum(axis=1)
            np.testing.assert_array_equal(step.start[step.row == row], np.cumsum(lengths) - lengths)
            assert lengths.sum() <= 128


def test_a_run_resumes_after_each_step_of_a_changing_dropout(corpus, layout):
    def fresh_loader() -> Loader:
        return Loader(corpus, layout, 128, seed=6, dropout_at=switching(*CHANGES))

    loader, states, steps = fresh_loader(), [], []
    for _ in range(45):
        states.append((json.dumps(loader.state()), loader.consumed))
        steps.append(loader.next_rows(8))
    assert json.loads(states[12][0])["plans"] == [[0.25, 0, 0], [0.5, 24, 0], [1.0, 32, 0], [0.0, 80, 0]]
    assert max(len(json.loads(state)["plans"]) for state, _ in states) == 4
    for number, (state, consumed) in enumerate(states):
        resumed = fresh_loader()
        resumed.load_state(json.loads(state), consumed)
        assert equal_rows(resumed.next_rows(8), steps[number])
        if number + 1 < len(states):
            assert equal_rows(resumed.next_rows(8), steps[number + 1])


def test_a_window_may_be_longer_than_the_run(large, layout):
    constant, switched = (
        Loader(large, layout, ROW, seed=1, dropout_at=dropout_at)
        for dropout_at in (None, switching((0, 0.0), (3, 1.0)))
    )
    for _ in range(3):
        assert equal_rows(switched.next_rows(20), constant.next_rows(20))
    with_pairs, without = constant.next_rows(20), switched.next_rows(20)
    assert with_pairs.paired.all() and not without.paired.any()
    assert len(without.records) > 1.25 * len(with_pairs.records)
    assert (switched.epoch, switched.window) == (0, 0)
    order = switched.order.window(0, 0)[0]
    assert np.isin(without.records, order).all()


def test_a_constant_dropout_function_changes_nothing(corpus, layout):
    one = Loader(corpus, layout, 128, seed=6, dropout=0.3)
    other = Loader(corpus, layout, 128, seed=6, dropout_at=lambda consumed: 0.3)
    assert equal_rows(one.next_rows(500), other.next_rows(500)) and one.state() == other.state()


def test_without_pairs_the_dropout_makes_no_difference(corpus, specials):
    plain = make_layout("joint", specials)
    one, other = (Loader(corpus, plain, 128, seed=6, dropout_at=at) for at in (None, switching((0, 0.0), (1, 1.0))))
    for _ in range(3):
        assert equal_rows(one.next_rows(8), other.next_rows(8))


def test_each_record_occurs_once_per_epoch_if_the_packing_changes(corpus, layout, specials):
    """Continue a stream twice in the middle of a window, each time with another packing, and resume from each state."""
    plain = make_layout("joint", specials, pairing=None)
    packings = [Packing(plain, 128), Packing(layout, 160), Packing(plain, 128)]
    records, state = [], None
    for number, (own, row_length) in enumerate(packings):
        loader = Loader(corpus, own, row_length, seed=6, epochs=2, earlier=packings[:number])
        if state is not None:
            loader.load_state(json.loads(json.dumps(state)))
        for _ in range(3):
            resumed = Loader(corpus, own, row_length, seed=6, epochs=2, earlier=packings[:number])
            resumed.load_state(json.loads(json.dumps(loader.state())))
            rows = loader.next_rows(8)
            assert equal_rows(resumed.next_rows(8), rows) and rows.paired.any() == (own is layout)
            records.append(rows.records)
        state = loader.state()
    assert [plan[1:] for plan in state["plans"]] == [[0, 0], [24, 1], [48, 0]]
    while not loader.exhausted:
        records.append(loader.next_rows(8).records)
    epochs = np.split(np.concatenate(records), 2)
    assert [sorted(epoch.tolist()) for epoch in epochs] == [list(range(len(corpus)))] * 2


def test_a_state_of_an_earlier_version_continues_with_its_constant_dropout(corpus, layout):
    loader = Loader(corpus, layout, 128, seed=6, dropout=0.25, epochs=1)
    loader.next_rows(24)
    state, consumed = {key: value for key, value in loader.state().items() if key != "plans"}, loader.consumed
    rows = loader.next_rows(8)
    resumed = Loader(corpus, layout, 128, seed=6, dropout=0.25, dropout_at=switching((0, 1.0), (4, 0.25)), epochs=1)
    resumed.load_state(state, consumed)
    first = resumed.next_rows(8)
    assert resumed.state()["plans"] == [[0.25, 0, 0], [1.0, 24, 0]] and not first.paired.any()
    resumed.load_state(state, consumed._replace(steps=4))
    assert equal_rows(resumed.next_rows(8), rows)


def test_a_used_loader_can_be_reset(corpus, layout):
    loader = Loader(corpus, layout, 128, seed=2)
    first = loader.next_rows(50)
    loader.next_rows(500)
    loader.load_state({"epoch": 0, "window": 0, "row": 0})
    assert equal_rows(loader.next_rows(50), first)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_micro_steps_hold_the_same_rows_on_any_number_of_ranks(ranks, large, layout, specials):
    """Rank r gets the r-th part of each micro step. All ranks have pair arrays of equal length and the same seed."""
    micro_step_rows, steps = 8, 3
    rows = Loader(large, layout, ROW, seed=4, dropout=0.1).next_rows(micro_step_rows * steps)
    [full] = micro_batches(
        rows, large, layout, specials, ROW, micro_batch_rows=micro_step_rows * steps, rank=0, ranks=1
    )
    by_rank = [
        list(
            micro_batches(
                rows, large, layout, specials, ROW, micro_batch_rows=micro_step_rows // ranks, rank=rank, ranks=ranks
            )
        )
        for rank in range(ranks)
    ]
    assert torch.equal(
        torch.cat([batches[step].token_ids for step in range(steps) for batches in by_rank]), full.token_ids
    )
    assert torch.equal(
        torch.cat(
            [batches[step].pair_target_hash[batches[step].pair_valid] for step in range(steps) for batches in by_rank]
        ),
        full.pair_target_hash,
    )
    for step in range(steps):
        step_batches = [batches[step] for batches in by_rank]
        assert len({len(batch.pair_valid) for batch in step_batches}) == 1 and any(
            batch.pair_valid.all() for batch in step_batches
        )
        assert len({batch.seed.item() for batch in step_batches}) == 1
    assert len({batch.seed.item() for batch in by_rank[0]}) == steps
    assert [batch.seed.item() for batch in by_rank[0]] == [
        batch.seed.item()
        for batch in micro_batches(
            rows, large, layout, specials, ROW, micro_batch_rows=micro_step_rows, rank=0, ranks=1
        )
    ]


def test_the_stream_does_not_depend_on_how_many_rows_are_requested(corpus, layout):
    """This holds even if one call spans several epochs."""

    def stream(count):
        loader = Loader(corpus, layout, 128, seed=4)
        return [row for _ in range(1260 // count) for row in row_contents(loader.next_rows(count))]

    assert stream(1) == stream(7) == stream(630)


def pair_flags(loader: Loader, epoch: int) -> np.ndarray:
    """Return the pair flag of each record in an epoch, (records,) bool."""
    loader.load_state({"epoch": epoch, "window": 0, "row": 0})
    out = np.zeros(len(loader.corpus), bool)
    while loader.epoch == epoch:
        rows = loader.next_rows(1)
        out[rows.records] = rows.paired
    return out


def test_dropout_depends_on_seed_epoch_and_record(large, layout, specials):
    fraction = 0.3
    one = pair_flags(Loader(large, layout, ROW, seed=1, dropout=fraction), 0)
    assert abs(1 - one.mean() - fraction) < 0.005
    np.testing.assert_array_equal(
        one,
        pair_flags(
            Loader(large, make_layout("independent", specials, pairing=Pairing(0)), 256, seed=1, dropout=fraction), 0
        ),
    )
    more = pair_flags(Loader(large, layout, ROW, seed=1, dropout=0.5), 0)
    assert not (more & ~one).any(), "a larger fraction drops the records of a smaller one, and more"
    for other in (
        pair_flags(Loader(large, layout, ROW, seed=2, dropout=fraction), 0),
        pair_flags(Loader(large, layout, ROW, seed=1, dropout=fraction), 1),
    ):
        expected_agreement = fraction**2 + (1 - fraction) ** 2
        assert abs((one == other).mean() - expected_agreement) < 0.01


def test_without_dropout_all_records_are_paired_and_without_pairing_none(corpus, layout, specials):
    assert Loader(corpus, layout, 128, seed=1).next_rows(30).paired.all()
    assert not Loader(corpus, make_layout("joint", specials), 128, seed=1).next_rows(30).paired.any()


def test_dropout_frees_space_for_other_records(corpus, layout):
    """Pair segments are dropped before packing, and the same number of rows holds more records."""
    records = len(Loader(corpus, layout, 128, seed=1).next_rows(30).records)
    assert len(Loader(corpus, layout, 128, seed=1, dropout=0.9).next_rows(30).records) > 1.15 * records


def test_the_last_rows_of_the_last_epoch_are_empty(corpus, layout):
    loader = Loader(corpus, layout, 128, seed=1, epochs=1)
    rows = loader.next_rows(10_000)
    assert rows.count == 10_000 and loader.exhausted
    assert sorted(rows.records.tolist()) == list(range(len(corpus)))
    last = int(rows.row.max())
    empty = rows.select(last + 1, last + 9)
    assert empty.count == 8 and len(empty.records) == 0
    with pytest.raises(ValueError, match="exhausted"):
        loader.next_rows(1)


def test_long_records_do_not_come_first(large, layout):
    """Packing places long records first, but the order of rows must not depend on record length."""
    loader = Loader(large, layout, ROW, seed=1)
    window = Rows.join([loader.next_rows(1) for _ in range(800)], 800)
    half = window.row < 400
    assert abs(window.lengths[half].mean() - window.lengths[~half].mean()) < 0.3
    packed = plan(large, window.records, layout, ROW, window.paired)
    assert packed.lengths[packed.row < 200].mean() > packed.lengths[packed.row >= packed.count - 200].mean() + 1


def test_a_wrong_number_of_weights_is_refused(write_corpus):
    corpus = write_corpus([([5], [6])] * 4, sources=[(3, 1.0), (1, 2.0)])
    with pytest.raises(UserError, match=r"data.sources has length 1, but the corpus was prepared from 2"):
        source_weights(corpus.manifest, [NlrxSource(type="nlrx", records=1, weight=3.0)])
    assert source_weights(corpus.manifest) == [1.0, 2.0]


def test_weights_apply_to_the_sources_of_the_prepared_corpus(write_corpus):
    corpus = write_corpus([([5], [6])] * 4, sources=[(3, 1.0), (1, 2.0)])
    sources = [NlrxSource(type="nlrx", records=1, weight=3.0), JsonSource(type="json", path="a.jsonl", weight=4.0)]
    corpus.manifest["settings"]["data"]["sources"] = [
        source.model_dump(mode="json", exclude={"weight"}) for source in sources
    ]
    assert source_weights(corpus.manifest, sources) == [3.0, 4.0]
    assert source_weights(corpus.manifest, [sources[0], JsonSource(type="json", weight=5.0)]) == [3.0, 5.0]
    with pytest.raises(
        UserError,
        match=r"data.sources.0 is json train a.jsonl, but the corpus was prepared with type nlrx and path None there",
    ):
        source_weights(corpus.manifest, sources[::-1])
    with pytest.raises(
        UserError, match=r"data.sources.1 is json train b.jsonl, but the corpus was prepared with path a.jsonl there"
    ):
        source_weights(corpus.manifest, [sources[0], JsonSource(type="json", path="b.jsonl")])


def test_weights_that_select_no_record_are_refused(write_corpus, layout):
    corpus = write_corpus([([5], [6])] * 4)
    with pytest.raises(UserError, match="contain no records"):
        Loader(corpus, layout, 64, seed=1, weights=[0.1], epochs=2)
    with pytest.raises(UserError, match=r"a thousand epochs of .* contain no records"):
        Loader(corpus, layout, 64, seed=1, weights=[0.0009995 / 4])
    loader = Loader(corpus, layout, 64, seed=1, weights=[0.1], epochs=3)
    assert loader.records == 1 and len(loader.next_rows(5).records) == 1 and loader.exhausted


def test_the_random_bits_of_a_record_differ_between_passes(write_corpus, layout):
    corpus = write_corpus([([5], [6])] * 50)
    rows = Loader(corpus, layout, 64, seed=1, weights=[3.0], epochs=1).next_rows(60)
    assert len(rows.records) == 150 and len(set(rows.random_bits.tolist())) == 150


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    sources=st.lists(st.tuples(st.integers(1, 60), st.sampled_from([0.5, 1.0, 1.3, 2.0])), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    parts=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3, 6])), max_size=4),
    dropout=st.sampled_from([0.0, 0.4]),
    switch=st.sampled_from([0, 1, 2, 5, 1000]),
    longest=st.integers(1, 20),
    epochs=st.integers(1, 3),
)
def test_interruptions_on_any_number_of_ranks_lose_and_repeat_nothing(
    write_corpus, layout, specials, sources, seed, parts, dropout, switch, longest, epochs
):
    """Run a few steps at a time on some number of ranks, and then run to the end.

    Each part uses a fresh loader with the state as a checkpoint stores it. After `switch` steps there are no pairs.
    """
    total, rng = sum(records for records, _ in sources), np.random.default_rng(seed)
    records = [
        tuple([int(5 + number % 500)] * int(length) for length in rng.integers(1, longest + 1, 2))
        for number in range(total)
    ]
    corpus = write_corpus(records, shard_records=25, sources=sources)
    weights = [weight for _, weight in sources]
    weighted_sources = [(source.first, source.records, weights[source.number]) for source in corpus.sources]
    if Order(weighted_sources, seed).records_in_epochs(epochs) == 0:
        return

    def fresh_loader() -> Loader:
        dropout_at = switching((0, dropout), (switch, 1.0))
        return Loader(corpus, layout, 128, seed, weights=weights, dropout_at=dropout_at, epochs=epochs)

    loader, taken, read = fresh_loader(), [], []
    for steps, ranks in [*parts, (10**6, 2)]:
        while steps and not loader.exhausted:
            rows = loader.next_rows(6)
            taken += list(zip(rows.records.tolist(), rows.paired.tolist(), strict=True))
            for rank in range(ranks):
                for batch in micro_batches(
                    rows, corpus, layout, specials, 128, micro_batch_rows=6 // ranks, rank=rank, ranks=ranks
                ):
                    read += batch.token_ids[batch.token_ids != specials.pad].tolist()
            steps -= 1
        interrupted, loader = loader, fresh_loader()
        loader.load_state(json.loads(json.dumps(interrupted.state())), interrupted.consumed)
    loader, steps = fresh_loader(), []
    while not loader.exhausted:
        steps.append(loader.next_rows(6))
    uninterrupted = Rows.join(steps, 6 * len(steps))
    assert taken == list(zip(uninterrupted.records.tolist(), uninterrupted.paired.tolist(), strict=True))
    counts = np.bincount(uninterrupted.records, minlength=total)
    for source in corpus.sources:
        source_counts = counts[source.first : source.first + source.records]
        assert source_counts.max() - source_counts.min() <= 1
        assert source_counts.sum() == epochs * Fraction(str(weights[source.number])) * source.records // 1
    expected = Counter()
    for record, paired in taken:
        for view, copies in ((0, 1), (1, 2 if paired else 1)):
            expected[records[record][view][0]] += copies * len(records[record][view])
    found = Counter(token for token in read if token >= 5)
    assert found - Counter({specials.predictor: len(read)}) == expected


def test_the_rows_of_a_seed_stay_the_same_in_every_version_of_the_project(write_corpus, layout):
    """A checkpoint holds only a position in this stream, and runs may resume after an update of the project."""
    lengths = [(1 + number % 7, 1 + number % 11) for number in range(500)]
    corpus = write_corpus([([5] * context, [6] * target) for context, target in lengths])
    loader = Loader(corpus, layout, 64, seed=3, dropout=0.25)
    loader.load_state({"epoch": 2, "window": 0, "row": 5})
    rows = loader.next_rows(200)
    assert rows.records[:5].tolist() == [204, 161, 102, 473, 408] and len(rows.records) == 671
    columns = (rows.records, rows.row, rows.start, rows.paired, rows.random_bits, rows.lengths, rows.segment_lengths)
    assert zlib.crc32(b"".join(column.astype("<i8").tobytes() for column in columns)) == 737748826


def test_a_position_after_the_last_row_of_a_window_is_an_error(corpus, layout):
    loader = Loader(corpus, layout, 128, seed=3)
    loader.load_state({"epoch": 0, "window": 0, "row": 10**6})
    with pytest.raises(ValueError, match=r"row 1000000 of a window of \d+ rows"):
        loader.next_rows(1)
    for plans in ([[0.0, 0], [1.0, 10**6]], [[0.0, 0], [1.0, 8]]):
        loader.load_state({"epoch": 0, "window": 0, "row": 10**6, "plans": plans})
        with pytest.raises(ValueError, match=r"row 1000000 of a window of \d+ rows"):
            loader.next_rows(1)


def test_no_records_give_no_rows(corpus, layout):
    assert plan(corpus, np.empty(0, np.int64), layout, 64, np.empty(0, bool)).count == 0
