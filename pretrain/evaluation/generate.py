"""Greedy answers in batches, with a key/value cache."""

from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import pretrain.models.openelm  # noqa: F401  registers the family
from data_prep.console import UserError
from data_prep.tokenizer import Tokenizer
from pretrain.evaluation.helpers import share_rows

BATCH = 128


class Answer(NamedTuple):
    """What the model wrote."""

    text: str
    stopped: bool
    """Whether it ended with the end token, rather than at the limit."""


@share_rows
def answer(folder: Path, contexts: list[str], max_new_tokens: int) -> list[Answer]:
    """Continue `[BOS context SEP]` greedily for each context with the model of an export.

    An answer is made of text tokens and the end token; no other special or padding id of the vocabulary can be chosen.
    Raises UserError for a context that leaves no room for an answer.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device).eval()
    prompts = [[tokenizer.bos_id, *ids, tokenizer.sep_id] for ids in tokenizer.encode_batch(contexts)]
    limit = model.config.max_position_embeddings
    if max(map(len, prompts)) >= limit:
        raise UserError(f"a context of {max(map(len, prompts)) - 2} tokens leaves no room for an answer: the model has {limit} positions")
    no_text = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.sep_id, *range(tokenizer.vocab_size, model.config.vocab_size)]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding in a batch
    answers: dict[int, Answer] = {}
    for first in tqdm(range(0, len(prompts), BATCH), desc="generating", unit="batch", mininterval=1, disable=None):
        members = by_length[first : first + BATCH]
        longest = len(prompts[members[-1]])
        ids = torch.full((len(members), longest), tokenizer.pad_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(members):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        with torch.inference_mode():
            output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False,
                                    max_new_tokens=min(max_new_tokens, limit - longest), suppress_tokens=no_text,
                                    eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
        for index, written in zip(members, output[:, longest:].tolist(), strict=True):
            stopped = tokenizer.eos_id in written
            answers[index] = Answer(tokenizer.decode(written[: written.index(tokenizer.eos_id)] if stopped else written), stopped)
    return [answers[index] for index in range(len(prompts))]
