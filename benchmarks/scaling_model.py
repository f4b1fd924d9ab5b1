"""Model of the duration of a step on many GPUs. It only predicts; it does not measure.

    python benchmarks/scaling_model.py CONFIG [key=value ...] --doctor doctor.json --flops 4e14 > scaling.json
    python benchmarks/scaling_model.py CONFIG [key=value ...] --within 300e9 5e-6 --between 200e9 10e-6 > scaling.json
    python benchmarks/scaling_model.py --check > check.json        # compare with measurements of 1 and 2 CPU processes

Every rank keeps its micro batch, so the global batch grows with the number of ranks. The compute time is the FLOPs
that `--dry-run` counts, divided by the FLOP/s of a rank (`--flops`). A collective takes the latency of each hop,
plus its bytes divided by the bandwidth. In a ring, every rank sends (n - 1) / n of the bytes; in a tree, there
are log2 n hops. The speeds of the links come from `launcher/doctor.py --json`, or from `--within` and `--between`,
in bytes/s and seconds per hop. `--ranks-per-node` is the number of ranks on a node. The fraction `--overlap` of the
communication is hidden by computation. One JSON object is written to stdout, a table to stderr.
"""

import argparse
import json
import math
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError, exit_on_user_error

RANKS = (1, 2, 8, 64, 256, 1000)
STAGES = (0, 1, 2, 3)
FLOPS = 0.4 * 989e12
"""FLOP/s of a rank, including recomputation: 40% of the dense bf16 peak of an H100. This is an assumption for
machines without a measurement."""
USABLE_MEMORY_FRACTION = 0.9
"""Fraction of a GPU's memory that a rank can use; the remainder is for the context, buffers of collectives, and
fragmentation."""
OVERLAP = 0.5
"""Fraction of the communication that overlaps with computation, as far as there is computation: an assumption."""


@dataclass(frozen=True)
class Link:
    """Bandwidth of a rank in bytes per second, and latency of a hop in seconds."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Nodes with equal numbers of ranks. All ranks of a node share its bandwidth to other nodes."""

    within: Link | None
    between: Link | None
    ranks_per_node: int
    tree: bool = False

    def collective_seconds(self, data: float, messages: float, ranks: int) -> float:
        """Return the seconds of an all-gather or a reduce-scatter of `data` bytes over all ranks.

        `messages` is the number of messages into which the bytes are split. A ring crosses the boundary of each
        node once, so the slowest link determines its speed (Thakur et al. 2005, section 4.1).
        """
        if ranks == 1:
            return 0.0
        nodes = -(-ranks // self.ranks_per_node)
        link_by_name = {"within": self.within} if ranks > nodes else {}
        link_by_name |= {"between": self.between} if nodes > 1 else {}
        links = [link for link in link_by_name.values() if link is not None]
        for name, link in link_by_name.items():
            if link is None:
                raise UserError(
                    f"{ranks} ranks use the link {name} nodes, but its speed is unknown: "
                    f"set --{name} BYTES_PER_SECOND SECONDS"
                )
        if self.tree:
            local_ranks = min(ranks, self.ranks_per_node)
            hops = (math.ceil(math.log2(local_ranks)), math.ceil(math.log2(nodes)))
        else:
            hops = (ranks - nodes, nodes - 1)
        latency = sum(
            count * link.latency
            for count, link in zip(hops, (self.within, self.between), strict=True)
            if count and link
        )
        return messages * latency + data * (ranks - 1) / ranks / min(link.bandwidth for link in links)


@dataclass(frozen=True)
class Work:
    """Work of a rank in a step."""

    compute_seconds: float
    """Compute time of a micro step, in seconds."""
    micro_steps: int
    tokens: float
    """Positions of a micro step."""
    gathered: float
    """Bytes of the parameters that ZeRO-3 gathers for each pass: all parameters except the small ones."""
    tensors: int
    """Number of parameters that ZeRO-3 gathers; each parameter is gathered separately."""
    small: float
    """Bytes of the parameters that ZeRO-3 does not partition, and gathers once after the optimizer step."""
    bucket: float
    """Bytes of gradients that are reduced at once."""


def step_seconds(work: Work, stage: int, ranks: int, cluster: Cluster, overlap: float) -> dict[str, float]:
    """Return the duration of a step in seconds, and its parts.

    The communication depends on the ZeRO stage (Rajbhandari et al., arXiv 1910.02054, section 7):

    - Stage 0 all-reduces the gradients once per step, with a reduce-scatter and an all-gather.
    - Stage 1 reduces the gradients to their owners once per step, and gathers the new parameters.
    - Stage 2 reduces the gradients in every micro step.
    - Stage 3 gathers the parameters for the forward pass and again for the backward pass of every micro step, and
      reduces the gradients in each.
    """
    parameter_bytes = work.gathered + work.small
    reduce = cluster.collective_seconds(parameter_bytes, math.ceil(parameter_bytes / work.bucket), ranks)
    if stage == 3:
        passes = 2 * cluster.collective_seconds(work.gathered, work.tensors, ranks)
        communication = work.micro_steps * (passes + reduce) + cluster.collective_seconds(work.small, 1, ranks)
    else:
        communication = (work.micro_steps if stage == 2 else 1) * reduce + cluster.collective_seconds(
            parameter_bytes, math.ceil(parameter_bytes / work.bucket), ranks
        )
    compute = work.micro_steps * work.compute_seconds
    exposed = communication - min(overlap * communication, compute)
    seconds = compute + exposed
    return {
        "seconds": seconds,
        "compute_seconds": compute,
        "communication_seconds": communication,
        "exposed_seconds": exposed,
        "tokens_per_second": ranks * work.micro_steps * work.tokens / seconds,
        "efficiency": compute / seconds,
        "share_of_communication": exposed / seconds,
    }


def read_doctor_links(path: Path) -> tuple[Link | None, Link | None, int]:
    """Return the link within a node, the link between nodes, and the ranks of a node.

    A link that was not measured is None. Raises UserError if the file has no measurement of a link.
    """
    try:
        report = json.loads(path.read_text())
        measured, nodes = report["measurements"], report["nodes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--doctor {path}: not the output of `launcher/doctor.py CONFIG --json` ({error!r}): correct the path"
        ) from None
    per_node = max(node["slots"] for node in nodes)
    reduced = measured["all_reduce"]
    if reduced and reduced[0]["ranks"] > 1:
        # An all-reduce goes around the ring twice, so it takes the latency of each hop twice.
        link = fit_link([(2 * entry["bytes"], entry["seconds"]) for entry in reduced], reduced[0]["ranks"], rounds=2)
        return (link, None, per_node) if len(nodes) == 1 else (link, link, per_node)
    pairs = [pair for pair in measured["pairs"] if "error" not in pair]
    if not pairs:
        raise UserError(
            f"--doctor {path}: contains neither an all-reduce over several ranks nor pairs of nodes: "
            "set --within and --between"
        )
    return (
        None,
        Link(
            statistics.median(pair["bytes_per_second"] for pair in pairs),
            statistics.median(pair["latency_seconds"] for pair in pairs) / 2,
        ),
        per_node,
    )


def fit_link(times: list[tuple[float, float]], ranks: int, rounds: int = 1) -> Link:
    """Return the link with which a ring fits the measured (bytes, seconds) best.

    The fit minimises the squared relative error of latency + bytes / bandwidth.
    """
    weights = [1 / seconds for _, seconds in times]
    ones, data = weights, [size * weight for (size, _), weight in zip(times, weights, strict=True)]
    a, b, c = (sum(map(lambda x, y: x * y, one, other)) for one, other in ((ones, ones), (ones, data), (data, data)))
    u, v = sum(ones), sum(data)
    determinant = a * c - b * b
    latency = (u * c - v * b) / determinant if determinant else 0.0
    per_byte = (a * v - b * u) / determinant if determinant else v / c
    if latency < 0 or per_byte <= 0:  # the times are too noisy to fit both: fit only the bandwidth
        latency, per_byte = 0.0, v / c
    return Link((ranks - 1) / ranks / per_byte, latency / (rounds * (ranks - 1)))


def estimate_work(plan: Any, flops: float, micro_steps: int) -> Work:
    """Return a rank's work, estimated from the plan of --dry-run."""
    from pretrain.planning.memory import ITEM_BYTES

    train, item = plan.config.train, ITEM_BYTES[plan.config.train.precision]
    sizes = [parameter.numel() for parameter in plan.model.parameters()]
    large = [size for size in sizes if size > plan.zero.param_persistence_threshold]
    share = train.micro_batch_rows / train.global_batch_rows
    recomputed = 4 / 3 if train.activation_checkpointing else 1  # the forward pass is a third of the FLOPs
    return Work(
        share * plan.flops * recomputed / flops,
        micro_steps,
        share * plan.step.stream.positions,
        item * sum(large),
        len(large),
        item * (sum(sizes) - sum(large)),
        item * plan.zero.reduce_bucket_size,
    )


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


def predict(plan: Any, cluster: Cluster, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the JSON object with the predictions."""
    work = estimate_work(plan, arguments.flops, arguments.micro_steps)
    by_ranks = []
    for ranks in RANKS:
        stages = {}
        for stage in STAGES if ranks > 1 else (3,):
            needed = rank_bytes(plan, stage, ranks)
            stages[stage] = step_seconds(work, stage, ranks, cluster, arguments.overlap) | {
                "memory_bytes": needed,
                "fits": needed <= USABLE_MEMORY_FRACTION * arguments.memory * 1e9,
            }
        fitting = [stage for stage in stages if stages[stage]["fits"]]
        best = min(
            fitting, key=lambda stage: (round(stages[stage]["seconds"], 6), stages[stage]["memory_bytes"]), default=None
        )
        by_ranks.append(
            {
                "ranks": ranks,
                "best_stage": best,
                "global_batch_tokens": ranks * work.micro_steps * work.tokens,
                "stages": stages,
            }
        )
    return {
        "kind": "model, not a measurement",
        "parameters": plan.parameters.total,
        "precision": plan.config.train.precision,
        "assumptions": {
            "flops_of_a_rank": arguments.flops,
            "overlap": arguments.overlap,
            "memory_gb": arguments.memory,
            "usable": USABLE_MEMORY_FRACTION,
            "algorithm": "tree" if cluster.tree else "ring",
            "batch": "each rank keeps its micro batch",
        },
        "cluster": asdict(cluster),
        "work_of_a_rank": asdict(work),
        "by_ranks": by_ranks,
    }


def table(result: dict[str, Any]) -> str:
    """Return a table of the best stage and of ZeRO-3 for each number of ranks."""
    lines = [
        f"{'ranks':>6}  {'stage':>12}  {'memory':>8}  {'step':>9}  {'tokens/s':>13}  {'efficiency':>10}  "
        f"{'communication':>13}"
    ]
    for entry in result["by_ranks"]:
        for stage in dict.fromkeys((entry["best_stage"], 3)):
            if stage is None:
                lines.append(f"{entry['ranks']:>6}  no stage fits")
                continue
            prediction = entry["stages"][stage]
            note = ""
            if stage == entry["best_stage"]:
                note = ", best"
            elif not prediction["fits"]:
                note = ", too big"
            lines.append(
                f"{entry['ranks']:>6}  {f'{stage}{note}':>12}  {prediction['memory_bytes'] / 1e9:>5.1f} GB  "
                f"{prediction['seconds']:>7.3f} s  {prediction['tokens_per_second']:>13,.0f}  "
                f"{prediction['efficiency']:>10.1%}  {prediction['share_of_communication']:>13.1%}"
            )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, compute the predictions and print them."""
    parser = argparse.ArgumentParser(description="Predict the duration of a step on many GPUs with a model.")
    parser.add_argument("config", nargs="?", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the file, with dotted keys")
    parser.add_argument("--doctor", type=Path, help="file with the output of launcher/doctor.py --json")
    parser.add_argument(
        "--within",
        nargs=2,
        type=float,
        metavar=("BYTES_PER_SECOND", "SECONDS"),
        help="link between the ranks of a node",
    )
    parser.add_argument(
        "--between", nargs=2, type=float, metavar=("BYTES_PER_SECOND", "SECONDS"), help="link of a node to other nodes"
    )
    parser.add_argument("--ranks-per-node", type=int, help="ranks of a node (default: as measured by the doctor, or 8)")
    parser.add_argument(
        "--flops",
        type=float,
        default=FLOPS,
        help=f"FLOP/s of a rank, as measured on a single rank (default {FLOPS:.3g}, 40%% of an H100)",
    )
    parser.add_argument("--memory", type=float, default=80, help="GB of a GPU (default 80)")
    parser.add_argument("--micro-steps", type=int, default=1, help="micro batches of a rank in a step (default 1)")
    parser.add_argument(
        "--overlap",
        type=float,
        default=OVERLAP,
        help=f"fraction of the communication that overlaps with computation (default {OVERLAP})",
    )
    parser.add_argument("--tree", action="store_true", help="collectives with log2 n hops instead of a ring's n - 1")
    parser.add_argument(
        "--check", action="store_true", help="instead, compare the model with measurements of 1 and 2 CPU processes"
    )
    arguments = parser.parse_intermixed_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if arguments.check:
        from scaling_check import check

        return print(json.dumps(check(), indent=1))
    if arguments.config is None:
        raise UserError("CONFIG is missing: pass the configuration of a run, or --check")
    within, between, per_node = read_doctor_links(arguments.doctor) if arguments.doctor else (None, None, 8)
    cluster = Cluster(
        Link(*arguments.within) if arguments.within else within,
        Link(*arguments.between) if arguments.between else between,
        arguments.ranks_per_node or per_node,
        arguments.tree,
    )
    from pretrain.config import load_config
    from pretrain.training.dry_run import checked_plan

    result = predict(checked_plan(load_config(arguments.config, arguments.overrides), None), cluster, arguments)
    print(table(result), file=sys.stderr)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    exit_on_user_error(main)
