"""Batched log-likelihoods equal the ones of each answer in its own pass, for every model family."""

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from data_prep.make_tokenizer import train
from data_prep.nlrx_grammar import generate
from data_prep.tokenizer import Tokenizer
from pretrain.evaluation import likelihood
from pretrain.evaluation.likelihood import log_likelihoods
from pretrain.models.language_model import build_model_config
from tests.families import FAMILIES
from tests.pretrain.conftest import SHAPES

PAIRS = [generate(0, "test", index) for index in range(6)]


@pytest.fixture(scope="module", params=FAMILIES)
def export(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train([text for pair in PAIRS * 5 for text in pair], 330, folder)
    torch.manual_seed(0)
    shape = yaml.safe_load((SHAPES / f"{request.param}_tiny.yaml").read_text())
    model = AutoModelForCausalLM.from_config(build_model_config(request.param, shape, tokenizer, 192))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)  # tiny weights would hide wrong masks and positions
    model.save_pretrained(folder)
    return folder


def test_likelihoods_match_a_single_unpadded_row(export, monkeypatch):
    monkeypatch.setattr(likelihood, "TOKENS", 150)  # small enough for several batches
    options = [[target, "", other * 2] for (_, target), (_, other) in zip(PAIRS, PAIRS[-1:] + PAIRS[:-1], strict=True)]
    found = log_likelihoods(export, [(context, texts) for (context, _), texts in zip(PAIRS, options, strict=True)])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval(), Tokenizer.load(export)
    for (context, _), texts, values in zip(PAIRS, options, found, strict=True):
        for text, value in zip(texts, values, strict=True):
            prompt = [tokenizer.bos_id, *tokenizer.encode_batch([context])[0], tokenizer.sep_id]
            answer = [*tokenizer.encode_batch([text])[0], tokenizer.eos_id]
            with torch.no_grad():
                log_probabilities = model(torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
            expected = sum(
                log_probabilities[len(prompt) - 1 + index, token].item() for index, token in enumerate(answer)
            )
            assert value == pytest.approx(expected, rel=1e-4)


def test_an_answer_that_does_not_fit_has_zero_probability(export):
    found = log_likelihoods(export, [("lines", ["number " * 200, "[0-9]"])])
    assert found[0][0] == float("-inf") and -1000 < found[0][1] < 0
