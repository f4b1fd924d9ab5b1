"""What generation, likelihood and embeddings of an export have in common."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from data_prep.tokenizer import Tokenizer
from pretrain.models.families import register_family_from_folder


def load_causal_lm(folder: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Model, in fp32 and on the GPU where there is one, and tokenizer of an export."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register_family_from_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.to(device)  # type: ignore[arg-type]  # the wrapper around it hides that it is a method
    return model.eval(), Tokenizer.load(folder)


def encode_prompts(tokenizer: Tokenizer, contexts: list[str]) -> list[list[int]]:
    """`[BOS context SEP]` of each."""
    return [[tokenizer.bos_id, *ids, tokenizer.sep_id] for ids in tokenizer.encode_batch(contexts)]


def left_pad(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) that end together, and which of them are no padding (B, L)."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = torch.tensor(row)
        mask[place, longest - len(row) :] = 1
    return ids, mask
