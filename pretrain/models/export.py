"""An export: a folder that transformers can load, with additional files for computing embeddings.

    config.json model.safetensors tokenizer.json ...    AutoModelForCausalLM / AutoTokenizer.from_pretrained
    jepa.safetensors              `predictor.weight` (k, hidden width), embedding of the k predictor tokens; absent
                                  if k = 0
    jepa.json                     objective, layout, special tokens, corpus settings
    README.md                     description of the export, and code that embeds a view

An export is sufficient to recompute the language-model loss and the auxiliary term.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.tokenizer import Tokenizer
from data_prep.utils.files import copy_folder, write_json, write_text
from pretrain.models.attention import resolve_attention
from pretrain.models.families import register_family_from_folder
from pretrain.models.language_model import LanguageModel

PREDICTOR_KEY = "predictor.weight"


def write_export(
    folder: Path, model_folder: Path, state: Mapping[str, torch.Tensor], jepa: dict[str, Any], readme: str = ""
) -> None:
    """Write an export to a temporary folder, then move it to `folder`; a kill never leaves an incomplete `folder`.

    An existing export is moved aside first and removed last; if the process is killed in between, the next call
    restores or removes it. Only one process at a time may write an export to `folder`.

    `model_folder` contains config.json and the tokenizer. `state` is the fp32 state of a LanguageModel. `jepa` is
    written to jepa.json and `readme` to README.md. Raises ValueError if the state does not fit the model.
    """
    # A rewind removes .*.tmp, so it also removes an old export (`_remove_later_steps` in pretrain/training/spikes.py).
    temporary, old = (folder.with_name(f".{folder.name}.{kind}.tmp") for kind in ("new", "old"))
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    copy_folder(model_folder, temporary)
    register_family_from_folder(model_folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder), dtype=torch.float32)
    weights = {key.removeprefix("causal_lm."): value for key, value in state.items() if key.startswith("causal_lm.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise ValueError(
            f"the checkpoint does not match {model_folder / 'config.json'}: "
            f"missing weights {sorted(set(missing) - tied)}, unexpected weights {unexpected}"
        )
    model.tie_weights()
    model.save_pretrained(temporary)
    if PREDICTOR_KEY in state:
        save_file({PREDICTOR_KEY: state[PREDICTOR_KEY].contiguous()}, temporary / "jepa.safetensors")
    write_json(temporary / "jepa.json", jepa)
    if readme:
        write_text(temporary / "README.md", readme)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_language_model(folder: Path, attention_setting: str, device: torch.device) -> tuple[LanguageModel, Tokenizer]:
    """Return the model of an export in fp32 on the CPU, not partitioned, and its tokenizer.

    The model uses the attention kernel that `attention_setting` selects for `device`.
    """
    register_family_from_folder(folder)
    attention = resolve_attention(attention_setting, device, AutoConfig.from_pretrained(folder, local_files_only=True))
    causal_lm = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32, local_files_only=True
    )
    path = folder / "jepa.safetensors"
    predictor_tokens = len(load_file(path)[PREDICTOR_KEY]) if path.exists() else 0
    model = LanguageModel(causal_lm, predictor_tokens, attention)
    load_predictor(model, folder)
    return model.eval(), Tokenizer.load(folder)


def load_predictor(model: LanguageModel, folder: str | Path) -> None:
    """Copy the predictor embedding of an export into the model if their shapes match."""
    path = Path(folder) / "jepa.safetensors"
    if model.predictor is None or not path.exists():
        return
    weight = load_file(path)[PREDICTOR_KEY]
    if weight.shape == model.predictor.weight.shape:
        model.predictor.weight.data.copy_(weight)
