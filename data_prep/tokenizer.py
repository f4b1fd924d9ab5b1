"""Text to token ids and back.

`train` makes a tokenizer from text, `import_tokenizer` adopts an existing one, and both leave a self-contained folder
for `Tokenizer.load`:

    tokenizer.json          Hugging Face format, for `tokenizers` and AutoTokenizer
    tokenizer_config.json   names pad, bos, eos and sep; makes AutoTokenizer read their literals as plain text
    tokenizer.model         only where the tokenizer is a sentencepiece model whose ids are equal on every text; they then come from
                            it, because on one thread it is 1.3 (BPE) to 5 (unigram) times as fast on documents; most BPE ones
                            are several times as fast once more (data_prep/word_cache.py)

Neither torch nor transformers is imported, so worker processes start fast.
"""

import hashlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from data_prep.console import UserError, print_now
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
from data_prep.tokenizer_files import add_tokens, read_tokenizer_json, special_tokens_by_name, token_text
from data_prep.word_cache import WordCache, is_cacheable

# Data preparation runs one process per core; `tokenizers` starting threads in each would only oversubscribe them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sentencepiece.set_min_log_level(2)  # else building a normaliser prints to stderr

SPECIAL_TOKENS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "sep": "<sep>"}
LARGEST_VOCABULARY = 2**24
SENTENCE = r"[^\n]{1,1000}"  # sentencepiece drops training sentences above 4192 bytes without a word
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


class Tokenizer:
    """A tokenizer read from its folder; pickles as the folder's path and is read again on unpickling.

    pad_id, bos_id, eos_id, sep_id: four different ids, which no text is ever encoded to.
    special_ids: the set of these.
    unknown_id: the id of text that is not in the vocabulary; None if there is no such id.
    vocab_size: all ids are below it, specials included; not padded to a multiple.
    fingerprint: sha256 (hex) over all that determines the ids, here and in exported models.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder).absolute()
        config = read_tokenizer_json(self.folder / "tokenizer_config.json")
        spec = read_tokenizer_json(self.folder / "tokenizer.json")
        id_of: dict[str | None, int] = {token["content"]: token["id"] for token in spec["added_tokens"]}
        ids = {name: id_of.get(token_text(config.get(f"{name}_token"))) for name in SPECIAL_TOKENS}
        known = [token_id for token_id in ids.values() if token_id is not None]
        if len(set(known)) < len(ids):
            raise UserError(
                f"{self.folder}: pad, bos, eos and sep are not four declared special tokens ({ids}); "
                "make the folder with `train` or `import_tokenizer`"
            )
        self.pad_id, self.bos_id, self.eos_id, self.sep_id = known
        self.special_ids = frozenset(known)
        vocab = spec["model"]["vocab"]  # a list of pieces and scores in a unigram model
        self.unknown_id: int | None = (
            spec["model"].get("unk_id") if isinstance(vocab, list) else vocab.get(_unknown_token(spec))
        )
        self.vocab_size = 1 + max(*id_of.values(), *(vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]))

        model_path = self.folder / "tokenizer.model"
        self._sentencepiece = _open_sentencepiece(model_path) if model_path.exists() else None
        self._words = WordCache(self._sentencepiece) if self._sentencepiece and is_cacheable(spec) else None
        self._tokenizers = None if self._sentencepiece else _open_tokenizers(spec, self.folder / "tokenizer.json")
        model = model_path.read_bytes() if self._sentencepiece else b""
        self.fingerprint = hashlib.sha256(
            (self.folder / "tokenizer.json").read_bytes() + model + json.dumps(ids).encode()
        ).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads a folder of `train` or `import_tokenizer`. Raises UserError where it is not one."""
        return cls(folder)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Path]]:
        return Tokenizer, (self.folder,)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without any special token; literals like "<s>" are plain text.

        Runs on one thread. Raises UserError for a text with a lone surrogate, which has no UTF-8 form.
        """
        try:
            if self._words:
                return self._words.encode(texts)
            if self._sentencepiece:
                return _encode_sentencepiece(self._sentencepiece, texts)
            return _encode_tokenizers(self._own(), texts)
        except (TypeError, UnicodeEncodeError):
            bad = [text for text in texts if re.search("[\ud800-\udfff]", text)]
            if not bad:
                raise
            raise UserError(f"text with a lone surrogate cannot be tokenized: {bad[0][:80]!r}; repair it") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special ids are skipped. Of ids which are no valid UTF-8, the bad bytes become U+FFFD."""
        plain = [int(i) for i in ids if int(i) not in self.special_ids]
        text: str = (self._sentencepiece or self._own()).decode(plain)
        return text

    def piece(self, token_id: int) -> str:
        """How the vocabulary writes a token: with U+2581 for a blank, or with letters for bytes, as its kind does."""
        if self._sentencepiece:
            return str(self._sentencepiece.id_to_piece(token_id))
        piece = self._own().id_to_token(token_id)
        assert piece is not None
        return piece

    def _own(self) -> tokenizers.Tokenizer:
        """Return the tokenizer of the `tokenizers` library, which there is if and only if there is no sentencepiece model."""
        assert self._tokenizers is not None
        return self._tokenizers


def train(texts: Iterable[str], vocab_size: int, folder: Path, model_type: str = "bpe") -> Tokenizer:
    """Trains a lossless "bpe" or "unigram" sentencepiece model and writes its folder.

    Every text decodes to itself: blanks are kept, nothing is normalised, and characters outside the vocabulary
    become their UTF-8 bytes. Equal texts give equal files. vocab_size counts the 5 specials and 256 bytes.
    All texts are held in memory. Raises UserError for an empty corpus or a vocab_size too large or too small.
    """
    if model_type not in ("bpe", "unigram"):
        raise UserError(f"tokenizer model_type is {model_type!r}; give 'bpe' or 'unigram'")
    if vocab_size > LARGEST_VOCABULARY:  # sentencepiece would take minutes to say so, or never end
        raise UserError(
            f"tokenizer vocab_size {vocab_size} is too large: the largest possible is {LARGEST_VOCABULARY}; lower it"
        )
    sample: list[str] = []  # doubles as the text on which the conversion is checked
    proto = _train_sentencepiece(texts, vocab_size, model_type, sample)
    return _write_sentencepiece(
        proto, Path(folder), EDGE_CASE_TEXTS + sample, f"{folder}: the new tokenizer", print_now
    )


def import_tokenizer(path: Path, folder: Path, say: Callable[[str], None] = print_now) -> Tokenizer:
    """Adopts a sentencepiece .model, a tokenizer.json, or a Hugging Face folder with one of these.

    Ids stay as they are. Of pad, bos, eos and sep those it lacks, shares (pad = eos) or would encode text to are
    appended as new special tokens. Where `tokenizers` reads a sentencepiece model otherwise on some texts, its ids count, and one line says so,
    so that exported models agree with the preparation. Raises UserError where `path` is none of these or cannot be kept exactly.
    """
    source, folder = find_tokenizer(Path(path)), Path(folder)
    if folder.resolve() == source.parent.resolve():
        raise UserError(f"{folder}: the tokenizer would be taken over into its own folder; choose another one")
    if source.suffix == ".json":
        return _take_over_json(source, folder, say, with_model=Path(path).is_dir())
    _open_sentencepiece(source)  # names what is wrong with it, which parsing does not
    proto, odd_texts = _parse_proto(source.read_bytes()), list(EDGE_CASE_TEXTS)
    pieces = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type == NORMAL]
    odd_texts += ["".join(random.Random(i).choices(pieces, k=20)) for i in range(200)]
    odd_texts += [f"a {p.piece.replace(SPACE, ' ')}b" for p in proto.pieces if p.type == USER_DEFINED]
    return _write_sentencepiece(proto, folder, odd_texts, str(source), say, beside=source.parent)


def _train_sentencepiece(texts: Iterable[str], vocab_size: int, model_type: str, sample: list[str]) -> ModelProto:
    failure: list[BaseException] = []  # sentencepiece would turn an exception of `texts` into a RuntimeError of its own

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
            vocab_size=max(vocab_size, len(SPECIAL_TOKENS) + 1),  # it tells no number to one who gives fewer
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
            required_chars="<>/0123456789ABCDEFxpadunkse",  # all of reserved pieces, see `_unigram_json`
            num_threads=1,
            minloglevel=2,
        )  # the thread count alters the scores
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
        return "tokenizer training: the corpus holds no text; check the input files and fields"
    if largest := re.search(r"Please set it to a value <= (\d+)", message):
        return (
            f"tokenizer vocab_size {vocab_size} is too large for the corpus: "
            f"the largest possible is {largest[1]}; lower it or give more text"
        )
    if smallest := re.search(r"required_chars\. -?\d+ vs (\d+)", message):
        return (
            f"tokenizer vocab_size {vocab_size} is too small: specials, bytes and the characters of the corpus "
            f"alone are {smallest[1]}; raise it to at least that"
        )
    return "tokenizer training: sentencepiece says " + " ".join(message.split())


def _write_sentencepiece(
    proto: ModelProto,
    folder: Path,
    texts: list[str],
    where: str,
    say: Callable[[str], None],
    beside: Path | None = None,
) -> Tokenizer:
    """Write the folder of a sentencepiece model, with the tokens that the files in the folder `beside` add to it."""
    content: bytes | None = proto.SerializeToString()
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    spec = to_tokenizer_json(proto, where)
    ids = {"pad": model.pad_id(), "bos": model.bos_id(), "eos": model.eos_id()}
    declared = {name: model.id_to_piece(i) for name, i in ids.items() if i >= 0}
    added = add_tokens(spec, beside) if beside else []
    if beside:
        declared |= _declared(beside)
    config = _give_specials(spec, declared, where, say)
    differing = []
    if spec["normalizer"]["normalizers"][0]["type"] == PRECOMPILED:
        # `tokenizers` looks up whole graphemes of up to 5 bytes, sentencepiece the longest key at each place.
        ours = _open_tokenizers(spec, where).normalizer
        texts = [text for text in texts if ours.normalize_str(text) == model.normalize(text)]
        differing.append("letters with combining marks, which it normalises")
    if spec["model"]["type"] == "Unigram" and any(piece.score * SCORE_STEPS % 1 for piece in proto.pieces):
        differing.append("choices between segmentations that are equally likely but for rounding")
    if added:
        content = None  # it lacks these tokens
        texts = [text for text in texts if not any(token in text for token in added)]
        say(
            f"note: {where} is used as a tokenizer.json with the {len(added):,} tokens that the files beside it add, such as {added[0]!r}"
        )
    if differing:
        content = None
        say(
            f"note: {where} is used as a tokenizer.json, so that exported models give the same ids; they may differ from sentencepiece's own in "
            + " and in ".join(differing)
        )
    _check(spec, lambda batch: _encode_sentencepiece(model, batch), texts, where)
    return _write(folder, spec, config, content)


def _parse_proto(content: bytes) -> ModelProto:
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, which encoding does not

    return sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]  # made at run time


def _open_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path}: not a sentencepiece model ({' '.join(str(error).split())}); give one, or a tokenizer.json"
        ) from None


def _take_over_json(source: Path, folder: Path, say: Callable[[str], None], with_model: bool) -> Tokenizer:
    # Views are laid out by this project: the tokenizer must add, cut or pad nothing itself.
    spec = read_tokenizer_json(source) | {"truncation": None, "padding": None, "post_processor": None}
    original = _open_tokenizers(spec, source)
    if spec["model"].get("type") == "Unigram":  # as in `_unigram_json`
        low = min(score for _, score in spec["model"]["vocab"]) - 1000
        specials = {token["content"] for token in spec["added_tokens"] if token["special"]}
        spec["model"]["vocab"] = [[p, low if p in specials else score] for p, score in spec["model"]["vocab"]]
    config = _give_specials(spec, _declared(source.parent), str(source), say)
    mine = [token["content"] for token in spec["added_tokens"]]
    _check(
        spec,
        lambda batch: _encode_tokenizers(original, batch),
        [text for text in EDGE_CASE_TEXTS if not any(literal in text for literal in mine)],
        str(source),
    )
    return _write(folder, spec, config, _model_beside(source, spec) if with_model else None)


def _declared(folder: Path) -> dict[str, str]:
    """Return the tokens that the files of a folder name as pad, bos, eos and sep."""
    named = special_tokens_by_name(folder)
    return {name: named[f"{name}_token"] for name in SPECIAL_TOKENS if f"{name}_token" in named}


def _model_beside(source: Path, spec: dict[str, Any]) -> bytes | None:
    """The sentencepiece model in the folder of a tokenizer.json, as `train` leaves it, where it gives the same ids: it is faster."""
    path = source.with_name("tokenizer.model")
    if not path.exists():
        return None
    model, texts = _open_sentencepiece(path), [text for text in EDGE_CASE_TEXTS if text]
    same = _encode_sentencepiece(model, texts) == _encode_tokenizers(_open_tokenizers(spec, source), texts)
    return path.read_bytes() if same else None


def _give_specials(
    spec: dict[str, Any], declared: dict[str, str], where: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Content of tokenizer_config.json; special tokens which are missing or clash are appended to `spec`, a line said of each clash."""
    tokenizer = _open_tokenizers(spec, where)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    specials = {token["content"] for token in spec["added_tokens"] if token["special"]}
    unknown = _unknown_token(spec)

    chosen: dict[str, str] = {}
    for name in ("eos", "bos", "sep", "pad"):  # where two share a token the first one keeps it: pad = eos is common
        for candidate in (SPECIAL_TOKENS[name], declared.get(name)):  # the last one wins
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
            why = f"is its {shared[0]} token too" if shared else "is no special token that text never becomes"
            say(f"note: {where}: the {name} token {declared[name]!r} {why}; {chosen[name]!r} stands for {name} instead")

    tokenizer = _open_tokenizers(spec, where)
    for token in spec["added_tokens"]:
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"{where}: token {token['content']!r} cannot have id {token['id']}, the library gives "
                f"{tokenizer.token_to_id(token['content'])}; repair added_tokens or the vocabulary"
            )
    config = {f"{name}_token": chosen[name] for name in SPECIAL_TOKENS} | ({"unk_token": unknown} if unknown else {})
    return config | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }


def _unknown_token(spec: dict[str, Any]) -> str | None:
    model = spec["model"]
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    token: str | None = model.get("unk_token")
    return token


def _in_text(tokenizer: tokenizers.Tokenizer, literal: str) -> bool:
    batch = _encode_tokenizers(tokenizer, [literal, f" {literal}", f"a {literal} b"])
    return any(tokenizer.token_to_id(literal) in ids for ids in batch)


def _check(
    spec: dict[str, Any], reference: Callable[[list[str]], list[list[int]]], texts: list[str], where: str
) -> None:
    encoded = _encode_tokenizers(_open_tokenizers(spec, where), texts)
    for text, ids, expected in zip(texts, encoded, reference(texts), strict=True):
        if ids != expected:
            raise UserError(
                f"{where}: cannot be written as a tokenizer.json with equal ids, the first text which "
                f"differs is {text[:80]!r}; give a tokenizer.json instead or train a new tokenizer"
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


def _open_tokenizers(spec: dict[str, Any], where: str | Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{where}: not a usable tokenizer.json ({' '.join(str(error).split())}); write it anew with save_pretrained"
        ) from None
    tokenizer.encode_special_tokens = True  # a literal of a special token is plain text
    return tokenizer


def _encode_sentencepiece(model: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = model.encode(texts, num_threads=1)
    return ids


def _encode_tokenizers(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def find_tokenizer(path: Path) -> Path:
    """Return the file of a tokenizer at a path or in a folder. Raises UserError if there is none."""
    candidates = [path]
    if path.is_dir():
        candidates = list(path.glob("tokenizer.json")) or list(path.glob("*.model"))
    if len(candidates) == 1 and candidates[0].is_file() and candidates[0].suffix in (".json", ".model"):
        return candidates[0]
    raise UserError(
        f"{path}: no tokenizer there; give a sentencepiece .model, a tokenizer.json, "
        "or a folder with a tokenizer.json or one .model"
    )
