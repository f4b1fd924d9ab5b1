"""A cache of the tokens of words. On real text it is several times as fast as sentencepiece itself.

Byte-pair encoding merges neighbours whose concatenation is a piece. If no piece has a blank after a character that is
not a blank, nothing is merged across the beginning of a word. A text can then be split into parts, each a word with its
preceding blanks, and the concatenated tokens of the parts are the tokens of the text.
"""

import itertools
import re
from typing import Any

import numpy as np
import sentencepiece

from data_prep.sentencepiece_json import SPACE
from data_prep.utils.ragged import flatten, ragged_ranges, ragged_sums

PART = re.compile(" *[^ ]+| +")
MAX_CACHE_SIZE = 1 << 25
"""Maximum size of the cache: characters of the parts plus tokens. A larger cache is cleared."""


def is_cacheable(spec: dict[str, Any]) -> bool:
    """Return whether the tokens of a text are the tokens of its parts.

    `spec` is the tokenizer.json of a sentencepiece model.
    """
    if spec["model"]["type"] != "BPE" or not all(token["special"] for token in spec["added_tokens"]):
        return False
    # None for a rule that does not replace a fixed string, because it may look across words.
    replaced = [rule.get("pattern", {}).get("String") for rule in spec["normalizer"]["normalizers"]]
    across = re.compile(f"[^{SPACE}]{SPACE}")
    return (
        replaced[-1:] == [" "]
        and all(old and " " not in old for old in replaced[:-1])
        and not any(map(across.search, spec["model"]["vocab"]))
    )


class WordCache:
    """The tokens of all parts since the cache was last cleared."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor):
        self.model = model
        self._clear()

    def _clear(self) -> None:
        self.parts, self.characters = _Numbering(), 0
        self.tokens = np.empty(0, np.uint32)
        self.starts = self.lengths = np.empty(0, np.int64)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated token ids of the texts, and the number of tokens of each.

        Raises the model's error for a text that has no UTF-8 form.
        """
        parts_of_texts = [PART.findall(text) for text in texts]
        counts = np.fromiter(map(len, parts_of_texts), np.int64, len(texts))
        old_size = len(self.parts)
        numbers = np.fromiter(
            map(self.parts.__getitem__, itertools.chain.from_iterable(parts_of_texts)), np.int64, int(counts.sum())
        )
        try:
            self._add(list(itertools.islice(self.parts, old_size, None)))
        except BaseException:
            self._clear()
            raise
        lengths = self.lengths[numbers]
        tokens = self.tokens[ragged_ranges(self.starts[numbers], lengths)]
        if self.characters + len(self.tokens) > MAX_CACHE_SIZE:
            self._clear()
        return tokens, ragged_sums(lengths, counts)

    def _add(self, parts: list[str]) -> None:
        new, lengths = flatten(self.model.encode(parts, num_threads=1))
        self.starts = np.append(self.starts, len(self.tokens) + np.cumsum(lengths) - lengths)
        self.lengths = np.append(self.lengths, lengths)
        self.tokens = np.append(self.tokens, new)
        self.characters += sum(map(len, parts))


class _Numbering(dict[str, int]):
    """A dictionary that numbers its keys in the order of their first lookup."""

    def __missing__(self, part: str) -> int:
        number = self[part] = len(self)
        return number
