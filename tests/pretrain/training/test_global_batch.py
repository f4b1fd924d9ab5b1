"""Invariant 2: losses and gradients depend on the global batch only. A NaN on one rank skips the step on all ranks."""

import json
import math

import pytest
import yaml

from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, tiny_config, write_config
from tests.families import FAMILIES

WORKER = ROOT / "tests/pretrain/training/several_runs.py"
FIXED_POOL = {"pool8": ["r1-m8", "r2-m4"], "pool4": ["r1-m4", "r2-m2"]}


def metrics(folder, name):
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


JEPA = {"name": "llm_jepa", "weight": 0.5}
REGULARIZERS = [{"name": name, "weight": 0.05} for name in ("vicreg", "sigreg", "coding_rate")]
SUMS = {
    "cosine": JEPA | {"dropout": 0.3},
    "l2-both": JEPA | {"distance": "l2", "direction": "both", "predictor_placement": "prepend"},
    "tube": {"name": "semantic_tube", "weight": 0.5, "form": "sub_span"},
    "in-context": JEPA | {"target": "in_context", "dropout": 0.3},
    "predictor-mlp": JEPA | {"predictor_mlp": 24, "stop_gradient": True},
    "nitp": {"name": "nitp"},
    "nextlat": {"name": "nextlat", "kl_weight": 0.5},
}
"""Objectives that are sums over pairs, spans or targets."""
POOLED = {
    "info_nce": JEPA | {"distance": "info_nce", "dropout": 0.3},
    "regularized": JEPA | {"distance": "mse", "regularizers": REGULARIZERS},
    "in-context-k0": JEPA | {"target": "in_context", "predictor_tokens": 0, "regularizers": REGULARIZERS},
    "regularizers-alone": {"name": "regularized", "regularizers": REGULARIZERS},
}
"""Objectives that depend on all pairs of a micro step at once."""
OTHER_FAMILIES = [family for family in FAMILIES if family != "llama"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train with different splits of 8 rows over ranks and micro batches, in two launches, and return the folder."""
    folder = tmp_path_factory.mktemp("global-batch")
    configs: dict[int, list] = {1: [], 2: []}

    def add(name: str, prefix: str = "", ranks: int = 1, micro: int = 8, **changes) -> None:
        values = tiny_config(folder, name=name, train__micro_batch_rows=micro, monitor__loggers=[], **changes)
        configs[ranks].append(prefix + str(write_config(folder, values)))

    for name, objective in (SUMS | POOLED).items():
        for ranks, micro in ((1, 8), (1, 4), (2, 4), (2, 2)):
            length = (
                192 if "predictor_placement" in objective else 128
            )  # prepended predictor tokens need copies of both views
            add(
                f"{name}-r{ranks}-m{micro}", ranks=ranks, micro=micro, objective=objective, data__sequence_length=length
            )
    for family in OTHER_FAMILIES:
        shape = yaml.safe_load((ROOT / "configs" / "models" / f"{family}_tiny.yaml").read_text())
        for ranks, micro in ((1, 8), (2, 2)):
            add(
                f"{family}-r{ranks}-m{micro}",
                ranks=ranks,
                micro=micro,
                objective=SUMS["cosine"],
                model={"family": family, "shape": shape},
            )
    add("nan", "nan:", ranks=2, micro=4, objective__distance="cosine", train__steps=5)
    add(
        "collapse",
        objective__distance="cosine",
        objective__weight=20.0,
        train__steps=40,
        train__learning_rate=1e-2,
        monitor={"log_every": 20, "validate_every": 20, "validation_records": 60},
    )
    prepare_corpus(configs[1][0])
    logs = {ranks: run_command(ranks_command(ranks, WORKER, *paths)).stdout for ranks, paths in configs.items()}
    (folder / "one-rank.log").write_text(logs[1])
    return folder


def assert_same_losses(folder, first, second):
    pairs = list(zip(metrics(folder, first), metrics(folder, second), strict=True))
    assert len(pairs) == 4
    for one, other in pairs:
        tags = [tag for tag in one if tag.startswith("loss/")] + [
            "optimizer/grad_norm",
            "records",
            "tokens",
            "positions",
        ]
        assert len(tags) >= 7
        for tag in tags:
            assert one[tag] == pytest.approx(other[tag], rel=1e-5, abs=1e-6), (tag, one["step"], first, second)


@pytest.mark.parametrize("split", ["r1-m4", "r2-m4", "r2-m2"])
@pytest.mark.parametrize("objective", SUMS)
def test_losses_and_gradients_do_not_depend_on_ranks_or_micro_batches(folder, objective, split):
    assert_same_losses(folder, f"{objective}-r1-m8", f"{objective}-{split}")


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_losses_and_gradients_of_any_family_do_not_depend_on_ranks_or_micro_batches(folder, family):
    assert_same_losses(folder, f"{family}-r1-m8", f"{family}-r2-m2")


@pytest.mark.parametrize("pool", FIXED_POOL)
@pytest.mark.parametrize("objective", POOLED)
def test_a_pooled_term_depends_on_the_rows_of_a_micro_step_but_not_on_their_ranks(folder, objective, pool):
    one_rank, two_ranks = FIXED_POOL[pool]
    assert_same_losses(folder, f"{objective}-{one_rank}", f"{objective}-{two_ranks}")


def test_targets_in_context_are_monitored_in_context_and_encoded_separately(folder):
    for split in ("r1-m8", "r2-m4"):
        first, *_, last = metrics(folder, f"in-context-{split}")
        assert "embedding_in_context/paired_cosine" in first and "embedding/paired_cosine" not in first
        groups = ("validation/embedding", "validation/embedding_in_context")
        cosines = [last[f"{group}/{name}"] for group in groups for name in ("paired_cosine", "shuffled_cosine")]
        assert len(set(cosines)) == 4
    plain, in_context = (metrics(folder, f"{name}-r1-m8")[-1] for name in ("cosine", "in-context"))
    positions = [line["positions"] / line["records"] for line in (plain, in_context)]
    assert positions[1] < 0.85 * positions[0], "targets in context must need no copy"
    assert "embedding/paired_cosine" not in metrics(folder, "regularizers-alone-r1-m8")[-1]
    assert "validation/embedding/paired_cosine" in metrics(folder, "regularizers-alone-r1-m8")[-1]


def test_a_contrastive_term_sees_the_negatives_of_all_ranks(folder):
    large_pool, small_pool = (metrics(folder, f"info_nce-{name}")[0]["loss/jepa"] for name in ("r2-m4", "r2-m2"))
    assert large_pool > small_pool  # twice as many negatives give a larger loss with the same weights


def test_the_first_loss_equals_a_uniform_guess_on_any_number_of_ranks(folder):
    one, two = (metrics(folder, f"cosine-r{ranks}-m4")[0]["loss/lm"] for ranks in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)
    # The logits of a normalised hidden state have the variance D * std^2, here 32 * 0.2^2. Half of it adds to the loss.
    assert one == pytest.approx(math.log(448) + 32 * 0.2**2 / 2, abs=0.35)


def test_a_nan_on_one_rank_skips_the_step_on_all_ranks_and_is_counted(folder):
    lines = metrics(folder, "nan")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1]
    assert lines[2]["loss/jepa"] is None and math.isfinite(lines[2]["loss/lm"])
    assert all(math.isfinite(line["loss/total"]) for line in lines if line["step"] != 3)


def test_a_collapse_with_the_published_jepa_term_is_reported_as_a_warning(folder):
    last = metrics(folder, "collapse")[-1]
    assert last["validation/embedding/paired_cosine"] - last["validation/embedding/shuffled_cosine"] < 0.1
    assert "WARNING: the embeddings have collapsed" in (folder / "one-rank.log").read_text()
