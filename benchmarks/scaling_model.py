"""What a step would take on many GPUs, from a model of its communication. A model, not a measurement.

    python benchmarks/scaling_model.py CONFIG [key=value ...] --doctor doctor.json --flops 4e14 --memory 80 > scaling.json
    python benchmarks/scaling_model.py CONFIG [key=value ...] --within 300e9 5e-6 --between 200e9 10e-6 --ranks-per-node 8 > scaling.json
    python benchmarks/scaling_model.py --check > check.json        # the model against 1 and 2 measured CPU processes

Every rank keeps its micro batch, so the global batch grows with the ranks. Computing takes the FLOPs that `--dry-run` counts, over `--flops` of a
rank. A collective takes a latency for each hop and its bytes over the bandwidth (ring: every rank sends (n - 1) / n of them; tree: log2 n hops).
Links come from what `launcher/doctor.py --json` measured, or from `--within` and `--between`: bytes/s and seconds of a hop. Of the communication
a share of `--overlap` is hidden behind computing. One JSON object goes to stdout, a table to stderr.
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

from data_prep.console import UserError, exit_on_user_error

RANKS = (1, 2, 8, 64, 256, 1000)
STAGES = (0, 1, 2, 3)
FLOPS = 0.4 * 989e12
"""Of a rank, recomputation included: 40% of the dense bf16 peak of an H100, an assumption where nothing was measured."""
USABLE_MEMORY_FRACTION = 0.9
"""Of the memory of a GPU; the rest is for the context, the buffers of collectives, and fragments."""
OVERLAP = 0.5
"""Share of the communication that runs beside computing, as long as there is any: an assumption."""


@dataclass(frozen=True)
class Link:
    """Bytes that a rank sends over it a second, and the seconds of a hop."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal ranks. The bandwidth between nodes is that of a node, which all its ranks share."""

    within: Link | None
    between: Link | None
    ranks_per_node: int
    tree: bool = False

    def collective_seconds(self, data: float, messages: float, ranks: int) -> float:
        """Seconds of an all-gather to, or a reduce-scatter of, so many bytes over all ranks, cut into so many messages.

        A ring crosses the edge of each node once, so that the slowest link sets the pace (Thakur et al. 2005, section 4.1).
        """
        if ranks == 1:
            return 0.0
        nodes = -(-ranks // self.ranks_per_node)
        used = {"within": self.within} if ranks > nodes else {}
        used |= {"between": self.between} if nodes > 1 else {}
        links = [link for link in used.values() if link is not None]
        for name, link in used.items():
            if link is None:
                raise UserError(
                    f"{ranks} ranks use the link {name} nodes, of which nothing is known: give --{name} BYTES_PER_SECOND SECONDS"
                )
        if self.tree:
            here = min(ranks, self.ranks_per_node)
            hops = (math.ceil(math.log2(here)), math.ceil(math.log2(nodes)))
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
    """What a rank does in a step."""

    compute_seconds: float
    """Of a micro step."""
    micro_steps: int
    tokens: float
    """Positions of a micro step."""
    gathered: float
    """Bytes of the parameters that ZeRO-3 gathers for each pass; all of them, but the small ones."""
    tensors: int
    """Their number: each is gathered by itself."""
    small: float
    """Bytes of those that ZeRO-3 keeps whole, and gathers once after the optimizer's step."""
    bucket: float
    """Bytes of gradients that are reduced at once."""


def step_seconds(work: Work, stage: int, ranks: int, cluster: Cluster, overlap: float) -> dict[str, float]:
    """Seconds of a step and what they consist of.

    Stage 0 all-reduces the gradients once a step, which is a reduce-scatter and an all-gather; stage 1 reduces them to their owners once a step
    and gathers the new parameters; stage 2 reduces in every micro step; stage 3 gathers the parameters for the forward and again for the backward
    pass of every micro step, and reduces in each (Rajbhandari et al., arXiv 1910.02054, section 7).
    """
    whole = work.gathered + work.small
    reduce = cluster.collective_seconds(whole, math.ceil(whole / work.bucket), ranks)
    if stage == 3:
        passes = 2 * cluster.collective_seconds(work.gathered, work.tensors, ranks)
        communication = work.micro_steps * (passes + reduce) + cluster.collective_seconds(work.small, 1, ranks)
    else:
        communication = (work.micro_steps if stage == 2 else 1) * reduce + cluster.collective_seconds(
            whole, math.ceil(whole / work.bucket), ranks
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
    """The link within a node and that between nodes, as far as measured, and the ranks of a node."""
    try:
        report = json.loads(path.read_text())
        measured, nodes = report["measurements"], report["nodes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--doctor {path}: not what `launcher/doctor.py CONFIG --json` prints ({error!r})") from None
    per_node = max(node["slots"] for node in nodes)
    reduced = measured["all_reduce"]
    if reduced and reduced[0]["ranks"] > 1:
        # an all-reduce goes around twice, and takes each hop's latency as often
        link = fit_link([(2 * entry["bytes"], entry["seconds"]) for entry in reduced], reduced[0]["ranks"], rounds=2)
        return (link, None, per_node) if len(nodes) == 1 else (link, link, per_node)
    pairs = [pair for pair in measured["pairs"] if "error" not in pair]
    if not pairs:
        raise UserError(
            f"--doctor {path}: holds neither an all-reduce over several ranks nor pairs of nodes: give --within and --between"
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
    """The link with which a ring comes nearest to (bytes, seconds), by relative error: least squares of latency + bytes / bandwidth."""
    weights = [1 / seconds for _, seconds in times]
    ones, data = weights, [size * weight for (size, _), weight in zip(times, weights, strict=True)]
    a, b, c = (sum(map(lambda x, y: x * y, one, other)) for one, other in ((ones, ones), (ones, data), (data, data)))
    u, v = sum(ones), sum(data)
    determinant = a * c - b * b
    latency = (u * c - v * b) / determinant if determinant else 0.0
    per_byte = (a * v - b * u) / determinant if determinant else v / c
    if latency < 0 or per_byte <= 0:  # too noisy for both: bandwidth alone
        latency, per_byte = 0.0, v / c
    return Link((ranks - 1) / ranks / per_byte, latency / (rounds * (ranks - 1)))


def estimate_work(plan: Any, flops: float, micro_steps: int) -> Work:
    """A rank's work from the plan behind --dry-run."""
    from pretrain.training.memory import ITEM_BYTES

    train, item = plan.config.train, ITEM_BYTES[plan.config.train.precision]
    sizes = [parameter.numel() for parameter in plan.model.parameters()]
    large = [size for size in sizes if size > plan.zero.param_persistence_threshold]
    share = train.micro_batch_rows / train.global_batch_rows
    recomputed = 4 / 3 if train.activation_checkpointing else 1  # the forward pass is a third of it all
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
    """Memory of a rank, by the estimates of --dry-run."""
    from pretrain.training.dry_run import model_states_per_rank, non_state_memory

    states = model_states_per_rank(plan, stage, ranks)
    beside = {
        name: recomputed if plan.config.train.activation_checkpointing else whole
        for name, whole, recomputed in non_state_memory(plan, "cuda")
    }
    if stage < 3:
        beside = {name: size for name, size in beside.items() if not name.startswith("gathered")}
    return max(states.held + sum(beside.values()), states.in_step)


def predict(plan: Any, cluster: Cluster, arguments: argparse.Namespace) -> dict[str, Any]:
    """The JSON object."""
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
    """The best stage, and ZeRO-3 beside it, by number of ranks."""
    lines = [
        f"{'ranks':>6}  {'stage':>12}  {'memory':>8}  {'step':>9}  {'tokens/s':>13}  {'efficiency':>10}  {'communication':>13}"
    ]
    for entry in result["by_ranks"]:
        for stage in dict.fromkeys((entry["best_stage"], 3)):
            if stage is None:
                lines.append(f"{entry['ranks']:>6}  none fits")
                continue
            one = entry["stages"][stage]
            name = f"{stage}{', best' if stage == entry['best_stage'] else '' if one['fits'] else ', no room'}"
            lines.append(
                f"{entry['ranks']:>6}  {name:>12}  {one['memory_bytes'] / 1e9:>5.1f} GB  {one['seconds']:>7.3f} s"
                f"  {one['tokens_per_second']:>13,.0f}  {one['efficiency']:>10.1%}  {one['share_of_communication']:>13.1%}"
            )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure and print the result."""
    parser = argparse.ArgumentParser(description="What a step would take on many GPUs: a model, not a measurement.")
    parser.add_argument("config", nargs="?", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the YAML file")
    parser.add_argument("--doctor", type=Path, help="what launcher/doctor.py --json printed")
    parser.add_argument(
        "--within", nargs=2, type=float, metavar=("BYTES_PER_SECOND", "SECONDS"), help="link between ranks of a node"
    )
    parser.add_argument(
        "--between", nargs=2, type=float, metavar=("BYTES_PER_SECOND", "SECONDS"), help="link of a node to the others"
    )
    parser.add_argument("--ranks-per-node", type=int, help="default: those of the doctor's nodes, or 8")
    parser.add_argument(
        "--flops",
        type=float,
        default=FLOPS,
        help=f"FLOP/s of a rank, as measured on one (default {FLOPS:.3g}, 40%% of an H100)",
    )
    parser.add_argument("--memory", type=float, default=80, help="GB of a GPU (default 80)")
    parser.add_argument("--micro-steps", type=int, default=1, help="micro batches of a rank in a step (default 1)")
    parser.add_argument(
        "--overlap", type=float, default=OVERLAP, help=f"share of communication beside computing (default {OVERLAP})"
    )
    parser.add_argument("--tree", action="store_true", help="collectives with log2 n hops instead of a ring's n - 1")
    parser.add_argument(
        "--check", action="store_true", help="compare the model with 1 and 2 measured CPU processes instead"
    )
    arguments = parser.parse_intermixed_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if arguments.check:
        from scaling_check import check

        return print(json.dumps(check(), indent=1))
    if arguments.config is None:
        raise UserError("give the CONFIG of a run, or --check")
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
