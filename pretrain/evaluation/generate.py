"""Generation of answers, in batches and with a key/value cache."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError
from data_prep.utils.files import read_json
from data_prep.utils.progress import Progress
from pretrain.evaluation.inference import encode_prompts, left_pad, load_causal_lm
from pretrain.evaluation.workers import row_progress, shard_rows
from pretrain.tasks.scoring import Answer

BATCH = 128
"""Largest number of rows of a batch."""
BATCH_POSITIONS = 2**15
"""Largest number of positions of a batch, with the room for new tokens. Larger caches of keys and values need much
memory, and on a CPU most of the time: they are allocated anew for each token."""


def generate_answers(folder: Path, contexts: list[str], max_new_tokens: int) -> list[Answer]:
    """Continue `[BOS context SEP]` greedily for each context with the model of an export.

    An answer consists of text tokens and the end token; other special ids and padding ids are suppressed. Raises
    UserError if no context leaves room for an answer.
    """
    answers = _answer(folder, contexts, max_new_tokens=max_new_tokens)
    if not any(answer.fits for answer in answers):
        raise UserError(
            f"none of the {len(contexts):,} contexts leaves room for an answer: even the shortest fills all positions "
            "of the model; use shorter contexts"
        )
    return answers


@shard_rows
def _answer(folder: Path, contexts: list[str], max_new_tokens: int) -> list[Answer]:
    return AnswerWriter(folder).answer(contexts, max_new_tokens)


class AnswerWriter:
    """The model of an export, which answers contexts in batches."""

    def __init__(self, folder: Path):
        self.model, self.tokenizer = load_causal_lm(folder)
        self._suppressed = _suppressed_ids(self.tokenizer, self.model.config.vocab_size)

    def answer(self, contexts: list[str], max_new_tokens: int, **options: Any) -> list[Answer]:
        """Return the answers to the contexts, in order; `options` are options of transformers' `generate`.

        By default, the most likely tokens are chosen.
        """
        rows = encode_prompts(self.tokenizer, contexts)
        limit = self.model.config.max_position_embeddings
        answers = [Answer("", False, False)] * len(rows)
        batches = list(_batches([len(row) for row in rows], limit, max_new_tokens))
        with row_progress("generating", len(rows)) as progress:
            progress.update(len(rows) - sum(len(indices) for _, indices in batches))  # the contexts that do not fit
            for room, indices in batches:
                for index, written in zip(
                    indices, self._continue([rows[index] for index in indices], room, progress, options), strict=True
                ):
                    stopped = self.tokenizer.eos_id in written
                    answers[index] = Answer(
                        self.tokenizer.decode(written[: written.index(self.tokenizer.eos_id)] if stopped else written),
                        stopped,
                    )
                progress.update(len(indices))
        return answers

    def _continue(
        self, rows: list[list[int]], room: int, progress: Progress, options: dict[str, Any]
    ) -> list[list[int]]:
        """Return the tokens that the model writes after each row, at most `room`, with padding."""
        ids, mask = left_pad(rows, self.tokenizer.pad_id)
        longest = ids.shape[1]
        with torch.inference_mode():
            output = self.model.generate(  # type: ignore[operator]  # every causal language model has it
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=room,
                suppress_tokens=self._suppressed,
                eos_token_id=self.tokenizer.eos_id,
                pad_token_id=self.tokenizer.pad_id,
                stopping_criteria=StoppingCriteriaList([_TokenProgress(progress, longest, room)]),
                **{"do_sample": False} | options,
            )
        tokens: list[list[int]] = output[:, longest:].tolist()
        return tokens


class _TokenProgress(StoppingCriteria):
    """A criterion of transformers' `generate` that never stops a row. It shows the progress within a batch.

    The tokens written so far count as the same fraction of the batch's rows.
    """

    def __init__(self, progress: Progress, prompt: int, room: int):
        self._progress, self._prompt, self._room = progress, prompt, room

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Show the progress after a token, and return that no row has to stop, (B,)."""
        batch, length = input_ids.shape
        self._progress.update(0, begun=batch * (length - self._prompt) / self._room)
        return torch.zeros(batch, dtype=torch.bool, device=input_ids.device)


def _suppressed_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Return the ids below `vocab_size` that an answer must not contain: all except text tokens and the end token.

    Decoding skips special tokens and ids without an entry. An answer with one of these ids would look like the
    answer without it. Tokens that a tokenizer.json adds to the vocabulary of a tokenizer.model are suppressed too: no
    text is encoded to them, and the tokenizer.model cannot decode them.
    """
    spec = read_json(tokenizer.folder / "tokenizer.json")
    vocab, added = spec["model"]["vocab"], {token["id"]: token["special"] for token in spec["added_tokens"]}
    text = set(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
    if not (tokenizer.folder / "tokenizer.model").exists():
        text |= added.keys()
    allowed = {token for token in text if not added.get(token)} | {tokenizer.eos_id}
    return [token for token in range(vocab_size) if token not in allowed]


def _batches(lengths: list[int], limit: int, max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Yield batches as (room for new tokens, row indices).

    The rows of a batch have the same room, so a long row does not shorten the answers of other rows.
    """
    fitting = [index for index, length in enumerate(lengths) if length < limit]
    by_length = sorted(fitting, key=lengths.__getitem__)
    for room, group in itertools.groupby(by_length, key=lambda index: min(max_new_tokens, limit - lengths[index])):
        batch: list[int] = []
        for index in group:
            if len(batch) == BATCH or ((len(batch) + 1) * (lengths[index] + room) > BATCH_POSITIONS and batch):
                yield room, batch
                batch = []
            batch.append(index)
        yield room, batch
