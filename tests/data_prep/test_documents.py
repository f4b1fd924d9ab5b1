"""Tests of plain documents: mixed with pairs, and longer than a row."""

import json
import random

import pyarrow as pa
import pyarrow.ipc
import pytest
import tokenizers

from data_prep import text_chunks
from data_prep.pipeline import prepare
from data_prep.tokenizer import Tokenizer
from tests.small_corpora import SEQUENCE_LENGTH, data_config, json_source, shard_rows, split_rows

WORDS = [
    "list",
    "all",
    "the",
    "names",
    "of",
    "dogs",
    "and",
    "cats",
    "in",
    "a",
    "town",
    "sorted",
    "by",
    "größe",
    "犬",
    "🐕",
]


def words(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice("    \n") for _ in range(count)).strip()


@pytest.fixture
def documents(tmp_path) -> list[str]:
    texts = [words(count, seed) for seed, count in enumerate([5, 2000, 300, 1, 40, 700])]
    (tmp_path / "documents.txt").write_text("\n==\n".join(texts), encoding="utf-8")
    return texts


def text_source(folder, **settings) -> dict:
    return {"type": "text", "path": str(folder / "documents.txt"), "separator": "=="} | settings


def test_no_token_of_a_long_document_is_lost_and_its_records_fill_rows(documents, tmp_path):
    manifest = prepare(data_config(tmp_path / "out", text_source(tmp_path), views=["text"]))
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    (entry,) = manifest["splits"]["train"]["shards"]
    table = pa.ipc.open_file(tmp_path / "out" / entry["file"]).read_all()
    found: list[list[int]] = []
    document: list[int] = []
    for tokens, continues in zip(table["text"].to_pylist(), table["continues"].to_pylist(), strict=True):
        assert len(tokens) == SEQUENCE_LENGTH - 2 or not continues, (
            "only the last part of a document may leave a row partly empty"
        )
        document += tokens
        if not continues:
            found.append(document)
            document = []
    assert found == [tokenizer.encode_batch([text])[0] for text in documents] and document == []
    assert (
        manifest["splits"]["train"]["continued"] == sum(table["continues"].to_pylist()) == len(table) - len(documents)
    )
    assert manifest["dropped"] == {}


def test_a_document_that_is_one_position_too_long_is_cut(documents, tmp_path):
    prepare(data_config(tmp_path / "first", text_source(tmp_path), views=["text"]))
    tokenizer = Tokenizer.load(tmp_path / "first" / "tokenizer")
    prefixes = [documents[1][:length] for length in range(1, 1000)]
    tokens = [len(ids) for ids in tokenizer.encode_batch(prefixes)]
    for count, expected in (
        (SEQUENCE_LENGTH - 2, [SEQUENCE_LENGTH - 2]),
        (SEQUENCE_LENGTH - 1, [SEQUENCE_LENGTH - 2, 1]),
    ):
        (tmp_path / "documents.txt").write_text(prefixes[tokens.index(count)])
        out = tmp_path / str(count)
        prepare(
            data_config(
                out, text_source(tmp_path), views=["text"], tokenizer={"path": str(tmp_path / "first" / "tokenizer")}
            )
        )
        assert [len(tokens) for (tokens,) in split_rows(out, views=("text",))] == expected


def test_plain_documents_are_mixed_with_pairs(documents, tmp_path, write_jsonl, pairs):
    source = json_source(write_jsonl(tmp_path / "pairs.jsonl", [*pairs(50), {"text": "a question without an answer"}]))
    manifest = prepare(data_config(tmp_path / "out", source, text_source(tmp_path), sequence_length=256))
    assert {reason: drop["count"] for reason, drop in manifest["dropped"].items()} == {"one_sided": 1}, (
        "only the source of pairs may drop a record"
    )
    first, second = manifest["splits"]["train"]["shards"]
    assert (first["source"], second["source"], first["incomplete"]) == (0, 1, 0)
    decode = Tokenizer.load(tmp_path / "out" / "tokenizer").decode
    assert [(decode(text), decode(code)) for text, code in shard_rows(tmp_path / "out", first)] == [
        tuple(row.values()) for row in pairs(50)
    ]
    assert all(text is None for text, _ in shard_rows(tmp_path / "out", second))
    joined = "".join(decode(code) for _, code in shard_rows(tmp_path / "out", second))
    assert joined == "".join(documents) and second["incomplete"] == second["records"]


def test_encoding_a_very_long_text_in_chunks_changes_no_token(tmp_path, monkeypatch):
    (tmp_path / "documents.txt").write_text(words(3000, seed=9), encoding="utf-8")
    source = text_source(tmp_path)
    prepare(data_config(tmp_path / "single", source, views=["text"]))
    monkeypatch.setattr(text_chunks, "CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(text_chunks, "MARGIN_CHARACTERS", 100)
    calls = []
    encode_ragged = Tokenizer.encode_ragged
    monkeypatch.setattr(
        Tokenizer,
        "encode_ragged",
        lambda self, texts: calls.append(max(map(len, texts), default=0)) or encode_ragged(self, texts),
    )
    prepare(
        data_config(
            tmp_path / "chunked", source, views=["text"], tokenizer={"path": str(tmp_path / "single" / "tokenizer")}
        )
    )
    assert 500 < max(calls) <= 1000
    assert split_rows(tmp_path / "chunked", views=("text",)) == split_rows(tmp_path / "single", views=("text",))


def train_gpt2_style(folder) -> tokenizers.Tokenizer:
    """Train and save a byte-level BPE tokenizer that splits words with the regular expression of GPT-2."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [f"{words(3000, seed=1)}\n    indented  twice\n\n"] * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=330, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer.save(str(folder / "gpt2.json"))
    return tokenizer


@pytest.mark.parametrize("separator", [" ", "  ", "   \t ", "\n    ", "\n\n\n ", " \n"])
def test_a_long_text_is_cut_at_word_boundaries_of_the_tokenizer(tmp_path, monkeypatch, separator):
    tokenizer = train_gpt2_style(tmp_path)
    text = separator.join(words(3000, seed=9).split())
    (tmp_path / "documents.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(text_chunks, "CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(text_chunks, "MARGIN_CHARACTERS", 200)
    prepare(
        data_config(
            tmp_path / "out", text_source(tmp_path), views=["text"], tokenizer={"path": str(tmp_path / "gpt2.json")}
        )
    )
    assert [
        token for (tokens,) in split_rows(tmp_path / "out", views=("text",)) for token in tokens
    ] == tokenizer.encode(text).ids
    parts = text_chunks.chunk_text(text, Tokenizer.load(tmp_path / "out" / "tokenizer").encode_batch)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 1000, "a chunk is too long"


def test_an_unbroken_text_is_cut_anywhere(documents, tmp_path, monkeypatch):
    prepare(data_config(tmp_path / "first", text_source(tmp_path), views=["text"]))
    monkeypatch.setattr(text_chunks, "CHUNK_CHARACTERS", 1000)
    (tmp_path / "documents.txt").write_text("犬" * 2500, encoding="utf-8")
    prepare(
        data_config(
            tmp_path / "out",
            text_source(tmp_path),
            views=["text"],
            tokenizer={"path": str(tmp_path / "first" / "tokenizer")},
        )
    )
    decode = Tokenizer.load(tmp_path / "out" / "tokenizer").decode
    assert (
        decode([token for (tokens,) in split_rows(tmp_path / "out", views=("text",)) for token in tokens])
        == "犬" * 2500
    )


def test_a_text_is_not_cut_if_the_tokenizer_prepends_a_space(tmp_path, monkeypatch):
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({"▁": 0, "a": 1, "▁a": 2, "b": 3}, [("▁", "a")], byte_fallback=False)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "documents.txt").write_text("a ab b " * 200)
    monkeypatch.setattr(text_chunks, "CHUNK_CHARACTERS", 100)
    settings = {"views": ["text"], "tokenizer": {"path": str(tmp_path / "tokenizer.json")}}
    prepare(data_config(tmp_path / "out", text_source(tmp_path), **settings))
    tokens = [token for (tokens,) in split_rows(tmp_path / "out", views=("text",)) for token in tokens]
    assert tokens == tokenizer.encode("a ab b " * 200).ids


def test_a_list_of_paraphrases_fills_the_views(tmp_path, write_jsonl):
    rows = [{"phrases": ["a b", "b c", "c d"]}, {"phrases": ["d e"]}, {"phrases": ["e f", "f g", "g h", "h a", "a c"]}]
    source = json_source(write_jsonl(tmp_path / "a.jsonl", rows), views="phrases")
    manifest = prepare(
        data_config(
            tmp_path / "out", source, views=["one", "two", "three"], missing_views="keep", tokenizer={"vocab_size": 300}
        )
    )
    decode = Tokenizer.load(tmp_path / "out" / "tokenizer").decode
    texts = [
        tuple(decode(tokens) if tokens else None for tokens in row)
        for row in split_rows(tmp_path / "out", views=("one", "two", "three"))
    ]
    assert texts == [("a b", "b c", "c d"), ("d e", None, None), ("e f", "f g", "g h"), ("h a", "a c", None)]
    assert manifest["sources"] == [
        {"weight": 1.0, "records": 4, "kept": 4, "tokens": sum(manifest["splits"]["train"]["tokens"].values())}
    ]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
