"""Tables of the plan of a run, as `--dry-run` prints them."""

import math

from pretrain.data.corpus import Corpus
from pretrain.data.loader import Consumed
from pretrain.planning.budget import consumed_fraction
from pretrain.planning.flops import peak_flops
from pretrain.planning.plan import Plan
from pretrain.planning.rank_memory import model_states_per_rank, non_state_memory, reduce_buffers
from pretrain.sections import BUDGETS

ASSUMED_MFU = 0.4
"""Fraction of a device's bf16 peak in the estimate of days; typical of large runs."""
Table = list[tuple[str, ...]]
"""Rows of a printed table, starting with the heading."""


def plan_tables(plan: Plan) -> list[Table]:
    """Return all tables of a plan: parameters, corpus, step, budget, model states and other memory."""
    return [
        _parameter_table(plan),
        *([_corpus_table(plan.corpus)] if plan.corpus else []),
        _step_table(plan),
        _budget_table(plan),
        _states_table(plan),
        _activation_table(plan),
    ]


def _parameter_table(plan: Plan) -> Table:
    size = plan.parameters
    vocabulary, width = plan.model.vocab_size, plan.model.hidden_size
    embedding = (
        f"embedding, {vocabulary:,} x {width:,}"
        + ", and positions" * (size.embedding > vocabulary * width)
        + ", is the output head too" * size.tied
    )
    head = [] if size.tied else [("output head", f"{size.head:,}")]
    predictor = [("predictor embedding", f"{size.predictor:,}")] if size.predictor else []
    objective = [("weights of the objective", f"{size.objective:,}")] if size.objective else []
    adapters = [("adapters", f"{sum(plan.adapters):,}")] if plan.adapters else []
    trained = [("trained", f"{plan.trained:,}")] if plan.adapters else []
    return [
        ("parameters", ""),
        (embedding, f"{size.embedding:,}"),
        *head,
        ("layers", f"{size.layers:,}"),
        *predictor,
        *objective,
        *adapters,
        ("total", f"{plan.total:,}"),
        *trained,
    ]


def _corpus_table(corpus: Corpus) -> Table:
    rows: Table = [("corpus", "records", "tokens")]
    for split, entry in corpus.manifest["splits"].items():
        tokens = sum(sum(shard["tokens"].values()) for shard in entry["shards"])
        rows.append((split, f"{sum(shard['records'] for shard in entry['shards']):,}", f"{tokens:,}"))
    return rows


def _step_table(plan: Plan) -> Table:
    train, step, stream, plain = plan.config.train, plan.step, plan.step.stream, plan.step.without_pairs
    title = f"one step, mean of {step.planned:,} steps" if step.planned else "one step, at most"
    rows: Table = [
        (title, plan.config.objective.name, *(("next_token", "more") if plain else ())),
        ("rows", f"{train.global_batch_rows:,}"),
    ]
    for ranks in plan.rank_counts:
        rows.append(
            (
                f"micro steps per rank ({ranks:,} rank{'s' * (ranks > 1)})",
                f"{train.global_batch_rows // train.micro_batch_rows // ranks:,}",
            )
        )
    if step.planned:
        rows += [("records", f"{step.records:,.0f}"), ("corpus tokens", f"{step.tokens:,.0f}")]
    rows.append(_comparison_row("positions", stream.positions, plain.positions if plain else None, ",.0f"))
    if plain:
        parts = {
            "predictor tokens": stream.predictor,
            "copies of a view": stream.positions - plain.positions - stream.predictor,
        }
        rows += [(f"  {name}", f"{count:,.0f}") for name, count in parts.items() if count > 0.5]
    if step.planned:
        rows.append(
            ("padding", f"{1 - stream.positions / (train.global_batch_rows * plan.config.data.sequence_length):.1%}")
        )
    rows.append(_comparison_row("next-token targets", stream.targets, plain.targets if plain else None, ",.0f"))
    if step.pairs:
        rows.append(("pairs", f"{step.pairs:,.0f}"))
    flops = plan.flops_by_part
    plain_flops = plain.flops(plan.parameters, plan.model) if plain else {}
    if plain and "Muon" in flops:
        plain_flops["Muon"] = flops["Muon"]
    rows += [_comparison_row(f"FLOPs, {part}", value, plain_flops.get(part), ".3g") for part, value in flops.items()]
    return [*rows, _comparison_row("FLOPs", sum(flops.values()), sum(plain_flops.values()), ".3g")]


def _comparison_row(name: str, value: float, plain: float | None, form: str) -> tuple[str, ...]:
    return (name, f"{value:{form}}", *((f"{plain:{form}}", f"{value / plain - 1:.1%}") if plain else ()))


def _budget_table(plan: Plan) -> Table:
    train, step, corpus = plan.config.train, plan.step, plan.corpus
    name, budget = next((name, value) for name in BUDGETS if (value := getattr(train, name)) is not None)
    rows: Table = [("the run", ""), (f"train.{name}", f"{budget:,}")]
    if corpus is None and name in ("records", "epochs"):
        return [*rows, ("steps", "unknown")]
    # without a corpus, a full row has at most as many tokens as positions
    records, tokens = (step.records, step.tokens) if corpus else (0, step.stream.positions)
    one_step = Consumed(1, records, tokens)
    epoch_records = step.order.records_in_epochs(train.epochs) if train.epochs and step.order else 0
    exact = round(1 / consumed_fraction(one_step, train, epoch_records), 6)  # rounded, because 1 / (1 / 49) is above 49
    steps = math.ceil(exact)
    full_steps = exact if train.epochs else steps  # the last step of the last epoch may be only partly filled
    if train.steps is None:
        rows.append(("steps, about" if corpus else "steps, at least", f"{steps:,}"))
    if step.order:
        rows += [
            ("total corpus tokens", f"{full_steps * step.tokens:,.0f}"),
            ("epochs", f"{full_steps * step.records / step.order.epoch_records:,.2f}"),
        ]
    rows.append(("total FLOPs" if corpus else "total FLOPs with full rows", f"{full_steps * plan.flops:.3g}"))
    peak = peak_flops()
    if peak is not None and train.precision == "bf16":
        speed = ASSUMED_MFU * peak * (plan.ranks or 1)
        rows.append(
            (
                f"days at {speed:.3g} FLOP/s, {ASSUMED_MFU:.0%} of the peak of {plan.ranks or 1:,} "
                f"device{'s' * ((plan.ranks or 1) > 1)}",
                f"{full_steps * plan.flops / speed / 86400:,.2f}",
            )
        )
    return rows


def _states_table(plan: Plan) -> Table:
    """Return the table of model states by ZeRO stage and number of ranks.

    Without ZeRO the number of ranks makes no difference, and on one rank all stages are equal. These repetitions are
    omitted.
    """
    precision = plan.config.train.precision
    configured = int(plan.zero.stage)
    cases = [(0, 1)] + [
        (stage, ranks) for ranks in plan.rank_counts for stage in ((1, 2, 3) if ranks > 1 else (configured,))
    ]
    states = {case: model_states_per_rank(plan, *case) for case in cases}
    unit, scale = _memory_unit(plan)
    rows: Table = [
        (
            f"model states of a rank in {precision}, {unit}",
            "ranks",
            "parameters",
            "gradients",
            "optimizer",
            "combined",
            "during the step",
        )
    ]
    for (stage, ranks), state in states.items():
        name = "no ZeRO" if stage == 0 else f"ZeRO {stage}" + ", as configured" * (stage == configured)
        numbers = (state.parameters, state.gradients, state.optimizer, state.held, state.in_step)
        rows.append((name, "any" if stage == 0 else f"{ranks:,}", *(f"{number / scale:,.2f}" for number in numbers)))
    return rows


def _activation_table(plan: Plan) -> Table:
    """Return the table of memory in addition to the model states.

    If the gradients do not fill the reduction buffers, the table has totals for CUDA and CPU, because the unused
    part needs memory on CUDA only.
    """
    train = plan.config.train
    buffers = reduce_buffers(plan)
    devices = ("cuda", "cpu") if buffers["cpu"] < buffers["cuda"] else ("cuda",)
    rows_by_device = {device: non_state_memory(plan, device) for device in devices}
    rows = list(dict.fromkeys(row for device_rows in rows_by_device.values() for row in device_rows))
    for device, device_rows in rows_by_device.items():
        name = "combined" + f" on {device.upper()}" * (len(devices) > 1)
        rows.append((name, sum(row[1] for row in device_rows), sum(row[2] for row in device_rows)))
    unit, scale = _memory_unit(plan)
    recomputed = "with activation checkpointing" + ", as configured" * train.activation_checkpointing
    return [
        (
            f"other memory of a rank, {unit}",
            "standard" if train.activation_checkpointing else "as configured",
            recomputed,
        ),
        *((name, f"{stored / scale:,.2f}", f"{checkpointed / scale:,.2f}") for name, stored, checkpointed in rows),
    ]


def _memory_unit(plan: Plan) -> tuple[str, int]:
    """Return the memory unit and its bytes: GiB for at least 100 million parameters, else MiB."""
    return ("GiB", 2**30) if plan.total >= 10**8 else ("MiB", 2**20)
