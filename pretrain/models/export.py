"""Exports: a folder that transformers loads, with additional files for computing the embeddings.

    config.json model.safetensors tokenizer.json ...    AutoModelForCausalLM / AutoTokenizer.from_pretrained
    jepa.safetensors              the predictor embedding, `predictor.weight` (k, D); absent for k = 0
    jepa.json                     objective, layout, special tokens, corpus settings
    README.md                     description of the export, and code that embeds a view

An export is sufficient to recompute both losses.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.files import copy_folder, write_json, write_text
from data_prep.tokenizer import Tokenizer
from pretrain.models.attention import resolve_attention
from pretrain.models.families import register_family_from_folder
from pretrain.models.language_model import LanguageModel

PREDICTOR_KEY = "predictor.weight"


def write_export(
    folder: Path, skeleton: Path, state: Mapping[str, torch.Tensor], jepa: dict[str, Any], page: str = ""
) -> None:
    """Write an export atomically: the folder is complete or absent.

    `skeleton` contains config.json and the tokenizer. `state` is the fp32 state of a LanguageModel. `jepa` is written
    to jepa.json and `page` to README.md. Raises ValueError if the state does not fit the model.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    copy_folder(skeleton, temporary)
    register_family_from_folder(skeleton)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(skeleton), dtype=torch.float32)
    weights = {key.removeprefix("causal_lm."): value for key, value in state.items() if key.startswith("causal_lm.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise ValueError(
            f"the checkpoint does not fit the model: missing {sorted(set(missing) - tied)}, unexpected {unexpected}"
        )
    model.tie_weights()
    model.save_pretrained(temporary)
    if PREDICTOR_KEY in state:
        save_file({PREDICTOR_KEY: state[PREDICTOR_KEY].contiguous()}, temporary / "jepa.safetensors")
    write_json(temporary / "jepa.json", jepa)
    if page:
        write_text(temporary / "README.md", page)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load_language_model(folder: Path, setting: str, device: torch.device) -> tuple[LanguageModel, Tokenizer]:
    """Return the model and the tokenizer of an export, in fp32, unpartitioned and on CPU.

    The model uses the attention kernel that `setting` selects for `device`.
    """
    register_family_from_folder(folder)
    attention = resolve_attention(setting, device, AutoConfig.from_pretrained(folder, local_files_only=True))
    causal_lm = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32, local_files_only=True
    )
    path = folder / "jepa.safetensors"
    predictor_tokens = len(load_file(path)[PREDICTOR_KEY]) if path.exists() else 0
    model = LanguageModel(causal_lm, predictor_tokens, attention)
    load_predictor(model, folder)
    return model.eval(), Tokenizer.load(folder)


def load_predictor(model: LanguageModel, folder: str | Path) -> None:
    """Load the predictor embedding of an export if model and export have the same k; otherwise leave it unchanged."""
    path = Path(folder) / "jepa.safetensors"
    if model.predictor is None or not path.exists():
        return
    weight = load_file(path)[PREDICTOR_KEY]
    if weight.shape == model.predictor.weight.shape:
        model.predictor.weight.data.copy_(weight)
