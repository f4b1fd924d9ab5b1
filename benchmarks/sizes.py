"""Estimate of what fits on a GPU: the lowest ZeRO stage and the largest micro batch for each model shape.

    python benchmarks/sizes.py > sizes.json

The estimates are made as in `--dry-run`: model states, activations with checkpointing, logits and buffers. They are
for bf16 and rows of 4,096 positions, or of max_position_embeddings if the shape has fewer. A rank can use 90% of a
GPU's memory. Offloading moves the optimizer's 12 bytes per parameter to the host. One JSON object is written
to stdout, a table to stderr.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
VOCABULARIES = {
    "llama": 128_256,
    "gemma2": 256_000,
    "olmo2": 100_352,
    "openelm": 32_000,
    "qwen3": 151_936,
    "mistral": 32_000,
    "smollm3": 128_256,
    "olmo3": 100_278,
    "gemma3_text": 262_144,
}
"""Vocabulary sizes of the published models."""
ROWS = (64, 32, 16, 8, 4, 2, 1)
MEMORY = (80, 141)
"""GPU memory sizes in GB."""
USABLE_MEMORY_FRACTION = 0.9
"""Fraction of a GPU's memory that a rank can use; the remainder is for the context, buffers of collectives, and
fragmentation."""
RANKS = (1, 8, 64)


def main() -> None:
    """Print the estimates for all model shapes: JSON to stdout, a table to stderr."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    result = []
    for path in sorted((ROOT / "configs" / "models").glob("*.yaml")):
        if path.stem.endswith("_tiny"):
            continue  # a shape for tests
        plan = make_plan(path)
        if plan.parameters.total < 10**8:
            continue  # the shape of the demo
        sizes = [
            {"memory_gb": memory, "ranks": ranks} | choose_stage_and_rows(plan, memory, ranks)
            for memory in MEMORY
            for ranks in RANKS
        ]
        result.append(
            {
                "shape": path.stem,
                "parameters": plan.parameters.total,
                "positions_of_a_row": plan.config.data.sequence_length,
                "sizes": sizes,
            }
        )
        print(table_row(result[-1]), file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                "kind": "estimate, not a measurement",
                "precision": "bf16",
                "usable": USABLE_MEMORY_FRACTION,
                "shapes": result,
            },
            indent=1,
        )
    )


def make_plan(path: Path) -> Any:
    """Return the plan of a run with this model shape; the plan needs no corpus."""
    from pretrain.config import RunConfig
    from pretrain.training.dry_run import checked_plan

    family, shape = path.stem.rpartition("_")[0], yaml.safe_load(path.read_text())
    length = min(4096, shape.get("max_position_embeddings", 4096))
    return checked_plan(
        RunConfig(
            **{
                "name": "sizes",
                "data": {
                    "path": "no-corpus",
                    "sources": [{"type": "nlrx", "records": 1}],
                    "sequence_length": length,
                    "tokenizer": {"vocab_size": VOCABULARIES[family]},
                },
                "model": {"family": family, "shape": shape},
                "objective": {"name": "llm_jepa"},
                "train": {
                    "steps": 1,
                    "learning_rate": 1e-4,
                    "global_batch_rows": 1,
                    "micro_batch_rows": 1,
                    "precision": "bf16",
                    "activation_checkpointing": True,
                },
            }
        ),
        None,
    )


def choose_stage_and_rows(plan: Any, memory: float, ranks: int) -> dict[str, Any]:
    """Return the lowest ZeRO stage at which a row fits, and the most rows that fit at that stage.

    Offloading is chosen only if no stage fits without offloading. The stage is None if nothing fits.
    """
    from pretrain.planning.memory import OPTIMIZER_BYTES

    for offload in (False, True):
        for stage in (1, 2, 3) if ranks > 1 else (3,):
            for rows in ROWS:
                train = plan.config.train.model_copy(update={"micro_batch_rows": rows, "global_batch_rows": rows})
                resized_plan = replace(plan, config=plan.config.model_copy(update={"train": train}))
                needed = rank_bytes(resized_plan, stage, ranks) - (
                    OPTIMIZER_BYTES * plan.parameters.total / ranks if offload else 0
                )
                if needed <= USABLE_MEMORY_FRACTION * memory * 1e9:
                    return {"stage": stage, "offload_optimizer": offload, "micro_batch_rows": rows, "bytes": needed}
    return {"stage": None}


def rank_bytes(plan: Any, stage: int, ranks: int) -> float:
    """Return the memory of a rank in bytes, estimated as in --dry-run."""
    from pretrain.planning.rank_memory import model_states_per_rank, non_state_memory

    states = model_states_per_rank(plan, stage, ranks)
    non_state = {
        name: recomputed if plan.config.train.activation_checkpointing else whole
        for name, whole, recomputed in non_state_memory(plan, "cuda")
    }
    if stage < 3:
        non_state = {name: size for name, size in non_state.items() if not name.startswith("gathered")}
    return max(states.held + sum(non_state.values()), states.in_step)


def table_row(entry: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = []
    for size in entry["sizes"]:
        if size["stage"] is None:
            cells.append("no")
            continue
        if size["offload_optimizer"]:
            stage = "offload"
        elif size["ranks"] > 1:
            stage = f"ZeRO {size['stage']}"
        else:
            stage = "any"
        cells.append(f"{stage}, {size['micro_batch_rows']}")
    return f"| {entry['shape']} | {entry['parameters'] / 1e9:.2f} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
