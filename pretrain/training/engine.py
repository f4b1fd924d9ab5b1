"""The DeepSpeed engine: ZeRO (stage 3 by default) around the model and its objective."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.imports import import_deepspeed_muon
from pretrain.models.attention import resolve_attention
from pretrain.models.export import load_objective_weights, load_predictor
from pretrain.models.hidden_matrices import full_shape, hidden_matrices
from pretrain.models.language_model import (
    LanguageModel,
    pretrained_causal_lm,
    random_causal_lm,
)
from pretrain.models.layer_states import LayerStates
from pretrain.models.lora import add_adapters
from pretrain.objectives.base import Z_LOSS, ForwardPass, Objective, ObjectiveOutput, build_objective
from pretrain.objectives.pool import Gather
from pretrain.planning.model import check_model_fits_corpus, resolve_hf_config
from pretrain.planning.settings import check_zero_options, engine_settings
from pretrain.training.distributed import World
from pretrain.training.layer_measurements import LayerMeasurements
from pretrain.training.layers import (
    compile_layers,
    enable_activation_checkpointing,
    limit_compile_threads,
    mark_layers_as_z3_leaves,
    raise_recompile_limit,
)
from pretrain.training.muon import MuonWithAdamW
from pretrain.training.random_state import seed_all


class TrainingModule(nn.Module):
    """Model and objective as one module: one forward and one backward pass cover all loss terms."""

    def __init__(self, model: LanguageModel, objective: Objective, gather: Gather):
        super().__init__()
        self.model, self.objective, self.gather = model, objective, gather
        self.layer_states = LayerStates(model, objective.layers)
        self.measurements: LayerMeasurements | None = None

    def forward(self, batch: Batch, with_pool: bool = False) -> ObjectiveOutput:
        """Return the loss terms of a micro batch."""
        with self.measurements.record(batch) if self.measurements else contextlib.nullcontext():
            with self.layer_states.record() as layers:
                hidden = self.model(batch)
            output: ObjectiveOutput = self.objective(
                ForwardPass(batch, hidden, layers, self.model, self.gather), with_pool=with_pool
            )
        if self.training and Z_LOSS in self.objective.weights:
            output.terms[Z_LOSS] = self.model.head_sums[0]
        return output


def build_engine(
    config: RunConfig,
    tokenizer: Tokenizer,
    world: World,
    *,
    resuming: bool = False,
    universal: bool = False,
) -> deepspeed.DeepSpeedEngine:
    """Build the model, partitioned from the start, the objective and the optimizer.

    `resuming` means that a checkpoint will be loaded, so no initial weights are read. `universal` means that this
    checkpoint was converted from a different number of ranks. Raises UserError if the batch sizes do not divide evenly,
    the model does not fit the corpus, or an option does not work with this model or device.
    """
    settings = engine_settings(config, world.size) | ({"checkpoint": {"load_universal": True}} if universal else {})
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    check_zero_options(settings, world.device.type)
    hf_config = resolve_hf_config(config, tokenizer, resuming)
    attention = resolve_attention(config.model.attention, world.device, hf_config)
    # while this object exists, transformers creates and loads models already partitioned by ZeRO-3
    keep_alive = HfDeepSpeedConfig(settings)
    seed_all(config.seed)
    init_folder = None if resuming else config.model.init_from
    if init_folder:
        causal_lm = pretrained_causal_lm(init_folder, attention, dtype)
    else:
        causal_lm = random_causal_lm(hf_config, attention, dtype)
    model = LanguageModel(causal_lm, config.predictor_tokens, attention)
    if config.model.init_from:
        check_model_fits_corpus(config, model, tokenizer)
    objective = _initial_objective(config, model)
    if init_folder:
        load_predictor(model, init_folder)
        load_objective_weights(objective, init_folder)
    if config.model.lora:
        add_adapters(model, config.model.lora)
    if config.train.activation_checkpointing:
        enable_activation_checkpointing(model)
    if settings["zero_optimization"]["stage"] == 3 and (config.train.compile or not config.monitor.gradients_every):
        mark_layers_as_z3_leaves(model)  # monitor.gradients_every cannot measure such layers
    if config.train.compile:
        compile_layers(model)
    if config.train.compile or attention == "flex_attention":
        raise_recompile_limit(model)
        limit_compile_threads(world.hosts.count(world.hosts[world.rank]))
    if config.train.z_loss:
        objective.add_z_loss(config.train.z_loss)
        model.head.z_loss = config.train.z_loss
    module = TrainingModule(model, objective, Gather(world.all_gather, world.rank))
    if config.monitor.layers_every:
        module.measurements = LayerMeasurements(model)
    optimizer = _optimizer(module, config, world.device)
    import_deepspeed_muon()
    with contextlib.redirect_stdout(io.StringIO()):  # the stage 1 optimizer in bf16 prints a dozen lines about memory
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    engine.keep_alive = keep_alive
    if isinstance(optimizer, MuonWithAdamW):
        optimizer.bind(engine.optimizer, hidden_matrices(model, objective), world)
    if config.monitor.gradients_every and any(
        hasattr(parameter, "ds_z3_leaf_module") for parameter in module.parameters()
    ):
        raise UserError(
            "monitor.gradients_every cannot measure modules that ZeRO stage 3 gathers as one unit, such as mixtures of "
            "experts: set it to 0, or set deepspeed.zero_optimization.stage to 1 or 2"
        )
    return engine


def _optimizer(module: TrainingModule, config: RunConfig, device: torch.device) -> torch.optim.AdamW:
    """Return the optimizer of the trained parameters; weight decay applies to matrices only."""
    train = config.train
    options: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": train.betas,
        # on the GPU, the unfused optimizer would pass over all weights several times and would copy them
        "fused": device.type == "cuda",
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if len(full_shape(parameter)) >= 2]
    undecayed = [parameter for parameter in trained if len(full_shape(parameter)) < 2]
    if train.optimizer.name == "adamw":
        return torch.optim.AdamW(_groups(train.weight_decay, {}, decayed, undecayed), **options)
    matrices = hidden_matrices(module.model, module.objective)
    among_matrices = {id(matrix) for matrix in matrices}
    decayed = [parameter for parameter in decayed if id(parameter) not in among_matrices]
    groups = _groups(train.weight_decay, {"muon": True}, matrices) + _groups(
        train.weight_decay, {"muon": False}, decayed, undecayed
    )
    return MuonWithAdamW(groups, train.optimizer.momentum, **options)


def _groups(
    weight_decay: float, options: dict[str, Any], decayed: list[nn.Parameter], undecayed: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Return the parameter groups with and without weight decay, without empty ones."""
    groups = [(decayed, weight_decay), (list(undecayed), 0.0)]
    return [{"params": weights, "weight_decay": decay, **options} for weights, decay in groups if weights]


def _initial_objective(config: RunConfig, model: LanguageModel) -> Objective:
    """Return the objective; its weights depend on the seed alone and have the type of the model's weights.

    Every rank creates them completely, and DeepSpeed partitions them later.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_objective(config.objective, model.shape).to(model.causal_lm.dtype)
