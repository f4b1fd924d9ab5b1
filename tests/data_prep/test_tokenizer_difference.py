"""The comparison of tokenizers reports the first difference, and no difference for equal tokenizers."""

import json
from pathlib import Path

import pytest
import transformers

from data_prep.make_tokenizer import import_tokenizer, train
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_difference import first_difference
from tests.data_prep.test_tokenizer import corpus, train_sentencepiece


@pytest.fixture(scope="module", params=["bpe", "unigram", "foreign bpe", "foreign unigram"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    *foreign, kind = request.param.split()
    return (
        import_tokenizer(train_sentencepiece(folder, model_type=kind), folder / "imported")
        if foreign
        else train(corpus(), 380, folder / "trained", kind)
    )


def import_modified(tokenizer: Tokenizer, folder: Path, change) -> Tokenizer:
    """Import a copy of the tokenizer after `change` has modified its tokenizer.json."""
    spec = json.loads((tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(spec)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_bytes((tokenizer.folder / "tokenizer_config.json").read_bytes())
    return import_tokenizer(folder, folder / "imported")


def test_saving_and_importing_a_tokenizer_changes_nothing(tokenizer, tmp_path):
    saved = tokenizer.folder
    for number in range(2):
        imported = import_tokenizer(saved / "tokenizer.json", tmp_path / f"imported {number}")
        saved = tmp_path / f"saved {number}"
        transformers.AutoTokenizer.from_pretrained(imported.folder).save_pretrained(saved)
        again = import_tokenizer(saved, tmp_path / f"again {number}")
        assert [first_difference(one, tokenizer) for one in (imported, again)] == [None, None]


def test_order_of_merges_that_form_the_same_token_does_not_matter(tmp_path):
    tokenizer = train(corpus(), 380, tmp_path / "trained")

    def reorder(spec: dict) -> None:
        merges = spec["model"]["merges"]
        indices = [
            index for index, merge in enumerate(merges[1:], start=1) if "".join(merge) == "".join(merges[index - 1])
        ]
        assert indices
        merges[indices[0]], merges[indices[0] - 1] = merges[indices[0] - 1], merges[indices[0]]

    other = import_modified(tokenizer, tmp_path / "other", reorder)
    assert other.fingerprint != tokenizer.fingerprint and first_difference(other, tokenizer) is None


def swap_merges(spec: dict) -> None:
    merges = spec["model"]["merges"]
    merges[-1], merges[-20] = merges[-20], merges[-1]


def drop_merge(spec: dict) -> None:
    del spec["model"]["merges"][-1]


@pytest.mark.parametrize(
    "change, expected",
    [
        (swap_merges, "merge "),
        (drop_merge, " merges instead of "),
        (lambda spec: spec["model"].update(byte_fallback=False), "byte_fallback of its model is False instead of True"),
    ],
)
def test_different_merges_are_reported(tmp_path, change, expected):
    tokenizer = train(corpus(), 380, tmp_path / "trained")
    other = import_modified(tokenizer, tmp_path / "other", change)
    difference = first_difference(other, tokenizer)
    assert expected in difference and "\n" not in difference


def test_different_scores_are_reported(tmp_path):
    tokenizer = train(corpus(), 380, tmp_path / "trained", "unigram")

    def change(spec: dict) -> None:
        spec["model"]["vocab"][-1][1] += 1 / 32

    assert "has the score " in first_difference(import_modified(tokenizer, tmp_path / "other", change), tokenizer)


def test_different_tokens_and_normalizers_are_reported(tmp_path):
    tokenizer = train(corpus(), 380, tmp_path / "trained")
    assert first_difference(train(corpus(), 381, tmp_path / "larger"), tokenizer) == "381 ids instead of 380"

    def swap_ids(spec: dict) -> None:
        spec["model"]["vocab"]["<0xFF>"], spec["model"]["vocab"]["<0xFE>"] = (
            spec["model"]["vocab"]["<0xFE>"],
            spec["model"]["vocab"]["<0xFF>"],
        )

    assert (
        first_difference(import_modified(tokenizer, tmp_path / "other", swap_ids), tokenizer)
        == "id 259 is '<0xFF>' instead of '<0xFE>'"
    )

    def drop_last_normalizer(spec: dict) -> None:
        spec["normalizer"]["normalizers"].pop()

    assert " has ids [" in first_difference(
        import_modified(tokenizer, tmp_path / "normalizer", drop_last_normalizer), tokenizer
    )
