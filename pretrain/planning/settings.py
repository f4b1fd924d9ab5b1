"""The DeepSpeed configuration of a run."""

from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from data_prep.utils.console import UserError
from pretrain.config import RunConfig


def engine_settings(config: RunConfig, ranks: int | None) -> dict[str, Any]:
    """Return the DeepSpeed configuration: the values computed by the project and the options passed through.

    If the number of ranks is not known yet (None), the settings are for one rank. Raises UserError for settings that do
    not fit the number of ranks.
    """
    train = config.train
    _check_ranks(config, ranks)
    rows_per_micro_step = train.micro_batch_rows * (ranks or 1)
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
        | ({"zero_allow_untested_optimizer": True} if train.optimizer.name == "muon" else {})
    )


def _check_ranks(config: RunConfig, ranks: int | None) -> None:
    """Raise UserError for settings that do not fit the number of ranks, or any number of ranks if it is None."""
    train = config.train
    if train.global_batch_rows % (train.micro_batch_rows * (ranks or 1)):
        raise UserError(
            f"train.global_batch_rows ({train.global_batch_rows}) must be a multiple of train.micro_batch_rows x ranks "
            f"({train.micro_batch_rows} x {ranks or 1}): change one of them or the number of ranks"
        )
    partition = config.deepspeed.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if ranks is not None and ranks % partition:
        raise UserError(
            f"deepspeed.zero_optimization.zero_hpz_partition_size ({partition}) must divide the number of ranks "
            f"({ranks}): change one of them"
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
