"""The same batch and the same budget for every arm, in the project's own accounting.

The reference is the base configuration as it is written: neither other arms nor their order change what an arm gets, so that arms can be added
to a study later.

    batch     a step holds as many corpus tokens as one of the base: rows with copies of a view hold fewer records, so an arm without them takes
              fewer rows. Rows of a micro step are scaled, not the number of micro steps, which also keeps the pool of a contrastive term
    tokens    the corpus tokens that the base's budget comes to
    flops     the tokens at which an arm has computed what the baseline computes over those tokens
    seconds   the tokens that an arm reads while the baseline reads those, by the speed of both in a short run (calibration.py)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from data_prep.console import UserError
from pretrain.config import RunConfig, load_config
from pretrain.data.corpus import Corpus, source_weights
from pretrain.sections import BUDGETS
from pretrain.studies.config import Study
from pretrain.tasks.options import AnswerTask
from pretrain.training.dry_run import Plan, make_plan
from pretrain.training.setup import check

ROWS = ("global_batch_rows", "micro_batch_rows")
CLOSE = 0.05
"""Difference in tokens a step up to which batches count as equal."""


@dataclass
class Arm:
    """What an arm gets."""

    name: str
    overrides: dict[str, Any]
    """Dotted keys over those of the study file, for its corpus and its batch."""
    config: RunConfig
    """With the first seed and these overrides."""
    tokens_per_step: float
    """Of the corpus."""
    flops_per_step: float
    own_tokens: int
    """Of the corpus, that the budget of its own configuration comes to."""
    notes: list[str] = field(default_factory=list)

    @property
    def flops_per_token(self) -> float:
        """For one token of the corpus."""
        return self.flops_per_step / self.tokens_per_step


class Matching:
    """Batches and budgets of the arms, whose corpora stand. Raises UserError for an arm that could not start.

    `say` gets each warning of a start once.
    """

    def __init__(self, study: Study, corpora: dict[str, dict[str, Any]], say: Callable[[str], None]):
        self.study, self._say = study, say
        self._said: set[str] = set()
        self.base = load_base_config(study)
        plan = self._plan(self.base)
        self.base_step_tokens = plan.step.tokens
        self.base_tokens = budget_tokens(plan)
        self.arms = {name: self._arm(name, corpora[name]) for name in study.config.arms}

    @property
    def baseline(self) -> Arm:
        """The arm that the others are matched to."""
        return self.arms[self.study.config.baseline]

    def tokens(self, arm: Arm, speeds: dict[str, float]) -> int:
        """The corpus tokens of an arm's training; `speeds` are measured tokens a second, where seconds are matched."""
        match self.study.config.matched_by:
            case "tokens":
                return self.base_tokens
            case "flops":
                return round(self.base_tokens * self.baseline.flops_per_token / arm.flops_per_token)
            case "seconds":
                return round(self.base_tokens * speeds[arm.name] / speeds[self.baseline.name])
            case _:
                return arm.own_tokens

    def overrides(self, arm: Arm, speeds: dict[str, float]) -> dict[str, Any]:
        """The dotted keys that set an arm's corpus, batch and budget."""
        if self.study.config.matched_by == "none":
            return arm.overrides
        others = {f"train.{budget}": None for budget in BUDGETS if getattr(arm.config.train, budget) is not None}
        return arm.overrides | others | {"train.tokens": self.tokens(arm, speeds)}

    def _arm(self, name: str, overrides: dict[str, Any]) -> Arm:
        study, notes = self.study, []
        plan = self._plan(study.run_config(name, study.config.seeds[0], overrides))
        if study.config.matched_by != "none":
            overrides = overrides | finetuning_of_base(plan.config, self.base)
            given = any(f"train.{key}" in study.config.arms[name] for key in ROWS)
            rows = {} if given else matched_rows(plan.config, plan.step.tokens, self.base_step_tokens)
            if rows:
                before, overrides = plan, overrides | rows
                plan = self._plan(study.run_config(name, study.config.seeds[0], overrides))
                notes.append(_change(before, plan, self.base_step_tokens))
            if abs(plan.step.tokens / self.base_step_tokens - 1) > CLOSE:
                notes.append(
                    f"WARNING: a step holds {plan.step.tokens:,.0f} corpus tokens, one of the base {self.base_step_tokens:,.0f}: the arms "
                    "differ in batch size too; more train.micro_batch_rows in the base allow a closer match"
                )
        return Arm(name, overrides, plan.config, plan.step.tokens, plan.flops, budget_tokens(plan), notes)

    def _plan(self, config: RunConfig) -> Plan:
        corpus = Corpus(config.data.path, "train")
        try:
            check(config, corpus, self._say_once)
            return make_plan(config, corpus)
        except UserError as error:
            raise UserError(f"{config.name}: {error}") from None

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def load_base_config(study: Study) -> RunConfig:
    """The base configuration as it is written, with the study's first seed."""
    return load_config(study.base, [f"seed={study.config.seeds[0]}", "name=base", f"output_dir={study.folder}"])


def matched_rows(config: RunConfig, tokens: float, wanted: float) -> dict[str, int]:
    """The rows with which a step that holds `tokens` holds about the tokens wanted; empty where they are what they should be."""
    train = config.train
    micro = max(1, round(train.micro_batch_rows * wanted / tokens))
    if micro == train.micro_batch_rows:
        return {}
    return {
        "train.global_batch_rows": train.global_batch_rows // train.micro_batch_rows * micro,
        "train.micro_batch_rows": micro,
    }


def finetuning_of_base(config: RunConfig, base: RunConfig) -> dict[str, Any]:
    """Dotted keys that let finetunings of an arm take rows and budget from the base, where their task gives none, not from the matched arm."""
    tasks = {
        index: task.finetune
        for index, task in enumerate(config.evaluation.tasks)
        if isinstance(task, AnswerTask) and task.finetune is not None
    }
    train = base.train.model_dump(exclude_none=True)
    rows, budget = ({key: train[key] for key in keys if key in train} for keys in (ROWS, BUDGETS))
    return {
        f"evaluation.tasks.{index}.finetune": rows | ({} if set(BUDGETS) & set(finetune) else budget) | finetune
        for index, finetune in tasks.items()
    }


def _change(before: Plan, now: Plan, wanted: float) -> str:
    rows, rows_before = now.config.train, before.config.train
    return (
        f"{rows.global_batch_rows} rows a step instead of {rows_before.global_batch_rows} (micro {rows.micro_batch_rows} instead of "
        f"{rows_before.micro_batch_rows}), so that a step holds as many corpus tokens as one of the base: {now.step.tokens:,.0f} of "
        f"{wanted:,.0f}, not {before.step.tokens:,.0f}"
    )


def budget_tokens(plan: Plan) -> int:
    """The corpus tokens that a run's budget comes to."""
    train, corpus, order = plan.config.train, plan.corpus, plan.step.order
    if train.tokens is not None:
        return train.tokens
    if train.steps is not None:
        return round(
            (train.steps - 0.5) * plan.step.tokens
        )  # a run ends with the step that reaches its tokens: with this one as a rule
    assert corpus is not None and order is not None  # the corpora of a study are prepared before its plan
    records = train.records
    if records is None:
        assert train.epochs is not None  # a run has exactly one budget
        records = order.records_in_epochs(train.epochs)
    weights = source_weights(corpus.manifest, plan.config.data.sources)
    of_an_epoch: float = sum(
        weights[shard["source"]] * sum(shard["tokens"].values()) for shard in corpus.entry["shards"]
    )
    return math.floor(records * of_an_epoch / order.epoch_records + 1e-6)
