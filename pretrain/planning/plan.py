"""The plan of a run: its model, its steps and their FLOPs, from the configuration and the lengths of the records.

Only the model is built, on the meta device, so it has shapes but no values. There is no process group and no run
folder.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from data_prep.layout import Layout, make_layout
from data_prep.make_tokenizer import import_tokenizer
from data_prep.tokenizer import Tokenizer
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus, source_weights
from pretrain.data.loader import Consumed, Loader, Packing, Rows, Unit, count_pairs, loss_denominators
from pretrain.data.order import Order
from pretrain.models.hidden_matrices import hidden_matrices
from pretrain.models.language_model import LanguageModel, special_ids
from pretrain.models.lora import adapter_sizes
from pretrain.objectives.base import Objective, build_objective
from pretrain.planning.budget import consumed_fraction
from pretrain.planning.flops import Parameters, count_parameters, muon_flops
from pretrain.planning.memory import layer_widths
from pretrain.planning.model import meta_model, without_values
from pretrain.planning.settings import check_zero_options, engine_settings

RANKS = (1, 8, 64)
"""Numbers of ranks to compare if there is no launcher and they divide the global batch."""
PLANNED_WINDOWS = 4
"""Largest number of windows of the first epoch from which the mean values of a step are computed."""
PLAIN, TERM = "next_token ", "term "
"""Prefixes of the names of counts: under objective.name=next_token, and for loss terms."""
SCHEDULE_POINTS = 10_000
"""Number of points, spread evenly over the budget, at which the dropout of the records is evaluated."""


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
    """A global batch: means over planned steps, or upper bounds if there is no corpus.

    If the dropout of the records changes during the run, the means are over all steps of the run.
    """

    stream: Stream
    counts: Mapping[str, float]
    """Count of each loss term."""
    max_counts: Mapping[str, float]
    """Count of each loss term at the dropout that leaves the most."""
    dropout_levels: dict[float, float] = field(default_factory=dict)
    """Fraction of the budget at each dropout of the records; 1 means that the terms on pairs are switched off. Empty
    without pairs."""
    planned: int = 0
    """Number of steps planned for these means."""
    skipped_windows: int = 0
    """Number of windows of the first epoch that are not sampled."""
    records: float = 0
    tokens: float = 0
    """Corpus tokens."""
    pairs: float = 0
    without_pairs: Stream | None = None
    """The same records under objective.name=next_token; None if this is the run's objective."""
    order: Order | None = None
    """Order of the records; None without a corpus."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run, from which all tables are printed."""

    config: RunConfig
    corpus: Corpus | None
    model: LanguageModel
    """On the meta device."""
    objective: Objective
    """On the meta device."""
    parameters: Parameters
    """Parameter counts of the model without adapters, and of the objective."""
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
        if self.config.model.lora:
            return self.parameters.predictor + self.parameters.objective + sum(self.adapters)
        return self.total

    @property
    def muon_matrices(self) -> list[torch.Size]:
        """Shapes of the matrices that Muon trains; empty with AdamW."""
        if self.config.train.optimizer.name != "muon":
            return []
        return [matrix.shape for matrix in hidden_matrices(self.model, self.objective)]

    @property
    def rank_counts(self) -> list[int]:
        """Numbers of ranks to show: the launcher's, or the ones of RANKS that divide the global batch."""
        if self.ranks is not None:
            return [self.ranks]
        largest = self.config.train.global_batch_rows // self.config.train.micro_batch_rows
        divisors = {ranks for ranks in RANKS if largest % ranks == 0}
        return sorted(divisors | ({largest} if largest < max(RANKS) else set()))

    @property
    def flops_by_part(self) -> dict[str, float]:
        """FLOPs of a step by part of the model."""
        parts = self.step.stream.flops(self.parameters, self.model)
        if own := self.objective.flops(self.step.counts, self.parameters.head):
            parts["objective"] = own
        if matrices := self.muon_matrices:
            parts["Muon"] = muon_flops(matrices)
        return parts

    @property
    def flops(self) -> float:
        """FLOPs of a step."""
        return sum(self.flops_by_part.values())


def make_plan(config: RunConfig, corpus: Corpus | None, ranks: int | None = None) -> "Plan":
    """Return the plan of a run. Raises UserError.

    With a corpus, the values of a step are means over the steps of a few windows of the first epoch. If the terms on
    pairs are switched off in a part of the run, or their dropout changes, the means account for the whole run.
    """
    settings = engine_settings(config, ranks)
    check_zero_options(settings)
    zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
    tokenizer = corpus.tokenizer if corpus else _future_tokenizer(config)
    model = meta_model(config, tokenizer)
    with without_values():
        objective = build_objective(config.objective, model.shape)
    units = objective.units
    step = _planned_step(config, corpus, tokenizer, model, units) if corpus else _largest_step(config, units)
    adapters = adapter_sizes(model, config.model.lora) if config.model.lora else []
    parameters = count_parameters(model, objective)
    return Plan(config, corpus, model, objective, parameters, adapters, step, zero, ranks)


def make_loader(config: RunConfig, corpus: Corpus, layout: Layout, earlier: Sequence[Packing] = ()) -> Loader:
    """Return the loader of the training split. Raises UserError if the weights of the sources leave no record.

    `earlier` lists the packings of the runs whose data this run continues.
    """
    objective, train = config.objective, config.train
    loader = _constant_loader(
        config,
        corpus,
        layout,
        objective.loss_dropout(0.0),
        lambda consumed: objective.record_dropout(consumed_fraction(consumed, train, loader.records)),
        earlier,
    )
    return loader


def _constant_loader(
    config: RunConfig,
    corpus: Corpus,
    layout: Layout,
    dropout: float,
    dropout_at: Callable[[Consumed], float] | None = None,
    earlier: Sequence[Packing] = (),
) -> Loader:
    """Return the loader of the training split with a constant dropout, or with `dropout_at`."""
    return Loader(
        corpus,
        layout,
        config.data.sequence_length,
        config.seed,
        weights=source_weights(corpus.manifest, config.data.sources),
        dropout=dropout,
        dropout_at=dropout_at,
        epochs=config.train.epochs,
        earlier=earlier,
    )


def _future_tokenizer(config: RunConfig) -> Any:
    """Return the tokenizer that data_prep would import; if data_prep would train one, only its size and special ids."""
    if config.data.tokenizer.path is not None:
        with tempfile.TemporaryDirectory() as folder:
            return import_tokenizer(Path(config.data.tokenizer.path), Path(folder))
    return SimpleNamespace(vocab_size=config.data.tokenizer.vocab_size, pad_id=0, bos_id=2, eos_id=3, sep_id=4)


def _planned_step(
    config: RunConfig, corpus: Corpus, tokenizer: Tokenizer, model: LanguageModel, units: Mapping[str, Unit]
) -> Step:
    """Return means over the steps of a few of the loader's windows, spread evenly over the first epoch.

    If the dropout changes during the run, steps with the lowest and the highest dropout are planned, and the values of
    a record are interpolated between them.
    """
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
    levels = dropout_levels(config) if layout.read_outs else {0.0: 1.0}
    loaders = [_constant_loader(config, corpus, layout, level) for level in sorted({min(levels), max(levels)})]
    order = loaders[0].order
    windows = order.windows(0)
    planned = sorted({round(part * (windows - 1) / (PLANNED_WINDOWS - 1)) for part in range(PLANNED_WINDOWS)})
    samples = [_sample_steps(loader, planned, config.train.global_batch_rows, plain, units) for loader in loaders]
    steps = {level: _step_at(level, min(levels), max(levels), samples) for level in levels}
    mean = _mean_over_run(config, levels, steps)
    return Step(
        _stream_in(mean, ""),
        {name: mean[TERM + name] for name in units},
        {name: max(step[TERM + name] for step in steps.values()) for name in units},
        levels if layout.read_outs else {},
        sum(sample["steps"] for sample in samples),
        windows - len(planned),
        **{name: mean[name] for name in ("records", "tokens", "pairs")},
        without_pairs=_stream_in(mean, PLAIN) if config.objective.name != "next_token" else None,
        order=order,
    )


def dropout_levels(config: RunConfig) -> dict[float, float]:
    """Return the fraction of the budget at each dropout of the records; exact for short budgets in steps."""
    points = min(config.train.steps or SCHEDULE_POINTS, SCHEDULE_POINTS)
    counts = Counter(config.objective.record_dropout(point / points) for point in range(points))
    return {level: count / points for level, count in counts.items()}


def _sample_steps(
    loader: Loader, windows: list[int], rows_per_step: int, plain: Layout, units: Mapping[str, Unit]
) -> Counter[str]:
    """Return the number of steps in these windows of the first epoch, and the sums of their counts.

    The names of a Stream's counts in the layout `plain` have the prefix PLAIN, and the names of loss terms TERM.
    """
    layout = loader.layout
    steps: list[Rows] = []
    for window in windows:
        loader.load_state({"epoch": 0, "window": window, "row": 0})
        while (loader.epoch, loader.window) == (0, window):
            rows = loader.next_rows(rows_per_step)
            if loader.exhausted and steps:
                break  # the last step of a run is skipped, because it is not full
            steps.append(rows)
    rows = Rows.join(steps, len(steps) * rows_per_step)  # counting all steps at once is faster
    without_pairs = count_stream(plain, rows.lengths, plain.segment_lengths(rows.lengths, rows.paired))
    return Counter(
        steps=len(steps),
        records=len(rows.records),
        tokens=int(rows.lengths.sum()),
        pairs=count_pairs(rows, layout),
        **count_stream(layout, rows.lengths, rows.segment_lengths),
        **{PLAIN + name: count for name, count in without_pairs.items()},
        **{TERM + name: count for name, count in loss_denominators(rows, layout, units).items()},
    )


def _step_at(level: float, lowest: float, highest: float, samples: list[Counter[str]]) -> dict[str, float]:
    """Return the mean counts of a step at a dropout, from samples at the lowest and the highest dropout.

    The values of a record and the filled positions of a step are linear in the dropout.
    """
    means = [{name: total / sample["steps"] for name, total in sample.items()} for sample in samples]
    if level in (lowest, highest):
        return means[level != lowest]
    low, high = means
    part = (level - lowest) / (highest - lowest)

    def between(at_lowest: float, at_highest: float) -> float:
        return at_lowest + part * (at_highest - at_lowest)

    per_record = {name: between(low[name] / low["records"], high[name] / high["records"]) for name in low}
    records = between(low["positions"], high["positions"]) / per_record["positions"]
    return {name: value * records for name, value in per_record.items()}


def _mean_over_run(
    config: RunConfig, levels: Mapping[float, float], steps: Mapping[float, dict[str, float]]
) -> dict[str, float]:
    """Return the mean counts of a step of the run, from its steps at each dropout and their fractions of the budget."""
    if len(levels) == 1:
        (only,) = steps.values()
        return only
    unit = "tokens" if config.train.tokens is not None else "records"  # train.epochs counts records
    numbers = {
        level: share / (1 if config.train.steps is not None else steps[level][unit]) for level, share in levels.items()
    }
    total = sum(numbers.values())
    names = next(iter(steps.values()))
    return {name: sum(numbers[level] * step[name] for level, step in steps.items()) / total for name in names}


def _stream_in(counts: Mapping[str, float], prefix: str) -> Stream:
    return Stream(**{one.name: counts[prefix + one.name] for one in fields(Stream)})


def count_stream(layout: Layout, lengths: np.ndarray, segment_lengths: np.ndarray) -> dict[str, int]:
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


def _largest_step(config: RunConfig, units: Mapping[str, Unit]) -> Step:
    """Return the upper bound of a step: each row is filled by one record, and every position is a target."""
    rows = config.train.global_batch_rows
    length = config.data.sequence_length
    targets = rows * length
    counts = dict.fromkeys(units, float(targets))
    return Step(Stream(targets, targets, 0, targets * (length + 1) / 2), counts, counts)
