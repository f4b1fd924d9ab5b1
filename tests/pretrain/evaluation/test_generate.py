"""Batched generation returns the same answers as generation with one context at a time."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_prep.make_tokenizer import train
from data_prep.nlrx_grammar import generate
from data_prep.sentencepiece_json import added_token
from data_prep.tokenizer import Tokenizer
from data_prep.utils import progress
from data_prep.utils.console import UserError
from pretrain.evaluation import generate as generate_module
from pretrain.evaluation.generate import BATCH, BATCH_POSITIONS, _batches, generate_answers
from pretrain.models.language_model import build_model_config
from tests.commands import TINY_SHAPE

CONTEXTS = [generate(0, "test", index)[0] for index in range(12)]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tokenizer = train(CONTEXTS * 5, 330, folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        build_model_config("llama", TINY_SHAPE | {"initializer_range": 0.6}, tokenizer, 96)
    )
    model.save_pretrained(folder)
    return folder


def test_batched_answers_equal_single_answers_in_the_order_of_the_contexts(export):
    batched = generate_answers(export, CONTEXTS, 12)
    assert batched == [generate_answers(export, [context], 12)[0] for context in CONTEXTS]
    assert len({answer.text for answer in batched}) > 6


def test_progress_is_logged_also_within_a_batch(export, monkeypatch, messages):
    monkeypatch.setattr(progress, "RENEWAL_SECONDS", 0)
    monkeypatch.setattr(progress.Progress, "LINE_SECONDS", 0)
    monkeypatch.setattr(generate_module, "BATCH", 6)
    quiet = generate_answers(export, CONTEXTS, 12)
    lines = [line for line in messages if line.startswith("generating: ")]
    assert {line.split(",")[0] for line in lines} >= {"generating: 0 of 12 rows", "generating: 6 of 12 rows"}
    assert len(lines) > 10 and all(line.endswith((" left", " so far")) for line in lines)
    monkeypatch.undo()
    assert generate_answers(export, CONTEXTS, 12) == quiet


def test_a_long_context_does_not_shorten_other_answers(export):
    short = generate_answers(export, CONTEXTS, 12)
    (long_ids,) = Tokenizer.load(export).encode_batch(["number " * 60])
    for room in (1, 5):
        long = Tokenizer.load(export).decode(long_ids[: 94 - room])
        assert len(Tokenizer.load(export).encode_batch([long])[0]) == 94 - room
        assert generate_answers(export, [*CONTEXTS, long], 12) == [*short, *generate_answers(export, [long], 12)]


def test_an_answer_contains_no_padding_or_special_ids(export):
    assert Tokenizer.load(export).vocab_size < AutoModelForCausalLM.from_pretrained(export).config.vocab_size
    generate_answers(export, CONTEXTS, 40)  # an id of the padded vocabulary has no text, so decoding would fail


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("with_model", [True, False])
def test_an_answer_contains_no_special_token_that_decoding_would_hide(export, tmp_path, with_model, special):
    """Use a model whose most likely tokens are in tokenizer.json but not in tokenizer.model."""
    shutil.copytree(export, tmp_path / "export")
    if not with_model:
        (tmp_path / "export" / "tokenizer.model").unlink()
    expected = generate_answers(tmp_path / "export", CONTEXTS, 12)
    model = AutoModelForCausalLM.from_pretrained(export)
    first = model.config.vocab_size
    spec = json.loads((export / "tokenizer.json").read_text())
    added = [added_token(first + number, f"<|note{number}|>", special) for number in range(64)]
    (tmp_path / "export" / "tokenizer.json").write_text(
        json.dumps(spec | {"added_tokens": spec["added_tokens"] + added})
    )
    model.resize_token_embeddings(first + 64, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[first:] = 10 * torch.randn(
            64, model.config.hidden_size, generator=torch.Generator().manual_seed(0)
        )
    model.save_pretrained(tmp_path / "export")
    found = generate_answers(tmp_path / "export", CONTEXTS, 12)
    if special or with_model:
        assert found == expected
    else:
        assert any("<|note" in answer.text for answer in found), (
            "without tokenizer.model, tokens that are not special should be shown as text"
        )


def test_a_context_without_room_gets_no_answer_and_is_marked(export):
    assert generate_answers(export, [CONTEXTS[0], "number " * 200], 12) == [
        *generate_answers(export, CONTEXTS[:1], 12),
        ("", False, False),
    ]
    with pytest.raises(UserError, match="none of the 1 contexts leaves room for an answer"):
        generate_answers(export, ["number " * 200], 12)


def test_an_endless_answer_is_cut_off_and_not_marked_as_stopped(export):
    # 300 tokens are more than the model has positions. Random weights hardly ever choose the end token.
    found = generate_answers(export, CONTEXTS[:4], 300)
    assert not all(answer.stopped for answer in found)
    tokenizer = Tokenizer.load(export)
    assert all(len(tokenizer.encode_batch([answer.text])[0]) <= 96 for answer in found)


def test_a_batch_has_no_more_rows_and_positions_than_allowed():
    lengths = [*range(1, 3000, 7), 40_000, 90_000, *[5] * 300]
    rows = []
    for room, batch in _batches(lengths, 80_000, 500):
        assert len(batch) <= BATCH and all(room == min(500, 80_000 - lengths[row]) for row in batch)
        assert len(batch) == 1 or len(batch) * (max(lengths[row] for row in batch) + room) <= BATCH_POSITIONS
        rows += batch
    assert sorted(rows) == [row for row, length in enumerate(lengths) if length < 80_000]
