"""The resource estimate of a run: parameters, batch, FLOPs, steps and memory.

The estimate is computed from the configuration and the lengths of the records. Only the model is built, on the meta
device, so it has shapes but no values. There is no process group and no run folder.
"""

import math
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from data_prep.shards import MANIFEST
from data_prep.tokenizer import Tokenizer, import_tokenizer
from data_prep.utils.console import UserError, print_now
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus
from pretrain.data.layout import Layout, make_layout
from pretrain.data.loader import loss_denominators
from pretrain.data.order import Order
from pretrain.deepspeed_options import FP32_NAMES
from pretrain.models.attention import resolve_attention
from pretrain.models.language_model import LanguageModel, random_causal_lm, special_ids
from pretrain.models.lora import adapter_sizes
from pretrain.run_folder import list_steps
from pretrain.sections import BUDGETS
from pretrain.training.describe import check_same_run
from pretrain.training.distributed import normalize_launcher_env
from pretrain.training.engine import (
    check_model_fits_corpus,
    check_zero_options,
    engine_settings,
    gradient_accumulation_dtype,
    resolve_hf_config,
)
from pretrain.training.memory import ITEM_BYTES, ModelStates, activations, layer_widths, model_states
from pretrain.training.schedule import Progress, consumed_fraction
from pretrain.training.setup import check, make_loader
from pretrain.training.throughput import Parameters, count_parameters, peak_flops

RANKS = (1, 8, 64)
"""Numbers of ranks to compare if there is no launcher and they divide the global batch."""
PLANNED_WINDOWS = 4
"""Largest number of windows of the first epoch from which the mean values of a step are computed."""
ASSUMED_MFU = 0.4
"""Fraction of a device's bf16 peak in the estimate of days; typical of large runs."""
Table = list[tuple[str, ...]]
"""Rows of a printed table, starting with the heading."""


def dry_run(config: RunConfig) -> None:
    """Print the plan on rank 0. Raises the UserErrors of a real run, except for a corpus that is not prepared."""
    rank, ranks = _rank_and_ranks()
    if rank:
        return
    plan = checked_plan(config, ranks)
    corpus = plan.corpus

    if config.ignored_keys:
        print(f"note: ignored with objective.name=next_token: {', '.join(config.ignored_keys)}")
    if config.model.lora:
        print("note: FLOPs and activations are for training the whole model; adapters need up to a third fewer FLOPs")
    if corpus is None:
        print(
            f"note: there is no corpus in {config.data.path}. The vocabulary is taken from data.tokenizer and rows are "
            "assumed to be full.\nTo include records, pairs and the cost of the JEPA term, run: python -m data_prep "
            "CONFIG"
        )
    if plan.step.skipped_windows:
        print(f"note: means of a step are over {plan.step.planned:,} steps, spread evenly over the first epoch")
    tables = [
        _parameter_table(plan),
        _corpus_table(corpus) if corpus else [],
        _step_table(plan),
        _budget_table(plan),
        _states_table(plan),
        _activation_table(plan),
    ]
    for table in filter(None, tables):
        _print_table(table)
    print(
        "\n6 FLOPs per position and layer parameter, and per target and head parameter (arXiv 2001.08361). Attention "
        "scores: 12 FLOPs per\nlayer, width of the heads and visible key. Model states: arXiv 1910.02054. Activations: "
        "arXiv 2205.05198, without stored scores.\nOffloading is not included.",
        flush=True,
    )


def checked_plan(config: RunConfig, ranks: int | None) -> "Plan":
    """Return the plan of a run, with the corpus if it is prepared. Raises the UserErrors of a real run on `ranks`."""
    corpus = Corpus(config.data.path, "train") if (Path(config.data.path) / MANIFEST).exists() else None
    engine_settings(config, ranks or 1)
    _check_start(config, corpus, ranks)
    return make_plan(config, corpus, ranks)


def make_plan(config: RunConfig, corpus: Corpus | None, ranks: int | None = None) -> "Plan":
    """Return the plan of a run. Raises UserError.

    With a corpus, the values of a step are means over the steps of a few windows of the first epoch.
    """
    settings = engine_settings(config, ranks or 1)
    check_zero_options(settings)
    zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
    tokenizer = corpus.tokenizer if corpus else _future_tokenizer(config)
    model = _meta_model(config, tokenizer)
    step = _planned_step(config, corpus, tokenizer, model) if corpus else _largest_step(config)
    adapters = adapter_sizes(model, config.model.lora) if config.model.lora else []
    return Plan(config, corpus, model, count_parameters(model), adapters, step, zero, ranks)


def _rank_and_ranks() -> tuple[int, int | None]:
    """Return this process's rank and the number of ranks; the number is None if no launcher started the process."""
    set_by_launcher = "WORLD_SIZE" in os.environ
    normalize_launcher_env()
    ranks = int(os.environ["WORLD_SIZE"])
    return int(os.environ["RANK"]), ranks if set_by_launcher or ranks > 1 else None


def _check_start(config: RunConfig, corpus: Corpus | None, ranks: int | None) -> None:
    """Raise the UserErrors of a real run about the corpus, files and the run folder."""
    check(config, corpus, print_now)
    if corpus and "validation" in corpus.manifest["splits"]:
        Corpus(config.data.path, "validation")
    # a run that was killed early leaves a folder without config.yaml
    if corpus and (config.run_dir / "config.yaml").exists():
        check_same_run(config, corpus.manifest, ranks)
    existing = next(folder for folder in (config.run_dir, *config.run_dir.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write to {config.run_dir} (output_dir/name): {existing} is not a writable folder")


def _future_tokenizer(config: RunConfig) -> Any:
    """Return the tokenizer that data_prep would import; if data_prep would train one, only its size and special ids."""
    if config.data.tokenizer.path is not None:
        with tempfile.TemporaryDirectory() as folder:
            return import_tokenizer(Path(config.data.tokenizer.path), Path(folder))
    return SimpleNamespace(vocab_size=config.data.tokenizer.vocab_size, pad_id=0, bos_id=2, eos_id=3, sep_id=4)


def _meta_model(config: RunConfig, tokenizer: Tokenizer) -> LanguageModel:
    """Return the model on the meta device. Raises UserError if it does not fit the corpus."""
    attention = "eager"  # supported by every family; nothing is computed
    shape = resolve_hf_config(config, tokenizer, resuming=bool(list_steps(config.run_dir / "checkpoints")))
    if config.model.init_from is None:
        resolve_attention(
            config.model.attention, torch.device("cuda"), shape
        )  # rejects settings that no device supports
        with torch.device("meta"):
            return LanguageModel(random_causal_lm(shape, attention, torch.float32), config.predictor_tokens, attention)
    with torch.device("meta"):
        model = LanguageModel(random_causal_lm(shape, attention, torch.float32), config.predictor_tokens, attention)
    check_model_fits_corpus(config, model, tokenizer)
    return model


@dataclass(frozen=True)
class Stream:
    """Counts of a step in one layout, over all ranks. They are means, so they need not be integers."""

    positions: float
    targets: float
    """Next-token targets."""
    predictor: float
    """Predictor tokens."""
    visible: float
    """Number of keys that a query sees, including the query's position, summed over all queries."""

    def flops(self, parameters: Parameters, model: LanguageModel) -> dict[str, float]:
        """Return the FLOPs of a step by part of the model.

        Attention scores need 12 FLOPs per layer, width of the query heads and visible key: two products, forward and
        backward.
        """
        layers, head = parameters.flops(self.positions, self.targets)
        return {
            "layers": layers,
            "output head": head,
            "attention scores": 12 * self.visible * sum(layer.queries for layer in layer_widths(model)),
        }


@dataclass(frozen=True)
class Step:
    """A global batch: means over planned steps, or upper bounds if there is no corpus."""

    stream: Stream
    planned: int = 0
    """Number of steps planned for these means."""
    skipped_windows: int = 0
    """Number of windows of the first epoch that are not sampled."""
    records: float = 0
    tokens: float = 0
    """Corpus tokens."""
    pairs: float = 0
    without_pairs: Stream | None = None
    """The same records under objective.name=next_token; None if the run's objective has no pairs."""
    order: Order | None = None
    """Order of the records; None without a corpus."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run, from which all tables are printed."""

    config: RunConfig
    corpus: Corpus | None
    model: LanguageModel
    """On the meta device."""
    parameters: Parameters
    """Parameter counts of the model without adapters."""
    adapters: list[int]
    """Sizes of the parameters that model.lora adds."""
    step: Step
    zero: DeepSpeedZeroConfig
    ranks: int | None
    """Number of ranks set by the launcher; None without a launcher."""

    @property
    def total(self) -> int:
        """Number of all parameters, adapters included."""
        return self.parameters.total + sum(self.adapters)

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return self.parameters.predictor + sum(self.adapters) if self.config.model.lora else self.total

    @property
    def rank_counts(self) -> list[int]:
        """Numbers of ranks to show: the launcher's, or the ones of RANKS that divide the global batch."""
        if self.ranks is not None:
            return [self.ranks]
        largest = self.config.train.global_batch_rows // self.config.train.micro_batch_rows
        divisors = {ranks for ranks in RANKS if largest % ranks == 0}
        return sorted(divisors | ({largest} if largest < max(RANKS) else set()))

    @property
    def flops(self) -> float:
        """FLOPs of a step."""
        return sum(self.step.stream.flops(self.parameters, self.model).values())


def _planned_step(config: RunConfig, corpus: Corpus, tokenizer: Tokenizer, model: LanguageModel) -> Step:
    """Return means over the steps of a few of the loader's windows, spread evenly over the first epoch."""
    data = config.data
    specials = special_ids(tokenizer, model.vocab_size)
    layout = config.make_layout(specials, corpus.views)
    plain = make_layout(
        config.objective.layout,
        specials,
        views=corpus.views,
        lm_views=data.lm_views,
        train_end_token=data.train_end_token,
    )
    loader = make_loader(config, corpus, layout)
    sums: Counter[str] = Counter()
    stream: Counter[str] = Counter()
    without_pairs: Counter[str] = Counter()
    windows = loader.order.windows(0)
    planned = sorted({round(part * (windows - 1) / (PLANNED_WINDOWS - 1)) for part in range(PLANNED_WINDOWS)})
    for window in planned:
        loader.load_state({"epoch": 0, "window": window, "row": 0})
        while (loader.epoch, loader.window) == (0, window):
            rows = loader.next_rows(config.train.global_batch_rows)
            if loader.exhausted and sums["steps"]:
                break  # the last step of a run is skipped, because it is not full
            sums.update(
                steps=1,
                records=len(rows.records),
                tokens=int(rows.lengths.sum()),
                pairs=loss_denominators(rows, layout)["pairs"],
            )
            stream.update(_stream(layout, rows.lengths, rows.segment_lengths))
            without_pairs.update(_stream(plain, rows.lengths, plain.segment_lengths(rows.lengths, rows.paired)))
    steps = sums.pop("steps")
    mean, plain_mean = (
        Stream(**{name: total / steps for name, total in counts.items()}) for counts in (stream, without_pairs)
    )
    return Step(
        mean,
        steps,
        windows - len(planned),
        **{name: total / steps for name, total in sums.items()},
        without_pairs=plain_mean if layout.read_outs else None,
        order=loader.order,
    )


def _stream(layout: Layout, lengths: np.ndarray, segment_lengths: np.ndarray) -> dict[str, int]:
    """Return the fields of a Stream, summed over records with view lengths (N, views) and segments (N, segments)."""
    predicting = [index for index, segment in enumerate(layout.segments) if segment.view is None]
    return {
        "positions": int(segment_lengths.sum()),
        "targets": int(layout.count_lm_targets(lengths, segment_lengths).sum()),
        "predictor": layout.predictor_tokens * int((segment_lengths[:, predicting] > 0).sum()),
        "visible": _visible_keys(layout, segment_lengths),
    }


def _visible_keys(layout: Layout, lengths: np.ndarray) -> int:
    """Return the number of visible keys of all queries of records with segment lengths (N, segments).

    A token sees its own segment up to itself, and all tokens of the ancestors of that segment.
    """
    ancestors = np.zeros_like(lengths)
    for index, segment in enumerate(layout.segments):
        if segment.parent is not None:
            ancestors[:, index] = ancestors[:, segment.parent] + lengths[:, segment.parent]
    return int((lengths * (lengths + 1) // 2 + lengths * ancestors).sum())


def _largest_step(config: RunConfig) -> Step:
    """Return the upper bound of a step: each row is filled by one record, and every position is a target."""
    rows = config.train.global_batch_rows
    length = config.data.sequence_length
    return Step(Stream(rows * length, rows * length, 0, rows * length * (length + 1) / 2))


def _parameter_table(plan: Plan) -> Table:
    size = plan.parameters
    embedding = (
        f"embedding, {plan.model.vocab_size:,} x {plan.model.hidden_size:,}" + ", is the output head too" * size.tied
    )
    head = [] if size.tied else [("output head", f"{size.head:,}")]
    predictor = [("predictor embedding", f"{size.predictor:,}")] if size.predictor else []
    adapters = [("adapters", f"{sum(plan.adapters):,}")] if plan.adapters else []
    trained = [("trained", f"{plan.trained:,}")] if plan.adapters else []
    return [
        ("parameters", ""),
        (embedding, f"{size.embedding:,}"),
        *head,
        ("layers", f"{size.layers:,}"),
        *predictor,
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
    title = f"one step, mean of {step.planned:,}" if step.planned else "one step, at most"
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
    if plain:
        rows.append(("pairs", f"{step.pairs:,.0f}"))
    flops = stream.flops(plan.parameters, plan.model)
    plain_flops = plain.flops(plan.parameters, plan.model) if plain else {}
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
    one_step = Progress(1, records, tokens)  # type: ignore[arg-type]  # means, so not integers
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


def model_states_per_rank(plan: Plan, stage: int, ranks: int) -> ModelStates:
    """Return the model states of the plan under a ZeRO stage on `ranks` ranks."""
    sizes = [*(parameter.numel() for parameter in plan.model.parameters()), *plan.adapters]
    small = sum(size for size in sizes if size <= plan.zero.param_persistence_threshold)
    accumulated = 4 if gradient_accumulation_dtype(plan.config) in FP32_NAMES else 2
    return model_states(plan.total, plan.trained, small, plan.config.train.precision, stage, ranks, accumulated)


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
    targets = plan.step.stream.targets * train.micro_batch_rows / train.global_batch_rows
    stored = activations(
        plan.model, train.precision, train.micro_batch_rows * plan.config.data.sequence_length, targets, device
    )
    rows = [
        ("activations of the layers", stored.layers, stored.checkpointed_layers),
        ("logits of the targets", stored.logits, stored.logits),
        ("gradient of the output head", stored.head, stored.head),
        (f"gradients to be reduced{extent}", reduced, reduced),
    ]
    if int(zero.stage) == 3:
        gathered = item_bytes * min(plan.total, zero.max_live_parameters)
        rows.append(("gathered parameters, at most", gathered, gathered))
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


def _print_table(rows: Table) -> None:
    """Print a table. Only the first column is left-aligned; rows may omit their last columns."""
    columns = max(map(len, rows))
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(columns)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    print("\n" + lines[0] + "\n" + "-" * (sum(widths) + 2 * (columns - 1)) + "\n" + "\n".join(lines[1:]))
