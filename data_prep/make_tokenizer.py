"""New tokenizer folders: `train` trains a tokenizer on text, and `import_tokenizer` imports an existing one.

tokenizer.py describes the files of a folder and reads it.
"""

import io
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from data_prep.sentencepiece_json import (
    ESCAPES,
    NORMAL,
    PRECOMPILED,
    SCORE_STEPS,
    SPACE,
    USER_DEFINED,
    ModelProto,
    added_token,
    normalizer,
    to_tokenizer_json,
)
from data_prep.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    encode_sentencepiece,
    encode_tokenizers,
    open_sentencepiece,
    open_tokenizers,
    unknown_token,
)
from data_prep.tokenizer_files import add_tokens, read_tokenizer_json, special_tokens_by_name
from data_prep.utils.console import UserError

logger = logging.getLogger(__name__)

LARGEST_VOCABULARY = 2**24
SENTENCE = r"[^\n]{1,1000}"  # sentencepiece silently drops training sentences of more than 4192 bytes
EDGE_CASE_TEXTS = [
    "",
    " ",
    "  two  blanks ",
    "\ttab\nline\r\n\n end \n",
    "a\0b\x01\x7f\x85\xa0",
    "1234567890 3.14 \u0663\u00bd",
    "e\u0301 \u0e33 \u1100\u1161 \ufb01 \u0130",
    "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\u2581 \u2581\u241b_\u241be\u2585",
    "<s></s><pad><sep><unk><0x41>",
    " <s> a</s>b <pad> <sep>",
    "\ufeff\ufffd\uffff",
    *(character * count for character in " a-0(\n\u00e9\u2581\U0001f44d" for count in (2, 3, 7, 40)),
    *(
        "".join(map(chr, random.Random(i).choices(range(*block), k=20)))
        for i in range(30)
        for block in ((32, 127), (0, 0x300), (0x2C0, 0x380), (0x2000, 0x2C00), (0x3000, 0xD800), (0xE000, 0x20000))
    ),
]


def train(texts: Iterable[str], vocab_size: int, folder: Path, model_type: str = "bpe") -> Tokenizer:
    """Train a lossless "bpe" or "unigram" sentencepiece model and write its folder.

    Every text decodes to itself: blanks are kept, nothing is normalized, and characters outside the vocabulary become
    their UTF-8 bytes. Equal texts produce equal files. `vocab_size` includes the 5 special tokens and 256 bytes. All
    texts are held in memory. Raises UserError for an empty corpus, or if `vocab_size` is too large or too small.
    """
    if model_type not in ("bpe", "unigram"):
        raise UserError(f"tokenizer model_type is {model_type!r}; set 'bpe' or 'unigram'")
    if vocab_size > LARGEST_VOCABULARY:  # sentencepiece would report this only after minutes, or hang
        raise UserError(
            f"tokenizer vocab_size {vocab_size} is too large: the maximum is {LARGEST_VOCABULARY}; lower it"
        )
    sample: list[str] = []  # the texts on which the conversion is checked
    proto = _train_sentencepiece(texts, vocab_size, model_type, sample)
    return _write_sentencepiece(proto, Path(folder), EDGE_CASE_TEXTS + sample, f"{folder}: the new tokenizer")


def import_tokenizer(path: Path, folder: Path, notes_level: int = logging.INFO) -> Tokenizer:
    """Import a sentencepiece .model, a tokenizer.json, or a Hugging Face folder with one of these.

    Ids do not change. Of pad, bos, eos and sep, the tokens that are missing, shared (pad = eos) or possible in encoded
    text are replaced by new special tokens. If `tokenizers` encodes some texts differently from a sentencepiece model,
    the ids of `tokenizers` are used; exported models then agree with the preparation. A note about each such change is
    logged at `notes_level`. Raises UserError if `path` is not one of these, or if its ids cannot be preserved.
    """
    source, folder = find_tokenizer(Path(path)), Path(folder)
    if folder.resolve() == source.parent.resolve():
        raise UserError(f"{folder}: cannot import the tokenizer into its own folder; choose a different folder")
    if source.suffix == ".json":
        return _import_json(source, folder, notes_level, with_model=Path(path).is_dir())
    open_sentencepiece(source)  # raises a more specific error than parsing does
    proto = _parse_proto(source.read_bytes())
    test_texts = list(EDGE_CASE_TEXTS)
    pieces = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type == NORMAL]
    test_texts += ["".join(random.Random(i).choices(pieces, k=20)) for i in range(200)]
    test_texts += [f"a {p.piece.replace(SPACE, ' ')}b" for p in proto.pieces if p.type == USER_DEFINED]
    return _write_sentencepiece(proto, folder, test_texts, str(source), notes_level, model_folder=source.parent)


def _train_sentencepiece(texts: Iterable[str], vocab_size: int, model_type: str, sample: list[str]) -> ModelProto:
    failure: list[BaseException] = []  # kept because sentencepiece would replace an exception of `texts` by its own

    def sentences() -> Iterator[str]:
        try:
            for text in texts:
                for sentence in re.findall(SENTENCE, text):
                    if len(sample) < 1000 and not sentence.isspace():
                        sample.append(sentence)
                    yield sentence
        except BaseException as error:
            failure.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type=model_type,
            vocab_size=max(vocab_size, len(SPECIAL_TOKENS) + 1),  # below this, its error has no minimum
            normalizer=normalizer(ESCAPES, escape_whitespaces=True),
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=SPECIAL_TOKENS["pad"],
            bos_piece=SPECIAL_TOKENS["bos"],
            eos_piece=SPECIAL_TOKENS["eos"],
            control_symbols=SPECIAL_TOKENS["sep"],
            required_chars="<>/0123456789ABCDEFxpadunkse",  # all characters of reserved pieces; see `_unigram_json`
            num_threads=1,  # the number of threads changes the scores
            minloglevel=2,
        )
    except RuntimeError as error:
        if failure:
            raise failure[0] from None
        raise UserError(_why_training_failed(str(error), vocab_size, sample)) from None

    proto = _parse_proto(model.getvalue())
    if model_type == "unigram":
        for piece in proto.pieces:
            piece.score = round(piece.score * SCORE_STEPS) / SCORE_STEPS
    undo = normalizer([(b, a) for a, b in ESCAPES], escape_whitespaces=False)
    proto.denormalizer_spec.ParseFromString(undo.serialized_normalizer_spec())
    return proto


def _why_training_failed(message: str, vocab_size: int, sample: list[str]) -> str:
    if not sample or "all_chars_count" in message:
        return "tokenizer training: the corpus has no text; check the input files and columns"
    if largest := re.search(r"Please set it to a value <= (\d+)", message):
        return (
            f"tokenizer vocab_size {vocab_size} is too large for the corpus: "
            f"the maximum is {largest[1]}; lower it or provide more text"
        )
    if smallest := re.search(r"required_chars\. -?\d+ vs (\d+)", message):
        return (
            f"tokenizer vocab_size {vocab_size} is too small: special tokens, bytes and the characters of the corpus "
            f"already require {smallest[1]}; raise it to at least this number"
        )
    return "tokenizer training: sentencepiece reports " + " ".join(message.split())


def _write_sentencepiece(
    proto: ModelProto,
    folder: Path,
    texts: list[str],
    where: str,
    notes_level: int = logging.INFO,
    model_folder: Path | None = None,
) -> Tokenizer:
    """Write the folder of a sentencepiece model, with the tokens that other files in `model_folder` add to it."""
    content: bytes | None = proto.SerializeToString()
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    spec = to_tokenizer_json(proto, where)
    ids = {"pad": model.pad_id(), "bos": model.bos_id(), "eos": model.eos_id()}
    declared = {name: model.id_to_piece(i) for name, i in ids.items() if i >= 0}
    added = add_tokens(spec, model_folder) if model_folder else []
    if model_folder:
        declared |= _declared(model_folder)
    config = _assign_special_tokens(spec, declared, where, notes_level)
    differences = []
    if spec["normalizer"]["normalizers"][0]["type"] == PRECOMPILED:
        # `tokenizers` looks up entire graphemes of up to 5 bytes, sentencepiece the longest key at each position.
        converted_normalizer = open_tokenizers(spec, where).normalizer
        texts = [text for text in texts if converted_normalizer.normalize_str(text) == model.normalize(text)]
        differences.append("the normalization of letters with combining marks")
    if spec["model"]["type"] == "Unigram" and any(piece.score * SCORE_STEPS % 1 for piece in proto.pieces):
        differences.append("the choice between segmentations whose scores differ only by rounding")
    if added:
        content = None  # the model lacks these tokens
        texts = [text for text in texts if not any(token in text for token in added)]
        logger.log(
            notes_level,
            f"note: {where} is used as a tokenizer.json with the {len(added):,} tokens that other files in its folder "
            f"add, such as {added[0]!r}",
        )
    if differences:
        content = None
        logger.log(
            notes_level,
            f"note: {where} is used as a tokenizer.json, to agree with exported models; its ids may differ from the "
            "ones of sentencepiece in " + " and in ".join(differences),
        )
    _check(spec, lambda batch: encode_sentencepiece(model, batch), texts, where)
    return _write(folder, spec, config, content)


def _parse_proto(content: bytes) -> ModelProto:
    from sentencepiece import sentencepiece_model_pb2  # imported late: encoding does not need protobuf

    return sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]  # made at run time


def _import_json(source: Path, folder: Path, notes_level: int, with_model: bool) -> Tokenizer:
    # This project lays out the views: the tokenizer itself must not add, truncate or pad anything.
    spec = read_tokenizer_json(source) | {"truncation": None, "padding": None, "post_processor": None}
    original = open_tokenizers(spec, source)
    if spec["model"].get("type") == "Unigram":  # as in `_unigram_json`
        low = min(score for _, score in spec["model"]["vocab"]) - 1000
        specials = {token["content"] for token in spec["added_tokens"] if token["special"]}
        spec["model"]["vocab"] = [[p, low if p in specials else score] for p, score in spec["model"]["vocab"]]
    config = _assign_special_tokens(spec, _declared(source.parent), str(source), notes_level)
    literals = [token["content"] for token in spec["added_tokens"]]
    _check(
        spec,
        lambda batch: encode_tokenizers(original, batch),
        [text for text in EDGE_CASE_TEXTS if not any(literal in text for literal in literals)],
        str(source),
    )
    return _write(folder, spec, config, _equivalent_model(source, spec) if with_model else None)


def _declared(folder: Path) -> dict[str, str]:
    """Return the tokens that the files of a folder name as pad, bos, eos and sep."""
    named = special_tokens_by_name(folder)
    return {name: named[f"{name}_token"] for name in SPECIAL_TOKENS if f"{name}_token" in named}


def _equivalent_model(source: Path, spec: dict[str, Any]) -> bytes | None:
    """Return the sentencepiece model in the folder of a tokenizer.json if it produces the same ids, else None.

    `train` writes both. The sentencepiece model is faster.
    """
    path = source.with_name("tokenizer.model")
    if not path.exists():
        return None
    model = open_sentencepiece(path)
    texts = [text for text in EDGE_CASE_TEXTS if text]
    same = encode_sentencepiece(model, texts) == encode_tokenizers(open_tokenizers(spec, source), texts)
    return path.read_bytes() if same else None


def _assign_special_tokens(
    spec: dict[str, Any], declared: dict[str, str], where: str, notes_level: int
) -> dict[str, Any]:
    """Return the content of tokenizer_config.json.

    Special tokens that are missing or conflict are appended to `spec`. Each conflict is logged in one line.
    """
    tokenizer = open_tokenizers(spec, where)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    specials = {token["content"] for token in spec["added_tokens"] if token["special"]}
    unknown = unknown_token(spec)

    chosen: dict[str, str] = {}
    for name in ("eos", "bos", "sep", "pad"):  # of two that share a token (often pad = eos), the first keeps it
        for candidate in (SPECIAL_TOKENS[name], declared.get(name)):  # the last valid candidate is chosen
            if candidate is None or candidate not in specials or candidate in (unknown, *chosen.values()):
                continue
            if not _in_text(tokenizer, candidate):
                chosen[name] = candidate
    for name, literal in SPECIAL_TOKENS.items():
        if name not in chosen:
            while literal in vocab:
                literal = f"<|{literal[1:-1]}|>"
            chosen[name], vocab[literal] = literal, 1 + max(vocab.values())
            spec["added_tokens"].append(added_token(vocab[literal], literal, special=True))
        if declared.get(name, chosen[name]) != chosen[name]:
            shared = [other for other in SPECIAL_TOKENS if other != name and chosen.get(other) == declared[name]]
            why = f"is also its {shared[0]} token" if shared else "is not special or can occur in encoded text"
            logger.log(
                notes_level,
                f"note: {where}: the {name} token {declared[name]!r} {why}; {chosen[name]!r} is used instead",
            )

    tokenizer = open_tokenizers(spec, where)
    for token in spec["added_tokens"]:
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"{where}: token {token['content']!r} cannot have id {token['id']}: the library assigns "
                f"{tokenizer.token_to_id(token['content'])}; fix added_tokens or the vocabulary"
            )
    config = {f"{name}_token": chosen[name] for name in SPECIAL_TOKENS} | ({"unk_token": unknown} if unknown else {})
    return config | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }


def _in_text(tokenizer: tokenizers.Tokenizer, literal: str) -> bool:
    batch = encode_tokenizers(tokenizer, [literal, f" {literal}", f"a {literal} b"])
    return any(tokenizer.token_to_id(literal) in ids for ids in batch)


def _check(
    spec: dict[str, Any], reference: Callable[[list[str]], list[list[int]]], texts: list[str], where: str
) -> None:
    encoded = encode_tokenizers(open_tokenizers(spec, where), texts)
    for text, ids, expected in zip(texts, encoded, reference(texts), strict=True):
        if ids != expected:
            raise UserError(
                f"{where}: cannot be converted to a tokenizer.json with equal ids: the first text with a "
                f"difference is {text[:80]!r}; use a tokenizer.json instead or train a new tokenizer"
            )


def _write(folder: Path, spec: dict[str, Any], config: dict[str, Any], model: bytes | None = None) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in ("tokenizer_config.json", "tokenizer.model"):
        (folder / stale).unlink(missing_ok=True)
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
    for name, content in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return Tokenizer.load(folder)


def find_tokenizer(path: Path) -> Path:
    """Return the file of a tokenizer at a path or in a folder. Raises UserError if there is none."""
    candidates = [path]
    if path.is_dir():
        candidates = list(path.glob("tokenizer.json")) or list(path.glob("*.model"))
    if len(candidates) == 1 and candidates[0].is_file() and candidates[0].suffix in (".json", ".model"):
        return candidates[0]
    raise UserError(
        f"{path}: no tokenizer found; use a sentencepiece .model, a tokenizer.json, "
        "or a folder with a tokenizer.json or one .model"
    )
