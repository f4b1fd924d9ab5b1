"""Log-likelihoods of given answers, in batches."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from pretrain.evaluation.inference import encode_prompts, left_pad, load_causal_lm
from pretrain.evaluation.workers import row_progress, shard_rows

TOKENS = 16_384
"""Maximum number of tokens of a batch, padding included."""
LOGITS = 2**28
"""Maximum number of logits of a batch: 1 GiB in fp32."""


@shard_rows
def log_likelihoods(folder: Path, questions: list[tuple[str, list[str]]]) -> list[list[float]]:
    """Return log P(option and the end token | `[BOS context SEP]`) in nats, for each option of each (context, options).

    The end token is included because it distinguishes an answer from a longer one that begins with it. The result is
    -inf for an option that does not fit into the model's positions.
    """
    model, tokenizer = load_causal_lm(folder)
    rows = [
        (prompt, [*ids, tokenizer.eos_id])
        for prompt, (_, options) in zip(
            encode_prompts(tokenizer, [context for context, _ in questions]), questions, strict=True
        )
        for ids in tokenizer.encode_batch(options)
    ]
    results = [float("-inf")] * len(rows)
    batches = list(_batches(rows, model.config.max_position_embeddings, model.config.vocab_size))
    with row_progress("scoring", len(rows), "options") as progress:
        progress.update(len(rows) - sum(map(len, batches)))  # the options that do not fit
        for indices in batches:
            ids, mask = left_pad([rows[index][0] + rows[index][1] for index in indices], tokenizer.pad_id)
            lengths = torch.tensor([len(rows[index][1]) for index in indices])
            longest_option = int(lengths.max())
            with torch.inference_mode():
                positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
                logits = model(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    position_ids=positions.to(model.device),
                    use_cache=False,
                    logits_to_keep=longest_option + 1,
                ).logits[:, :-1]
                losses = F.cross_entropy(
                    logits.transpose(1, 2), ids[:, -longest_option:].to(model.device), reduction="none"
                ).cpu()
            inside = torch.arange(longest_option) >= longest_option - lengths[:, None]
            for index, loss in zip(indices, (losses * inside).sum(dim=1).tolist(), strict=True):
                results[index] = -loss
            progress.update(len(indices))
    values = iter(results)
    return [[next(values) for _ in options] for _, options in questions]


def _batches(rows: list[tuple[list[int], list[int]]], limit: int, vocab_size: int) -> Iterator[list[int]]:
    """Yield batches of the indices of rows of similar length; rows that do not fit `limit` positions are skipped."""
    length = [len(prompt) + len(option) for prompt, option in rows]
    batch: list[int] = []
    logit_positions = 0
    fitting = [index for index in range(len(rows)) if length[index] <= limit]
    for index in sorted(fitting, key=length.__getitem__):
        logit_positions = max(logit_positions, len(rows[index][1]) + 1)
        size = len(batch) + 1
        if batch and (size * length[index] > TOKENS or size * logit_positions * vocab_size > LOGITS):
            yield batch
            batch = []
            logit_positions = len(rows[index][1]) + 1
        batch.append(index)
    if batch:
        yield batch
