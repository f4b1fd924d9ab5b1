"""Batched generation gives each context its own answer, as one by one."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_prep.console import UserError
from data_prep.nlrx_grammar import generate
from data_prep.sentencepiece_json import added_token
from data_prep.tokenizer import Tokenizer, train
from pretrain.evaluation.generate import generate_answers
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


def test_batched_answers_equal_those_one_by_one_in_the_order_of_the_contexts(export):
    together = generate_answers(export, CONTEXTS, 12)
    assert together == [generate_answers(export, [context], 12)[0] for context in CONTEXTS]
    assert len({answer.text for answer in together}) > 6


def test_a_long_context_shortens_no_other_answer(export):
    short = generate_answers(export, CONTEXTS, 12)
    (length,) = Tokenizer.load(export).encode_batch(["number " * 60])
    for room in (1, 5):
        long = Tokenizer.load(export).decode(length[: 94 - room])
        assert len(Tokenizer.load(export).encode_batch([long])[0]) == 94 - room
        assert generate_answers(export, [*CONTEXTS, long], 12) == [*short, *generate_answers(export, [long], 12)]


def test_an_answer_holds_no_padding_or_special_ids(export):
    assert Tokenizer.load(export).vocab_size < AutoModelForCausalLM.from_pretrained(export).config.vocab_size
    generate_answers(export, CONTEXTS, 40)  # a padded id would have no text


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("with_model", [True, False])
def test_an_answer_holds_no_special_token_that_decoding_would_hide(export, tmp_path, with_model, special):
    """The likeliest tokens by far are ones that a tokenizer.json adds, and that sentencepiece does not have."""
    shutil.copytree(export, tmp_path / "export")
    if not with_model:
        (tmp_path / "export" / "tokenizer.model").unlink()
    plain, model = generate_answers(tmp_path / "export", CONTEXTS, 12), AutoModelForCausalLM.from_pretrained(export)
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
        assert found == plain
    else:
        assert any("<|note" in written.text for written in found), "they are text here, and are shown"


def test_a_context_without_room_gets_no_answer_and_is_told_apart(export):
    assert generate_answers(export, [CONTEXTS[0], "number " * 200], 12) == [
        *generate_answers(export, CONTEXTS[:1], 12),
        ("", False, False),
    ]
    with pytest.raises(UserError, match="not one of 1 contexts leaves room for an answer"):
        generate_answers(export, ["number " * 200], 12)


def test_a_model_that_never_stops_is_cut_off_and_has_not_stopped(export):
    found = generate_answers(
        export, CONTEXTS[:4], 300
    )  # more than the model has positions: random weights hardly ever choose the end token
    assert not all(written.stopped for written in found)
    tokenizer = Tokenizer.load(export)
    assert all(len(tokenizer.encode_batch([written.text])[0]) <= 96 for written in found)
