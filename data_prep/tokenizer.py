"""Tokenizers: conversion of text to token ids and back.

A tokenizer is a self-contained folder, written by make_tokenizer.py:

    tokenizer.json          the tokenizer in the Hugging Face format, for `tokenizers` and AutoTokenizer
    tokenizer_config.json   names pad, bos, eos and sep; makes AutoTokenizer read their literals as plain text
    tokenizer.model         the same tokenizer as a sentencepiece model, if the ids of every text are equal

If there is a tokenizer.model, it encodes the texts: on one thread and on documents it is 1.3 (BPE) to 5 (unigram) times
as fast as `tokenizers`. A word cache makes most BPE models several times faster still (data_prep/word_cache.py).

Neither torch nor transformers is imported, so worker processes start fast.
"""

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from data_prep.tokenizer_files import read_tokenizer_json, token_text
from data_prep.utils.console import UserError
from data_prep.utils.ragged import flatten
from data_prep.word_cache import WordCache, is_cacheable

logger = logging.getLogger(__name__)

# The preparation runs one process per core. Threads of `tokenizers` in each of them would only oversubscribe the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sentencepiece.set_min_log_level(2)  # otherwise building a normalizer prints to stderr

SPECIAL_TOKENS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "sep": "<sep>"}
"""Default special tokens."""


class Tokenizer:
    """A tokenizer that is read from its folder. A pickle contains only the path of the folder.

    pad_id, bos_id, eos_id, sep_id: four different ids, which never occur in an encoded text.
    special_ids: the set of these four ids.
    unknown_id: the id of text that is not in the vocabulary; None if there is no such id.
    vocab_size: an upper limit of all ids, including special tokens; not padded to a multiple.
    fingerprint: SHA-256 (hex) of everything that determines the ids, here and in exported models.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder).absolute()
        config = read_tokenizer_json(self.folder / "tokenizer_config.json")
        spec = read_tokenizer_json(self.folder / "tokenizer.json")
        id_of: dict[str | None, int] = {token["content"]: token["id"] for token in spec["added_tokens"]}
        ids = {name: id_of.get(token_text(config.get(f"{name}_token"))) for name in SPECIAL_TOKENS}
        special_ids = [token_id for token_id in ids.values() if token_id is not None]
        if len(set(special_ids)) < len(ids):
            raise UserError(
                f"{self.folder}: pad, bos, eos and sep are not four declared special tokens ({ids}); "
                "create the folder with `train` or `import_tokenizer`"
            )
        self.pad_id, self.bos_id, self.eos_id, self.sep_id = special_ids
        self.special_ids = frozenset(special_ids)
        vocab = spec["model"]["vocab"]  # a list of pieces and scores in a unigram model
        self.unknown_id: int | None = (
            spec["model"].get("unk_id") if isinstance(vocab, list) else vocab.get(unknown_token(spec))
        )
        self.vocab_size = 1 + max(*id_of.values(), *(vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]))

        model_path = self.folder / "tokenizer.model"
        self._sentencepiece = open_sentencepiece(model_path) if model_path.exists() else None
        self._words = WordCache(self._sentencepiece) if self._sentencepiece and is_cacheable(spec) else None
        self._tokenizers = None if self._sentencepiece else open_tokenizers(spec, self.folder / "tokenizer.json")
        model = model_path.read_bytes() if self._sentencepiece else b""
        self.fingerprint = hashlib.sha256(
            (self.folder / "tokenizer.json").read_bytes() + model + json.dumps(ids).encode()
        ).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a folder written by `train` or `import_tokenizer`. Raises UserError for any other folder."""
        return cls(folder)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Path]]:
        return Tokenizer, (self.folder,)

    def encode_ragged(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of all texts, concatenated, and the number of tokens of each: (T,) uint32, (N,).

        There are no special tokens; literals such as "<s>" are plain text. Runs on one thread. Raises UserError for a
        text with a lone surrogate, which has no UTF-8 form.
        """
        try:
            if self._words:
                return self._words.encode(texts)
            if self._sentencepiece:
                return flatten(encode_sentencepiece(self._sentencepiece, texts))
            return flatten(encode_tokenizers(self._hugging_face(), texts))
        except (TypeError, UnicodeEncodeError):
            bad = [text for text in texts if re.search("[\ud800-\udfff]", text)]
            if not bad:
                raise
            raise UserError(f"text with a lone surrogate cannot be tokenized: {bad[0][:80]!r}; fix the text") from None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text as a list. See `encode_ragged`."""
        ids, lengths = self.encode_ragged(texts)
        flat, ends = ids.tolist(), np.cumsum(lengths).tolist()
        return [flat[begin:end] for begin, end in itertools.pairwise([0, *ends])]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids. Special ids are skipped, and invalid UTF-8 bytes become U+FFFD."""
        plain = [int(i) for i in ids if int(i) not in self.special_ids]
        text: str = (self._sentencepiece or self._hugging_face()).decode(plain)
        return text

    def piece(self, token_id: int) -> str:
        """Return a token as the vocabulary writes it, for example with U+2581 for a blank or with letters for bytes."""
        if self._sentencepiece:
            return str(self._sentencepiece.id_to_piece(token_id))
        piece = self._hugging_face().id_to_token(token_id)
        assert piece is not None
        return piece

    def _hugging_face(self) -> tokenizers.Tokenizer:
        """Return the tokenizer of the `tokenizers` library, which exists only if there is no sentencepiece model."""
        assert self._tokenizers is not None
        return self._tokenizers


def open_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Open a sentencepiece model. Raises UserError if it is not one."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path}: not a sentencepiece model ({' '.join(str(error).split())}); use a valid one, or a tokenizer.json"
        ) from None


def unknown_token(spec: dict[str, Any]) -> str | None:
    """Return the token for unknown text in the content of a tokenizer.json, if there is one."""
    model = spec["model"]
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    token: str | None = model.get("unk_token")
    return token


def open_tokenizers(spec: dict[str, Any], where: str | Path) -> tokenizers.Tokenizer:
    """Build the tokenizer of the content of a tokenizer.json. Raises UserError if it is invalid."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{where}: not a valid tokenizer.json ({' '.join(str(error).split())}); write it again with save_pretrained"
        ) from None
    tokenizer.encode_special_tokens = True  # the literal of a special token is plain text
    return tokenizer


def encode_sentencepiece(model: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text."""
    ids: list[list[int]] = model.encode(texts, num_threads=1)
    return ids


def encode_tokenizers(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
