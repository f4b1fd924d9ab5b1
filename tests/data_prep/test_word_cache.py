"""The word cache yields the tokens of sentencepiece, and texts are not cut if that would change their tokens."""

import itertools
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import word_cache
from data_prep.make_tokenizer import import_tokenizer, train
from data_prep.tokenizer import Tokenizer
from data_prep.word_cache import WordCache, is_cacheable
from tests.data_prep.test_tokenizer import TRICKY_TEXTS, corpus, random_unicode, train_sentencepiece

CODE = [
    "def f(x):\n    return x  # a comment\n",
    "if a:\n        b = [1, 2]\n\n\n    else:\n",
    "    \n  \n",
    "a  b   c    d" * 50,
    "\n \n  x",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    tokenizer = train(corpus() + CODE * 20, 400, tmp_path_factory.mktemp("tokenizer"))
    return tokenizer, sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / "tokenizer.model"))


def load_spec(tokenizer: Tokenizer) -> dict:
    return json.loads((tokenizer.folder / "tokenizer.json").read_text())


def test_cached_tokens_equal_the_tokens_of_sentencepiece(trained):
    tokenizer, model = trained
    texts = TRICKY_TEXTS + corpus() + CODE + random_unicode(200_000)
    assert is_cacheable(load_spec(tokenizer))
    for _ in range(2):  # every word is cached the second time
        assert tokenizer.encode_batch(texts) == model.encode(texts)
    assert tokenizer.encode_batch([]) == [] and tokenizer.encode_batch(["", ""]) == [[], []]


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(
        st.text(st.sampled_from("ab \n\t01éß犬▁␛_e<s>") | st.characters(exclude_categories=["Cs"]), max_size=40),
        max_size=6,
    )
)
def test_random_texts_are_encoded_like_sentencepiece(trained, texts):
    tokenizer, model = trained
    assert tokenizer.encode_batch(texts) == model.encode(texts)


def test_the_cache_is_bounded_and_survives_an_encoding_error(trained, monkeypatch):
    _, model = trained
    monkeypatch.setattr(word_cache, "MAX_CACHE_SIZE", 2000)
    cache, texts = WordCache(model), corpus() + CODE
    for start in range(0, len(texts), 7):
        tokens, lengths = cache.encode(texts[start : start + 7])
        expected = model.encode(texts[start : start + 7])
        assert tokens.tolist() == list(itertools.chain.from_iterable(expected)) and lengths.tolist() == [
            len(ids) for ids in expected
        ]
        assert cache.characters + len(cache.tokens) <= 2000 + sum(map(len, texts[start : start + 7])) * 2
        if start % 3 == 0:
            with pytest.raises((TypeError, UnicodeEncodeError)):
                cache.encode(["new words", "half a pair: \ud800"])


@pytest.mark.parametrize(
    "options, cacheable",
    [
        ({"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}, True),
        # A space is put in front of the text.
        ({"normalization_rule_name": "identity", "remove_extra_whitespaces": False}, False),
        # Runs of spaces are collapsed.
        ({"normalization_rule_name": "identity", "add_dummy_prefix": False}, False),
        # The default normalization, nmt_nfkc, handles several characters together.
        ({"add_dummy_prefix": False, "remove_extra_whitespaces": False}, False),
        (
            {
                "normalization_rule_name": "identity",
                "add_dummy_prefix": False,
                "remove_extra_whitespaces": False,
                "split_by_whitespace": False,
            },
            False,
        ),
        (
            {
                "normalization_rule_name": "identity",
                "add_dummy_prefix": False,
                "remove_extra_whitespaces": False,
                "user_defined_symbols": ["dog"],
            },
            False,
        ),
        (
            {
                "normalization_rule_name": "identity",
                "add_dummy_prefix": False,
                "remove_extra_whitespaces": False,
                "model_type": "unigram",
            },
            False,
        ),
    ],
)
def test_texts_are_cut_only_if_that_changes_no_token(tmp_path: Path, options, cacheable):
    path = train_sentencepiece(tmp_path, **options)
    imported = import_tokenizer(path, tmp_path / "imported")
    assert is_cacheable(load_spec(imported)) == cacheable
    if (imported.folder / "tokenizer.model").exists():
        texts = TRICKY_TEXTS + corpus() + CODE + ["a dog and a  dog  "]
        assert imported.encode_batch(texts) == sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(texts)
