"""Recording of the hidden states of chosen layers during a forward pass, by hooks; no other states are kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pretrain.models.language_model import LanguageModel


class LayerStates:
    """A recorder of the hidden states after some layers of a model; the first layer is 1, and 0 is its input.

    Create it before DeepSpeed is initialised.
    """

    def __init__(self, model: LanguageModel, numbers: Sequence[int]):
        self._recorded: dict[int, torch.Tensor] | None = None
        layers = model.layers
        for number in numbers:
            if number == 0:
                layers[0].register_forward_pre_hook(self._record_input, with_kwargs=True)
            else:
                layers[number - 1].register_forward_hook(self._recorder(number))

    @contextmanager
    def record(self) -> Iterator[dict[int, torch.Tensor]]:
        """Yield a dictionary that a forward pass in this context fills: (B * L, D) by number of the layer."""
        self._recorded = {}
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def _record_input(self, layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._record(0, arguments[0] if arguments else keywords["hidden_states"])

    def _recorder(self, number: int) -> Any:
        def record(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self._record(number, output[0] if isinstance(output, tuple) else output)

        return record

    def _record(self, number: int, states: torch.Tensor) -> None:
        if self._recorded is not None:
            self._recorded[number] = states.flatten(0, 1)
