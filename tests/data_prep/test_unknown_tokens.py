"""Text that is unknown to the tokenizer is counted in every record and reported with its location."""

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from data_prep.pipeline import prepare
from data_prep.tokenizer import Tokenizer
from data_prep.tools.stats import stats
from tests.small_corpora import data_config, json_source, split_rows

NUM_ROWS = 2100
"""Number of rows. Those with unknown text come after the CHECKED_TEXTS texts on which a tokenizer is first checked."""


def save_character_tokenizer(folder: Path) -> Path:
    """Save a tokenizer of single ASCII characters, and return its tokenizer.json."""
    vocab = {token: number for number, token in enumerate(["<unk>", *map(chr, range(32, 127))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def save_word_tokenizer(folder: Path) -> Path:
    """Save a tokenizer of words, and return its tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {"[UNK]": 0, "question": 1, "answer": 2} | {str(n): n + 3 for n in range(NUM_ROWS)}, unk_token="[UNK]"
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def train_model_without_bytes(folder: Path) -> Path:
    """Train a sentencepiece model without byte fallback, and return its path."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["question answer 0123456789"] * 50),
        model_prefix=str(folder / "ascii"),
        model_type="bpe",
        vocab_size=30,
        hard_vocab_limit=False,
        byte_fallback=False,
        minloglevel=2,
        normalization_rule_name="identity",
    )
    return folder / "ascii.model"


MAKERS = {
    "characters": save_character_tokenizer,
    "words": save_word_tokenizer,
    "sentencepiece": train_model_without_bytes,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_unknown_tokens_are_counted_in_every_text(tmp_path, write_jsonl, kind, messages):
    rows = [{"text": f"question {number}", "code": f"answer {number}"} for number in range(NUM_ROWS)]
    rows[NUM_ROWS - 2]["code"] = "answer № 3"
    rows[NUM_ROWS - 1] |= {"text": "question 犬", "code": "answer 🦙"}
    rows[5]["code"] = "№ " * 200  # too long for a row, so it is dropped
    source = json_source(write_jsonl(tmp_path / "a.jsonl", rows))
    held_out = json_source(
        write_jsonl(tmp_path / "b.jsonl", [{"text": "question 1", "code": "answer 3"}]), split="validation"
    )
    out = tmp_path / "out"
    manifest = prepare(data_config(out, source, held_out, tokenizer={"path": str(MAKERS[kind](tmp_path))}))
    unknown_id = Tokenizer.load(out / "tokenizer").unknown_id
    in_shards = sum(tokens.count(unknown_id) for row in split_rows(out) for tokens in row)
    locations = [f"{tmp_path / 'a.jsonl'}:{NUM_ROWS - 1}: '№'", f"{tmp_path / 'a.jsonl'}:{NUM_ROWS}: '犬'"]
    assert in_shards == 3
    assert manifest["splits"]["train"]["unknown"] == {"tokens": in_shards, "records": 2, "first": locations}
    assert manifest["splits"]["validation"]["unknown"] == {"tokens": 0, "records": 0, "first": []}
    line = (
        "3 tokens in 2 records of split train are unknown to the tokenizer, so their text is lost; "
        f"the first: {locations[0]}"
    )
    assert f"WARNING: {line}" in messages and line in (out / "summary.md").read_text()
    assert list(stats(out, "train"))[-1] == line and "are unknown" not in list(stats(out, "validation"))[-1]


def test_a_tokenizer_with_byte_fallback_has_no_unknown_tokens(tmp_path, write_jsonl, messages):
    rows = [{"text": f"question {number}", "code": f"№ {number} 犬🦙"} for number in range(50)]
    manifest = prepare(
        data_config(
            tmp_path / "out", json_source(write_jsonl(tmp_path / "a.jsonl", rows)), tokenizer={"vocab_size": 300}
        )
    )
    assert manifest["splits"]["train"]["unknown"]["tokens"] == 0 and not any("unknown" in line for line in messages)
    messages.clear()
    prepare(
        data_config(
            tmp_path / "again",
            json_source(tmp_path / "a.jsonl"),
            tokenizer={"path": str(tmp_path / "out" / "tokenizer")},
        )
    )
    assert not any("unknown" in line for line in messages)


def test_a_tokenizer_that_drops_unknown_text_is_warned_about(tmp_path, write_jsonl, messages):
    vocab = {character: number for number, character in enumerate(map(chr, range(32, 127)))}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[])).save(str(tmp_path / "tokenizer.json"))
    source = json_source(write_jsonl(tmp_path / "a.jsonl", [{"text": "a question", "code": "b"}]))
    prepare(data_config(tmp_path / "out", source, tokenizer={"path": str(tmp_path / "tokenizer.json")}))
    assert any(
        line.startswith(f"WARNING: the tokenizer {tmp_path / 'tokenizer.json'} has neither bytes nor an unknown token")
        for line in messages
    )


def test_statistics_of_a_corpus_without_unknown_token_counts(tmp_path, write_jsonl):
    out = tmp_path / "out"
    prepare(
        data_config(
            out,
            json_source(write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "code": "b"}])),
            tokenizer={"vocab_size": 290},
        )
    )
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["splits"]["train"]["unknown"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert "are unknown" not in "".join(stats(out, "train"))
