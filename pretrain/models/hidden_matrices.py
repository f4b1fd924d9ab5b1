"""The hidden matrices of a model and its objective, which Muon trains."""

import torch
from torch import nn

from pretrain.models.language_model import LanguageModel


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter before partitioning by ZeRO stage 3."""
    return getattr(parameter, "ds_shape", parameter.shape)


def hidden_matrices(model: LanguageModel, objective: nn.Module) -> list[nn.Parameter]:
    """Return the trained matrices other than the embeddings (of tokens and of predictor tokens) and the output head.

    They may be partitioned or on the meta device.
    """
    outer = [model.causal_lm.get_input_embeddings(), model.causal_lm.get_output_embeddings(), model.predictor]
    excluded = {id(parameter) for module in outer if module is not None for parameter in module.parameters()}
    return [
        parameter
        for parameter in (*model.parameters(), *objective.parameters())
        if parameter.requires_grad and len(full_shape(parameter)) == 2 and id(parameter) not in excluded
    ]
