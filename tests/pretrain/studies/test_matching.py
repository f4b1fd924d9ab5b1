"""Matching of arms: the same number of tokens per step, and the same matched budget."""

import pytest
import yaml

from data_prep.layout import SpecialTokenIds
from pretrain.data.corpus import Corpus
from pretrain.planning.budget import consumed_fraction
from pretrain.planning.plan import make_loader, make_plan
from pretrain.studies.corpora import assign_corpora
from pretrain.studies.matching import Matching, load_base_config
from pretrain.studies.plan import make_runs
from pretrain.studies.speeds import PairedRatio
from tests.pretrain.studies.conftest import STEPS

ARMS = {
    "plain": {"objective.name": "next_token"},
    "jepa": {},
    "dropout": {"objective.dropout": 0.5},
    "wide": {"model.shape.hidden_size": 64},
}


def match(study):
    return Matching(study, assign_corpora(study, load_base_config(study))[0])


def tokens_of_steps(config, whole_run=False):
    """Return the corpus tokens of each step that the loader yields in the first epoch or in the complete run."""
    corpus = Corpus(config.data.path, "train")
    loader = make_loader(config, corpus, config.make_layout(SpecialTokenIds(0, 2, 3, 4, 500), corpus.views))
    steps = []
    while not loader.exhausted if whole_run else loader.epoch == 0:
        steps.append(int(loader.next_rows(config.train.global_batch_rows).lengths.sum()))
    return steps


def test_steps_of_all_arms_have_the_same_number_of_corpus_tokens(make_study):
    matching = match(make_study(arms=ARMS))
    assert matching.arms["jepa"].config.train.global_batch_rows == 8 and not matching.arms["jepa"].notes
    assert matching.arms["plain"].config.train.global_batch_rows < 8
    for arm in matching.arms.values():
        steps = tokens_of_steps(arm.config)[:-1]
        mean_tokens = sum(steps) / len(steps)
        # The tolerance allows for batches of complete micro steps of 4 rows.
        assert mean_tokens == pytest.approx(matching.base_step_tokens, rel=0.15), arm.name
        assert arm.config.train.global_batch_rows == 2 * arm.config.train.micro_batch_rows
    assert "rows per step instead of 8" in matching.arms["plain"].notes[0]


def test_a_batch_that_cannot_be_matched_is_reported(make_study):
    matching = match(make_study(arms={"plain": {"objective.name": "next_token", "train.micro_batch_rows": 4}}))
    assert "WARNING: a step has" in matching.arms["plain"].notes[0]


def test_token_budgets_equal_the_budget_of_the_base(make_study):
    matching = match(make_study(arms=ARMS))
    assert matching.base_tokens == pytest.approx((STEPS - 0.5) * matching.base_step_tokens, abs=1)
    runs = make_runs(make_study(arms=ARMS, seeds=[5, 6]), matching, {})
    assert [(run.seed, run.arm) for run in runs] == [(seed, arm) for seed in (5, 6) for arm in ARMS]
    assert {run.config.train.tokens for run in runs} == {matching.base_tokens} and all(
        run.config.seed == run.seed for run in runs
    )
    assert all(run.config.train.steps is None and run.run_dir.name == f"{run.arm}-seed{run.seed}" for run in runs)


def test_cheaper_arms_read_more_tokens_if_matched_by_flops(make_study):
    matching = match(make_study(arms=ARMS, matched_by="flops"))
    runs = {run.arm: run for run in make_runs(matching.study, matching, {})}
    assert runs["plain"].config.train.tokens == matching.base_tokens
    assert (
        runs["wide"].config.train.tokens
        < runs["jepa"].config.train.tokens
        < runs["dropout"].config.train.tokens
        < matching.base_tokens
    )
    for run in runs.values():
        assert run.flops == pytest.approx(runs["plain"].flops, rel=1e-3)


@pytest.mark.parametrize("matched_by", ["tokens", "flops", "none"])
def test_arms_whose_terms_are_switched_off_are_matched_over_the_whole_run(make_study, folder, matched_by):
    """Compare with the steps of the loader up to the end of each run."""
    base = (folder / "base.yaml").read_text().replace(f"steps: {STEPS}", f"steps: {4 * STEPS}")
    (folder / "long.yaml").write_text(base)
    arms = {"plain": {"objective.name": "next_token"}, "early": {"objective.active": [0, 0.25]}, "jepa": {}}
    matching = match(make_study(base="long.yaml", arms=arms, matched_by=matched_by))
    runs = {run.arm: run for run in make_runs(matching.study, matching, {})}
    for name, run in runs.items():
        config = run.config
        corpus = Corpus(config.data.path, "train")
        loader = make_loader(config, corpus, config.make_layout(SpecialTokenIds(0, 2, 3, 4, 500), corpus.views))
        positions = 0
        while consumed_fraction(loader.consumed, config.train, loader.records) < 1:
            positions += loader.next_rows(config.train.global_batch_rows).segment_lengths.sum()
        steps, _, tokens = loader.consumed
        assert matching.arms[name].tokens_per_step == pytest.approx(tokens / steps, rel=0.02), name
        plan = make_plan(config, corpus)
        assert plan.step.stream.positions == pytest.approx(positions / steps, rel=0.02), name
        assert run.flops == pytest.approx(plan.flops * steps, rel=0.03), name


def test_faster_arms_read_more_tokens_if_matched_by_seconds(make_study):
    matching = match(make_study(arms=ARMS, matched_by="seconds"))
    ratios = {"plain": 1.0, "jepa": 0.5, "dropout": 0.75, "wide": 1.5}
    speeds = {arm: PairedRatio(ratio, 0.9 * ratio, 1.1 * ratio) for arm, ratio in ratios.items()}
    tokens = {run.arm: run.config.train.tokens for run in make_runs(matching.study, matching, speeds)}
    assert tokens == {arm: round(matching.base_tokens * ratio) for arm, ratio in ratios.items()}


def test_equally_fast_arms_have_the_same_budget(make_study):
    matching = match(make_study(matched_by="seconds"))
    for low, high, factor in ((0.94, 1.01, 1), (0.94, 0.99, 0.95), (1.0, 1.1, 1)):
        speeds = {"plain": PairedRatio(1, 1, 1), "jepa": PairedRatio(0.95, low, high)}
        assert matching.tokens(matching.arms["jepa"], speeds) == round(factor * matching.base_tokens)


def test_without_matching_each_arm_has_its_own_budget_and_batch(make_study):
    arms = {
        "plain": {"objective.name": "next_token"},
        "long": {"objective.name": "next_token", "train.steps": 4 * STEPS},
    }
    matching = match(make_study(arms=arms, matched_by="none"))
    runs = make_runs(matching.study, matching, {})
    assert [(run.config.train.steps, run.config.train.global_batch_rows) for run in runs] == [
        (STEPS, 8),
        (4 * STEPS, 8),
    ]
    assert runs[1].flops == pytest.approx(4 * runs[0].flops, rel=0.01)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"epochs": 2}, {"epochs": 2, "global_batch_rows": 8, "micro_batch_rows": 4}),
        ({"global_batch_rows": 4}, {"steps": STEPS, "global_batch_rows": 4, "micro_batch_rows": 4}),
    ],
)
def test_all_arms_are_finetuned_like_the_base(make_study, folder, given, expected):
    base = yaml.safe_load((folder / "base.yaml").read_text())
    pairs = str(folder / "pairs.jsonl")
    task = {"name": "nl_rx", "test": pairs}
    base["evaluation"]["tasks"] += [task | {"train": pairs, "finetune": given}, task | {"label": "before"}]
    (folder / "finetuned.yaml").write_text(yaml.safe_dump(base))
    matching = match(make_study(base="finetuned.yaml", arms=ARMS, matched_by="flops"))
    assert matching.arms["plain"].config.train.global_batch_rows < 8
    for run in make_runs(matching.study, matching, {}):
        assert [getattr(task, "finetune", None) for task in run.config.evaluation.tasks] == [None, expected, None], (
            run.arm
        )


def test_epochs_of_the_base_are_converted_to_tokens(make_study, folder):
    (folder / "epochs.yaml").write_text((folder / "base.yaml").read_text().replace(f"steps: {STEPS}", "epochs: 2"))
    matching = match(make_study(base="epochs.yaml"))
    assert matching.base_tokens == sum(tokens_of_steps(matching.base, whole_run=True))


def test_arms_with_different_records_get_separate_corpora(make_study, folder):
    arms = {
        "plain": {},
        "short": {"data.filters.min_characters": 40},
        "again": {"data.filters.min_characters": 40, "objective.weight": 1},
        "named": {"data.filters.min_characters": 50, "data.path": "elsewhere"},
        "answers": {"data.lm_views": "last"},
    }
    study = make_study(arms=arms)
    overrides, corpora = assign_corpora(study, load_base_config(study))
    assert overrides["plain"] == overrides["answers"] == overrides["named"] == {}
    assert overrides["short"] == overrides["again"] and overrides["short"]["data.path"].startswith(
        f"{folder / 'corpus'}-"
    )
    assert [config.data.path for config in corpora] == [
        str(folder / "corpus"),
        overrides["short"]["data.path"],
        "elsewhere",
    ]
