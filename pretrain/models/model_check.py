"""The check that a model suits packed rows, on a tiny model of the same class and structure with random weights.

All knowledge about a family is in the code of its class. The check therefore runs this code: on packed rows with the
project's mask and positions, and on each sequence of the rows alone with the class's own mask and positions. States,
losses and gradients must be equal, and no token may change the states of tokens that must not see it. The weights are
large, so a leak is far above the rounding errors.
"""

import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers import __version__ as VERSION
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from data_prep.utils.console import UserError
from pretrain.models.attention import attention_mask, resolve_attention
from pretrain.models.language_model import LanguageModel, one_line
from pretrain.models.structure import decoder_layers, model_class
from pretrain.models.tiny_config import ROW, VOCABULARY, tiny_config
from pretrain.user_cache import read_cached, write_cached

K = 2
"""Number of predictor tokens."""
TOLERANCE = 1e-3
"""Largest relative error of states, losses and gradients, in fp32."""
RECORDS = (((9, 7), (3, 8)), ((4, 6), (8, 5)))
"""Lengths of the context and the target of each record, by row."""
RECORDING = "check_of_packed_rows"
"""Name of an attention kernel that records its mask."""
PASSED = "passed"
"""Value in the user's cache for a model that passed the check."""
EXPERTS = ("expert", "router", "moe", "mixtureof")
"""Parts of the names of module classes in a mixture of experts."""


class Rejected(Exception):
    """The reason why a model does not suit packed rows."""


class NotBuilt(Rejected):
    """The reason why no tiny model could be built, so nothing was checked."""


class Sequence(NamedTuple):
    """A sequence of a record: the places of its tokens in the flattened rows, and whether it has predictor tokens."""

    places: list[int]
    predicts: bool


class Rows(NamedTuple):
    """Packed rows in the joint layout: [context] [target] [predictor tokens] [target alone], and padding at the end.

    All tensors are (B, L). `record` is the number of the record of each token, and -1 for padding.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    visible_until: torch.Tensor
    record: torch.Tensor
    sequences: list[Sequence]


def check_model(config: PretrainedConfig, attention: str, where: str) -> None:
    """Raise UserError if a model of `config` does not suit packed rows, with the reason.

    `attention` is the setting model.attention. FlexAttention has no backward pass on CPU, so the check uses SDPA or
    eager attention instead of it. The message starts with `where`. The check takes about a second, and does not change
    the state of torch's random number generators. A model that passed is not checked again: the user's cache lists it.
    """
    kernel = attention if attention in ("sdpa", "eager") else "auto"
    config_class: Any = type(config)
    values = json.dumps(config.to_dict(), sort_keys=True, default=str)
    key = _cache_key(config_class, values, kernel)
    name = f"model-check-{key}.json"
    if read_cached(name, key) == PASSED:
        return
    problem = find_problem(config_class, values, kernel)
    if problem is not None:
        raise UserError(f"{where}: {config.model_type} is not supported, because {problem}; see docs/models.md")
    write_cached(name, key, PASSED)


def _cache_key(config_class: type[PretrainedConfig], values: str, kernel: str) -> str:
    """Return a hash of everything that decides the check: the configuration, the libraries, and the code of the model.

    The code is this package and the files next to the class of the configuration.
    """
    key = hashlib.sha256(repr((config_class.__name__, values, kernel, torch.__version__, VERSION)).encode())
    folders = [Path(__file__).parent, Path(inspect.getfile(config_class)).parent]
    for path in sorted({path for folder in folders for path in folder.glob("*.py")}):
        key.update(path.read_bytes())
    return key.hexdigest()


@functools.cache
def find_problem(config_class: type[PretrainedConfig], values: str, kernel: str) -> Rejected | None:
    """Return the reason why a model does not suit packed rows; None if it suits them.

    `values` is the configuration in JSON, and `kernel` a setting that resolve_attention resolves on CPU.
    """
    config = config_class.from_dict(json.loads(values))
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            model = _tiny_model(config, kernel)
            with torch.no_grad():
                _check_plain_passes(model)
                _check_interface(model)
                _check_leaks(model)
            _check_equality(model)
    except Rejected as rejected:
        return rejected
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of transformers about the unusual sizes of tiny models."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _tiny_model(config: PretrainedConfig, kernel: str) -> LanguageModel:
    """Return a tiny model with the structure of `config` and large weights. Raises Rejected."""
    # not from_config: it would partition the models while an engine of ZeRO stage 3 exists
    try:
        with torch.device("meta"):
            full = model_class(config)(config)
    except Exception as error:  # whatever the code of the class raises; also for a missing package
        raise NotBuilt(f"it cannot be built with these values ({_described(error)})") from None
    _check_parts(full)
    try:
        tiny = tiny_config(config)
        attention = resolve_attention(kernel, torch.device("cpu"), tiny)
        tiny._attn_implementation = attention
        causal_lm = type(full)(tiny).float().eval()
    except Exception as error:  # as above
        raise NotBuilt(f"no tiny model of it can be built ({_described(error)})") from None
    _check_parts(causal_lm)
    if missing := {type(module).__name__ for module in full.modules()} - {
        type(module).__name__ for module in causal_lm.modules()
    }:
        raise NotBuilt(f"no tiny model with all its kinds of layers can be built ({', '.join(sorted(missing))})")
    model = LanguageModel(causal_lm, K, attention)
    _enlarge_weights(model)
    return model


def _check_parts(causal_lm: Any) -> None:
    """Raise Rejected if a part of the model is missing or unknown to the project."""
    for module in causal_lm.modules():
        if any(part in type(module).__name__.lower() for part in EXPERTS):
            raise Rejected(
                "it is a mixture of experts: there is no load-balancing loss, and the plan and Muon would treat all "
                "experts as one dense layer"
            )
    rates = {key: value for key, value in vars(causal_lm.config).items() if "layerdrop" in key}
    if any(rates.values()):
        raise Rejected(
            f"its training skips layers at random ({max(rates)} is above 0): set it to 0, because ZeRO-3 "
            "would use gradients of an earlier step for them"
        )
    if any("sink" in name for name, _ in causal_lm.named_parameters()):
        raise Rejected("it has attention sinks, which SDPA and the checked kernels do not compute")
    head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    if not isinstance(head, nn.Linear):
        raise Rejected("its output head is not a linear layer")
    if not isinstance(embedding, nn.Embedding):
        raise Rejected("its token embedding is not a table")
    width = causal_lm.config.hidden_size
    if embedding.embedding_dim != width or head.in_features != width:
        raise Rejected("its token embeddings or its last hidden states do not have the width hidden_size")
    try:
        layers = decoder_layers(causal_lm)
    except ValueError as error:
        raise Rejected(one_line(error)) from None
    if len(layers) != causal_lm.config.num_hidden_layers:
        raise Rejected(f"it has {len(layers)} layers where num_hidden_layers is {causal_lm.config.num_hidden_layers}")
    parameters = inspect.signature(causal_lm.base_model.forward).parameters
    if missing := [name for name in ("inputs_embeds", "position_ids", "attention_mask") if name not in parameters]:
        raise Rejected(f"its forward pass does not take {' and '.join(missing)}")


@torch.no_grad()
def _enlarge_weights(model: LanguageModel) -> None:
    """Give the model random weights that are large enough for attention to matter."""
    generator = torch.Generator().manual_seed(0)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(0.5 * noise)
        elif parameter.dim() > 1:
            parameter.copy_(noise * 2 / parameter.shape[-1] ** 0.5)
        else:
            # larger projections do not change normalized queries and keys
            parameter.add_(0.2 * noise + (1.0 if "q_norm" in name or "k_norm" in name else 0.0))


def _packed_rows() -> Rows:
    """Return rows of RECORDS with random tokens."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(RECORDS), ROW)
    token_ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    record, visible_until = torch.full(shape, -1), torch.arange(1, ROW + 1).repeat(len(RECORDS), 1)
    sequences, number = [], 0
    for row, records in enumerate(RECORDS):
        begin = 0
        for c, t in records:
            words = torch.randint(3, VOCABULARY, (c + t,), generator=generator)
            after_target = begin + c + t
            after_predictors, end = after_target + K, after_target + K + t
            token_ids[row, begin:end] = torch.cat([words, VOCABULARY + torch.arange(K), words[c:]])
            positions[row, begin:end] = torch.tensor([*range(c + t), *range(c, c + K), *range(t)])
            visible_until[row, begin : begin + c] = after_predictors
            visible_until[row, begin + c : after_target] = after_target
            visible_until[row, after_target:after_predictors] = after_predictors
            visible_until[row, after_predictors:end] = end
            record[row, begin:end] = number
            places = [row * ROW + column for column in range(begin, end)]
            sequences += [
                Sequence(places[: c + t], False),
                Sequence(places[:c] + places[c + t : c + t + K], True),
                Sequence(places[c + t + K :], False),
            ]
            begin, number = end, number + 1
    return Rows(token_ids, positions, visible_until, record, sequences)


def _states(model: LanguageModel, rows: Rows, mask: Any = None) -> torch.Tensor:
    """Return the last hidden states of packed rows, (B * L, D), by default with the mask of the model's kernel.

    Raises Rejected if the forward pass fails.
    """
    if mask is None:
        config = model.causal_lm.config
        mask = attention_mask(rows.visible_until, rows.positions, model.attention, config, torch.float32)
    try:
        hidden: torch.Tensor = model.transformer(
            inputs_embeds=model.embed(rows.token_ids),
            attention_mask=mask,
            position_ids=rows.positions,
            use_cache=False,
        ).last_hidden_state
    except Exception as error:  # whatever the code of the class raises
        raise Rejected(f"its forward pass fails with the mask of packed rows ({_described(error)})") from None
    return hidden.flatten(0, 1)


def _states_alone(model: LanguageModel, rows: Rows, sequence: Sequence) -> torch.Tensor:
    """Return the last hidden states of a sequence without packing, (L, D), with the class's own mask and positions."""
    tokens = rows.token_ids.flatten()[sequence.places][None]
    inputs = {"inputs_embeds": model.embed(tokens)} if sequence.predicts else {"input_ids": tokens}
    hidden: torch.Tensor = model.transformer(**inputs, use_cache=False).last_hidden_state[0]
    return hidden


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _error(found: torch.Tensor, expected: torch.Tensor, floor: float = 1e-6) -> float:
    """Return the largest difference, relative to the root mean square of the expected values or a larger `floor`."""
    scale = _root_mean_square(expected).clamp(min=floor)
    return ((found - expected).abs().max() / scale).nan_to_num(torch.inf).item()


def _root_mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean().sqrt()


def _check_plain_passes(model: LanguageModel) -> None:
    """Raise Rejected if the class does not compute a causal language model of embeddings with a linear head."""
    rows = _packed_rows()
    sequence = rows.sequences[0]
    tokens = rows.token_ids.flatten()[sequence.places][None]
    changed = tokens.clone()
    changed[0, -1] = 3 + (tokens[0, -1] - 2) % (VOCABULARY - 3)
    try:
        states = _states_alone(model, rows, sequence)
        after_change = model.transformer(input_ids=changed, use_cache=False).last_hidden_state[0]
        embedded = model.transformer(inputs_embeds=model.embed(tokens), use_cache=False).last_hidden_state[0]
        logits = model.causal_lm(input_ids=tokens, use_cache=False).logits[0]
    except Exception as error:  # whatever the code of the class raises
        raise Rejected(f"its forward pass fails on plain text ({_described(error)})") from None
    if _error(after_change[:-1], states[:-1]) > TOLERANCE:
        raise Rejected("its attention is not causal: a token sees the tokens after it")
    if _error(embedded, states) > TOLERANCE:
        raise Rejected("it reads token ids besides their embeddings, but predictor tokens have no id in the vocabulary")
    if _error(model.logits(states), logits) > TOLERANCE:
        raise Rejected("its logits are not its last hidden states times a matrix, scaled or soft-capped")


def _check_interface(model: LanguageModel) -> None:
    """Raise Rejected if the attention of a layer is not computed by the common interface with the project's mask.

    A kernel that is not checked here, FlexAttention, then sees the same queries, keys, values and mask.
    """
    rows, received = _packed_rows(), []
    masks = attention_mask(rows.visible_until, rows.positions, "eager", model.causal_lm.config, torch.float32)
    own = list(masks.values()) if isinstance(masks, dict) else [masks]

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        received.append(any(attention_mask is mask for mask in own))
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, dim=1).mT * (scaling or query.shape[-1] ** -0.5)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        weights = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1)
        return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), None

    states = _states(model, rows)
    config = model.causal_lm.config
    ALL_ATTENTION_FUNCTIONS.register(RECORDING, attend)
    config._attn_implementation = RECORDING
    try:
        found = _states(model, rows, masks)
    finally:
        config._attn_implementation = model.attention
        del ALL_ATTENTION_FUNCTIONS._global_mapping[RECORDING]
    if len(received) < len(model.layers):
        raise Rejected("its attention does not go through the common interface of transformers")
    if not all(received):
        raise Rejected("it changes the mask before it reaches the attention kernel")
    if _error(found, states) > TOLERANCE:
        raise Rejected(f"its attention computes more than {model.attention} attention with a mask, scale and soft cap")


def _check_leaks(model: LanguageModel) -> None:
    """Raise Rejected if tokens change the states of tokens that must not see them."""
    rows = _packed_rows()
    states = _states(model, rows)
    predicting = rows.token_ids >= VOCABULARY
    first, second, padding = rows.record == 0, rows.record == 1, rows.record < 0
    row = torch.arange(len(RECORDS))[:, None].expand_as(rows.record)

    def is_seen(changed: torch.Tensor, by: torch.Tensor) -> bool:
        """Return whether a change of the tokens in the mask `changed` changes the states in the mask `by`."""
        ids = torch.where(changed & ~predicting, 3 + (rows.token_ids - 2) % (VOCABULARY - 3), rows.token_ids)
        ids = torch.where(changed & predicting, 2 * VOCABULARY + 1 - ids, ids)  # swaps the two predictor tokens
        found, seen = _states(model, rows._replace(token_ids=ids)), by.flatten()
        return _error(found[seen], states[seen]) > TOLERANCE

    if not is_seen(first, first):
        raise Rejected("its tokens have no effect on its hidden states")
    if is_seen(first, (row > 0) & ~padding):
        raise Rejected("the rows of a batch influence each other")
    if is_seen(first, second) or is_seen(second, first):
        raise Rejected("a state passes from record to record in a row: a mask of attention does not separate them")
    if is_seen(padding, ~padding):
        raise Rejected("padding changes the hidden states of records")
    if is_seen(predicting, ~predicting & ~padding):
        raise Rejected("predictor tokens change the hidden states of other tokens")


def _check_equality(model: LanguageModel) -> None:
    """Raise Rejected if packed rows do not have the states, losses and gradients of separate sequences."""
    rows = _packed_rows()
    calls = [0] * len(model.layers)
    handles = [
        layer.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
        for number, layer in enumerate(model.layers)
    ]
    states = _states(model, rows)
    for handle in handles:
        handle.remove()
    if set(calls) != {1}:
        raise Rejected("a forward pass does not run each layer once, so FLOPs and ZeRO-3 would not be right")
    alone = torch.zeros_like(states)
    for number, sequence in enumerate(rows.sequences):
        own = _states_alone(model, rows, sequence)
        if _error(states[sequence.places].detach(), own.detach()) > TOLERANCE:
            raise Rejected(
                "the project's mask is not the mask of its layers"
                if number == 0
                else "it does not take its positions from the rows, so records after the first one are shifted"
            )
        is_new = (alone[sequence.places] == 0).all(dim=1)
        places = torch.tensor(sequence.places)[is_new]
        alone = alone.index_put((places,), own[is_new])
    losses, gradients = zip(*(_losses_and_gradients(model, rows, found) for found in (states, alone)), strict=True)
    if _error(*losses) > TOLERANCE:
        raise Rejected("the losses of packed rows differ from the losses of separate sequences")
    # some gradients, such as the ones of the biases of keys, are 0 up to rounding
    floor = 0.01 * max(_root_mean_square(gradient).item() for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        if _error(gradient, gradients[1][name], floor) > TOLERANCE:
            raise Rejected(f"the gradient of {name} on packed rows differs from the one on separate sequences")


def _losses_and_gradients(
    model: LanguageModel, rows: Rows, states: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the next-token and the embedding loss of states (B * L, D), and the gradients of their sum."""
    tokens = rows.token_ids.flatten()
    reading = [sequence.places for sequence in rows.sequences if not sequence.predicts]
    before, after = (
        torch.tensor([place for places in reading for place in places[part]]) for part in (slice(-1), slice(1, None))
    )
    ends = torch.tensor([[sequence.places[-1] for sequence in rows.sequences[kind::3]] for kind in range(3)])
    next_token = model.cross_entropy(states[before], tokens[after]) / len(before)
    embedding = (1 - F.cosine_similarity(states[ends[1]], states[ends[2]])).mean()
    model.zero_grad(set_to_none=True)
    (next_token + embedding).backward(retain_graph=True)
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return torch.stack([next_token, embedding]).detach(), gradients
