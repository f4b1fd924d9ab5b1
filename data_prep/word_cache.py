"""Encoding that does the words of a text once, however often they come: on real text several times as fast as sentencepiece itself.

Byte-pair encoding merges neighbours whose concatenation is a piece. Where no piece has a blank behind another character, nothing is merged
across the border between the two, so a text can be cut there: the tokens of its parts, each a word with the blanks before it, are the
tokens of the whole.
"""

import itertools
import re
from typing import Any

import numpy as np
import sentencepiece

from data_prep.ragged import ragged_ranges
from data_prep.sentencepiece_json import SPACE

PART = re.compile(" *[^ ]+| +")
ENOUGH = 1 << 25
"""Characters of parts, and tokens, with which the cache starts afresh."""


def is_cacheable(spec: dict[str, Any]) -> bool:
    """Whether the tokens of a text are those of its parts, for the tokenizer.json of a sentencepiece model."""
    if spec["model"]["type"] != "BPE" or not all(token["special"] for token in spec["added_tokens"]):
        return False
    replaced = [
        rule.get("pattern", {}).get("String") for rule in spec["normalizer"]["normalizers"]
    ]  # None: looks at more than a place
    across = re.compile(f"[^{SPACE}]{SPACE}")
    return (
        replaced[-1:] == [" "]
        and all(old and " " not in old for old in replaced[:-1])
        and not any(map(across.search, spec["model"]["vocab"]))
    )


class WordCache:
    """The tokens of the parts seen so far."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor):
        self.model = model
        self._forget()

    def _forget(self) -> None:
        self.parts, self.characters = _Numbers(), 0
        self.tokens = np.empty(0, np.uint32)
        self.starts = self.lengths = np.empty(0, np.int64)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. Raises what the model raises, for a text that has no UTF-8 form."""
        by_text = [PART.findall(text) for text in texts]
        counts = [len(parts) for parts in by_text]
        known = len(self.parts)
        numbers = np.fromiter(
            map(self.parts.__getitem__, itertools.chain.from_iterable(by_text)), np.int64, sum(counts)
        )
        try:
            self._learn(list(itertools.islice(self.parts, known, None)))
        except BaseException:
            self._forget()
            raise
        lengths = self.lengths[numbers]
        tokens = self.tokens[ragged_ranges(self.starts[numbers], lengths)].tolist()
        ends = np.append(0, np.cumsum(lengths))[np.cumsum([0, *counts])].tolist()
        if self.characters + len(self.tokens) > ENOUGH:
            self._forget()
        return [tokens[begin:end] for begin, end in itertools.pairwise(ends)]

    def _learn(self, parts: list[str]) -> None:
        encoded = self.model.encode(parts, num_threads=1)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        new = np.fromiter(itertools.chain.from_iterable(encoded), np.uint32, lengths.sum())
        self.starts = np.append(self.starts, len(self.tokens) + np.cumsum(lengths) - lengths)
        self.lengths = np.append(self.lengths, lengths)
        self.tokens = np.append(self.tokens, new)
        self.characters += sum(map(len, parts))


class _Numbers(dict[str, int]):
    """Numbers things in the order in which they are first asked for."""

    def __missing__(self, part: str) -> int:
        number = self[part] = len(self)
        return number
