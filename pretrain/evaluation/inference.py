"""Helper functions for inference with an export: loading, prompts and padding."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from data_prep.tokenizer import Tokenizer
from pretrain.models.families import register_family_from_folder


def load_causal_lm(folder: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Return the model and the tokenizer of an export; the model is in fp32, and on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register_family_from_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.to(device)  # type: ignore[arg-type]  # its decorator hides that it is a method
    return model.eval(), Tokenizer.load(folder)


def encode_prompts(tokenizer: Tokenizer, contexts: list[str]) -> list[list[int]]:
    """Return the token ids of `[BOS context SEP]` for each context."""
    return [[tokenizer.bos_id, *ids, tokenizer.sep_id] for ids in tokenizer.encode_batch(contexts)]


def left_pad(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded token ids (B, L) and their attention mask (B, L), which is 0 at padding."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids, mask
