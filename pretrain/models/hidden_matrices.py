"""The hidden matrices of a model and its objective, which Muon trains."""

import torch
from torch import nn

from pretrain.models.language_model import LanguageModel


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the shape of a parameter before partitioning by ZeRO stage 3."""
    return getattr(parameter, "ds_shape", parameter.shape)


def hidden_matrices(model: LanguageModel, objective: nn.Module) -> list[nn.Parameter]:
    """Return the trained matrices other than embeddings (of tokens, positions and predictor tokens) and output head.

    They may be partitioned or on the meta device.
    """
    outer = [model.head, *(module for module in model.modules() if isinstance(module, nn.Embedding))]
    excluded = {id(parameter) for module in outer for parameter in module.parameters()}
    return [
        parameter
        for parameter in (*model.parameters(), *objective.parameters())
        if parameter.requires_grad and len(full_shape(parameter)) == 2 and id(parameter) not in excluded
    ]
