"""Matching: the same batch and the same budget for every arm.

The reference is the base configuration. Other arms do not affect the batch and budget of an arm, so arms can
be added to a study later.

    batch     a step has the same number of corpus tokens as a step of the base. Rows with copies of a view hold fewer
              records, so an arm without copies needs fewer rows. The rows of a micro batch are scaled and the number
              of micro steps stays the same. This also keeps the size of a contrastive term's pool
    tokens    the number of corpus tokens in the base's budget
    flops     the number of tokens for which the arm needs the FLOPs that the baseline needs for the base's tokens
    seconds   the number of tokens that the arm reads in the time in which the baseline reads the base's tokens; the
              speeds of both come from short runs (calibration.py). Arms that are equally fast have the same budget
"""

import logging
import math
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus, source_weights
from pretrain.planning.plan import Plan, make_plan
from pretrain.sections import BUDGETS
from pretrain.studies.config import Study
from pretrain.studies.speeds import PairedRatio
from pretrain.tasks.options import AnswerTask
from pretrain.training.start_checks import check

ROWS = ("global_batch_rows", "micro_batch_rows")
CLOSE = 0.05
"""Largest relative difference in tokens per step at which batches count as equal."""


@dataclass
class Arm:
    """An arm with its batch and its budget."""

    name: str
    overrides: dict[str, Any]
    """Dotted keys that set the arm's corpus and batch, in addition to the study file's overrides."""
    config: RunConfig
    """Configuration of the arm with the first seed and these overrides."""
    tokens_per_step: float
    """Mean number of corpus tokens per step."""
    flops_per_step: float
    unmatched_tokens: int
    """Number of corpus tokens in the budget that the arm's configuration sets."""
    dropout_levels: dict[float, float]
    """Fraction of the run at each dropout of the records; see `pretrain.planning.plan.Step`."""
    notes: list[str] = field(default_factory=list)

    @property
    def flops_per_token(self) -> float:
        """FLOPs per corpus token."""
        return self.flops_per_step / self.tokens_per_step


class Matching:
    """Batches and budgets of all arms. The corpora of the arms must be prepared.

    Raises UserError for an arm whose run could not start. The notes of these checks are logged once, not for each arm.
    """

    def __init__(self, study: Study, corpora: dict[str, dict[str, Any]]):
        self.study = study
        checks, once = logging.getLogger(check.__module__), _OncePerText()
        checks.addFilter(once)
        try:
            self.base = load_base_config(study)
            plan = self._plan(self.base)
            self.base_step_tokens = self._in_tokens(plan).step.tokens
            self.base_tokens = budget_tokens(plan)
            self.arms = {name: self._arm(name, corpora[name]) for name in study.config.arms}
        finally:
            checks.removeFilter(once)

    @property
    def baseline(self) -> Arm:
        """Arm to which the other arms are matched."""
        return self.arms[self.study.config.baseline]

    def tokens(self, arm: Arm, speeds: dict[str, PairedRatio]) -> int:
        """Return the number of corpus tokens that an arm trains on.

        `speeds` are the measured speeds relative to the baseline; only matching by seconds needs them.
        """
        match self.study.config.matched_by:
            case "tokens":
                return self.base_tokens
            case "flops":
                return round(self.base_tokens * self.baseline.flops_per_token / arm.flops_per_token)
            case "seconds":
                return round(self.base_tokens * speeds[arm.name].used)
            case _:
                return arm.unmatched_tokens

    def overrides(self, arm: Arm, speeds: dict[str, PairedRatio]) -> dict[str, Any]:
        """Return the dotted keys that set an arm's corpus, batch and budget."""
        if self.study.config.matched_by == "none":
            return arm.overrides
        cleared = {f"train.{key}": value for key, value in arm.config.train.without_budget().items()}
        return arm.overrides | cleared | {"train.tokens": self.tokens(arm, speeds)}

    def _arm(self, name: str, overrides: dict[str, Any]) -> Arm:
        study = self.study
        notes: list[str] = []
        plan = self._in_tokens(self._plan(study.run_config(name, study.first_seed, overrides)))
        if study.config.matched_by != "none":
            overrides = overrides | finetuning_of_base(plan.config, self.base)
            sets_rows = any(f"train.{key}" in study.config.arms[name] for key in ROWS)
            rows = {} if sets_rows else matched_rows(plan.config, plan.step.tokens, self.base_step_tokens)
            if rows:
                unmatched = plan
                overrides = overrides | rows
                plan = self._in_tokens(self._plan(study.run_config(name, study.first_seed, overrides)))
                notes.append(_describe_change(unmatched, plan, self.base_step_tokens))
            if abs(plan.step.tokens / self.base_step_tokens - 1) > CLOSE:
                notes.append(
                    f"WARNING: a step has {plan.step.tokens:,.0f} corpus tokens, a step of the base "
                    f"{self.base_step_tokens:,.0f}, so the arms differ in batch size too; "
                    "raise train.micro_batch_rows in the base for a closer match"
                )
        return Arm(
            name,
            overrides,
            plan.config,
            plan.step.tokens,
            plan.flops,
            budget_tokens(plan),
            dict(plan.step.dropout_levels),
            notes,
        )

    def _plan(self, config: RunConfig) -> Plan:
        corpus = Corpus(config.data.path, "train")
        try:
            check(config, corpus)
            return make_plan(config, corpus)
        except UserError as error:
            raise UserError(f"{config.name}: {error}") from None

    def _in_tokens(self, plan: Plan) -> Plan:
        """Return the plan with the mean step of a budget in tokens, which matched runs have.

        It differs only if the steps change during the run: then a fraction of the tokens is a different fraction of the
        steps.
        """
        if self.study.config.matched_by == "none" or len(plan.step.dropout_levels) < 2:
            return plan
        budget = plan.config.train.without_budget() | {"tokens": budget_tokens(plan)}
        config = plan.config.model_copy(update={"train": plan.config.train.model_copy(update=budget)})
        return replace(plan, step=make_plan(config, plan.corpus).step)


class _OncePerText(logging.Filter):
    """A filter that drops a message with the same text as an earlier one."""

    def __init__(self) -> None:
        super().__init__()
        self._texts: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the text is new."""
        text = record.getMessage()
        is_new = text not in self._texts
        self._texts.add(text)
        return is_new


def load_base_config(study: Study) -> RunConfig:
    """Return the base configuration of a study with its first seed."""
    return study.load_base({"seed": study.first_seed, "name": "base", "output_dir": str(study.folder)})


def matched_rows(config: RunConfig, tokens: float, wanted_tokens: float) -> dict[str, int]:
    """Return the rows that change a step from `tokens` to about `wanted_tokens`; empty if no change is needed."""
    train = config.train
    micro_batch_rows = max(1, round(train.micro_batch_rows * wanted_tokens / tokens))
    if micro_batch_rows == train.micro_batch_rows:
        return {}
    return {
        "train.global_batch_rows": train.global_batch_rows // train.micro_batch_rows * micro_batch_rows,
        "train.micro_batch_rows": micro_batch_rows,
    }


def finetuning_of_base(config: RunConfig, base: RunConfig) -> dict[str, Any]:
    """Return the dotted keys that give an arm's finetunings the rows and budget of the base.

    Without these keys, rows and budget that a task does not set would come from the matched arm.
    """
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


def _describe_change(unmatched: Plan, matched: Plan, wanted_tokens: float) -> str:
    rows, rows_before = matched.config.train, unmatched.config.train
    return (
        f"{rows.global_batch_rows} rows per step instead of {rows_before.global_batch_rows} "
        f"(micro batch: {rows.micro_batch_rows} instead of {rows_before.micro_batch_rows}), to match the corpus tokens "
        f"per step of the base: {matched.step.tokens:,.0f} of {wanted_tokens:,.0f}, "
        f"instead of {unmatched.step.tokens:,.0f}"
    )


def budget_tokens(plan: Plan) -> int:
    """Return the number of corpus tokens in a run's budget."""
    train, corpus, order = plan.config.train, plan.corpus, plan.step.order
    if train.tokens is not None:
        return train.tokens
    if train.steps is not None:
        # A run ends with the step that reaches its tokens. With half a step less, this is normally step `train.steps`.
        return round((train.steps - 0.5) * plan.step.tokens)
    assert corpus is not None and order is not None  # a study prepares its corpora before it plans
    records = train.records
    if records is None:
        assert train.epochs is not None  # a run has exactly one budget
        records = order.records_in_epochs(train.epochs)
    weights = source_weights(corpus.manifest, plan.config.data.sources)
    epoch_tokens: float = sum(
        weights[shard["source"]] * sum(shard["tokens"].values()) for shard in corpus.entry["shards"]
    )
    return math.floor(records * epoch_tokens / order.epoch_records + 1e-6)
