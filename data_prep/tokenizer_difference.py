"""Comparison of two tokenizers: whether the tokenizers of a corpus and of a model produce the same ids."""

import json
from typing import Any

import tokenizers

from data_prep.make_tokenizer import EDGE_CASE_TEXTS
from data_prep.tokenizer import SPECIAL_TOKENS, Tokenizer


def first_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return the first difference between two tokenizers, in one line, or None.

    The comparison includes the number of ids, the special tokens, every token, the merges or scores, and the ids of
    texts. It ignores differences between files that have no effect, such as the ones between library versions.
    """
    if one.fingerprint == other.fingerprint:
        return None
    if one.vocab_size != other.vocab_size:
        return f"{one.vocab_size} ids instead of {other.vocab_size}"
    for name in SPECIAL_TOKENS:
        ids = [getattr(tokenizer, f"{name}_id") for tokenizer in (one, other)]
        if ids[0] != ids[1]:
            return f"{name} is id {ids[0]} instead of {ids[1]}"
    opened = [tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json")) for tokenizer in (one, other)]
    for token_id in set(range(one.vocab_size)) - one.special_ids:
        tokens = [tokenizer.id_to_token(token_id) for tokenizer in opened]
        if tokens[0] != tokens[1]:
            return f"id {token_id} is {tokens[0]!r} instead of {tokens[1]!r}"
    specs = [json.loads(tokenizer.to_str()) for tokenizer in opened]
    return _model_difference(*specs) or _text_difference(one, other, _literals(opened[0]))


def _model_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Return the first difference between the models of two tokenizer.json files with the same tokens, or None."""
    settings = [
        {key: value for key, value in spec["model"].items() if key not in ("vocab", "merges")} for spec in (one, other)
    ]
    for key in settings[0] | settings[1]:
        if settings[0].get(key) != settings[1].get(key):
            return f"{key} of its model is {settings[0].get(key)!r} instead of {settings[1].get(key)!r}"
    if "merges" in one["model"]:
        for number, (merge, expected) in enumerate(zip(*map(_merges, (one, other)), strict=False), start=1):
            if merge != expected:
                return f"merge {number} makes {merge[0]!r} of {merge[1]} instead of {expected[0]!r} of {expected[1]}"
        counts = [len(_merges(spec)) for spec in (one, other)]
        if counts[0] != counts[1]:
            return f"{counts[0]} merges instead of {counts[1]}"
    if settings[0]["type"] == "Unigram":
        special = {token["content"] for spec in (one, other) for token in spec["added_tokens"] if token["special"]}
        for (piece, score), (_, expected) in zip(one["model"]["vocab"], other["model"]["vocab"], strict=True):
            if score != expected and piece not in special:  # the import lowers the scores of special tokens
                return f"{piece!r} has the score {score} instead of {expected}"
    return None


def _merges(spec: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Return the merged tokens, in order, each with all pairs that produce it.

    The pairs of a token are sorted, because their order depends on the conversion of a sentencepiece model.
    """
    pairs_by_token: dict[str, list[list[str]]] = {}
    for left, right in spec["model"]["merges"]:
        pairs_by_token.setdefault(left + right, []).append([left, right])
    return [(token, sorted(pairs)) for token, pairs in pairs_by_token.items()]


def _literals(tokenizer: tokenizers.Tokenizer) -> list[str]:
    return [f"a {token.content}b" for token in tokenizer.get_added_tokens_decoder().values()]


def _text_difference(one: Tokenizer, other: Tokenizer, literals: list[str]) -> str | None:
    texts = [text for text in EDGE_CASE_TEXTS if text] + literals
    for text, ids, expected in zip(texts, one.encode_batch(texts), other.encode_batch(texts), strict=True):
        if ids != expected:
            return f"{text[:20]!r} has ids {ids[:8]} instead of {expected[:8]}"
    return None
