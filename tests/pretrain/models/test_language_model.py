"""The wrapper of a Hugging Face model: vocabulary, shape, and predictor tokens outside both."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from data_prep.layout import Pairing, make_layout
from data_prep.make_tokenizer import train
from data_prep.utils.console import UserError
from pretrain.data.batch import assemble
from pretrain.models.language_model import (
    VOCAB_SIZE_MULTIPLE,
    build_model_config,
    padded_vocab_size,
    pretrained_causal_lm,
    pretrained_config,
    special_ids,
)
from pretrain.objectives.next_token import next_token_sum
from tests.row_plans import plan

SHAPE = {"hidden_size": 32, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def batch(corpus, specials):
    layout = make_layout("joint", specials, pairing=Pairing(3))
    rows = plan(corpus, np.arange(5), layout, 128, np.ones(5, bool))
    return assemble(rows, corpus, layout, specials, 128, 5)


@pytest.mark.parametrize(("pieces", "padded"), [(300, 320), (320, 320), (321, 384)])
def test_the_vocabulary_is_rounded_up(pieces, padded, tmp_path):
    texts = [f"some text {number} with words to merge: {'ab' * (number % 7)}" for number in range(300)]
    tokenizer = train(texts, pieces, tmp_path)
    assert tokenizer.vocab_size == pieces
    assert padded_vocab_size(tokenizer) == padded and padded % VOCAB_SIZE_MULTIPLE == 0
    config = build_model_config("llama", SHAPE, tokenizer, 64)
    assert config.vocab_size == padded
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (
        tokenizer.pad_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    specials = special_ids(tokenizer, padded)
    assert len({specials.pad, specials.bos, specials.eos, specials.sep}) == 4
    assert specials.predictor == padded


def test_an_unknown_shape_key_is_reported(tokenizer):
    with pytest.raises(UserError, match=r"model\.shape: llama has no option 'hidden_sizes'"):
        build_model_config("llama", SHAPE | {"hidden_sizes": 3}, tokenizer, 64)


def test_a_shape_key_that_the_tokenizer_sets_is_refused(tokenizer):
    with pytest.raises(UserError, match="vocab_size comes from the tokenizer"):
        build_model_config("llama", SHAPE | {"vocab_size": 1000}, tokenizer, 64)


def test_too_few_positions_for_the_rows_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"data\.sequence_length is 64, but the model shape allows 32"):
        build_model_config("llama", SHAPE | {"max_position_embeddings": 32}, tokenizer, 64)
    assert build_model_config("llama", SHAPE, tokenizer, 64).max_position_embeddings == 64


def test_a_folder_without_a_model_is_reported(tmp_path):
    with pytest.raises(UserError, match=f"cannot load {tmp_path}"):
        pretrained_causal_lm(str(tmp_path), "sdpa", torch.float32)


def test_an_unknown_family_is_refused_with_the_nearest_known_one(tokenizer):
    with pytest.raises(UserError, match=r"model\.family: unknown family 'qwen_3'; the nearest known one is 'qwen3'"):
        build_model_config("qwen_3", SHAPE, tokenizer, 64)
    with pytest.raises(UserError, match=r"unknown family 'nonsense'; docs/models\.md lists the known ones"):
        build_model_config("nonsense", SHAPE, tokenizer, 64)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma3", r"a model of several parts \(text_config, vision_config\); use its text model, gemma3_text"),
        ("bart", "the decoder of an encoder-decoder model"),
        ("dots3_note_text", "layers of different sizes"),
        ("gemma4_assistant", "cannot create a configuration of gemma4_assistant"),
    ],
)
def test_a_family_that_is_not_one_decoder_is_refused(family, message, tokenizer):
    with pytest.raises(UserError, match=rf"^model\.family: .*{message}"):
        build_model_config(family, {}, tokenizer, 64)


def test_init_from_a_model_without_a_causal_language_model_is_refused(tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a model of the family 't5', which has no causal language model"):
        pretrained_config(tmp_path)


def test_init_from_a_folder_with_its_own_code_is_refused(tmp_path):
    """The code is never imported, even if transformers has a class of the same name."""
    AutoConfig.for_model("mistral").save_pretrained(tmp_path)
    assert pretrained_config(tmp_path).model_type == "mistral"
    path = tmp_path / "config.json"
    values = json.loads(path.read_text()) | {
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}
    }
    path.write_text(json.dumps(values))
    (tmp_path / "code.py").write_text("raise SystemExit('imported')")
    with pytest.raises(UserError, match=r"config.json refers to code outside transformers \(auto_map\)"):
        pretrained_config(tmp_path)


def test_predictor_tokens_have_no_logits_and_no_gradient_of_the_language_model_term(batch, make_model, tokenizer):
    model = make_model(3)
    hidden = model(batch)
    logits = model.logits(hidden[batch.label_index])
    assert logits.shape[1] == model.vocab_size == padded_vocab_size(tokenizer)
    assert batch.token_ids.max() == model.vocab_size + 2, "the test needs predictor tokens"
    next_token_sum(hidden, batch, model.cross_entropy).backward()
    assert not model.predictor.weight.grad.any()
    assert model.predictor.weight is not model.causal_lm.lm_head.weight
    assert not any(name.endswith("predictor.weight") for name, _ in model.causal_lm.named_parameters())


def test_predictor_tokens_have_their_own_embeddings(batch, make_model):
    model = make_model(3)
    with torch.no_grad():
        before = model(batch)
        # Ids beyond the vocabulary are clamped to the last row of the word embeddings.
        model.causal_lm.get_input_embeddings().weight[-1] += 10.0
        assert not (batch.token_ids == model.vocab_size - 1).any()
        assert torch.equal(model(batch), before)
        model.predictor.weight[2] += 1.0
        changed = (model(batch) != before).any(dim=1)
    last_of_three = (batch.token_ids == model.vocab_size + 2).flatten()
    assert torch.equal(changed, last_of_three), "only the last predictor token sees itself"


def test_every_parameter_has_a_gradient_even_without_predictor_tokens_in_the_rows(batch, corpus, specials, make_model):
    """Check this because ZeRO-3 waits for every module in each pass."""
    layout = make_layout("joint", specials)
    rows = plan(corpus, np.arange(5), layout, 128, np.zeros(5, bool))
    plain = assemble(rows, corpus, layout, specials, 128, 0)
    model = make_model(3)
    next_token_sum(model(plain), plain, model.cross_entropy).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.predictor.weight.grad.any()


def test_padding_changes_nothing(corpus, specials, make_model):
    """Put the same records into a longer row."""
    layout = make_layout("joint", specials, pairing=Pairing(1))
    model, hidden = make_model(1), []
    for length in (128, 200):
        rows = plan(corpus, np.arange(2), layout, length, np.ones(2, bool))
        batch = assemble(rows, corpus, layout, specials, length, 2)
        assert rows.count == 1
        with torch.no_grad():
            states = model(batch)
        assert states.isfinite().all()
        hidden.append(states[: int(rows.segment_lengths.sum())])
    torch.testing.assert_close(*hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_predictor_embeddings_are_scaled_like_the_word_embeddings_of_the_family(make_model, family, tokens):
    """A single predictor token is included, because its embedding is not looked up in a table."""
    model = make_model(tokens, family=family)
    word_embeddings = model.causal_lm.get_input_embeddings()
    scale = word_embeddings(torch.tensor([7]))[0] / word_embeddings.weight[7]
    ids = torch.tensor([[model.vocab_size + token for token in range(tokens)]])
    embedded = model.embed(ids)
    torch.testing.assert_close(embedded[0], model.predictor.weight * scale)
    (gradient,) = torch.autograd.grad(embedded.sum(), model.predictor.weight)
    torch.testing.assert_close(gradient, scale.detach().expand_as(gradient))
