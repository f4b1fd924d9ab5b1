"""Tokenizers are lossless, give equal ids in every library, and have four special tokens that no text produces."""

import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from data_prep.make_tokenizer import import_tokenizer, train
from data_prep.pipeline import prepare
from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError
from data_prep.utils.files import read_json
from tests.processes import TIMEOUT
from tests.small_corpora import data_config, json_source

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
WORDS = [
    "SELECT",
    "name",
    "FROM",
    "users",
    "WHERE",
    "lines",
    "with",
    "a",
    "vowel",
    "or",
    "the",
    "string",
    "'dog'",
    "[a-z]*",
    "(\\b)",
    "count",
    "=",
    "AND",
    "id",
]
LITERALS = "<s></s> <pad><sep> <unk> a<s>b <0x41> <|pad|>"
TRICKY_TEXTS = [
    "",
    " ",
    "   ",
    " a",
    "a ",
    "  two  blanks  ",
    "\t",
    "\ttab\n\nline\r\n end\n",
    "\n",
    "a\0b\x01\x7f\x85\xa0",
    "\u2581",
    " \u2581 \u2581\u2581",
    "\u241b",
    "\u241b_ \u241be\u241b\u241b\u2581\u241b",
    "\u2585",
    "\ufeff\uffff",
    "e\u0301\u0323 \u0e33",
    "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "日本語 العربية",
    "\U0010ffff",
    LITERALS,
    "0123456789 3.14",
    *(c * 300 for c in "a -é\n\u2581"),
    "ab" * 200,
]


def corpus() -> list[str]:
    rng = random.Random(1)
    words = WORDS + ["".join(rng.choices(["ta", "ble", "row", "s", "in", "er", "a", "_"], k=4)) for _ in range(300)]
    return [" " * rng.choice([0, 0, 4]) + " ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(2000)]


def random_unicode(characters: int) -> list[str]:
    rng = random.Random(2)
    texts: list[str] = []
    blocks = [(0, 128), (0, 128), (0, 0x400), (0x300, 0x370), (0x2000, 0x2C00), (0x3000, 0xD800), (0xE000, 0x110000)]
    while sum(map(len, texts)) < characters:
        block = rng.choice([rng.choice(blocks), (0, 0xD800)])
        texts.append(
            "".join(
                rng.choice([chr(rng.randrange(*block)), " ", rng.choice(WORDS)[:3]]) for _ in range(rng.randint(1, 200))
            )
        )
    return texts


def real_texts() -> list[str]:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent")
    texts = []
    for name in ("nl-rx-synth", "spider"):
        with (DATA / name / "train.jsonl").open(encoding="utf-8") as rows:
            texts += [
                message["content"]
                for _, row in zip(range(1500), rows, strict=False)
                for message in json.loads(row)["messages"]
            ]
    documents = (DATA / "text" / "sqlite3-doc.txt").read_text(encoding="utf-8")[:400_000]
    # Add the complete document as one text: float32 scores of a unigram model would drift over its length.
    return texts + documents.split("\n\n") + [documents]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request, tmp_path_factory) -> Tokenizer:
    return train(corpus(), 380, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory) -> Path:
    return train(corpus(), 380, tmp_path_factory.mktemp("source")).folder


def auto_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    """Return the default ids of AutoTokenizer; check that add_special_tokens=False yields the same ids."""
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    assert (auto.pad_token_id, auto.bos_token_id) == (ours.pad_id, ours.bos_id)
    assert (auto.eos_token_id, auto.sep_token_id) == (ours.eos_id, ours.sep_id)
    ids = auto(texts)["input_ids"]
    assert auto(texts, add_special_tokens=False)["input_ids"] == ids
    return ids


def check_specials(tokenizer: Tokenizer, texts: list[str]) -> None:
    specials = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.sep_id}
    assert len(specials) == 4 and max(specials) < tokenizer.vocab_size
    for ids in tokenizer.encode_batch(texts):
        assert not specials & set(ids)
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.sep_id, tokenizer.pad_id]) == tokenizer.decode(ids)


def write_json(folder: Path, spec: dict, config: dict | None = None) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_round_trip_and_special_tokens(trained):
    texts = TRICKY_TEXTS + random_unicode(20_000)
    for text, ids in zip(texts, trained.encode_batch(texts), strict=True):
        assert trained.decode(ids) == text
        assert all(5 <= i < trained.vocab_size for i in ids)
    check_specials(trained, TRICKY_TEXTS)
    assert (trained.pad_id, trained.vocab_size) == (0, 380)


@pytest.mark.parametrize("texts", [lambda: TRICKY_TEXTS + random_unicode(120_000), real_texts], ids=["tricky", "real"])
def test_ids_are_equal_in_every_library(trained, texts, tmp_path):
    texts = texts()
    expected = trained.encode_batch(texts)
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained.folder / "tokenizer.model"))
    assert model.encode(texts) == expected
    assert model.decode(expected) == texts
    # A tokenizer imported from tokenizer.json encodes with the `tokenizers` library.
    from_json = import_tokenizer(trained.folder / "tokenizer.json", tmp_path / "json")
    assert from_json.encode_batch(texts) == expected
    assert [from_json.decode(ids) for ids in expected] == texts
    assert auto_ids(trained.folder, texts) == expected


def test_a_unigram_model_of_realistic_size(tmp_path):
    texts = real_texts()
    tokenizer = train(texts, 4000, tmp_path / "a", "unigram")
    assert auto_ids(tokenizer.folder, texts) == tokenizer.encode_batch(texts)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic_and_silent(model_type, tmp_path, capfd):
    first, second = (train(corpus(), 360, tmp_path / name, model_type) for name in "ab")
    assert first.fingerprint == second.fingerprint
    assert len(list(first.folder.iterdir())) == 3
    for path in first.folder.iterdir():
        assert path.read_bytes() == (second.folder / path.name).read_bytes()
    assert train(corpus(), 361, tmp_path / "c", model_type).fingerprint != first.fingerprint
    # Exported models read tokenizer.json, and the preparation reads tokenizer.model.
    spec = tmp_path / "c" / "tokenizer.json"
    before = Tokenizer.load(tmp_path / "c").fingerprint
    spec.write_text(spec.read_text().replace('"the"', '"teh"').replace('"\\u2581a"', '"x"') + " ")
    assert Tokenizer.load(tmp_path / "c").fingerprint != before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_the_same_in_every_process(model_type, tmp_path):
    code = (
        "import sys; from pathlib import Path; from data_prep.make_tokenizer import train; "
        "from tests.data_prep.test_tokenizer import corpus; "
        f"print(train(corpus(), 360, Path(sys.argv[1]), {model_type!r}).fingerprint)"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": seed},
        )
        for seed in ("1", "2")
    ]
    found = [process.communicate(timeout=TIMEOUT)[0] for process in running]
    assert found[0] == found[1] == train(corpus(), 360, tmp_path / "here", model_type).fingerprint + "\n"
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_a_tokenizer_can_be_pickled(trained):
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.encode_batch(TRICKY_TEXTS) == trained.encode_batch(TRICKY_TEXTS)
    assert copy.fingerprint == trained.fingerprint


@pytest.mark.parametrize("source", ["", "tokenizer.model", "tokenizer.json"])
def test_importing_a_trained_tokenizer_keeps_ids_and_special_tokens(trained, source, tmp_path):
    imported = import_tokenizer(trained.folder / source, tmp_path / "imported")
    assert imported.encode_batch(TRICKY_TEXTS) == trained.encode_batch(TRICKY_TEXTS)
    for field in ("pad_id", "bos_id", "eos_id", "sep_id", "vocab_size"):
        assert getattr(imported, field) == getattr(trained, field)
    assert (imported.folder / "tokenizer.model").exists() == (source != "tokenizer.json"), (
        "the faster tokenizer.model should be kept unless the source is tokenizer.json"
    )


def test_a_sentencepiece_model_that_contradicts_tokenizer_json_is_not_imported(trained, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "other")
    train(corpus(), 361, tmp_path / "larger", "bpe")
    shutil.copy(tmp_path / "larger" / "tokenizer.model", folder)
    imported = import_tokenizer(folder, tmp_path / "imported")
    assert imported.encode_batch(TRICKY_TEXTS) == trained.encode_batch(TRICKY_TEXTS)
    assert not (imported.folder / "tokenizer.model").exists()


def train_sentencepiece(folder: Path, **options) -> Path:
    """Train a model with sentencepiece's defaults, as BPE unless `options` set a different type, and return its path.

    The model has no pad or sep token, puts a space in front of the text, and collapses runs of spaces.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(folder / "foreign"),
        byte_fallback=True,
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 360} | options,
    )
    return folder / "foreign.model"


def test_importing_a_model_trained_elsewhere(tmp_path):
    path = train_sentencepiece(tmp_path, normalization_rule_name="identity")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    imported = import_tokenizer(path, tmp_path / "imported")
    texts = TRICKY_TEXTS + random_unicode(20_000)
    assert imported.encode_batch(texts) == model.encode(texts) == auto_ids(imported.folder, texts)
    assert (imported.bos_id, imported.eos_id, imported.pad_id, imported.sep_id, imported.vocab_size) == (
        1,
        2,
        360,
        361,
        362,
    )
    check_specials(imported, TRICKY_TEXTS)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [{}, {"normalization_rule_name": "identity", "character_coverage": 0.98, "vocab_size": 350}],
    ids=["nmt_nfkc", "unknown characters"],
)
def test_a_model_that_tokenizers_encodes_differently_on_rare_texts(model_type, options, tmp_path, messages):
    path = train_sentencepiece(tmp_path, **options, model_type=model_type)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    imported = import_tokenizer(path, tmp_path / "imported")
    texts = corpus() + [
        LITERALS,
        "\uff26\uff35\uff2c\uff2c \u2460 \ufb01t",
        "Fu\u00dfg\u00e4nger \u65e5\u672c",
        "  a \t b\n",
    ]
    found = imported.encode_batch(texts)
    assert found == auto_ids(imported.folder, texts)
    for ids, expected in zip(found, model.encode(texts), strict=True):
        assert ids == expected or (
            model_type == "unigram"
            and sum(map(model.get_score, ids)) == pytest.approx(sum(map(model.get_score, expected)))
        )
    assert imported.encode_batch(TRICKY_TEXTS + random_unicode(50_000)) == auto_ids(
        imported.folder, TRICKY_TEXTS + random_unicode(50_000)
    )
    output = " ".join(messages)
    assert ("letters with combining marks" in output) == (not options) and ("differ only by rounding" in output) == (
        model_type == "unigram"
    )
    assert len(messages) <= 1
    check_specials(imported, TRICKY_TEXTS)


def test_a_model_that_cannot_be_converted_is_refused(tmp_path):
    # A user-defined symbol splits the text, and `tokenizers` puts the dummy space in front of every part.
    path = train_sentencepiece(tmp_path, normalization_rule_name="identity", user_defined_symbols="<tag>")
    with pytest.raises(UserError, match=r"foreign\.model: .* the first text with a difference is 'a <tag>b'"):
        import_tokenizer(path, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_a_pad_token_equal_to_eos_is_replaced(bpe_folder, tmp_path, messages):
    spec = json.loads((bpe_folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = {"pad_token": {"content": "</s>"}, "eos_token": "</s>", "bos_token": "</s>"}
    source = write_json(tmp_path / "source", spec, config)
    imported = import_tokenizer(source, tmp_path / "imported")
    assert imported.eos_id == 3
    assert (imported.pad_id, imported.bos_id) == (0, 2)  # undeclared special tokens with these names exist
    assert messages == [
        f"note: {source / 'tokenizer.json'}: the {name} token '</s>' is also its eos token; {literal!r} is used instead"
        for name, literal in (("pad", "<pad>"), ("bos", "<s>"))
    ]
    messages.clear()
    import_tokenizer(source, tmp_path / "quiet", notes_level=logging.DEBUG)
    assert not messages
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in ("<unk>", "</s>")]
    imported = import_tokenizer(write_json(tmp_path / "fewer", spec, config), tmp_path / "again")
    assert (imported.eos_id, imported.pad_id, imported.bos_id, imported.sep_id, imported.vocab_size) == (
        3,
        380,
        381,
        382,
        383,
    )
    assert '"<|pad|>"' in (imported.folder / "tokenizer_config.json").read_text(encoding="utf-8")
    check_specials(imported, TRICKY_TEXTS)
    assert (
        imported.encode_batch(TRICKY_TEXTS)
        == Tokenizer.load(bpe_folder).encode_batch(TRICKY_TEXTS)
        == auto_ids(imported.folder, TRICKY_TEXTS)
    )


def test_a_post_processor_that_adds_bos_is_removed(bpe_folder, tmp_path):
    spec = json.loads((bpe_folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
    }
    spec["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "direction": "Right", "stride": 0}
    source = write_json(tmp_path / "source", spec, {"add_bos_token": True, "bos_token": "<s>"})
    assert tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).encode("SELECT").ids[0] == 2
    imported = import_tokenizer(source, tmp_path / "imported")
    assert (
        imported.encode_batch(TRICKY_TEXTS)
        == Tokenizer.load(bpe_folder).encode_batch(TRICKY_TEXTS)
        == auto_ids(imported.folder, TRICKY_TEXTS)
    )


def test_a_special_token_that_text_produces_is_replaced(tmp_path, messages):
    vocab = {"[UNK]": 0, "[PAD]": 1, "dog": 2, "[CLS]": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    source = write_json(tmp_path / "source", json.loads(tokenizer.to_str()), {"pad_token": "[PAD]"})
    imported = import_tokenizer(source, tmp_path / "imported")
    assert imported.encode_batch(["dog [PAD] <pad>"]) == [[2, 1, 0]]
    assert (imported.pad_id, imported.vocab_size) == (4, 8)
    (message,) = messages
    assert message.endswith(
        "the pad token '[PAD]' is not special or can occur in encoded text; '<pad>' is used instead"
    )


def test_user_errors_are_one_line(bpe_folder, tmp_path):
    def message(function, *arguments) -> str:
        with pytest.raises(UserError) as caught:
            function(*arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for model_type in ("bpe", "unigram"):
        for size, word in ((90_000, "too large"), (10, "too small"), (1, "too small"), (10**7, "too large")):
            text = message(train, corpus(), size, tmp_path / "new", model_type)
            assert word in text and f"vocab_size {size} " in text
            limit = int("".join(c for c in text.replace(f"vocab_size {size} ", "") if c.isdigit()))
            assert train(corpus(), limit, tmp_path / f"{model_type}{size}", model_type).vocab_size == limit
        for size in (10**9, 2**31, 2**40):
            assert f"vocab_size {size} is too large" in message(train, corpus(), size, tmp_path / "new", model_type)
    for empty in ([], [""], ["  ", "\n"], ["\0"]):
        assert "has no text" in message(train, empty, 400, tmp_path / "new")
    assert "wordpiece" in message(train, corpus(), 400, tmp_path / "new", "wordpiece")
    assert "missing" in message(import_tokenizer, tmp_path / "missing", tmp_path / "new")
    assert "missing" in message(Tokenizer.load, tmp_path / "missing")
    assert "own folder" in message(import_tokenizer, bpe_folder, bpe_folder)
    assert "lone surrogate" in message(Tokenizer.load(bpe_folder).encode_batch, ["fine", "a\ud800"])
    for name, content in (("bad.model", "no model"), ("bad.json", "{"), ("tokenizer.json", "{}")):
        (tmp_path / name).write_text(content)
        assert name in message(import_tokenizer, tmp_path / name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_error_raised_by_the_texts_is_propagated(tmp_path):
    def texts():
        yield "SELECT"
        raise UserError("row 2: no field")

    with pytest.raises(UserError, match="row 2: no field"):
        train(texts(), 400, tmp_path / "new")


def test_the_tokenizer_module_imports_neither_torch_nor_transformers():
    code = "import sys, data_prep.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def write_model_folder(folder: Path, model: Path, **files: dict) -> Path:
    """Write a folder with a sentencepiece model and the files of a slow tokenizer, and return it."""
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


ADDED = {"<|im_start|>": 360, "<|im_end|>": 361}
DECODER = {
    "added_tokens_decoder": {
        "361": {"content": "<|im_end|>", "special": True},
        "360": {"content": "<|im_start|>", "rstrip": False},
        "1": {"content": "<s>", "special": True},
    }
}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": ADDED, "special_tokens_map": {"eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}}},
        {"added_tokens": ADDED, "special_tokens_map": {"eos_token": "<|im_end|>"}, "tokenizer_config": DECODER},
        {"tokenizer_config": DECODER | {"eos_token": "<|im_end|>", "pad_token": None}},
    ],
)
@pytest.mark.parametrize(
    "options", [{"normalization_rule_name": "identity", "add_dummy_prefix": False}, {}], ids=["plain", "nmt_nfkc"]
)
@pytest.mark.parametrize("file", ["", "tokenizer.model"])
def test_tokens_added_to_a_sentencepiece_model_keep_their_ids(tmp_path, messages, files, options, file):
    model = train_sentencepiece(tmp_path, **options)
    imported = import_tokenizer(write_model_folder(tmp_path / "folder", model, **files) / file, tmp_path / "imported")
    assert (imported.bos_id, imported.eos_id, imported.pad_id, imported.sep_id, imported.vocab_size) == (
        1,
        361,
        362,
        363,
        364,
    )
    assert any(
        "folder/tokenizer.model is used as a tokenizer.json with the 2 "
        "tokens that other files in its folder add, such as '<|im_start|>'" in line
        for line in messages
    )
    texts = [text for text in corpus() + TRICKY_TEXTS if text]
    assert imported.encode_batch(texts) == import_tokenizer(model, tmp_path / "alone").encode_batch(texts), (
        "the added tokens must not change the ids of other text"
    )
    (ids,) = imported.encode_batch(["<|im_start|>count = name<|im_end|>"])
    assert 360 in ids and 361 not in ids, "text must not produce the end token"
    assert imported.decode(ids).replace(" ", "") == "<|im_start|>count=name<|im_end|>", (
        "decoding must restore the text, except for a space that some models put in front of it"
    )
    assert [imported.encode_batch(["a <|im_start|> b"])] == [auto_ids(imported.folder, ["a <|im_start|> b"])]
    check_specials(imported, TRICKY_TEXTS)


def test_a_changed_file_next_to_a_model_is_detected(tmp_path, write_jsonl, pairs):
    folder = write_model_folder(tmp_path / "folder", train_sentencepiece(tmp_path), added_tokens={"<|im_start|>": 360})
    source = json_source(write_jsonl(tmp_path / "a.jsonl", pairs(40)))
    config = data_config(tmp_path / "out", source, tokenizer={"path": str(folder / "tokenizer.model")})
    prepare(config)
    manifest = read_json(tmp_path / "out" / "manifest.json")
    prepare(config)
    old = json.loads(json.dumps(manifest))
    del old["settings"]["files"][str(folder / "added_tokens.json")]  # earlier versions did not record this file
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(old))
    prepare(config)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "added_tokens.json").write_text('{"<|other|>": 360}')
    with pytest.raises(UserError, match=r"was prepared with a different content of .*added_tokens.json"):
        prepare(config)


def test_special_tokens_without_ids_get_the_same_ids_as_in_hugging_face(tmp_path):
    """Expect the ids of LlamaTokenizer of transformers 4, which appends the tokens that its vocabulary lacks."""
    files = {
        "added_tokens": {"<|im_start|>": 360},
        "special_tokens_map": {"pad_token": "[PAD]", "additional_special_tokens": ["<|b|>", "<|a|>"]},
        "tokenizer_config": {
            "sep_token": {"content": "[SEP]"},
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "extra_special_tokens": [],
        },
    }
    imported = import_tokenizer(
        write_model_folder(
            tmp_path / "folder", train_sentencepiece(tmp_path, normalization_rule_name="identity"), **files
        ),
        tmp_path / "imported",
    )
    spec = json.loads((imported.folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert {token["content"]: token["id"] for token in spec["added_tokens"] if token["id"] >= 360} == {
        "<|im_start|>": 360,
        "[SEP]": 361,
        "[PAD]": 362,
        "<|b|>": 363,
        "<|a|>": 364,
    }
    assert (imported.bos_id, imported.eos_id, imported.sep_id, imported.pad_id, imported.vocab_size) == (
        1,
        2,
        361,
        362,
        365,
    )
    check_specials(imported, TRICKY_TEXTS)


@pytest.mark.parametrize(
    "files, expected",
    [
        (
            {"added_tokens": {"<|im_start|>": 300}},
            r"added_tokens\.json: token '<\|im_start\|>' cannot have id 300: .* it has id 360",
        ),
        (
            {"added_tokens": {"<|im_start|>": 360, "<|im_end|>": 365}},
            r"added_tokens\.json: token '<\|im_end\|>' cannot have id 365: .* it has id 361",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"7": {"content": "<s>"}}}},
            r"tokenizer_config\.json: token '<s>' cannot have id 7: .* id 1;",
        ),
        ({"added_tokens": {"<|im_start|>": "x"}}, r"added_tokens\.json: 'x' is not a token id"),
        ({"added_tokens": ["<|im_start|>"]}, r"added_tokens\.json: not in the Hugging Face format"),
    ],
)
def test_added_tokens_with_impossible_ids_are_refused(tmp_path, files, expected):
    folder = write_model_folder(
        tmp_path / "folder", train_sentencepiece(tmp_path, normalization_rule_name="identity"), **files
    )
    with pytest.raises(UserError, match=expected) as raised:
        import_tokenizer(folder, tmp_path / "imported")
    assert "\n" not in str(raised.value) and not (tmp_path / "imported").exists()
