"""Greedy answers in batches, with a key/value cache."""

from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from data_prep.console import UserError
from pretrain.evaluation.helpers import share_rows
from pretrain.evaluation.inference import left_padded, load, prompts

BATCH = 128


class Answer(NamedTuple):
    """What the model wrote."""

    text: str
    stopped: bool
    """Whether it ended with the end token, rather than at the limit."""
    fits: bool = True
    """Whether the context left the model room for an answer; where not, the text is empty."""


def answer(folder: Path, contexts: list[str], max_new_tokens: int) -> list[Answer]:
    """Continue `[BOS context SEP]` greedily for each context with the model of an export.

    An answer is made of text tokens and the end token; no other special or padding id of the vocabulary can be chosen.
    Raises UserError where not one context leaves room for an answer.
    """
    answers = _answer(folder, contexts, max_new_tokens=max_new_tokens)
    if not any(written.fits for written in answers):
        raise UserError(f"not one of {len(contexts):,} contexts leaves room for an answer: the shortest takes all positions that the model has")
    return answers


@share_rows
def _answer(folder: Path, contexts: list[str], max_new_tokens: int) -> list[Answer]:
    model, tokenizer = load(folder)
    rows = prompts(tokenizer, contexts)
    limit = model.config.max_position_embeddings
    no_text = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.sep_id, *range(tokenizer.vocab_size, model.config.vocab_size)]
    by_length = sorted((place for place, row in enumerate(rows) if len(row) < limit), key=lambda place: len(rows[place]))  # little padding
    answers = [Answer("", False, False)] * len(rows)
    for first in tqdm(range(0, len(by_length), BATCH), desc="generating", unit="batch", mininterval=1, disable=None):
        members = by_length[first : first + BATCH]
        ids, mask = left_padded([rows[place] for place in members], tokenizer.pad_id)
        longest = ids.shape[1]
        with torch.inference_mode():
            output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
                                    max_new_tokens=min(max_new_tokens, limit - longest), suppress_tokens=no_text,
                                    eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
        for place, written in zip(members, output[:, longest:].tolist(), strict=True):
            stopped = tokenizer.eos_id in written
            answers[place] = Answer(tokenizer.decode(written[: written.index(tokenizer.eos_id)] if stopped else written), stopped)
    return answers
