"""Low-rank adapters (LoRA) around the linear layers of a model, by peft, and merging them into the weights."""

import torch
from torch import nn

from data_prep.utils.console import UserError
from pretrain.models.language_model import LanguageModel
from pretrain.sections import LoraConfig

BASE, DOWN, UP = "base_layer", "lora_A.default", "lora_B.default"
"""Names in peft for the parts of an adapted linear layer."""


def add_adapters(model: LanguageModel, lora: LoraConfig) -> None:
    """Add adapters to every linear layer of the transformer, and freeze all other weights but the predictor embedding.

    Raises UserError if peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise UserError(
            "model.lora needs the package peft, which is not installed; "
            "run pip install '.[lora]' in the project's folder"
        ) from None
    import torch.distributed.tensor  # noqa: F401  # peft uses it without importing it

    transformer = model.transformer
    layer_names = sorted(
        {name.rpartition(".")[2] for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    )
    if not layer_names:
        raise UserError(
            f"model.lora: {model.causal_lm.config.model_type} has no linear layers that peft could adapt; remove lora"
        )
    model.causal_lm.requires_grad_(False)
    # Under ZeRO stage 3, DeepSpeed releases the weights of a layer before the backward pass needs them if the input of
    # the layer does not require a gradient.
    model.causal_lm.enable_input_require_grads()
    # peft declares lora_alpha as an int, but accepts any number.
    adapters = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=layer_names)  # type: ignore[arg-type]
    peft.inject_adapter_in_model(adapters, transformer)


def adapter_sizes(model: LanguageModel, lora: LoraConfig) -> list[int]:
    """Return the number of elements of each parameter that `add_adapters` would add."""
    layers = [module for module in model.transformer.modules() if isinstance(module, nn.Linear)]
    return [lora.rank * width for linear in layers for width in (linear.in_features, linear.out_features)]


def merge_adapters(state: dict[str, torch.Tensor], lora: LoraConfig) -> dict[str, torch.Tensor]:
    """Return the state of an adapted LanguageModel with merged adapters: each weight is W + alpha / rank * B A."""
    merged = {}
    for key, value in state.items():
        if f".{BASE}." in key:
            name = key.replace(f".{BASE}.", ".")
            if name.endswith(".weight"):
                value = value + lora.alpha / lora.rank * state[key.replace(BASE, UP)] @ state[key.replace(BASE, DOWN)]
            merged[name] = value
        elif f".{DOWN}." not in key and f".{UP}." not in key:
            merged[key] = value
    return merged
