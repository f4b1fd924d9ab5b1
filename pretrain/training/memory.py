"""Bytes that a rank holds: model states by ZeRO stage, and the activations of a micro batch."""

from dataclasses import dataclass

from torch import nn

from pretrain.models.head import MAX_LOGITS
from pretrain.models.language_model import LanguageModel

ITEM_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    """The fp32 copy that is updated, and the two moments of Adam."""
    in_step: float
    """All that is held within the optimizer step, when there are no activations, but DeepSpeed's fp32 copy of the gradients."""

    @property
    def held(self) -> float:
        """All that is held between two steps, once there are gradients."""
        return self.parameters + self.gradients + self.optimizer


def model_states(
    parameters: int, trained: int, small: int, precision: str, stage: int, ranks: int, accumulated: int
) -> ModelStates:
    """Return the model states of a ZeRO stage; stage 0 is plain data parallelism with AdamW, for comparison. Without offloading.

    Frozen parameters, those that are not among the `trained` ones, have neither gradients nor optimizer states. `accumulated` is the bytes of
    an element in which gradients are added up over micro steps.

    Rajbhandari et al., arXiv 1910.02054, section 3.1: per parameter 2 + 2 + 12 bytes in bf16, of which stage 1 divides the optimizer's
    by the ranks, stage 2 the gradients' too, and stage 3 all. In fp32 plain training takes 4 + 4 + 8, but DeepSpeed keeps its fp32 copy
    beside fp32 parameters too: 4 + 4 + 12. Its step adds the gradients in fp32 once more, of this rank's part; stage 1 has freed the
    other parts by then. Where gradients in bf16 are added up in fp32 they take 4 bytes, from which stages 1 and 2 update without another copy;
    stage 1 then holds the gradients of all parameters, in fp32 and in bf16. Under stage 3 the `small` parameters, those up to
    stage3_param_persistence_threshold, stand whole beside their partitions between two steps. A test measures all of this.
    """
    item = ITEM_BYTES[precision]
    if stage == 0:
        adam = (8.0 if precision == "fp32" else 12.0) * trained
        return ModelStates(item * parameters, item * trained, adam, item * (parameters + trained) + adam)
    weights = item * parameters / (ranks if stage == 3 else 1)
    whole = item * small if stage == 3 and ranks > 1 else 0
    optimizer = 12.0 * trained / ranks
    if stage == 1 and accumulated > item:
        gradients = float((accumulated + item) * trained)
        return ModelStates(weights, gradients, optimizer, weights + gradients + optimizer)
    gradients = accumulated * trained / (ranks if stage > 1 else 1)
    copied = 0 if stage == 2 and accumulated > item else 4
    return ModelStates(
        weights + whole, gradients, optimizer, weights + (accumulated + copied) * trained / ranks + optimizer
    )


@dataclass(frozen=True)
class LayerWidths:
    """Elements a position of what a layer computes."""

    queries: int
    """All query heads together."""
    keys: int
    """All key heads together; the values are as many."""
    feed_forward: int
    norms: int
    """What goes into all of its norms together."""


def layer_widths(model: LanguageModel) -> list[LayerWidths]:
    """Of each layer, by the names that the modules of transformers have."""
    found = []
    for layer in model.causal_lm.model.layers:
        modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
        outputs = {name: module.out_features for name, module in modules.items() if isinstance(module, nn.Linear)}
        of_heads = {"q_norm": outputs["q_proj"], "k_norm": outputs["k_proj"]}
        norms = sum(
            of_heads.get(name, model.hidden_size)
            for name, module in modules.items()
            if type(module).__name__.endswith("Norm")
        )
        found.append(LayerWidths(outputs["q_proj"], outputs["k_proj"], outputs["up_proj"], norms))
    return found


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass leaves for the backward pass on one rank."""

    layers: float
    checkpointed_layers: float
    """The same with activation checkpointing: the input of each layer, and the largest layer computed anew."""
    logits: float
    """Those of a chunk, and their gradient."""
    head: float
    """The gradient of the head's weight."""


def activations(model: LanguageModel, precision: str, positions: float, targets: float, device: str) -> Activations:
    """Return an estimate for a micro batch of `positions`, padding included, and next-token `targets`.

    Counted as in Korthikanti et al., arXiv 2205.05198, section 4.1: each matrix product keeps its input, attention its queries, keys and
    values, each norm its input. With b bytes an element, width h, queries q, keys k, gated feed-forward f and norms n (2 h in Llama):
    (4 + b) n + b (2 h + 2 q + 2 k + 4 f) for each layer and position. The norms of transformers keep their input in fp32 and their
    normalised output; there is no dropout, and no attention score is kept, since the kernels compute them anew. With checkpointing b h
    remains of a layer (their section 5). Logits exist at the targets alone, and of a chunk of them at a time, whose size depends on the
    `device`, cpu or cuda: in fp32, which becomes the gradient in its place, in bf16 once more, and with soft-capping its slope. The gradient of the
    head's weight is in fp32 from the forward pass on, and once more, in bf16 a third time, in the backward pass.
    """
    item, head = ITEM_BYTES[precision], model.causal_lm.lm_head
    layers = [
        positions
        * (
            (4 + item) * layer.norms
            + item * (2 * model.hidden_size + 2 * layer.queries + 2 * layer.keys + 4 * layer.feed_forward)
        )
        for layer in layer_widths(model)
    ]
    return Activations(
        layers=sum(layers),
        checkpointed_layers=item * model.hidden_size * positions * len(layers) + max(layers),
        logits=min(targets * model.vocab_size, MAX_LOGITS[device])
        * (4 + (item if precision == "bf16" else 0) + (4 if head.softcap else 0)),
        head=float(8 + (item if precision == "bf16" else 0)) * model.vocab_size * model.hidden_size
        if head.weight.requires_grad
        else 0.0,
    )
