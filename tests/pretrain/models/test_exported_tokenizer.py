"""The AutoTokenizer of an export yields the same ids as the corpus, on a million characters of unusual text."""

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.make_tokenizer import import_tokenizer, train
from data_prep.tokenizer import Tokenizer
from pretrain.models.export import write_export
from pretrain.models.language_model import build_model_config, random_causal_lm

CHARACTERS = 1_000_000
WORDS = [
    "SELECT",
    "name",
    "FROM",
    "the",
    "string",
    "größe",
    "naïve",
    "[a-z]*",
    "don't",
    "it's",
    "x+=1",
    "日本語",
    "слово",
    "שלום",
    "مرحبا",
    "हिन्दी",
    "ภาษาไทย",
    "한국어",
    "Ελλάδα",
    "12345",
    "3.14",
    "ﬁne",
    "Å",
    "ﷺ",
]
LITERALS = [
    "<s>",
    "</s>",
    "<pad>",
    "<sep>",
    "<unk>",
    "<mask>",
    "<|endoftext|>",
    "<|pad|>",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "<0x41>",
    "<0xE2>",
    "<tag>",
    "\u2581",
    "\u2581\u2581",
    "\u241b",
    "\u241b_",
    "\u241be",
    "Ġ",
    "Ċ",
    "Â",
    "##ing",
    "@@",
    "\ufffd",
    "\ufeff",
    "\uffff",
]
EMOJI = [
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea\U0001f1eb",
    "\u2764\ufe0f",
    "\U0001f44d\U0001f3fd",
    "1\ufe0f\u20e3",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f",
]
BLOCKS = [
    (0x20, 0x7F),
    (0x80, 0x250),
    (0x370, 0x530),
    (0x590, 0x700),
    (0x900, 0xE80),
    (0x1100, 0x1200),
    (0x1E00, 0x2000),
    (0x2000, 0x2C00),
    (0x3000, 0x3400),
    (0x4E00, 0xA000),
    (0xAC00, 0xD7A4),
    (0xE000, 0xF900),
    (0xF900, 0x10000),
    (0x10000, 0x20000),
    (0x20000, 0x30000),
    (0x30000, 0xE0000),
    (0xE0000, 0xF0000),
    (0xF0000, 0x110000),
]
COMBINING = [chr(code) for code in range(0x300, 0x3100) if unicodedata.combining(chr(code))]
CONTROLS = [
    chr(code)
    for code in (
        *range(1, 0x20),
        *range(0x7F, 0xA1),
        0xAD,
        0x200B,
        0x200E,
        0x200F,
        0x2028,
        0x2029,
        0x202E,
        0x2066,
        0x3000,
    )
]


def unusual_texts(characters: int) -> list[str]:
    """Return texts of 0 to 20,000 characters, each a mixture of several kinds of unusual text."""
    rng = random.Random(7)

    def block_characters() -> str:
        low, high = rng.choice(BLOCKS)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 8)))

    kinds: list[Callable[[], str]] = [
        block_characters,
        lambda: rng.choice(WORDS),
        lambda: rng.choice(LITERALS),
        lambda: rng.choice(EMOJI) * rng.randint(1, 3),
        lambda: rng.choice("aeo한aש") + "".join(rng.choices(COMBINING, k=rng.randint(1, 6))),
        lambda: "".join(rng.choices(CONTROLS, k=rng.randint(1, 3))),
        lambda: rng.choice(" \n\t\r") * rng.choice([1, 2, 3, 4, 8, 17, 64]),
        lambda: rng.choice(["\r\n", " \n", "\n ", "\t ", " \t\n "]) * rng.randint(1, 4),
        lambda: "".join(rng.choices("abcdefghij_-", k=rng.randint(30, 400))),
        lambda: rng.choice("a0-=é漢\u2581\U0001f600") * rng.randint(2, 200),
    ]
    texts, total = ["", " ", "\n", "\0", "a\0b", "x" * 20_000, " " * 5000, "ab " * 4000], 0
    while total < characters:
        mixed = rng.sample(kinds, k=rng.randint(1, len(kinds)))
        parts = []
        for _ in range(rng.choice([1, 2, 5, 20, 200])):
            parts.append(rng.choice(mixed)())
            parts.append(rng.choice(["", " ", " ", "\n"]))
        texts.append("".join(parts)[: rng.randint(1, 20_000)])
        total += len(texts[-1])
    return texts


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return unusual_texts(CHARACTERS)


def training_texts() -> list[str]:
    """Return the texts that the tokenizers of this test are trained on, with all kinds of text."""
    rng = random.Random(3)
    words = WORDS + [
        "".join(rng.choices(["ta", "ble", "row", "s", "in", "er", "a", "_", "но", "日", "本"], k=5))
        for _ in range(3000)
    ]
    plain = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(3000)]
    return plain + [text[:300] for text in unusual_texts(30_000)]


def byte_level(folder: Path) -> Path:
    """Write a tokenizer.json like GPT-2's: byte-level, split by its regular expression, one special token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        training_texts(),
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def hugging_face_folder(folder: Path) -> Path:
    """Write a tokenizer folder with save_pretrained.

    The tokenizer is a normalized unigram model with a template that adds special tokens, the same token for pad and
    eos, and added words.
    """
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        training_texts(),
        trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.add_tokens(["<tag>", "don't"])
    fast.save_pretrained(folder / "saved")
    return folder / "saved"


def sentencepiece_model(folder: Path, **options) -> Path:
    """Train a SentencePiece model with the defaults of the library and the given options.

    By default, a blank is put in front of the text, runs of blanks become one blank, and the text is normalized with
    nmt_nfkc.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_texts()),
        model_prefix=str(folder / "given"),
        vocab_size=1000,
        character_coverage=0.98,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return folder / "given.model"


TOKENIZERS = {
    "trained bpe": lambda given, folder: train(training_texts(), 1200, folder),
    "trained unigram": lambda given, folder: train(training_texts(), 1200, folder, "unigram"),
    "byte-level tokenizer.json": lambda given, folder: import_tokenizer(byte_level(given), folder),
    "hugging face folder": lambda given, folder: import_tokenizer(hugging_face_folder(given), folder),
} | {
    f"sentencepiece {kind} {rule}": lambda given, folder, kind=kind, rule=rule: import_tokenizer(
        sentencepiece_model(given, model_type=kind, normalization_rule_name=rule), folder
    )
    for kind in ("bpe", "unigram")
    for rule in ("identity", "nmt_nfkc")
}


@pytest.mark.parametrize("variant", TOKENIZERS)
def test_token_ids_of_an_exported_model(variant, texts, tmp_path):
    (tmp_path / "given").mkdir()
    tokenizer = TOKENIZERS[variant](tmp_path / "given", tmp_path / "skeleton")
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    config = build_model_config("llama", shape, tokenizer, 64)
    config.save_pretrained(tmp_path / "skeleton")
    model = random_causal_lm(config, "sdpa", torch.float32)
    write_export(
        tmp_path / "export",
        tmp_path / "skeleton",
        {f"causal_lm.{key}": value for key, value in model.state_dict().items()},
        {},
    )
    auto = AutoTokenizer.from_pretrained(tmp_path / "export")
    expected = tokenizer.encode_batch(texts)
    differing = [
        text
        for text, ids, exported_ids in zip(texts, expected, auto(texts)["input_ids"], strict=True)
        if ids != exported_ids
    ]
    assert not differing, (
        f"{len(differing)} of {len(texts)} texts differ, the shortest is {min(differing, key=len)[:200]!r}"
    )
    specials = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.sep_id}
    assert not specials & {token for ids in expected for token in ids}
    assert (
        sum(map(len, texts)) >= CHARACTERS and Tokenizer.load(tmp_path / "export").fingerprint == tokenizer.fingerprint
    )
