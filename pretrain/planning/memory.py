"""Memory estimates of a rank: model states by ZeRO stage, and the activations of a micro batch."""

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from pretrain.models.head import MAX_LOGITS
from pretrain.models.hidden_matrices import full_shape
from pretrain.models.language_model import LanguageModel
from pretrain.models.structure import head_width

ITEM_BYTES = {"fp32": 4, "bf16": 2}
"""Bytes per element for each precision."""
OPTIMIZER_BYTES = 12
"""Bytes per trained parameter of DeepSpeed's optimizer: an fp32 copy of the parameter, and two moments."""
MUON_SAVING = 4
"""Bytes per parameter that Muon needs less than AdamW, because it has one moment."""


QUERY_NORMS, KEY_NORMS = {"q_norm", "q_layernorm", "query_layernorm"}, {"k_norm", "k_layernorm", "key_layernorm"}
"""Names in transformers of the norms of queries and keys, whose weights may be as wide as one head only."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes of the model states on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    """The fp32 copy of the parameters, which the optimizer updates, and the moments of the optimizer."""
    in_step: float
    """All model states during the optimizer step, including DeepSpeed's fp32 copy of the gradients. There are no
    activations at that time."""

    @property
    def held(self) -> float:
        """All model states between two steps, after the first gradients."""
        return self.parameters + self.gradients + self.optimizer


def model_states(
    parameters: int,
    trained: int,
    small: int,
    precision: str,
    stage: int,
    ranks: int,
    accumulated: int,
    by_muon: int = 0,
) -> ModelStates:
    """Return the model states of a ZeRO stage, without offloading.

    Stage 0 is plain data parallelism with the same optimizer, for comparison. Muon trains `by_muon` of the parameters,
    and AdamW all other ones. Only the `trained` parameters have gradients and optimizer states. `small` is the number
    of parameters in tensors up to stage3_param_persistence_threshold. `accumulated` is the size in bytes of an element
    of the accumulated gradients.

    Rajbhandari et al., arXiv 1910.02054, section 3.1: a parameter needs 2 + 2 + 12 bytes in bf16. Stage 1 divides the
    optimizer states by the number of ranks, stage 2 also the gradients, and stage 3 everything. In fp32, plain training
    needs 4 + 4 + 8 bytes. DeepSpeed keeps its fp32 copy next to fp32 parameters too, so it needs 4 + 4 + 12.

    The optimizer step needs an additional fp32 copy of this rank's part of the gradients. Stage 1 has freed the other
    parts by then. If bf16 gradients are accumulated in fp32, they need 4 bytes, and stages 1 and 2 update from them
    without an additional copy. Stage 1 then keeps the gradients of all parameters, in fp32 and in bf16. Under stage 3
    the `small` parameters are also kept unpartitioned, next to their partitions, between two steps. A test measures all
    of these sizes.
    """
    item_bytes = ITEM_BYTES[precision]
    if stage == 0:
        plain = (8 if precision == "fp32" else OPTIMIZER_BYTES) * float(trained) - MUON_SAVING * by_muon
        return ModelStates(
            item_bytes * parameters, item_bytes * trained, plain, item_bytes * (parameters + trained) + plain
        )
    weights = item_bytes * parameters / (ranks if stage == 3 else 1)
    unpartitioned = item_bytes * small if stage == 3 and ranks > 1 else 0
    optimizer = (OPTIMIZER_BYTES * trained - MUON_SAVING * by_muon) / ranks
    if stage == 1 and accumulated > item_bytes:
        gradients = float((accumulated + item_bytes) * trained)
        return ModelStates(weights, gradients, optimizer, weights + gradients + optimizer)
    gradients = accumulated * trained / (ranks if stage > 1 else 1)
    copied = 0 if stage == 2 and accumulated > item_bytes else 4
    return ModelStates(
        weights + unpartitioned, gradients, optimizer, weights + (accumulated + copied) * trained / ranks + optimizer
    )


@dataclass(frozen=True)
class LayerWidths:
    """Numbers of elements per position in the tensors of a layer."""

    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together; the values have the same width."""
    feed_forward: int
    """Width of a gated feed-forward network; half the width of a network without a gate."""
    norms: int
    """Width of the inputs of all norms together."""


def layer_widths(model: LanguageModel) -> list[LayerWidths]:
    """Return the widths of each layer, from the names of its modules or else from the configuration."""
    return [_widths(layer, model.causal_lm.config) for layer in model.layers]


def _widths(layer: nn.Module, config: PretrainedConfig) -> LayerWidths:
    modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    sizes = {name: _input_and_output(module) for name, module in modules.items()}
    matrices = {name: size for name, size in sizes.items() if size is not None}
    if "q_proj" in matrices and "k_proj" in matrices:
        queries, keys = matrices["q_proj"][1], matrices["k_proj"][1]
    else:
        heads, width = config.num_attention_heads, head_width(config)
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        if getattr(config, "kv_lora_rank", None):  # all heads have keys, which are wider than the values
            width = (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) // 2
            key_heads = heads
        queries, keys = heads * width, key_heads * width
    feed_forward = matrices["up_proj"][1] if "up_proj" in matrices else max(size[0] for size in matrices.values())
    if not any("gate" in name or name == "w3" for name in matrices):
        feed_forward //= 2  # two of the four tensors of a gated network
    norms = sum(
        queries if name in QUERY_NORMS else keys if name in KEY_NORMS else _norm_width(module, config.hidden_size)
        for name, module in modules.items()
        if type(module).__name__.endswith("Norm")
    )
    return LayerWidths(queries, keys, feed_forward, norms)


def _input_and_output(module: nn.Module) -> tuple[int, int] | None:
    """Return the widths of the input and the output of a matrix; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None


def _norm_width(norm: nn.Module, default: int) -> int:
    weight = getattr(norm, "weight", None)
    return default if weight is None else full_shape(weight)[0]


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass stores for the backward pass on one rank."""

    layers: float
    checkpointed_layers: float
    """Bytes of the layers with activation checkpointing: the input of each layer, and the largest recomputed layer."""
    logits: float
    """The logits of a chunk, and their gradient."""
    head: float
    """The gradient of the head's weight."""


def activations(model: LanguageModel, precision: str, positions: float, targets: float, device: str) -> Activations:
    """Return an estimate for a micro batch of `positions`, padding included, and next-token `targets`.

    Layers are counted as in Korthikanti et al., arXiv 2205.05198, section 4.1: each matrix product stores its input,
    attention stores its queries, keys and values, and each norm stores its input. With b bytes per element, width h,
    queries q, keys k, gated feed-forward f and norms n (2 h in Llama), a layer needs this many bytes per position:

        (4 + b) n + b (2 h + 2 q + 2 k + 4 f)

    The norms of transformers store their input in fp32 and their normalised output. There is no dropout. Attention
    scores are not stored, because the kernels recompute them. With checkpointing, b h bytes per layer and position
    remain (their section 5).

    Logits are computed for the targets only, in chunks whose size depends on the `device`, cpu or cuda. They need an
    fp32 tensor, which their gradient overwrites; in bf16 also a bf16 copy; with soft-capping also the slope. The
    gradient of the head's weight exists in fp32 from the forward pass on. The backward pass adds a second copy, and in
    bf16 a third.
    """
    item_bytes = ITEM_BYTES[precision]
    head = model.head
    layers = [
        positions
        * (
            (4 + item_bytes) * layer.norms
            + item_bytes * (2 * model.hidden_size + 2 * layer.queries + 2 * layer.keys + 4 * layer.feed_forward)
        )
        for layer in layer_widths(model)
    ]
    return Activations(
        layers=sum(layers),
        checkpointed_layers=item_bytes * model.hidden_size * positions * len(layers) + max(layers),
        logits=min(targets * model.vocab_size, MAX_LOGITS[device])
        * (4 + (item_bytes if precision == "bf16" else 0) + (4 if head.softcap else 0)),
        head=float(8 + (item_bytes if precision == "bf16" else 0)) * model.vocab_size * model.hidden_size
        if head.weight.requires_grad
        else 0.0,
    )
