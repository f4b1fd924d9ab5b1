"""Checks of the `deepspeed` section.

DeepSpeed itself silently ignores a misspelt key, and fails late on a value of the wrong type.
"""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from data_prep.utils.config_file import Section, unknown_key, validate
from data_prep.utils.console import UserError

COMPUTED_KEYS = {
    "train_batch_size": "train.global_batch_rows",
    "train_micro_batch_size_per_gpu": "train.micro_batch_rows",
    "gradient_accumulation_steps": "train.global_batch_rows and train.micro_batch_rows",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "train.learning_rate, train.betas, train.weight_decay",
    "scheduler": "train.schedule and train.warmup_fraction",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "steps_per_print": "monitor.log_every",
    "tensorboard": "monitor.loggers",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
}
"""Top-level DeepSpeed keys that the project computes, with the configuration keys to set instead."""
PASSED_KEYS = (
    "aio",
    "communication_data_type",
    "comms_logger",
    "data_types",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "seq_parallel_communication_data_type",
    "timers",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_optimization",
)
"""Top-level DeepSpeed keys that are passed on, because they have an effect on this engine."""
COMMUNICATION_TYPES = ("fp16", "bf16", "fp32")
FP32_NAMES = ("fp32", "float32", "float")
ACCUMULATION_TYPES = ("fp16", "float16", "half", "bf16", "bfloat16", "bfloat", *FP32_NAMES)


class Options(Section):
    """Options of one DeepSpeed feature. DeepSpeed receives their values unconverted, so `"true"` is not a boolean."""

    model_config = ConfigDict(extra="forbid", strict=True)


class CommsLogger(Options):
    """Keys of comms_logger."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = []
    verbose: bool = False
    debug: bool = False


class ThroughputTimer(Options):
    """Keys of timers.throughput."""

    enabled: bool = True
    synchronized: bool = True


class Timers(Options):
    """Keys of timers."""

    throughput: ThroughputTimer = ThroughputTimer()


class FlopsProfiler(Options):
    """Keys of flops_profiler."""

    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: int = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: bool = True
    output_file: str | None = None


class AsynchronousIO(Options):
    """Keys of aio."""

    block_size: int = 1048576
    queue_depth: int = 8
    intra_op_parallelism: int = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class DataTypes(Options):
    """Keys of data_types; the types of parameters and buffers follow from train.precision."""

    grad_accum_dtype: str | None = None


class Switches(Options):
    """Top-level keys with a single value."""

    communication_data_type: str | None = None
    seq_parallel_communication_data_type: str | None = None
    dump_state: bool = False
    memory_breakdown: bool = False
    wall_clock_breakdown: bool = False
    zero_allow_untested_optimizer: bool = False


FEATURES: dict[str, type[Options]] = {
    "aio": AsynchronousIO,
    "comms_logger": CommsLogger,
    "data_types": DataTypes,
    "flops_profiler": FlopsProfiler,
    "timers": Timers,
}


def check_deepspeed(section: dict[str, Any]) -> None:
    """Raise ValueError, naming the key, for options that DeepSpeed would ignore or fail on."""
    for key in section:
        if key in COMPUTED_KEYS:
            raise ValueError(f"{key} is computed by the project: set {COMPUTED_KEYS[key]} instead")
        if key not in PASSED_KEYS:
            raise ValueError(unknown_key(key, PASSED_KEYS))
    for key, options in FEATURES.items():
        if not isinstance(section.get(key, {}), dict):
            raise ValueError(f"{key} must be a mapping of options, not {section[key]!r}")
        _check_options(options, section.get(key, {}), key)
    _check_options(Switches, {key: value for key, value in section.items() if key in Switches.model_fields}, "")
    types: dict[str, tuple[Any, tuple[str, ...]]] = {
        "communication_data_type": (section.get("communication_data_type"), COMMUNICATION_TYPES),
        "seq_parallel_communication_data_type": (
            section.get("seq_parallel_communication_data_type"),
            COMMUNICATION_TYPES,
        ),
        "data_types.grad_accum_dtype": (section.get("data_types", {}).get("grad_accum_dtype"), ACCUMULATION_TYPES),
    }
    for key, (chosen, allowed) in types.items():
        if chosen is not None and chosen not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}, not {chosen!r}")
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 3) not in (1, 2, 3) or isinstance(zero.get("stage"), bool):
        raise ValueError("zero_optimization must be a mapping of options, with stage 1, 2 or 3 (default)")
    _check_zero(zero)


def _check_options(options: type[Options], values: dict[str, Any], key: str) -> None:
    try:
        validate(options, values, key)
    except UserError as error:
        raise ValueError(str(error)) from None


def _check_zero(zero: dict[str, Any]) -> None:
    """Raise ValueError for a ZeRO option that DeepSpeed accepts but that does not work with this project."""
    stage = zero.get("stage", 3)
    for key, supported, problem in (
        ("zenflow", None, "does not work with the optimizer of this project"),
        ("legacy_stage1", False, "is no longer supported by DeepSpeed"),
        ("stage3_module_granularity_threshold", 0, "can leave the gradients of a module unreduced"),
        ("module_granularity_threshold", 0, "can leave the gradients of a module unreduced"),
        ("compute_grad_norm", True, "must be true: gradients are clipped by their norm (train.gradient_clipping)"),
    ):
        if zero.get(key, supported) != supported:
            raise ValueError(f"zero_optimization.{key} {problem}; remove it")
    for key, reason in (
        ("elastic_checkpoint", "runs resume on any number of ranks without it"),
        ("pipeline_loading_checkpoint", "it has an effect under stage 3 only"),
    ):
        if zero.get(key) and stage != 3:
            raise ValueError(f"zero_optimization.{key} cannot resume a run of stage {stage}; remove it: {reason}")
    partition = zero.get("zero_hpz_partition_size", 1)
    if type(partition) is not int or partition < 1:  # DeepSpeed would also take true and "2"
        raise ValueError(f"zero_optimization.zero_hpz_partition_size must be an integer above 0, not {partition!r}")
    if partition > 1 and stage != 3:
        raise ValueError("zero_optimization.zero_hpz_partition_size has an effect under stage 3 only; remove it")
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(key), dict):  # DeepSpeed reports any other type
            _check_offload(zero[key], f"zero_optimization.{key}")


def _check_offload(offload: dict[str, Any], key: str) -> None:
    path = offload.get("nvme_path")
    if offload.get("device") == "nvme" and not path:
        raise ValueError(f"{key}: device nvme needs nvme_path: set it to a folder on that disk")
    if isinstance(path, str) and Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{key}.nvme_path: {path} is not a folder: set the path of a folder")
    if offload.get("ratio", 1) != 1:
        raise ValueError(f"{key}.ratio does not work with the optimizer of this project; remove it")
