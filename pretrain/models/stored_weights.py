"""The weights in a local Hugging Face folder, compared with the model that its config.json describes.

transformers initialises missing tensors randomly and skips unknown ones. It prints a warning at most, and under ZeRO
stage 3 none at all.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from data_prep.utils.console import UserError

Shapes = dict[str, tuple[int, ...]]


def check_stored_weights(folder: str | Path, config: PretrainedConfig) -> None:
    """Raise UserError if the tensors in the folder's safetensors files do not match the model exactly.

    Only the headers are read. A folder without such files is not checked.
    """
    stored = _read_shapes(Path(folder))
    if not stored:
        return
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = model_class(config)  # from_config would partition the model while an engine of ZeRO stage 3 exists
    prefix = f"{model.base_model_prefix}."
    if not any(name.startswith(prefix) for name in stored):  # saved without the head
        stored = {prefix + name: shape for name, shape in stored.items()}
    expected: Shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unknown = {name for name in stored.keys() - expected.keys() if not any(pattern.search(name) for pattern in ignored)}
    problems = {
        "lacks tensors of the model in its config.json": expected.keys() - stored.keys() - tied,
        "has tensors that the model in its config.json does not have": unknown,
        "has tensors whose shapes differ from its config.json": {
            name for name in stored.keys() & expected.keys() if stored[name] != expected[name]
        },
    }
    for problem, names in problems.items():
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"model.init_from: {folder} {problem}: {listed}; use a folder with all weights of that model"
            )


def _read_shapes(folder: Path) -> Shapes:
    """Return the shape of each tensor by name. Raises UserError for a file that cannot be read."""
    shapes: Shapes = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.init_from: cannot read {path} ({error}); copy it again") from None
    return shapes
