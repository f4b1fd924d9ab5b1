"""An export: a folder that transformers can load, with additional files for computing embeddings.

    config.json model.safetensors tokenizer.json ...    AutoModelForCausalLM / AutoTokenizer.from_pretrained
    jepa.safetensors              `predictor.weight` (k, hidden width), embedding of the k predictor tokens, and
                                  `objective.*`, the weights of the objective; absent if there are neither
    jepa.json                     objective, layout, special tokens, corpus settings
    README.md                     model card: data, objective and figures of the run, and code that generates, embeds
                                  and searches

An export is sufficient to recompute the language-model loss and the auxiliary terms.
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
from data_prep.utils.console import UserError
from data_prep.utils.files import copy_folder, write_json, write_text
from pretrain.models.attention import resolve_attention
from pretrain.models.families import register_family_from_folder
from pretrain.models.language_model import LanguageModel
from pretrain.objectives.base import Objective, build_objective
from pretrain.objectives.configs import ObjectiveConfig

ADDITIONAL_WEIGHTS = "jepa.safetensors"
PREDICTOR_KEY = "predictor.weight"
OBJECTIVE_PREFIX = "objective."
EMBEDDINGS = "embeddings"
"""Folder in an export with the embeddings that `--embed` has computed."""
SEARCH_INDEX = "index"
"""Folder in an export with the texts and embeddings that launcher/search.py searches."""


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
    additional = {
        key: value.contiguous()
        for key, value in state.items()
        if key == PREDICTOR_KEY or key.startswith(OBJECTIVE_PREFIX)
    }
    if additional:
        save_file(additional, temporary / ADDITIONAL_WEIGHTS)
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
    model = LanguageModel(causal_lm, len(_additional_weights(folder).get(PREDICTOR_KEY, ())), attention)
    load_predictor(model, folder)
    return model.eval(), Tokenizer.load(folder)


def load_objective(folder: Path, config: ObjectiveConfig, model: LanguageModel) -> Objective:
    """Return the objective of an export with its weights, for inference with the model of the export.

    Raises UserError if the export lacks weights of the objective.
    """
    objective = build_objective(config, model.shape)
    if not load_objective_weights(objective, folder):
        raise UserError(f"{folder} lacks the weights of the objective {config.name}; export the checkpoint again")
    return objective.eval()


def load_predictor(model: LanguageModel, folder: str | Path) -> None:
    """Copy the predictor embedding of an export into the model if their shapes match."""
    weight = _additional_weights(folder).get(PREDICTOR_KEY)
    if model.predictor is not None and weight is not None and weight.shape == model.predictor.weight.shape:
        model.predictor.weight.data.copy_(weight)


def load_objective_weights(objective: Objective, folder: str | Path) -> bool:
    """Copy the weights of the objective from an export; return False, and copy none, if names or shapes differ."""
    stored = {
        key.removeprefix(OBJECTIVE_PREFIX): value
        for key, value in _additional_weights(folder).items()
        if key.startswith(OBJECTIVE_PREFIX)
    }
    own = objective.state_dict()
    if {key: value.shape for key, value in stored.items()} != {key: value.shape for key, value in own.items()}:
        return False
    objective.load_state_dict(stored)
    return True


def _additional_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    path = Path(folder) / ADDITIONAL_WEIGHTS
    return load_file(path) if path.exists() else {}
