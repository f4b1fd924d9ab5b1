"""Objectives by name, their weight schedule, regularizers against slow references, and Semantic Tube Prediction."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_prep.layout import Pairing, make_layout
from data_prep.utils.console import UserError
from pretrain.config import load_config
from pretrain.data.batch import assemble
from pretrain.data.loader import Loader, count_ends, count_pairs, count_spans, count_targets
from pretrain.models.head import Head
from pretrain.objectives.base import ForwardPass, ModelShape, build_objective, total_loss
from pretrain.objectives.configs import objective_configs
from pretrain.objectives.pool import Gather
from pretrain.objectives.regularizers import coding_rate_gap, sigreg, vicreg
from pretrain.objectives.semantic_tube import SemanticTube
from tests.commands import ROOT
from tests.reference import tube_distance

ALONE = Gather(all_gather=lambda mine: mine, rank=0)
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize(("layers", "expected"), [(2, 1), (4, 1), (16, 3), (24, 5), (28, 6)])
def test_nitp_reads_the_layer_at_a_fifth_of_the_depth_or_the_configured_one(layers, expected):
    for settings, layer in (("", expected), (", layer: 2", 2)):
        config = load_config(DEMO, [f"objective={{name: nitp{settings}}}"]).objective
        assert build_objective(config, ModelShape(16, layers)).layers == (layer,)
    with pytest.raises(UserError, match=f"the hidden states of layer {layers + 1}, but the model has {layers} layers"):
        build_objective(
            load_config(DEMO, [f"objective={{name: nitp, layer: {layers + 1}}}"]).objective, ModelShape(16, layers)
        )


def test_objectives_are_found_by_the_names_of_their_files():
    assert set(objective_configs()) >= {"next_token", "llm_jepa", "semantic_tube", "regularized"}


@pytest.mark.parametrize(
    "overrides, terms",
    [
        (["objective.name=next_token"], {"lm": 1.0}),
        (["objective.distance=cosine", "objective.weight=2"], {"lm": 1.0, "jepa": 2.0}),
        (["objective={name: semantic_tube, weight: 0.02}"], {"lm": 1.0, "jepa": 0.02}),
        (
            ["objective={name: semantic_tube, weight: 0.02, regularizers: [{name: vicreg, weight: 2}]}"],
            {"lm": 1.0, "jepa": 0.02, "vicreg": 2.0},
        ),
        (
            ["objective.regularizers=[{name: sigreg, weight: 0.1}, {name: vicreg, weight: 0.2}]"],
            {"lm": 1.0, "jepa": 0.1, "sigreg": 0.1, "vicreg": 0.2},
        ),
        (
            ["objective={name: regularized, regularizers: [{name: coding_rate, weight: 0.5}]}"],
            {"lm": 1.0, "coding_rate": 0.5},
        ),
    ],
)
def test_a_configuration_builds_its_objective(overrides, terms):
    objective = build_objective(load_config(DEMO, overrides).objective, ModelShape(16, 4))
    assert objective.weights == terms
    unit = count_ends if "regularized" in overrides[0] else count_pairs
    units = {name: unit for name in terms} | {"lm": count_targets}
    if "semantic_tube" in overrides[0]:
        units["jepa"] = count_spans
    assert objective.units == units


REGULARIZED = "regularizers: [{name: vicreg, weight: 1}]"


@pytest.mark.parametrize(
    ("settings", "kind", "pairing", "spans"),
    [
        ("name: next_token", "joint", None, None),
        ("name: next_token, layout: independent", "independent", None, None),
        ("name: llm_jepa", "joint", Pairing(1), None),
        (
            "name: llm_jepa, predictor_tokens: 3, predictor_placement: prepend, direction: both",
            "joint",
            Pairing(3, "prepend", "both"),
            None,
        ),
        ("name: semantic_tube", "joint", None, "three_points"),
        (
            f"name: semantic_tube, layout: independent, form: sub_span, {REGULARIZED}",
            "independent",
            Pairing(0),
            "sub_span",
        ),
    ],
)
def test_an_objective_has_its_layout_and_pairs_in_validation(settings, kind, pairing, spans, specials):
    config = load_config(DEMO, [f"objective={{{settings}}}"]).objective
    for views in (1, 2, 3):
        for lm_views, train_end_token in (("all", True), ("last", False)):
            options = {"views": views, "spans": spans, "lm_views": lm_views, "train_end_token": train_end_token}
            assert config.make_layout(specials, views, lm_views, train_end_token) == make_layout(
                kind, specials, pairing=pairing, **options
            )
            read_out = pairing or (Pairing() if views > 1 else None)
            validating = config.make_layout(specials, views, lm_views, train_end_token, validating=True)
            assert validating == make_layout(kind, specials, pairing=read_out, **options)
    assert config.make_layout(specials, 2, "all") == make_layout(kind, specials, pairing=pairing, spans=spans)


def test_targets_in_context_are_validated_in_context_and_encoded_separately(specials):
    config = load_config(DEMO, ["objective={name: llm_jepa, predictor_tokens: 2, target: in_context}"]).objective
    in_context = make_layout("joint", specials, pairing=Pairing(2, in_context=True))
    assert config.make_layout(specials, 2, "all") == in_context and config.embedding_group == "embedding_in_context"
    assert config.validation_layouts(specials, 2, "all") == {
        "embedding_in_context": in_context,
        "embedding": make_layout("joint", specials, pairing=Pairing(2)),
    }
    alone = load_config(DEMO, ["objective={name: llm_jepa}"]).objective
    assert list(alone.validation_layouts(specials, 2, "all")) == ["embedding"] == [alone.embedding_group]


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["objective.name=llm_jepo"], "objective.name: 'llm_jepo' is not one of "),
        (
            ["objective={name: semantic_tube, distance: l2}"],
            "objective.distance has no effect with semantic_tube; remove it",
        ),
        (["objective.distnace=l2"], "unknown key 'objective.distnace'; the nearest known key is 'objective.distance'"),
        (
            ["objective.distance=l2", "objective.temperature=0.1"],
            "objective: temperature has an effect only with distance info_nce; remove it",
        ),
        (
            ["objective.predictor_tokens=0", "objective.predictor_placement=prepend"],
            "objective: predictor_placement has no effect because predictor_tokens is 0",
        ),
        (
            ["objective={name: llm_jepa, target: in_context, layout: independent}"],
            "objective: target: in_context works only with layout: joint, because a view has a context only in",
        ),
        (
            ["objective={name: llm_jepa, target: in_context, direction: both}"],
            "objective: target: in_context works only with direction: forward, because a view is read before",
        ),
        (
            ["objective={name: llm_jepa, target: in_context, direction: backward}"],
            "objective: target: in_context works only with direction: forward",
        ),
        (
            ["objective={name: llm_jepa, target: in_context, predictor_placement: prepend}"],
            "objective: target: in_context works only with predictor_placement: append, because prepended",
        ),
        (["objective={name: regularized}"], "objective: regularizers is empty: add one, or choose next_token"),
        (
            ["objective={name: llm_jepa, predictor_tokens: 0, direction: backward}"],
            "objective: direction has an effect only with predictor tokens, predictor_mlp, info_nce or",
        ),
        (
            ["objective.regularizers=[{name: vicreg, weight: 1, projections: 3}]"],
            "objective.regularizers.0.projections has no effect with vicreg",
        ),
        (
            ["objective.regularizers=[{name: vicreg, weight: 1}, {name: vicreg, weight: 2}]"],
            "objective.regularizers: a regularizer is listed twice",
        ),
        (
            ["objective.weight_schedule=[[0.5, 1], [0.2, 0]]"],
            "objective.weight_schedule: must be points (fraction, factor) with increasing fractions",
        ),
        (["objective.weight=.inf"], "objective.weight: "),
        (["objective.weight_schedule=[[0, .nan], [1, 1]]"], "objective.weight_schedule.0.1: "),
        (
            ["objective.weight_schedule=[[0, 0], [1, 0]]"],
            "objective.weight_schedule: factors must not be negative, and at least one must be above 0",
        ),
        (["objective.active=[0.5, 0.5]"], "objective.active: must be two increasing fractions between 0 and 1"),
        (["objective.active=[0, 1.5]"], "objective.active: must be two increasing fractions between 0 and 1"),
        (
            ["objective.active=[0, 0.25]", "objective.weight_schedule=[[0.1, 0], [0.25, 0], [0.5, 1]]"],
            "objective: active has no effect because weight_schedule is 0 from 0 to 0.25; change one of them",
        ),
        (["objective.dropout=1.0"], "objective.dropout: must be at least 0 and less than 1"),
        (["objective.dropout=[[0, 0.5], [1, 1]]"], "objective.dropout: must be at least 0 and less than 1"),
        (["objective.dropout=[[0.5, 0], [0.2, 0.5]]"], "objective.dropout: must be points (fraction, dropout) with"),
        (["objective.dropout=[]"], "objective.dropout: must be points (fraction, dropout) with"),
        (["objective.dropout=high"], "objective.dropout: Input should be a valid number"),
    ],
)
def test_an_invalid_or_ineffective_setting_is_an_error(overrides, expected):
    with pytest.raises(UserError) as raised:
        load_config(DEMO, overrides)
    assert str(raised.value).startswith(expected)


def test_next_token_ignores_keys_of_other_objectives_but_not_misspelt_ones():
    config = load_config(DEMO, ["objective.name=next_token", "objective.form=views"])
    assert sorted(config.ignored_keys) == ["distance", "form", "predictor_tokens", "weight"]
    with pytest.raises(UserError, match=r"unknown key 'objective\.wieght'"):
        load_config(DEMO, ["objective.name=next_token", "objective.wieght=3"])


def test_the_weight_follows_its_piecewise_linear_schedule():
    config = load_config(DEMO, ["objective.weight_schedule=[[0.1, 0], [0.2, 1], [0.6, 1], [0.8, 0.25]]"]).objective
    factors = {0.0: 0, 0.1: 0, 0.15: 0.5, 0.2: 1, 0.4: 1, 0.7: 0.625, 0.8: 0.25, 1.0: 0.25}
    assert {fraction: pytest.approx(config.factor(fraction)) for fraction in factors} == factors
    assert (
        load_config(DEMO).objective.factor(0.3)
        == load_config(DEMO, ["objective.name=next_token"]).objective.factor(0.3)
        == 1
    )


def test_terms_are_switched_off_outside_of_their_part_of_the_budget():
    active = load_config(DEMO, ["objective.active=[0.25, 0.5]", "objective.weight_schedule=[[0, 0], [1, 1]]"]).objective
    assert [active.factor(fraction) for fraction in (0.2, 0.25, 0.26, 0.5, 0.51)] == [0, 0, 0.26, 0.5, 0]
    assert [active.record_dropout(fraction) for fraction in (0, 0.24, 0.25, 0.49, 0.5, 0.9)] == [1, 1, 0, 0, 1, 1]
    until_the_end = load_config(DEMO, ["objective.active=[0.5, 1]"]).objective
    assert until_the_end.factor(1.0) == until_the_end.factor(1.02) == 1, "the last step may exceed the budget"


@pytest.mark.parametrize("steps", [7, 100, 360])
def test_pairs_and_weights_of_a_step_agree_if_the_budget_is_in_steps(steps):
    for last in range(1, steps):
        config = load_config(DEMO, [f"objective.active=[0, {last / steps}]"]).objective
        with_weight = [config.factor((step + 1) / steps) == 1 for step in range(steps)]
        with_pairs = [config.record_dropout(step / steps) == 0 for step in range(steps)]
        assert with_weight == with_pairs == [step < last for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "off"),
    [
        ("[[0, 0], [0.1, 1]]", []),
        ("[[0.1, 0], [0.2, 1]]", [0.0]),
        ("[[0, 0], [0.3, 0], [0.6, 1]]", [0.0, 0.1, 0.2]),
        ("[[0.2, 1], [0.5, 0]]", [0.5, 0.6, 0.9]),
        ("[[0.2, 1], [0.3, 0], [0.6, 0], [0.7, 2]]", [0.3, 0.5]),
    ],
)
def test_records_have_no_pairs_where_the_scheduled_factor_stays_0(schedule, off):
    config = load_config(DEMO, [f"objective.weight_schedule={schedule}", "objective.dropout=0.25"]).objective
    fractions = (0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.9)
    assert {fraction: config.record_dropout(fraction) for fraction in fractions} == {
        fraction: 1.0 if fraction in off else 0.25 for fraction in fractions
    }


def test_a_scheduled_dropout_has_at_most_64_levels_and_stays_below_1():
    config = load_config(DEMO, ["objective.dropout=[[0.2, 0.5], [0.4, 0], [0.6, 0.999]]"]).objective
    dropouts = [config.record_dropout(step / 1000) for step in range(1000)]
    assert dropouts[0] == dropouts[200] == 0.5 and dropouts[400] == 0 and dropouts[300] == 0.25
    assert dropouts[600] == dropouts[999] == 0.999
    assert len(set(dropouts)) <= 65 and all(dropout * 64 % 1 == 0 or dropout == 0.999 for dropout in dropouts)


@pytest.mark.parametrize("count", [2, 3, 15])
def test_vicreg_equals_its_definition(count):
    embeddings = torch.randn(20, 6, dtype=torch.float64) * torch.tensor([0.3, 1, 2, 0.1, 1, 0.7])
    valid = torch.arange(20) < count
    covariance = np.cov(embeddings[:count].numpy().T)
    hinge = np.mean([max(0, 1 - math.sqrt(variance + 1e-4)) for variance in np.diag(covariance)])
    correlation = sum(covariance[i, j] ** 2 for i in range(6) for j in range(6) if i != j) / 6
    assert vicreg(embeddings, valid, covariance=0.3).item() == pytest.approx(hinge + 0.3 * correlation, rel=1e-6)


@pytest.mark.parametrize("count", [1, 9])
def test_sigreg_is_the_trapezoidal_rule_at_seventeen_points(count):
    embeddings, valid = torch.randn(12, 3, dtype=torch.float64) * 2, torch.arange(12) < count
    directions = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    directions /= directions.norm(dim=0)
    points = torch.linspace(0, 3, 17, dtype=torch.float64)
    statistics = []
    for projected in (embeddings[:count] @ directions.double()).T:
        phi, normal = torch.exp(1j * points[:, None] * projected).mean(dim=1), torch.exp(-(points**2) / 2)
        statistics.append(count * 2 * torch.trapezoid((phi - normal).abs() ** 2 * normal, points).item())
    assert sigreg(embeddings.float(), valid, 4, torch.tensor(5)).item() == pytest.approx(sum(statistics) / 4, rel=1e-4)


def test_sigreg_equals_the_epps_pulley_integral_along_its_directions():
    """Integrate numerically on a fine grid. The directions depend only on the seed."""
    embeddings, valid = torch.randn(40, 5) * 0.6 + 0.3, torch.arange(40) < 33
    directions = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
    directions /= directions.norm(dim=0)
    points = torch.linspace(-3, 3, 4001)
    statistics = []
    for projected in (embeddings[:33] @ directions).T:
        phi = torch.exp(1j * points[:, None] * projected).mean(dim=1)
        window = torch.exp(-(points**2) / 2)
        statistics.append(33 * torch.trapezoid((phi - window).abs() ** 2 * window, points))
    assert sigreg(embeddings, valid, 8, torch.tensor(9)).item() == pytest.approx(sum(statistics).item() / 8, rel=0.02)


def test_sigreg_is_larger_for_collapsed_and_shifted_clouds():
    generator, valid = torch.Generator().manual_seed(0), torch.ones(500, dtype=torch.bool)
    normal = torch.randn(500, 16, generator=generator)
    line = torch.outer(normal[:, 0], torch.ones(16) / 4)
    values = [
        sigreg(cloud, valid, 64, torch.tensor(1)).item() for cloud in (normal, line, torch.zeros(500, 16), normal + 2)
    ]
    assert values[0] < 2 < 10 * values[0] < min(values[1:])


@pytest.mark.parametrize(("count", "width"), [(12, 5), (5, 12), (6, 6)])
def test_the_coding_rate_gap_equals_its_definition(count, width):
    embeddings, valid = torch.randn(count + 3, width, dtype=torch.float64), torch.arange(count + 3) < count
    unit = embeddings[:count] / embeddings[:count].norm(dim=1, keepdim=True)

    def rate(rows: torch.Tensor) -> torch.Tensor:
        return torch.logdet(torch.eye(width) + width / (count * 0.1) * rows.T @ rows) / 2

    axes = torch.eye(max(count, width), width, dtype=torch.float64)
    axis_aligned = torch.stack([axes[number % min(count, width)] for number in range(count)])
    bound_is_attained = count % min(count, width) == 0
    gap = coding_rate_gap(embeddings.float(), valid, 0.1).item()
    bound = min(count, width) * math.log1p(width / (min(count, width) * 0.1)) / 2
    assert gap == pytest.approx((bound - rate(unit).item()) / count, rel=1e-4)
    assert not bound_is_attained or coding_rate_gap(
        axis_aligned.float(), torch.ones(count, dtype=torch.bool), 0.1
    ).item() == pytest.approx(0, abs=1e-6)
    assert coding_rate_gap(torch.ones(count, width), torch.ones(count, dtype=torch.bool), 0.1).item() > gap > 0


@pytest.mark.parametrize(
    "regularizer",
    [
        lambda pool, valid: vicreg(pool, valid, 0.04),
        lambda pool, valid: sigreg(pool, valid, 4, torch.tensor(0)),
        lambda pool, valid: coding_rate_gap(pool, valid, 0.05),
    ],
    ids=["vicreg", "sigreg", "coding_rate"],
)
@pytest.mark.parametrize("valid", [0, 1])
def test_regularizers_of_at_most_one_pair_are_finite(regularizer, valid, request):
    embeddings = torch.randn(3, 4, requires_grad=True)
    value = regularizer(embeddings, torch.arange(3) < valid)
    value.backward()
    assert embeddings.grad.isfinite().all()
    # The loss is multiplied by the number of pairs, and the spread of a single embedding is not penalized.
    if "sigreg" not in request.node.name:
        assert valid * value.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("joint", "three_points"),
        ("joint", "sub_span"),
        ("joint", "views"),
        ("independent", "three_points"),
        ("independent", "sub_span"),
    ],
)
def test_the_tube_term_of_packed_rows_matches_separate_documents(kind, form, corpus, specials, make_model):
    model, layout = make_model(0), make_layout(kind, specials, spans=form)
    rows = Loader(corpus, layout, 128, seed=5).next_rows(4)
    batch = assemble(rows, corpus, layout, specials, 128, 0)
    packed = SemanticTube(0.02)(ForwardPass(batch, model(batch), {}, model, ALONE)).terms["jepa"]
    expected = []
    tokens = batch.token_ids.flatten().tolist()
    for span in batch.span_index.tolist():
        begin = max(place for place in range(min(map(min, span)) + 1) if tokens[place] == specials.bos)
        end = tokens.index(specials.eos, begin)
        hidden = model.causal_lm.model(torch.tensor([tokens[begin : end + 1]]), use_cache=False).last_hidden_state[0]
        expected.append(tube_distance(hidden, [(one - begin, other - begin) for one, other in span]))
    expected_gradients = torch.autograd.grad(sum(expected), list(model.causal_lm.model.parameters()))
    assert packed.item() == pytest.approx(sum(expected).item(), rel=1e-5)
    gradients = torch.autograd.grad(packed, list(model.causal_lm.model.parameters()))
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


@pytest.mark.parametrize(
    "objective",
    [
        "{name: next_token}",
        *(
            f"{{name: llm_jepa, distance: {distance}, direction: both}}"
            for distance in ("cosine", "l2", "mse", "info_nce")
        ),
        "{name: semantic_tube, form: sub_span}",
        "{name: llm_jepa, regularizers: "
        "[{name: vicreg, weight: 1}, {name: sigreg, weight: 1}, {name: coding_rate, weight: 1}]}",
    ],
)
def test_no_value_is_fetched_from_the_device(objective, corpus, specials):
    """On the meta device, `.item()`, `.tolist()`, `.cpu()`, `.numpy()` and boolean indexing all fail."""
    config = load_config(DEMO, [f"objective={objective}"]).objective
    layout = config.make_layout(specials, corpus.views, "all")
    rows = Loader(corpus, layout, 192, seed=5).next_rows(2)
    batch = assemble(rows, corpus, layout, specials, 192, 40).to(torch.device("meta"))
    hidden = torch.empty(2 * 192, 16, device="meta", requires_grad=True)
    head = Head(torch.nn.Linear(16, 512, bias=False, device="meta"), None, max_logits=4096)
    built = build_objective(config, ModelShape(16, 4))
    terms = built(ForwardPass(batch, hidden, {}, SimpleNamespace(cross_entropy=head), ALONE)).terms
    total_loss(terms, dict.fromkeys(terms, 7), built.weights, ranks=1).backward()
    assert terms.keys() == built.weights.keys() and hidden.grad.is_meta


def test_the_tube_of_bf16_states_is_computed_in_fp32(corpus, specials):
    layout = make_layout("joint", specials, spans="sub_span")
    rows = Loader(corpus, layout, 128, seed=5).next_rows(2)
    batch = assemble(rows, corpus, layout, specials, 128, 0)
    hidden = torch.randn(256, 16).bfloat16()
    head = SimpleNamespace(cross_entropy=lambda *arguments: torch.zeros(()))
    value = SemanticTube(0.02)(ForwardPass(batch, hidden, {}, head, ALONE)).terms["jepa"].item()
    expected = sum(tube_distance(hidden.double(), span) for span in batch.span_index.tolist())
    assert value == pytest.approx(expected.item(), rel=1e-6)
