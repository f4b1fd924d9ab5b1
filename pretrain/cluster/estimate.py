"""What the run needs of its nodes, from the plan behind `run.py --dry-run`."""

from dataclasses import dataclass

from pretrain.config import RunConfig

PROCESS_BYTES = {"cuda": 2**30, "cpu": 512 * 2**20}
"""Of a rank before it holds anything: CUDA's context and NCCL's buffers in GPU memory; Python with its libraries in host memory."""
CHECKPOINT_BYTES = 12
"""Size of a trained parameter in a checkpoint: weights and two moments in fp32. A frozen one is saved as it is."""


@dataclass(frozen=True)
class ResourceEstimate:
    """Bytes, but where it says otherwise."""

    parameters: int
    """Their number."""
    rank_memory: dict[str, float]
    """Of a rank, by accelerator, cpu or cuda."""
    offloads: bool
    """DeepSpeed moves part of that to the host or to disk."""
    bucket: int
    """Gradients that are reduced at once."""
    precision: str
    checkpoint: float
    """One of them, at least."""
    checkpoints: int
    """How many stand in the run folder at most, the one that is being written included."""


def estimate_resources(config: RunConfig, ranks: int) -> ResourceEstimate:
    """Return what a start on so many ranks takes. Raises the UserErrors of that start."""
    from pretrain.training.dry_run import (
        checked_plan,
        model_states_per_rank,
        non_state_memory,
    )  # torch and DeepSpeed: seconds, which only this needs
    from pretrain.training.memory import ITEM_BYTES

    plan = checked_plan(config, ranks)
    states = model_states_per_rank(plan, int(plan.zero.stage), ranks)
    held = {}
    for device in PROCESS_BYTES:
        beside = [
            checkpointed if config.train.activation_checkpointing else whole
            for _, whole, checkpointed in non_state_memory(plan, device)
        ]
        held[device] = max(states.held + sum(beside), states.in_step)
    item = ITEM_BYTES[config.train.precision]
    kept_for_good = (
        config.train.steps // config.checkpoint.keep_every if config.train.steps and config.checkpoint.keep_every else 0
    )
    return ResourceEstimate(
        parameters=plan.total,
        rank_memory={device: PROCESS_BYTES[device] + held[device] for device in held},
        offloads=plan.zero.offload_optimizer is not None or plan.zero.offload_param is not None,
        bucket=item * min(plan.zero.reduce_bucket_size, plan.trained),
        precision=config.train.precision,
        checkpoint=CHECKPOINT_BYTES * plan.trained + item * (plan.total - plan.trained),
        checkpoints=config.checkpoint.keep + 1 + kept_for_good,
    )
