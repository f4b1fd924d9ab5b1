"""The picture of a packed row, parsed from its text, matches a token-by-token construction of the layouts."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from pretrain.data.batch import assemble
from pretrain.data.row_drawing import draw_row
from tests.pretrain.data.test_batch import Case, Node, record_tree, some_records

ROW = 64
CASES = [Case(kind, k, views=views) for kind in ("joint", "independent") for k in (0, 1, 3) for views in (2, 3)]
CASES += [
    Case(kind, 1, views=views, incomplete=incomplete)
    for kind in ("joint", "independent")
    for views, incomplete in ((1, False), (3, True))
]
SEGMENT = re.compile(r" *(\d+) +(\d*)  (\w+) +(\d+)–(\d+) +(\d+)–(\d+) +(\d+) +(\d+|–)  (.*)")


class ParsedPicture:
    """The parts of a picture, parsed from its text."""

    def __init__(self, text: str):
        self.text = text
        lines = text.splitlines()
        self.segments, record = [], ""
        for found in filter(None, map(SEGMENT.fullmatch, lines)):
            record = found[2] or record
            self.segments.append(
                (
                    int(found[1]),
                    int(record),
                    found[3],
                    *(int(found[place]) for place in range(4, 9)),
                    int(found[9].strip("–") or 0),
                )
            )
        self.strips = {
            name: "".join(line[10:].ljust(70) for line in lines if line.startswith(f"{name} "))
            for name in ("segment", "position", "label", "read-out")
        }
        self.matrix = {}
        shown_keys: list[int] = []
        for line in lines:
            numbers = line.split()
            if re.fullmatch(r" {10}[\d ]+", line):
                shown_keys = list(map(int, numbers))
            elif re.fullmatch(r" *\d+  *[■◣·? ]+", line):
                self.matrix |= {(int(numbers[0]), key): sign for key, sign in zip(shown_keys, numbers[1:], strict=True)}
        self.read_outs = [
            tuple(map(int, found))
            for found in re.findall(r"record (\d+): .* at (\d+) \(end .*──▶ .* at (\d+) \(end", text)
        ]


def sign(query: Node, key: Node) -> str:
    return "◣" if query is key else "■" if key in query.ancestors() else "·"


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request, write_corpus, specials):
    """Return the parsed picture, the expected segments and pairs, and the corpus.

    A segment is (record, node, index of its first token in the row). A pair is (record, index of the prediction, index
    of the target).
    """
    case: Case = request.param
    records = (
        some_records(case.k, case.views, case.incomplete)
        if case.views > 1
        else [record[:1] for record in some_records(0)]
    )
    corpus = write_corpus(records, shard_records=4)
    found = ParsedPicture(draw_row(corpus, 2, case.kind, case.k, ROW, width=80))
    expected, pairs, place = [], [], 0
    for record in dict.fromkeys(segment[1] for segment in found.segments):
        nodes, record_pairs = record_tree(case, list(records[record]), case.views > 1, specials)
        last = {}
        for node in nodes:
            expected.append((record, node, place))
            place += len(node.tokens)
            last[id(node)] = place - 1
        pairs += [(record, last[id(prediction)], last[id(target)]) for prediction, target, _ in record_pairs]
    return found, expected, pairs, corpus


def test_segments(case):
    found, expected, _, _ = case
    assert found.segments[0][1] >= 2 and 2 in {segment[1] for segment in found.segments}
    assert [segment[:2] for segment in found.segments] == [
        (number, record) for number, (record, _, _) in enumerate(expected)
    ]
    assert [segment[3:] for segment in found.segments] == [
        (
            place,
            place + len(node.tokens) - 1,
            node.first_position,
            node.first_position + len(node.tokens) - 1,
            len(node.tokens),
            sum(node.labelled),
        )
        for _, node, place in expected
    ]


def test_views(case, specials):
    found, expected, _, corpus = case
    for (_, record, name, *_), (_, node, _) in zip(found.segments, expected, strict=True):
        bare = [token for token in node.tokens if token not in (specials.bos, specials.sep, specials.eos)]
        if name == "pred":
            assert bare == list(range(specials.predictor, specials.predictor + len(bare)))
        else:
            assert bare == corpus.tokens_by_view(record)[name].tolist()


def test_visibility_matrix(case):
    found, expected, _, _ = case
    assert "no token sees a token of another record" in found.text and "?" not in found.matrix.values()
    same = [
        (query, key)
        for query, key in itertools.product(range(len(expected)), repeat=2)
        if expected[query][0] == expected[key][0]
    ]
    assert set(same) <= set(found.matrix), "each pair of segments of a record should be shown"
    assert found.matrix == {(query, key): sign(expected[query][1], expected[key][1]) for query, key in found.matrix}


def test_strips_and_read_outs(case):
    found, expected, pairs, _ = case
    labels = {
        place + offset for _, node, place in expected for offset, labelled in enumerate(node.labelled) if labelled
    }
    assert {index for index, char in enumerate(found.strips["label"]) if char == "•"} == labels
    assert {index for index, char in enumerate(found.strips["read-out"]) if char in "PB"} == {
        prediction for _, prediction, _ in pairs
    }
    assert {index for index, char in enumerate(found.strips["read-out"]) if char in "TB"} == {
        target for _, _, target in pairs
    }
    assert sorted(found.read_outs) == sorted(pairs)
    for _, node, place in expected:
        if len(node.tokens) > 1:
            strip = found.strips["segment"][place : place + len(node.tokens)]
            assert strip[0] == "├" and strip[-1] == "┤" and not {"├", "┤", "◆"} & set(strip[1:-1])
            assert found.strips["position"][place:].startswith((str(node.first_position), "…"))


MISTAKES = {
    "all records see each other": (
        lambda batch: {"visible_until": torch.full_like(batch.visible_until, ROW)},
        "TOKEN PAIRS ARE VISIBLE ACROSS RECORDS",
    ),
    "a token visible too long": (lambda batch: {"visible_until": batch.visible_until + (batch.positions == 1)}, "?"),
    "a context token hidden too early": (
        lambda batch: {"visible_until": torch.where(batch.positions == 1, 2, batch.visible_until)},
        "?",
    ),
    "shifted labels": (lambda batch: {"label_index": batch.label_index + 1}, "?"),
    "positions not reset": (lambda batch: {"positions": torch.arange(ROW).repeat(1, 1).flip(1)}, "?"),
    "a target read out one token early": (lambda batch: {"target_index": batch.target_index - 1}, "(?)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_batch_is_marked(mistake, write_corpus, monkeypatch):
    change, sign = MISTAKES[mistake]
    corpus = write_corpus(some_records(0))
    right = draw_row(corpus, 2, "joint", 1, ROW, width=200)
    monkeypatch.setattr(
        "pretrain.data.row_drawing.assemble", lambda *arguments: replace(made := assemble(*arguments), **change(made))
    )
    wrong = draw_row(corpus, 2, "joint", 1, ROW, width=200)
    assert wrong.count(sign) > right.count(sign)


def test_lines_have_at_most_the_requested_width(case):
    assert max(map(len, case[0].text.splitlines())) <= 80
