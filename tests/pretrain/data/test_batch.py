"""The batch equals a token-by-token construction from the definition of the layouts."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from pretrain.data.batch import Batch, assemble
from pretrain.data.layout import CONTEXT, TARGET, Layout, Segment, make_layout
from pretrain.data.loader import Rows, plan_rows
from pretrain.models.attention import visibility_mask

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


def record_tree(kind: str, context: list[int], target: list[int], k: int, paired: bool, lm_views: str,
                s) -> tuple[list[Node], Node | None, Node | None]:
    """The segments of a record in row order, and those whose last tokens are the prediction and the target."""
    context_labels = [False] + [lm_views == "all"] * (len(context) + 1)
    predictor = [s.predictor + i for i in range(k)]
    if kind == "joint":
        first = Node([s.bos, *context, s.sep], labelled=context_labels)
        answer = Node([*target, s.eos], first, [True] * (len(target) + 1))
        pred, alone = Node(predictor, first), Node([*target, s.eos])
        nodes = [first, answer] + ([pred] if k and paired else []) + ([alone] if paired else [])
    else:
        first = Node([s.bos, *context, s.eos], labelled=context_labels)
        pred, alone = Node(predictor, first), Node([s.bos, *target, s.eos], labelled=[False] + [True] * (len(target) + 1))
        nodes = [first] + ([pred] if k and paired else []) + [alone]
    return nodes, (pred if k else first) if paired else None, alone if paired else None


@dataclass
class Expected:
    ids: np.ndarray
    positions: np.ndarray
    visible: np.ndarray
    """(B, L, L) may query (second) see key (last)?"""
    labels: dict[int, int] = field(default_factory=dict)
    """Place in the batch -> the token it predicts."""
    read_outs: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    """Places of prediction and target, and the target's tokens, by record."""


def build(rows: Rows, records, kind: str, k: int, lm_views: str, specials) -> Expected:
    """Token by token, record after record."""
    size = rows.count * ROW
    owner: list[tuple[int, Node, int] | None] = [None] * size  # record, segment, place in it
    out = Expected(np.full(size, specials.pad), np.zeros(size, int), np.zeros((rows.count, ROW, ROW), bool))
    next_free = [0] * rows.count
    for number, (record, row, paired) in enumerate(zip(rows.records, rows.row, rows.paired, strict=True)):
        nodes, prediction, target = record_tree(kind, *records[record], k, paired, lm_views, specials)
        last = {}
        for node in nodes:
            for place, token in enumerate(node.tokens):
                at = row * ROW + next_free[row]
                next_free[row] += 1
                out.ids[at], out.positions[at], owner[at] = token, node.first_position + place, (number, node, place)
                if node.labelled[place]:
                    out.labels[at - 1] = token
                last[id(node)] = at
        if paired:
            out.read_outs.append((last[id(prediction)], last[id(target)], tuple(records[record][1])))
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


def some_records(seed: int) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(seed)
    records = [([rng.randrange(5, 512) for _ in range(rng.randint(1, 12))], [rng.randrange(5, 512) for _ in range(rng.randint(1, 8))])
               for _ in range(11)]
    for number, target in ((5, records[2][1]), (6, records[2][1][::-1]), (8, [*records[2][1], 7])):
        records[number] = (records[number][0], target)
    return records


CASES = [(kind, k, lm_views) for kind in ("joint", "independent") for k in (0, 1, 3) for lm_views in ("all", "last")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request, write_corpus, specials) -> tuple[Batch, Expected, str]:
    kind, k, lm_views = request.param
    records = some_records(k)
    corpus = write_corpus(records, shard_records=4)
    layout = make_layout(kind, specials, pairs=True, predictor_tokens=k, lm_views=lm_views)
    paired = np.array([record % 3 != 1 for record in range(len(records))])
    rows = plan_rows(corpus, np.arange(len(records)), layout, ROW, paired)
    rows = Rows.join([rows], rows.count + 1)  # an empty row at the end
    return assemble(rows, corpus, layout, specials, ROW, int(paired.sum()) + 2), build(rows, records, kind, k, lm_views, specials), lm_views


def test_tokens_and_positions(case):
    batch, expected, _ = case
    np.testing.assert_array_equal(batch.token_ids.flatten(), expected.ids)
    np.testing.assert_array_equal(batch.positions.flatten(), expected.positions)


def test_every_label_once_at_the_place_before_its_token(case):
    batch, expected, _ = case
    assert len(set(batch.label_index.tolist())) == len(batch.label_index)
    assert dict(zip(batch.label_index.tolist(), batch.label_ids.tolist(), strict=True)) == expected.labels


def test_the_end_token_is_a_label_and_what_no_one_writes_never_is(case, specials):
    batch, _, lm_views = case
    labels = batch.label_ids.tolist()
    assert labels.count(specials.eos) >= 11
    assert not {specials.bos, specials.pad} & set(labels)
    assert max(labels) < specials.predictor
    predicting = batch.token_ids.flatten()[batch.label_index]
    assert (predicting < specials.predictor).all() and (predicting != specials.pad).all()
    if lm_views == "last":
        assert labels.count(specials.eos) == 11 and specials.sep not in labels


def test_read_outs_and_the_padding_of_the_gather(case):
    batch, expected, _ = case
    pairs = int(batch.pair_valid.sum())
    assert batch.pair_valid.tolist() == [True] * pairs + [False] * 2
    found = zip(batch.prediction_index[:pairs].tolist(), batch.target_index[:pairs].tolist(), strict=True)
    assert list(found) == [read_out[:2] for read_out in expected.read_outs]
    assert batch.prediction_index[pairs:].tolist() == batch.target_index[pairs:].tolist() == [0, 0]


def test_keys_are_equal_exactly_where_targets_are(case):
    batch, expected, _ = case
    keys = batch.pair_key[batch.pair_valid].tolist()
    contents = [content for *_, content in expected.read_outs]
    assert len(set(contents)) < len(contents), "the test needs a target that occurs twice"
    assert [[one == other for other in keys] for one in keys] == [[one == other for other in contents] for one in contents]


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
        layout = make_layout(kind, specials, pairs=True, predictor_tokens=1)
        corpus = write_corpus(records)
        rows = plan_rows(corpus, np.arange(len(records)), layout, row_length, np.ones(len(records), bool))
        batch = assemble(rows, corpus, layout, specials, row_length, len(records))
        keys.append(dict(zip(rows.records.tolist(), batch.pair_key.tolist(), strict=True)))
    assert keys[0] == keys[1] == keys[2]


def test_a_segment_sees_its_parents_parents(write_corpus, specials):
    """A deeper tree than any layout of today: 0 - 1 - 2, and 0 - 3."""
    layout = Layout((Segment(CONTEXT, (specials.bos,)), Segment(TARGET, parent=0), Segment(CONTEXT, (), (specials.eos,), parent=1),
                     Segment(TARGET, (), (specials.eos,), parent=0)))
    corpus = write_corpus([([11, 12], [21, 22])])
    rows = plan_rows(corpus, np.zeros(1, np.int64), layout, 12, np.zeros(1, bool))
    batch = assemble(rows, corpus, layout, specials, 12, 0)
    assert batch.token_ids[0].tolist() == [2, 11, 12, 21, 22, 11, 12, 3, 21, 22, 3, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 0]
    segment = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    above = {0: set(), 1: {0}, 2: {0, 1}, 3: {0}, 4: set()}
    expected = [[key <= query and (segment[key] == segment[query] or segment[key] in above[segment[query]]) for key in range(12)]
                for query in range(12)]
    assert visibility_mask(batch.visible_until, "sdpa")[0, 0].tolist() == expected
    assert len(batch.label_index) == len(batch.prediction_index) == 0


def test_a_batch_of_empty_rows_is_padding_alone(write_corpus, specials):
    corpus = write_corpus(some_records(0))
    layout = make_layout("joint", specials, pairs=True, predictor_tokens=1)
    rows = plan_rows(corpus, np.arange(3), layout, ROW, np.ones(3, bool))
    batch = assemble(Rows.join([rows], rows.count + 2).select(rows.count, rows.count + 2), corpus, layout, specials, ROW, 4)
    assert batch.token_ids.shape == (2, ROW) and (batch.token_ids == specials.pad).all()
    assert len(batch.label_index) == 0 and not batch.pair_valid.any()
    assert torch.equal(visibility_mask(batch.visible_until, "sdpa")[:, 0], torch.eye(ROW, dtype=torch.bool).expand(2, ROW, ROW))
