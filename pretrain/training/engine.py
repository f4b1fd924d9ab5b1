"""The DeepSpeed engine: ZeRO (stage 3 by default) around the model and its objective."""

import contextlib
import io
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import nn
from transformers import PretrainedConfig
from transformers.integrations import HfDeepSpeedConfig

from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError, print_now
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.models.attention import resolve_attention
from pretrain.models.export import load_predictor
from pretrain.models.language_model import (
    LanguageModel,
    build_model_config,
    pretrained_causal_lm,
    pretrained_config,
    random_causal_lm,
)
from pretrain.models.lora import add_adapters
from pretrain.models.stored_weights import check_stored_weights
from pretrain.objectives.base import Objective, ObjectiveOutput
from pretrain.objectives.pool import Gather
from pretrain.run_folder import MODEL_DIR
from pretrain.training.distributed import World
from pretrain.training.layers import (
    compile_layers,
    enable_activation_checkpointing,
    limit_compile_threads,
    mark_layers_as_z3_leaves,
    raise_recompile_limit,
)
from pretrain.training.random_state import seed_all


class TrainingModule(nn.Module):
    """Model and objective as one module: one forward and one backward pass cover all loss terms."""

    def __init__(self, model: LanguageModel, objective: Objective, gather: Gather):
        super().__init__()
        self.model, self.objective, self.gather = model, objective, gather

    def forward(self, batch: Batch, with_pool: bool = False) -> ObjectiveOutput:
        """Return the loss terms of a micro batch."""
        return self.objective(self.model(batch), batch, self.model.cross_entropy, self.gather, with_pool=with_pool)


def resolve_hf_config(config: RunConfig, tokenizer: Tokenizer, resuming: bool) -> PretrainedConfig:
    """Return the model's Hugging Face configuration: from its family and shape, or from the folder of model.init_from.

    A resumed run has a copy of the configuration in that folder, and no longer needs the folder.
    """
    model = config.model
    if model.init_from is not None and resuming and (config.run_dir / MODEL_DIR).exists():
        return pretrained_config(config.run_dir / MODEL_DIR)
    if model.init_from is not None:
        hf_config = pretrained_config(model.init_from)
        check_stored_weights(model.init_from, hf_config)
        return hf_config
    assert model.family is not None and model.shape is not None  # the configuration has either these or init_from
    return build_model_config(model.family, model.shape, tokenizer, config.data.sequence_length)


def build_engine(
    config: RunConfig,
    tokenizer: Tokenizer,
    objective: Objective,
    world: World,
    *,
    resuming: bool = False,
    universal: bool = False,
) -> deepspeed.DeepSpeedEngine:
    """Build the model, partitioned from the start, and its optimizer.

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
    if init_folder:
        load_predictor(model, init_folder)
    if config.model.lora:
        add_adapters(model, config.model.lora)
    if config.train.activation_checkpointing:
        enable_activation_checkpointing(model)
    if settings["zero_optimization"]["stage"] == 3 and (config.train.compile or not config.monitor.gradients_every):
        mark_layers_as_z3_leaves(model)  # monitor.gradients_every cannot measure such layers
    if config.train.compile:
        compile_layers(model)
    if config.train.compile or attention == "flex_attention":
        raise_recompile_limit(model, print_now if world.is_main else lambda text: None)
        limit_compile_threads(world.hosts.count(world.hosts[world.rank]))
    module = TrainingModule(model, objective, Gather(world.all_gather, world.rank))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if len(full_shape(parameter)) >= 2]
    undecayed = [parameter for parameter in trained if len(full_shape(parameter)) < 2]
    groups = [
        {"params": decayed, "weight_decay": config.train.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.train.learning_rate,
        betas=config.train.betas,
        # on the GPU, the unfused optimizer would pass over all weights several times and would copy them
        fused=world.device.type == "cuda",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the stage 1 optimizer in bf16 prints a dozen lines about memory
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    engine.keep_alive = keep_alive
    if config.monitor.gradients_every and any(
        hasattr(parameter, "ds_z3_leaf_module") for parameter in module.parameters()
    ):
        raise UserError(
            "monitor.gradients_every cannot measure modules that ZeRO stage 3 gathers as one unit, such as mixtures of "
            "experts: set it to 0, or set deepspeed.zero_optimization.stage to 1 or 2"
        )
    return engine


def engine_settings(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration: the values computed by the project and the options passed through.

    Raises UserError if the rows of the global batch are not a multiple of the rows of a micro step on all ranks.
    """
    train = config.train
    rows_per_micro_step = train.micro_batch_rows * ranks
    if train.global_batch_rows % rows_per_micro_step:
        raise UserError(
            f"train.global_batch_rows ({train.global_batch_rows}) must be a multiple of train.micro_batch_rows x ranks "
            f"({train.micro_batch_rows} x {ranks}): change one of them or the number of ranks"
        )
    passed = dict(config.deepspeed)
    zero = {"stage": 3} | passed.pop("zero_optimization", {})
    data_types = {"data_types": {"grad_accum_dtype": gradient_accumulation_dtype(config)}}
    # DeepSpeed's throughput timer synchronises with the GPU in every micro step
    timers = {"timers": {"throughput": {"enabled": False}} | passed.get("timers", {})}
    return (
        passed
        | data_types
        | timers
        | {
            "zero_optimization": zero,
            "train_batch_size": train.global_batch_rows,
            "train_micro_batch_size_per_gpu": train.micro_batch_rows,
            "gradient_accumulation_steps": train.global_batch_rows // rows_per_micro_step,
            "gradient_clipping": train.gradient_clipping,
            "bf16": {"enabled": train.precision == "bf16"},
            "steps_per_print": 10**12,
            "zero_force_ds_cpu_optimizer": False,
        }
    )


def gradient_accumulation_dtype(config: RunConfig) -> str:
    """Return DeepSpeed's name for the type in which gradients are accumulated over micro steps.

    The default is fp32 even for bf16 gradients, because sums in bf16 would be off by 1%.
    """
    return config.deepspeed.get("data_types", {}).get("grad_accum_dtype") or "fp32"


def check_zero_options(settings: dict[str, Any], device: str | None = None) -> None:
    """Raise UserError for an option of zero_optimization that DeepSpeed does not support at all or on this device."""
    try:
        zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(f"deepspeed: {key}: {first['msg']}") from None
    super_offload = zero.offload_optimizer is not None and zero.offload_optimizer.super_offload
    for name, value in (
        ("zero_quantized_weights", zero.zero_quantized_weights),
        ("zero_quantized_nontrainable_weights", zero.zero_quantized_nontrainable_weights),
        ("offload_optimizer.super_offload", super_offload),
    ):
        if value and device == "cpu" and int(zero.stage) == 3:
            raise UserError(f"deepspeed: zero_optimization.{name} does not work on CPU: remove it")


def check_model_fits_corpus(config: RunConfig, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model in the folder model.init_from is too small for the corpus."""
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the model in model.init_from has {model.vocab_size} token embeddings, but the corpus uses "
            f"{tokenizer.vocab_size} ids: prepare the corpus with data.tokenizer.path set to {config.model.init_from}"
        )
    limit = model.causal_lm.config.max_position_embeddings
    if limit < config.data.sequence_length:
        raise UserError(
            f"data.sequence_length is {config.data.sequence_length}, but the model in model.init_from allows {limit} "
            "positions: lower data.sequence_length"
        )


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter before partitioning by ZeRO stage 3."""
    return getattr(parameter, "ds_shape", parameter.shape)


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a module, partitioned or not."""
    return sum(full_shape(parameter).numel() for parameter in module.parameters())
