"""Batches equal a token-by-token construction from the definition of the layouts."""

import random
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import pytest
import torch

from data_prep.layout import Layout, Pairing, Segment, make_layout
from pretrain.data.batch import Batch, assemble, micro_batches
from pretrain.data.loader import Rows, count_pairs, count_spans, count_targets
from pretrain.models.attention import visibility_mask
from tests.row_plans import plan

ROW = 64


@dataclass
class Node:
    """A segment as the design describes it: its tokens, its parent, and which of its tokens are labels."""

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
    """A layout, and the kind of records that it is tested on."""

    kind: str
    k: int
    lm_views: str = "all"
    direction: str = "forward"
    placement: str = "append"
    views: int = 2
    incomplete: bool = False
    train_end_token: bool = True


def record_tree(case: Case, views: list[list[int]], paired: bool, s) -> tuple[list[Node], list[tuple[Node, Node, int]]]:
    """Return the segments of a record in row order, and its pairs.

    A pair is (prediction node, target node, view of the target). The embedding of a node is read at its last token.
    """
    present = [number for number, view in enumerate(views) if view]
    views = [views[number] for number in present]
    edges = [(first, first + 1) for first in range(len(views) - 1)] if case.direction != "backward" else []
    edges += [(first + 1, first) for first in range(len(views) - 1)] if case.direction != "forward" else []
    edges = edges if paired else []
    sources, targets = {source for source, _ in edges}, {target for _, target in edges}
    predictor = [s.predictor + i for i in range(case.k)]
    nodes, lone_nodes, prediction_nodes = [], {}, {}
    joint, last = case.kind == "joint", len(views) - 1
    for number, view in enumerate(views):
        labelled = case.lm_views == "all" or number == last
        if joint:
            tokens = [s.bos] * (number == 0) + view + [s.eos if number == last else s.sep]
            unlabelled = {s.bos} if case.train_end_token else {s.bos, s.eos}
            nodes.append(
                Node(tokens, nodes[-1] if nodes else None, [labelled and token not in unlabelled for token in tokens])
            )
    if joint:
        lone_nodes[0] = nodes[0]
    for number, view in enumerate(views):
        if not joint:
            labelled = case.lm_views == "all" or number == last
            lone_nodes[number] = Node(
                [s.bos, *view, s.eos], labelled=[False] + [labelled] * len(view) + [labelled and case.train_end_token]
            )
            nodes.append(lone_nodes[number])
        elif number and (number in targets or (number in sources and not (case.k and case.placement == "prepend"))):
            lone_nodes[number] = Node([*view, s.eos])
            nodes.append(lone_nodes[number])
        if number in sources and not case.k:
            prediction_nodes[number] = lone_nodes[number]
        elif number in sources and case.placement == "append":
            prediction_nodes[number] = Node(predictor, lone_nodes[number])
            nodes.append(prediction_nodes[number])
        elif number in sources:
            first = [s.bos] if number == 0 or not joint else []
            prefix = Node([*first, *predictor])
            prediction_nodes[number] = Node([*view, s.sep if joint and number == 0 else s.eos], prefix)
            nodes += [prefix, prediction_nodes[number]]
    return nodes, [(prediction_nodes[source], lone_nodes[target], present[target]) for source, target in edges]


@dataclass
class Expected:
    ids: np.ndarray
    positions: np.ndarray
    visible: np.ndarray
    """Whether the query (second index) sees the key (last index), (B, L, L)."""
    labels: dict[int, int] = field(default_factory=dict)
    """Index of each predicting position in the flattened batch -> the token that it predicts."""
    read_outs: list[tuple[int, int, tuple[int, ...], int]] = field(default_factory=list)
    """Indices of prediction and target in the flattened batch, the target's tokens and the record of each pair."""


def build(rows: Rows, records, case: Case, specials) -> Expected:
    """Build the expected batch token by token, record after record."""
    size = rows.count * ROW
    owner: list[tuple[int, Node, int] | None] = [None] * size  # record, segment, offset within the segment
    out = Expected(np.full(size, specials.pad), np.zeros(size, int), np.zeros((rows.count, ROW, ROW), bool))
    next_free = [0] * rows.count
    for number, (record, row, paired) in enumerate(zip(rows.records, rows.row, rows.paired, strict=True)):
        nodes, pairs = record_tree(case, list(records[record]), paired, specials)
        last = {}
        for node in nodes:
            for offset, token in enumerate(node.tokens):
                index = row * ROW + next_free[row]
                next_free[row] += 1
                out.ids[index], out.positions[index] = token, node.first_position + offset
                owner[index] = (number, node, offset)
                if node.labelled[offset]:
                    out.labels[index - 1] = token
                last[id(node)] = index
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
            [rng.randrange(5, 512) for _ in range(rng.randint(1, 10 - 2 * views + index % 2))] for index in range(views)
        )
        for _ in range(11)
    ]
    for number, target in ((5, records[2][-1]), (6, records[2][-1][::-1] + [9]), (8, [*records[2][-1], 7])):
        records[number] = (*records[number][:-1], target)
    if incomplete:  # a single view, no middle view, or no first view
        missing_views = {0: {1, 2}, 1: {0, 2}, 3: {0, 1}, 4: {1}, 7: {0}, 9: {2}}
        records = [
            tuple([] if view in missing_views.get(number, ()) else tokens for view, tokens in enumerate(record))
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
    counts = [count(rows, layout) for count in (count_targets, count_pairs, count_spans)]
    assert counts == [len(expected.labels), len(expected.read_outs), 0]
    return assemble(rows, corpus, layout, specials, ROW, len(expected.read_outs) + 2), expected, case


def test_tokens_and_positions(case):
    batch, expected, _ = case
    np.testing.assert_array_equal(batch.token_ids.flatten(), expected.ids)
    np.testing.assert_array_equal(batch.positions.flatten(), expected.positions)


def test_tensors_are_integers_and_there_are_no_spans_or_ends_by_default(case):
    batch, _, _ = case
    dtypes = {field.name: getattr(batch, field.name).dtype for field in fields(batch)}
    flags = {"pair_valid", "end_of_first", "end_valid"}
    assert dtypes == {name: torch.bool if name in flags else torch.int64 for name in dtypes}
    assert batch.span_index.shape == (0, 3, 2) and len(batch.end_index) == 0


def test_each_label_occurs_once_at_the_position_before_its_token(case):
    batch, expected, _ = case
    assert len(set(batch.label_index.tolist())) == len(batch.label_index)
    assert dict(zip(batch.label_index.tolist(), batch.label_ids.tolist(), strict=True)) == expected.labels


def test_end_tokens_are_labels_but_bos_padding_and_predictor_tokens_are_not(case, specials):
    batch, _, setting = case
    labels = batch.label_ids.tolist()
    assert labels.count(specials.eos) >= 11 if setting.train_end_token else specials.eos not in labels
    assert not {specials.bos, specials.pad} & set(labels)
    assert max(labels) < specials.predictor
    predicting = batch.token_ids.flatten()[batch.label_index]
    assert (predicting < specials.predictor).all() and (predicting != specials.pad).all()
    if setting.lm_views == "last":
        assert labels.count(specials.eos) == 11 * setting.train_end_token and specials.sep not in labels


def test_read_out_indices_and_their_padding(case):
    batch, expected, _ = case
    pairs = int(batch.pair_valid.sum())
    assert batch.pair_valid.tolist() == [True] * pairs + [False] * 2
    found = zip(batch.prediction_index[:pairs].tolist(), batch.target_index[:pairs].tolist(), strict=True)
    assert sorted(found) == sorted(read_out[:2] for read_out in expected.read_outs)
    assert batch.prediction_index[pairs:].tolist() == batch.target_index[pairs:].tolist() == [0, 0]


def test_target_hashes_are_equal_exactly_if_the_targets_are_and_records_match(case):
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
    expected_pairs = sorted(expected.read_outs)
    assert [record for *_, record in found] == [record for *_, record in expected_pairs]
    hashes, targets = [key for _, _, key, _ in found], [target for _, _, target, _ in expected_pairs]
    equal_hashes = [[one == other for other in hashes] for one in hashes]
    assert equal_hashes == [[one == other for other in targets] for one in targets]


def test_the_records_contain_a_repeated_target():
    assert some_records(0)[5][-1] == some_records(0)[2][-1]


def test_the_mask_matches_the_segment_tree(case):
    batch, expected, _ = case
    mask = visibility_mask(batch.visible_until, "sdpa")[:, 0].numpy()
    np.testing.assert_array_equal(mask, expected.visible)
    assert mask.any(axis=2).all(), "a row of the mask is empty"
    padding = expected.ids.reshape(mask.shape[:2]) == 0
    assert padding[-1].all() and (mask.sum(axis=2)[padding] == 1).all() and (mask.sum(axis=1)[padding] == 1).all()


def test_target_hashes_do_not_depend_on_layout_or_row(write_corpus, specials):
    records = some_records(0)
    hashes = []
    for kind, row_length in (("joint", 64), ("joint", 200), ("independent", 90)):
        layout = make_layout(kind, specials, pairing=Pairing(1))
        corpus = write_corpus(records)
        rows = plan(corpus, np.arange(len(records)), layout, row_length, np.ones(len(records), bool))
        batch = assemble(rows, corpus, layout, specials, row_length, len(records))
        hashes.append(dict(zip(rows.records.tolist(), batch.pair_target_hash.tolist(), strict=True)))
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_segment_sees_all_of_its_ancestors(write_corpus, specials):
    """The tree is deeper than in any current layout: 0 - 1 - 2, and 0 - 3."""
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
    ancestors = {0: set(), 1: {0}, 2: {0, 1}, 3: {0}, 4: set()}
    expected = [
        [
            key <= query and (segment[key] == segment[query] or segment[key] in ancestors[segment[query]])
            for key in range(12)
        ]
        for query in range(12)
    ]
    assert visibility_mask(batch.visible_until, "sdpa")[0, 0].tolist() == expected
    assert len(batch.label_index) == len(batch.prediction_index) == 0


def test_a_batch_of_empty_rows_is_only_padding(write_corpus, specials):
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


def test_all_tensors_but_the_seed_move_to_the_device(some_batch):
    moved = some_batch.to(torch.device("meta"))
    for entry in fields(Batch):
        before, after = getattr(some_batch, entry.name), getattr(moved, entry.name)
        assert after.shape == before.shape and after.dtype == before.dtype
        assert after.device.type == ("cpu" if entry.name == "seed" else "meta")
    assert moved.seed.item() == 5


def test_every_tensor_of_a_batch_is_pinned(some_batch, monkeypatch):
    def changed_copy(tensor: torch.Tensor) -> torch.Tensor:
        return ~tensor if tensor.dtype == torch.bool else tensor + 1

    monkeypatch.setattr(torch.Tensor, "pin_memory", changed_copy)
    pinned = some_batch.pin_memory_copy()
    for entry in fields(Batch):
        assert torch.equal(getattr(pinned, entry.name), getattr(some_batch, entry.name).pin_memory())


def test_the_micro_batches_of_a_step_share_one_read(write_corpus, specials, monkeypatch):
    corpus, layout = write_corpus(some_records(0)), make_layout("joint", specials, pairing=Pairing(1))
    rows = plan(corpus, np.arange(11), layout, ROW, np.ones(11, bool))
    rows = Rows.join([rows], 8)
    read, reads = corpus.read, []
    monkeypatch.setattr(corpus, "read", lambda records: reads.append(records.tolist()) or read(records))
    batches = list(micro_batches(rows, corpus, layout, specials, ROW, micro_batch_rows=2, rank=0, ranks=2))
    assert reads == [rows.records[(rows.row // 2) % 2 == 0].tolist()]
    full = assemble(rows, corpus, layout, specials, ROW, 11)
    assert torch.equal(torch.cat([batch.token_ids for batch in batches]), full.token_ids[[0, 1, 4, 5]])
