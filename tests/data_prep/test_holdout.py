"""Tests of the validation split: drawn by target, or by context for frequent targets, with groups kept together."""

import hashlib
import json
import random

import pytest

from data_prep.make_tokenizer import train
from data_prep.pipeline import prepare
from data_prep.tokenizer import Tokenizer
from tests.data_prep.conftest import make_pairs
from tests.small_corpora import data_config, json_source, split_rows

FRACTION = 0.05


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """A validation fraction, and a tokenizer, because these corpora are not diverse enough to train one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train([f"{row['text']} {row['code']}" for row in make_pairs(300)], 400, folder)
    return {"validation_fraction": FRACTION, "tokenizer": {"path": str(folder)}}


def make_rows(targets: list[str], seed: int = 0, contexts: int = 10**6) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"text": f"review {rng.randrange(contexts)} of {seed}", "code": target} for target in targets]


def held_out_by_hash(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64 < FRACTION


def texts_of(folder) -> dict[str, list[tuple[str, ...]]]:
    """Return the texts of the records of each split."""
    decode = Tokenizer.load(folder / "tokenizer").decode
    return {split: [tuple(map(decode, row)) for row in split_rows(folder, split)] for split in ("train", "validation")}


UNIQUE_TARGETS = [f"SELECT {number}" for number in range(1000)]
TARGETS = {
    "two words": ["Good", "Bad"] * 1000,
    "two other words": ["positive", "negative"] * 1000,
    "sorted": ["positive"] * 1000 + ["negative"] * 1000,
    "one in ten": (["no"] * 9 + ["yes"]) * 200,
    "twenty classes": [f"class {number % 20}" for number in range(2000)],
}


@pytest.mark.parametrize("kind", TARGETS)
def test_frequent_targets_are_in_both_splits_and_each_context_in_one(tmp_path, write_jsonl, settings, kind, messages):
    rows = make_rows(TARGETS[kind], contexts=1500)
    prepare(data_config(tmp_path / "out", json_source(write_jsonl(tmp_path / "a.jsonl", rows)), **settings))
    found = texts_of(tmp_path / "out")
    trained, held_out = ({text for text, _ in found[split]} for split in ("train", "validation"))
    assert 0.03 < len(found["validation"]) / sum(map(len, found.values())) < 0.08
    assert {code for _, code in found["validation"]} >= {
        target for target in TARGETS[kind] if TARGETS[kind].count(target) > 50
    }
    assert not trained & held_out and held_out == {row["text"] for row in rows if held_out_by_hash(row["text"])}
    assert any(f"data.sources.0 has {len(set(TARGETS[kind]))} frequent targets" in line for line in messages)


@pytest.mark.parametrize("frequent", [0.05, 0.2, 0.7])
def test_a_frequent_target_is_split_by_context_and_rare_targets_by_target(
    tmp_path, write_jsonl, settings, frequent, messages
):
    rng = random.Random(1)
    targets = ["not answerable" if rng.random() < frequent else f"answer {rng.randrange(300)}" for _ in range(3000)]
    rows = make_rows(targets)
    prepare(
        data_config(
            tmp_path / "out", json_source(write_jsonl(tmp_path / "a.jsonl", rows)), **settings, deduplicate="none"
        )
    )
    found = texts_of(tmp_path / "out")
    trained, held_out = ({code for _, code in found[split]} for split in ("train", "validation"))
    assert trained & held_out == {"not answerable"}
    expected = {
        (row["text"], row["code"])
        for row in rows
        if held_out_by_hash(row["text" if row["code"] == "not answerable" else "code"])
    }
    assert set(found["validation"]) == expected
    assert any("data.sources.0 has 1 frequent target, such as a label" in line for line in messages)


@pytest.mark.parametrize(
    "targets",
    [
        UNIQUE_TARGETS,
        UNIQUE_TARGETS * 2 + UNIQUE_TARGETS[:500],
        ["a", "b"] * 8,
        [f"query {number // 20}" for number in range(4000)],
    ],
    ids=["each once", "each two or three times", "few records", "200 targets of 20"],
)
def test_many_targets_or_few_records_are_split_by_target(tmp_path, write_jsonl, settings, targets, messages):
    source = json_source(write_jsonl(tmp_path / "a.jsonl", make_rows(targets)))
    prepare(data_config(tmp_path / "out", source, **settings, deduplicate="none"))
    found = texts_of(tmp_path / "out")
    assert sorted(code for _, code in found["validation"]) == sorted(filter(held_out_by_hash, targets))
    assert not any("frequent target" in line for line in messages)


def test_sources_are_split_separately_and_independently_of_pieces_and_processes(
    tmp_path, write_jsonl, settings, set_piece_size, messages
):
    sources = [
        json_source(write_jsonl(tmp_path / f"{number}.jsonl", make_rows(targets, seed=number)))
        for number, targets in enumerate([TARGETS["sorted"], UNIQUE_TARGETS])
    ]
    found = []
    for workers, piece in ((1, 1 << 22), (1, 8000), (3, 8000)):
        set_piece_size(piece)
        out = tmp_path / f"{workers}-{piece}"
        messages.clear()
        prepare(data_config(out, *sources, **settings, workers=workers))
        assert [line[:20] for line in messages if "frequent target" in line] == ["note: data.sources.0"]
        found.append({split: set(rows) for split, rows in texts_of(out).items()})
    assert found[0] == found[1] == found[2]
    assert {code for _, code in found[0]["validation"]} == {
        "positive",
        "negative",
        *filter(held_out_by_hash, UNIQUE_TARGETS),
    }
    read = [(tmp_path / name / "manifest.json").read_text() for name in ("1-8000", "3-8000")]
    assert json.loads(read[0])["splits"] == json.loads(read[1])["splits"]


def test_a_long_list_of_paraphrases_is_in_one_split(tmp_path, write_jsonl, settings):
    phrases = [[f"list {number} phrase {phrase}" for phrase in range(8)] for number in range(200)]
    source = json_source(write_jsonl(tmp_path / "a.jsonl", [{"phrases": texts} for texts in phrases]), views="phrases")
    prepare(data_config(tmp_path / "out", source, **settings | {"validation_fraction": 0.3}))
    trained, held_out = ({text.split(" phrase")[0] for text, _ in rows} for rows in texts_of(tmp_path / "out").values())
    assert not trained & held_out and len(trained) + len(held_out) == 200 and 40 < len(held_out) < 80


def test_a_short_list_of_paraphrases_is_split_by_its_target(tmp_path, write_jsonl, settings):
    phrases = [[f"one {number}", f"other {number}"] for number in range(400)]
    source = json_source(write_jsonl(tmp_path / "a.jsonl", [{"phrases": texts} for texts in phrases]), views="phrases")
    prepare(data_config(tmp_path / "out", source, **settings))
    assert {tuple(row) for row in texts_of(tmp_path / "out")["validation"]} == {
        (one, other) for one, other in phrases if held_out_by_hash(other)
    }
