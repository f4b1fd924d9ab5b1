"""Conversion of a sentencepiece model to the content of a tokenizer.json."""

import base64
import re
from typing import Any

import sentencepiece

from data_prep.utils.console import UserError

ModelProto = Any
"""A model as a protocol buffer. The class that sentencepiece generates for it has no types."""

SPACE = "\u2581"  # the character that replaces a blank in the pieces of sentencepiece
# Sentencepiece cannot distinguish U+2581 in a text from a blank. Therefore U+2581 and U+241B are escaped by U+241B.
ESCAPES = [("\u241b", "\u241be"), (SPACE, "\u241b_")]
# Unigram scores are rounded to multiples of 1/32: sentencepiece adds them in float32 and `tokenizers` in float64,
# and only with exact sums do both choose the same of several equally likely segmentations (long runs of one character).
SCORE_STEPS = 32
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # piece types of sentencepiece_model.proto
UNIGRAM, BPE = 1, 2  # model types of sentencepiece_model.proto
PRECOMPILED = "Precompiled"  # the type of a normalizer with a table of replacements


def to_tokenizer_json(proto: ModelProto, where: str) -> dict[str, Any]:
    """Return the tokenizer.json of a sentencepiece model (a ModelProto).

    The ids of a text are equal if both libraries normalize it in the same way (they may differ with a PRECOMPILED
    table) and if sums of scores are exact. Raises UserError for a kind of model that a tokenizer.json cannot represent.
    """
    rules, trained = proto.normalizer_spec, proto.trainer_spec
    if (
        trained.model_type not in (UNIGRAM, BPE)
        or any(piece.type == UNUSED for piece in proto.pieces)
        or not rules.escape_whitespaces
        or trained.treat_whitespace_as_suffix
    ):
        raise UserError(
            f"{where}: this kind of sentencepiece model is not supported; use a BPE or unigram model without unused "
            "pieces and with U+2581 in front of words, or train a new tokenizer"
        )
    escaped = False
    normalizers: list[dict[str, Any]] = []
    if 0 < len(rules.precompiled_charsmap) < 4096:  # the table of ESCAPES is smaller than this
        escaped = sorted(sentencepiece.SentencePieceNormalizer(normalizer_spec=rules).Decompile()) == sorted(ESCAPES)
    if escaped:
        normalizers += [_replace(old, new) for old, new in ESCAPES]
    elif rules.precompiled_charsmap:
        table = base64.b64encode(rules.precompiled_charsmap).decode()
        normalizers.append({"type": PRECOMPILED, "precompiled_charsmap": table})
    if rules.remove_extra_whitespaces:
        normalizers += [_replace(rf"\A +|[ {SPACE}]+\z", "", "Regex"), _replace(" {2,}", " ", "Regex")]
    if rules.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append(_replace(" ", SPACE))

    decoders = [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if rules.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    if escaped:
        decoders += [_replace(new, old) for old, new in reversed(ESCAPES)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(i, p.piece, p.type != USER_DEFINED)
            for i, p in enumerate(proto.pieces)
            if p.type in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": _reserved_piece_splitter(proto),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe_json(proto) if trained.model_type == BPE else _unigram_json(proto),
    }


def _bpe_json(proto: ModelProto) -> dict[str, Any]:
    # Sentencepiece merges any two neighbours whose concatenation is a piece, the best score first. The equivalent list
    # of merges has every split of every piece, in the order of the scores.
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = [
        (-score, rank, cut, piece[:cut], piece[cut:])
        for rank, (piece, score) in enumerate(scores.items())
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN),
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.piece: i for i, piece in enumerate(proto.pieces)},
        "merges": [[left, right] for *_, left, right in sorted(merges)],
    }


def _unigram_json(proto: ModelProto) -> dict[str, Any]:
    # `tokenizers` would find special tokens and bytes ("<s>", "<0x41>") in plain text; sentencepiece does not. With a
    # very low score they always lose to single characters, provided that all their characters are pieces.
    low = min(piece.score for piece in proto.pieces if piece.type == NORMAL) - 1000
    return {
        "type": "Unigram",
        "unk_id": [piece.type for piece in proto.pieces].index(UNKNOWN),
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "vocab": [[piece.piece, piece.score if piece.type == NORMAL else low] for piece in proto.pieces],
    }


def _reserved_piece_splitter(proto: ModelProto) -> dict[str, Any] | None:
    # The low score of `_unigram_json` has no effect if a character of a reserved piece is unknown, because `tokenizers`
    # scores unknown characters even lower. Therefore the text is split at this character, and the reserved piece is
    # never found.
    if proto.trainer_spec.model_type == BPE:
        return None
    characters = {char for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED) for char in piece.piece}
    reserved = [piece.piece for piece in proto.pieces if piece.type not in (NORMAL, USER_DEFINED)]
    cuts = {min(unknown) for unknown in (set(piece) - characters for piece in reserved) if unknown}
    pattern = {"Regex": "|".join(map(re.escape, sorted(cuts)))}
    return {"type": "Split", "pattern": pattern, "behavior": "Contiguous", "invert": False} if cuts else None


def normalizer(rules: list[tuple[str, str]], escape_whitespaces: bool) -> sentencepiece.SentencePieceNormalizer:
    """Return a normalizer that applies these replacements (old, new) and changes nothing else."""
    return sentencepiece.SentencePieceNormalizer(
        norm_map=rules, add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=escape_whitespaces
    )


def _replace(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def added_token(token_id: int, content: str, special: bool) -> dict[str, Any]:
    """Return an entry of added_tokens."""
    # A token with blanks is matched after normalization, because normalization writes blanks as in the pieces.
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": SPACE in content,
        "special": special,
    }
