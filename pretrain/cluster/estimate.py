"""The resource estimate of a run, from the same plan as `run.py --dry-run`."""

from dataclasses import dataclass

from pretrain.config import RunConfig
from pretrain.imports import libraries

PROCESS_BYTES = {"cuda": 2**30, "cpu": 512 * 2**20}
"""Memory of a rank before it allocates any tensor, by accelerator.

On a GPU this is the CUDA context and NCCL's buffers, on CPU Python with its libraries.
"""


@dataclass(frozen=True)
class ResourceEstimate:
    """Estimated resources of a run; sizes are in bytes."""

    parameters: int
    """Number of parameters."""
    rank_memory: dict[str, float]
    """Memory of one rank, by accelerator (cpu or cuda)."""
    offloads: bool
    """Whether DeepSpeed moves part of that memory to the host or to disk."""
    bucket: int
    """Size of the gradients of one all-reduce."""
    precision: str
    checkpoint: float
    """Lower bound of the size of one checkpoint."""
    checkpoints: int
    """Maximum number of checkpoints in the run folder, including the one that is being written."""


def estimate_resources(config: RunConfig, ranks: int) -> ResourceEstimate:
    """Return the resource estimate of a run on this number of ranks.

    Raises UserError if the run could not start with this configuration.
    """
    # Imported here, because torch and DeepSpeed take seconds to import.
    with libraries():
        from pretrain.planning.memory import ITEM_BYTES, MUON_SAVING, OPTIMIZER_BYTES
        from pretrain.planning.rank_memory import model_states_per_rank, non_state_memory
        from pretrain.training.dry_run import checked_plan

    plan = checked_plan(config, ranks)
    states = model_states_per_rank(plan, int(plan.zero.stage), ranks)
    tensor_bytes = {}
    for device in PROCESS_BYTES:
        non_state_bytes = [
            checkpointed if config.train.activation_checkpointing else full
            for _, full, checkpointed in non_state_memory(plan, device)
        ]
        tensor_bytes[device] = max(states.held + sum(non_state_bytes), states.in_step)
    item = ITEM_BYTES[config.train.precision]
    permanent_checkpoints = (
        config.train.steps // config.checkpoint.keep_every if config.train.steps and config.checkpoint.keep_every else 0
    )
    before_decay = config.train.schedule == "warmup_stable_decay"  # the last one before the decay is kept
    return ResourceEstimate(
        parameters=plan.total,
        rank_memory={device: PROCESS_BYTES[device] + tensor_bytes[device] for device in tensor_bytes},
        offloads=plan.zero.offload_optimizer is not None or plan.zero.offload_param is not None,
        bucket=item * min(plan.zero.reduce_bucket_size, plan.trained),
        precision=config.train.precision,
        # a trained parameter is saved like the state of the optimizer; other parameters keep their precision
        checkpoint=OPTIMIZER_BYTES * plan.trained
        + item * (plan.total - plan.trained)
        - MUON_SAVING * sum(shape.numel() for shape in plan.muon_matrices),
        checkpoints=config.checkpoint.keep + 1 + permanent_checkpoints + before_decay,
    )
