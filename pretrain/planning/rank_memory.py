"""Memory of one rank according to the plan of a run."""

from pretrain.deepspeed_options import FP32_NAMES
from pretrain.planning.memory import ITEM_BYTES, ModelStates, activations, model_states
from pretrain.planning.plan import Plan
from pretrain.planning.settings import gradient_accumulation_dtype


def model_states_per_rank(plan: Plan, stage: int, ranks: int) -> ModelStates:
    """Return the model states of the plan under a ZeRO stage on `ranks` ranks."""
    sizes = [
        *(parameter.numel() for module in (plan.model, plan.objective) for parameter in module.parameters()),
        *plan.adapters,
    ]
    small = sum(size for size in sizes if size <= plan.zero.param_persistence_threshold)
    accumulated = 4 if gradient_accumulation_dtype(plan.config) in FP32_NAMES else 2
    by_muon = sum(shape.numel() for shape in plan.muon_matrices)
    return model_states(
        plan.total, plan.trained, small, plan.config.train.precision, stage, ranks, accumulated, by_muon
    )


def reduce_buffers(plan: Plan) -> dict[str, float]:
    """Return the bytes of the buffers in which a rank reduces gradients, by accelerator, cuda or cpu.

    DeepSpeed allocates reduce_bucket_size elements. With overlap_comm, ZeRO 1 and 2 allocate twice that. Memory
    that is never written counts on a GPU but not on the host. Without contiguous_gradients there are no buffers,
    because gradients stay where they are until they are reduced.
    """
    zero = plan.zero
    item_bytes = ITEM_BYTES[plan.config.train.precision]
    buffers = 2 if zero.overlap_comm and int(zero.stage) < 3 else 1
    used = min(zero.reduce_bucket_size, plan.trained)
    allocated = zero.reduce_bucket_size if zero.contiguous_gradients else used
    return {"cuda": float(item_bytes * buffers * allocated), "cpu": float(item_bytes * buffers * used)}


def non_state_memory(plan: Plan, device: str) -> list[tuple[str, float, float]]:
    """Return the memory of a rank during a step, on cuda or cpu, in addition to the model states.

    Each entry consists of a name, the bytes, and the bytes with activation checkpointing.
    """
    train, zero = plan.config.train, plan.zero
    item_bytes = ITEM_BYTES[train.precision]
    buffers = reduce_buffers(plan)
    reduced = buffers[device]
    partly_used = buffers["cpu"] < buffers["cuda"]
    extent = {"cuda": ", on CUDA all of reduce_bucket_size", "cpu": ", on CPU the used part only"}[device] * partly_used
    part = train.micro_batch_rows / train.global_batch_rows
    counts = {name: count * part for name, count in plan.step.max_counts.items()}
    targets = counts["lm"]
    own = plan.objective.activation_bytes(counts, item_bytes)
    stored = activations(
        plan.model, train.precision, train.micro_batch_rows * plan.config.data.sequence_length, targets, device
    )
    rows = [
        ("activations of the layers", stored.layers, stored.checkpointed_layers),
        *([("activations of the objective", own, own)] if own else []),
        ("logits of the targets", stored.logits, stored.logits),
        ("gradient of the output head", stored.head, stored.head),
        (f"gradients to be reduced{extent}", reduced, reduced),
    ]
    if int(zero.stage) == 3:
        gathered = item_bytes * min(plan.total, zero.max_live_parameters)
        rows.append(("gathered parameters, at most", gathered, gathered))
    return rows
