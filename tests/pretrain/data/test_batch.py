"""The batch equals a token-by-token construction from the definition of the layouts."""

import random
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import pytest
import torch

from pretrain.data.batch import Batch, assemble, micro_batches
from pretrain.data.layout import Layout, Pairing, Segment, make_layout
from pretrain.data.loader import Rows, loss_denominators
from pretrain.models.attention import visibility_mask
from tests.row_plans import plan

ROW = 64


@dataclass
class Node:
    """A segment as the design describes it: its tokens, what it hangs on, and which of its tokens are labels."""

    tokens: list[int]
    parent: "Node | None" = None
    labelled: list[bool] = field(default_factory=list)
    first_position: int = 0

    def __post_init__(self):
        self.labelled = self.labelled or [False] * len(self.tokens)
        if self.parent is not None:
            self.first_position = self.parent.first_position + len(self.parent.tokens)

    def ancestors(self) -> list["Node"]:
        return [] if self.parent is None else [self.parent, *self.parent.ancestors()]


class Case(NamedTuple):
    """A layout, and what its records are."""

    kind: str
    k: int
    lm_views: str = "all"
    direction: str = "forward"
    placement: str = "append"
    views: int = 2
    incomplete: bool = False
    train_end_token: bool = True


def record_tree(case: Case, views: list[list[int]], paired: bool, s) -> tuple[list[Node], list[tuple[Node, Node, int]]]:
    """The segments of a record in row order, and its pairs: nodes whose last tokens are prediction and target, and the target's view."""
    numbers = [number for number, view in enumerate(views) if view]
    views = [views[number] for number in numbers]
    edges = [(one, one + 1) for one in range(len(views) - 1)] if case.direction != "backward" else []
    edges += [(one + 1, one) for one in range(len(views) - 1)] if case.direction != "forward" else []
    edges = edges if paired else []
    sources, targets = {source for source, _ in edges}, {target for _, target in edges}
    predictor = [s.predictor + i for i in range(case.k)]
    nodes, alone, predicting = [], {}, {}
    joint, last = case.kind == "joint", len(views) - 1
    for number, view in enumerate(views):
        labelled = case.lm_views == "all" or number == last
        if joint:
            tokens = [s.bos] * (number == 0) + view + [s.eos if number == last else s.sep]
            no_target = {s.bos} if case.train_end_token else {s.bos, s.eos}
            nodes.append(
                Node(tokens, nodes[-1] if nodes else None, [labelled and token not in no_target for token in tokens])
            )
    if joint:
        alone[0] = nodes[0]
    for number, view in enumerate(views):
        if not joint:
            labelled = case.lm_views == "all" or number == last
            alone[number] = Node(
                [s.bos, *view, s.eos], labelled=[False] + [labelled] * len(view) + [labelled and case.train_end_token]
            )
            nodes.append(alone[number])
        elif number and (number in targets or (number in sources and not (case.k and case.placement == "prepend"))):
            alone[number] = Node([*view, s.eos])
            nodes.append(alone[number])
        if number in sources and not case.k:
            predicting[number] = alone[number]
        elif number in sources and case.placement == "append":
            predicting[number] = Node(predictor, alone[number])
            nodes.append(predicting[number])
        elif number in sources:
            first = [s.bos] if number == 0 or not joint else []
            before = Node([*first, *predictor])
            predicting[number] = Node([*view, s.sep if joint and number == 0 else s.eos], before)
            nodes += [before, predicting[number]]
    return nodes, [(predicting[source], alone[target], numbers[target]) for source, target in edges]


@dataclass
class Expected:
    ids: np.ndarray
    positions: np.ndarray
    visible: np.ndarray
    """(B, L, L) may query (second) see key (last)?"""
    labels: dict[int, int] = field(default_factory=dict)
    """Place in the batch -> the token it predicts."""
    read_outs: list[tuple[int, int, tuple[int, ...], int]] = field(default_factory=list)
    """Places of prediction and target, the target's tokens, and the record, of each pair."""


def build(rows: Rows, records, case: Case, specials) -> Expected:
    """Token by token, record after record."""
    size = rows.count * ROW
    owner: list[tuple[int, Node, int] | None] = [None] * size  # record, segment, place in it
    out = Expected(np.full(size, specials.pad), np.zeros(size, int), np.zeros((rows.count, ROW, ROW), bool))
    next_free = [0] * rows.count
    for number, (record, row, paired) in enumerate(zip(rows.records, rows.row, rows.paired, strict=True)):
        nodes, pairs = record_tree(case, list(records[record]), paired, specials)
        last = {}
        for node in nodes:
            for place, token in enumerate(node.tokens):
                at = row * ROW + next_free[row]
                next_free[row] += 1
                out.ids[at], out.positions[at], owner[at] = token, node.first_position + place, (number, node, place)
                if node.labelled[place]:
                    out.labels[at - 1] = token
                last[id(node)] = at
        for prediction, target, view in pairs:
            out.read_outs.append((last[id(prediction)], last[id(target)], tuple(records[record][view]), int(record)))
    for query in range(size):
        for key in range(query // ROW * ROW, query // ROW * ROW + ROW):
            out.visible[query // ROW, query % ROW, key % ROW] = query == key or sees(owner[query], owner[key])
    return out


def sees(query, key) -> bool:
    if query is None or key is None or query[0] != key[0]:
        return False
    if query[1] is key[1]:
        return key[2] <= query[2]
    return any(key[1] is ancestor for ancestor in query[1].ancestors())


def some_records(seed: int, views: int = 2, incomplete: bool = False) -> list[tuple[list[int], ...]]:
    rng = random.Random(seed)
    records = [
        tuple(
            [rng.randrange(5, 512) for _ in range(rng.randint(1, 10 - 2 * views + place % 2))] for place in range(views)
        )
        for _ in range(11)
    ]
    for number, target in ((5, records[2][-1]), (6, records[2][-1][::-1] + [9]), (8, [*records[2][-1], 7])):
        records[number] = (*records[number][:-1], target)
    if incomplete:  # each view alone, a hole in the middle, the first one missing
        lacking = {0: {1, 2}, 1: {0, 2}, 3: {0, 1}, 4: {1}, 7: {0}, 9: {2}}
        records = [
            tuple([] if view in lacking.get(number, ()) else tokens for view, tokens in enumerate(record))
            for number, record in enumerate(records)
        ]
        records = [record if any(record) else (*record[:-1], [11, 12]) for record in records]
    return records


CASES = [
    Case(kind, k, lm_views) for kind in ("joint", "independent") for k in (0, 1, 3) for lm_views in ("all", "last")
]
CASES += [
    Case(kind, k, "all", direction, placement, views)
    for kind in ("joint", "independent")
    for direction in ("forward", "backward", "both")
    for k, placement in ((0, "append"), (2, "append"), (2, "prepend"))
    for views in (2, 3)
]
CASES += [
    Case(kind, 1, lm_views, direction, placement, views, incomplete=True)
    for kind in ("joint", "independent")
    for lm_views in ("all", "last")
    for direction in ("forward", "both")
    for placement in ("append", "prepend")
    for views in (2, 3)
]
CASES += [
    Case(kind, 1, lm_views, views=views, incomplete=incomplete, train_end_token=False)
    for kind in ("joint", "independent")
    for lm_views in ("all", "last")
    for views, incomplete in ((2, False), (3, True))
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request, write_corpus, specials) -> tuple[Batch, Expected, Case]:
    case: Case = request.param
    records = some_records(case.k, case.views, case.incomplete)
    corpus = write_corpus(records, shard_records=4)
    layout = make_layout(
        case.kind,
        specials,
        views=case.views,
        pairing=Pairing(case.k, case.placement, case.direction),
        lm_views=case.lm_views,
        train_end_token=case.train_end_token,
    )
    paired = np.array([record % 3 != 1 for record in range(len(records))])
    rows = plan(corpus, np.arange(len(records)), layout, ROW, paired)
    rows = Rows.join([rows], rows.count + 1)  # an empty row at the end
    expected = build(rows, records, case, specials)
    assert loss_denominators(rows, layout) == {
        "targets": len(expected.labels),
        "pairs": len(expected.read_outs),
        "spans": 0,
    }
    return assemble(rows, corpus, layout, specials, ROW, len(expected.read_outs) + 2), expected, case


def test_tokens_and_positions(case):
    batch, expected, _ = case
    np.testing.assert_array_equal(batch.token_ids.flatten(), expected.ids)
    np.testing.assert_array_equal(batch.positions.flatten(), expected.positions)


def test_everything_is_an_integer_and_without_spans_there_are_none(case):
    batch, _, _ = case
    assert batch.pair_valid.dtype == torch.bool
    others = {field.name: getattr(batch, field.name).dtype for field in fields(batch) if field.name != "pair_valid"}
    assert others == dict.fromkeys(others, torch.int64)
    assert batch.span_index.shape == (0, 3, 2)


def test_every_label_once_at_the_place_before_its_token(case):
    batch, expected, _ = case
    assert len(set(batch.label_index.tolist())) == len(batch.label_index)
    assert dict(zip(batch.label_index.tolist(), batch.label_ids.tolist(), strict=True)) == expected.labels


def test_the_end_token_is_a_label_and_what_no_one_writes_never_is(case, specials):
    batch, _, of = case
    labels = batch.label_ids.tolist()
    assert labels.count(specials.eos) >= 11 if of.train_end_token else specials.eos not in labels
    assert not {specials.bos, specials.pad} & set(labels)
    assert max(labels) < specials.predictor
    predicting = batch.token_ids.flatten()[batch.label_index]
    assert (predicting < specials.predictor).all() and (predicting != specials.pad).all()
    if of.lm_views == "last":
        assert labels.count(specials.eos) == 11 * of.train_end_token and specials.sep not in labels


def test_read_outs_and_the_padding_of_the_gather(case):
    batch, expected, _ = case
    pairs = int(batch.pair_valid.sum())
    assert batch.pair_valid.tolist() == [True] * pairs + [False] * 2
    found = zip(batch.prediction_index[:pairs].tolist(), batch.target_index[:pairs].tolist(), strict=True)
    assert sorted(found) == sorted(read_out[:2] for read_out in expected.read_outs)
    assert batch.prediction_index[pairs:].tolist() == batch.target_index[pairs:].tolist() == [0, 0]


def test_keys_are_equal_exactly_where_targets_are_and_records_are_named(case):
    batch, expected, _ = case
    valid = batch.pair_valid
    found = sorted(
        zip(
            batch.prediction_index[valid].tolist(),
            batch.target_index[valid].tolist(),
            batch.pair_target_hash[valid].tolist(),
            batch.pair_record[valid].tolist(),
            strict=True,
        )
    )
    by_place = sorted(expected.read_outs)
    assert [record for *_, record in found] == [record for *_, record in by_place]
    keys, contents = [key for _, _, key, _ in found], [content for _, _, content, _ in by_place]
    assert [[one == other for other in keys] for one in keys] == [
        [one == other for other in contents] for one in contents
    ]


def test_some_target_occurs_twice():
    assert some_records(0)[5][-1] == some_records(0)[2][-1]


def test_the_mask_is_that_of_the_tree(case):
    batch, expected, _ = case
    mask = visibility_mask(batch.visible_until, "sdpa")[:, 0].numpy()
    np.testing.assert_array_equal(mask, expected.visible)
    assert mask.any(axis=2).all(), "a row of the mask is empty"
    padding = expected.ids.reshape(mask.shape[:2]) == 0
    assert padding[-1].all() and (mask.sum(axis=2)[padding] == 1).all() and (mask.sum(axis=1)[padding] == 1).all()


def test_keys_do_not_depend_on_layout_or_place(write_corpus, specials):
    records = some_records(0)
    keys = []
    for kind, row_length in (("joint", 64), ("joint", 200), ("independent", 90)):
        layout = make_layout(kind, specials, pairing=Pairing(1))
        corpus = write_corpus(records)
        rows = plan(corpus, np.arange(len(records)), layout, row_length, np.ones(len(records), bool))
        batch = assemble(rows, corpus, layout, specials, row_length, len(records))
        keys.append(dict(zip(rows.records.tolist(), batch.pair_target_hash.tolist(), strict=True)))
    assert keys[0] == keys[1] == keys[2]


def test_a_segment_sees_its_parents_parents(write_corpus, specials):
    """A deeper tree than any layout of today: 0 - 1 - 2, and 0 - 3."""
    layout = Layout(
        (
            Segment(0, (specials.bos,)),
            Segment(1, parent=0),
            Segment(0, (), (specials.eos,), parent=1),
            Segment(1, (), (specials.eos,), parent=0),
        )
    )
    corpus = write_corpus([([11, 12], [21, 22])])
    rows = plan(corpus, np.zeros(1, np.int64), layout, 12, np.zeros(1, bool))
    batch = assemble(rows, corpus, layout, specials, 12, 0)
    assert batch.token_ids[0].tolist() == [2, 11, 12, 21, 22, 11, 12, 3, 21, 22, 3, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 0]
    segment = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    above = {0: set(), 1: {0}, 2: {0, 1}, 3: {0}, 4: set()}
    expected = [
        [
            key <= query and (segment[key] == segment[query] or segment[key] in above[segment[query]])
            for key in range(12)
        ]
        for query in range(12)
    ]
    assert visibility_mask(batch.visible_until, "sdpa")[0, 0].tolist() == expected
    assert len(batch.label_index) == len(batch.prediction_index) == 0


def test_a_batch_of_empty_rows_is_padding_alone(write_corpus, specials):
    corpus = write_corpus(some_records(0))
    layout = make_layout("joint", specials, pairing=Pairing(1))
    rows = plan(corpus, np.arange(3), layout, ROW, np.ones(3, bool))
    batch = assemble(
        Rows.join([rows], rows.count + 2).select(rows.count, rows.count + 2), corpus, layout, specials, ROW, 4
    )
    assert batch.token_ids.shape == (2, ROW) and (batch.token_ids == specials.pad).all()
    assert len(batch.label_index) == 0 and not batch.pair_valid.any()
    assert torch.equal(
        visibility_mask(batch.visible_until, "sdpa")[:, 0], torch.eye(ROW, dtype=torch.bool).expand(2, ROW, ROW)
    )


def test_prefixes_and_suffixes_may_have_several_tokens(write_corpus, specials):
    layout = Layout(
        (
            Segment(0, (specials.bos, 101, 102), (103, specials.eos), lm_start=1),
            Segment(1, (104,), (105, 106, 107), parent=0),
        )
    )
    corpus = write_corpus([([11], [21, 22])])
    rows = plan(corpus, np.zeros(1, np.int64), layout, 14, np.zeros(1, bool))
    batch = assemble(rows, corpus, layout, specials, 14, 0)
    assert batch.token_ids[0].tolist() == [
        specials.bos,
        101,
        102,
        11,
        103,
        specials.eos,
        104,
        21,
        22,
        105,
        106,
        107,
        0,
        0,
    ]
    assert batch.label_ids.tolist() == [101, 102, 11, 103, specials.eos]


@pytest.fixture
def some_batch(write_corpus, specials) -> Batch:
    corpus, layout = (
        write_corpus(some_records(0)),
        make_layout("joint", specials, pairing=Pairing(1), spans="three_points"),
    )
    rows = plan(corpus, np.arange(4), layout, ROW, np.ones(4, bool))
    return assemble(rows, corpus, layout, specials, ROW, 6, seed=5)


def test_a_batch_moves_to_the_device_but_for_its_seed(some_batch):
    moved = some_batch.to(torch.device("meta"))
    for each in fields(Batch):
        before, after = getattr(some_batch, each.name), getattr(moved, each.name)
        assert after.shape == before.shape and after.dtype == before.dtype
        assert after.device.type == ("cpu" if each.name == "seed" else "meta")
    assert moved.seed.item() == 5


def test_every_tensor_of_a_batch_is_pinned(some_batch, monkeypatch):
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: tensor + 1 if tensor.dtype != torch.bool else ~tensor
    )  # a copy that shows
    pin_memory_copy = some_batch.pin_memory_copy()
    for each in fields(Batch):
        assert torch.equal(getattr(pin_memory_copy, each.name), getattr(some_batch, each.name).pin_memory())


def test_the_micro_batches_of_a_step_are_read_at_once(write_corpus, specials, monkeypatch):
    corpus, layout = write_corpus(some_records(0)), make_layout("joint", specials, pairing=Pairing(1))
    rows = plan(corpus, np.arange(11), layout, ROW, np.ones(11, bool))
    rows = Rows.join([rows], 8)
    read, reads = corpus.read, []
    monkeypatch.setattr(corpus, "read", lambda records: reads.append(records.tolist()) or read(records))
    batches = list(micro_batches(rows, corpus, layout, specials, ROW, micro_batch_rows=2, rank=0, ranks=2))
    assert reads == [rows.records[(rows.row // 2) % 2 == 0].tolist()]
    whole = assemble(rows, corpus, layout, specials, ROW, 11)
    assert torch.equal(torch.cat([batch.token_ids for batch in batches]), whole.token_ids[[0, 1, 4, 5]])
