"""Rendering of the report: the HTML page and the Markdown file."""

import logging
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from data_prep.utils.console import UserError
from pretrain.report import narrative, plots
from pretrain.report.caveats import caveats
from pretrain.report.curves import Band, metric_bands, tag_bands
from pretrain.report.embeddings import EmbeddingProjection, picture
from pretrain.report.examples import worst_examples
from pretrain.report.health import ACTIVATIONS, CLIPPED, GRADIENTS, LOG_Z, LOGITS, Health, health
from pretrain.report.overfitting import overfitting
from pretrain.report.row_kinds import compare_rows, table_heads, table_rows
from pretrain.report.sensitivity import sensitivity
from pretrain.report.summary import MONITORS, Summaries
from pretrain.report.tables import (
    AMOUNTS,
    DEFINITIONS,
    PAST,
    SENSITIVITY,
    SENSITIVITY_REMARK,
    columns,
    definition_rows,
    past_rows,
    row,
    rows_by_arm,
    seed_rows,
    sensitivity_rows,
)

logger = logging.getLogger(__name__)

AUXILIARY_TERMS = (
    "Auxiliary terms are unweighted. Their unit depends on the objective, so compare them only between arms with the "
    "same objective."
)
"""Remark on the auxiliary terms of the loss."""
HEALTH_REMARK = (
    "Measures in which the seeds of two arms do not overlap. Clipped steps are counted over the whole run; the other "
    "measures are means over the second half of the steps. Gradient norms are before clipping."
)
"""Remark on the table on the health of the training."""
NO_HEALTH_DIFFERENCE = "The seeds of the arms overlap in all measures that were recorded."
"""Text if arms do not differ in the health of the training."""
ENVIRONMENT = Environment(
    loader=PackageLoader("pretrain.report", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def markdown(summaries: Summaries) -> str:
    """Return the Markdown report: the verdict, the table of arms, the caveats, and the further tables."""
    lines = [f"# {_plain(summaries.comparison.title)}", "", f"**{_plain(narrative.headline(summaries))}**", ""]
    if tuning := narrative.tuning_sentences(summaries):
        lines += [_plain(" ".join(tuning)), ""]
    if len(summaries.tests) > 1:
        lines += [*(f"- {_plain(narrative.verdict(summaries, name))}" for name in summaries.tests), ""]
    heads = columns(summaries)
    lines += _table(heads, [row(summaries, summary) for summary in summaries.arms.values()])
    lines += ["", f"Mean ± standard deviation over seeds. Metric: {_plain(summaries.comparison.metric_origin)}."]
    remarks = [*narrative.cost_sentences(summaries).values(), *caveats(summaries)]
    if summaries.flops_unavailable_reason:
        remarks.append(f"FLOPs are not counted: {summaries.flops_unavailable_reason}.")
    if remarks:
        lines += ["", *(f"- {_plain(remark)}" for remark in remarks)]
    lines += ["", "## Arms", "", *_table(DEFINITIONS, definition_rows(summaries))]
    lines += ["", f"## {_plain(str(summaries.comparison.metric))} by seed", ""]
    lines += _table(["seed", *summaries.arms], seed_rows(summaries))
    if measured := sensitivity(summaries.comparison):
        lines += ["", "## Sensitivity", "", *_table(SENSITIVITY, sensitivity_rows(measured)), "", SENSITIVITY_REMARK]
    if summaries.scores:
        lines += ["", "## All scores", "", *_table(["metric", *summaries.arms], rows_by_arm(summaries.scores))]
    if summaries.losses:
        lines += ["", "## Validation losses", "", *_table(["term", *summaries.arms], rows_by_arm(summaries.losses))]
        lines += ["", AUXILIARY_TERMS]
    if past := overfitting(summaries):
        lines += ["", "## Past the best validation loss", "", *_table(PAST, past_rows(past)), ""]
        lines += [f"- {_plain(sentence)}" for sentence in narrative.overfitting_sentences(summaries, past)]
    if measures := health(summaries):
        lines += ["", "## Health of the training", ""]
        if measures.rows:
            lines += [*_table(["measure", *summaries.arms], rows_by_arm(measures.rows)), ""]
        lines += [HEALTH_REMARK if measures.rows else NO_HEALTH_DIFFERENCE]
    if by_kind := compare_rows(summaries.comparison):
        lines += ["", "## Which rows?", ""]
        if by_kind.arms:
            lines += [*_table(table_heads(summaries.comparison, by_kind), table_rows(by_kind)), ""]
        lines += [f"- {_plain(remark)}" for remark in by_kind.remarks] or [_plain(by_kind.problem)]
    return "\n".join(lines) + "\n"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(map(_plain, heads))} |",
        "|" + "---|" * len(heads),
        *(f"| {' | '.join(map(_plain, cells))} |" for cells in rows),
    ]


def _plain(text: str) -> str:
    """Escape text for Markdown and put it on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for letter in "\\|*`[]":
        text = text.replace(letter, f"\\{letter}")
    return text


def html(summaries: Summaries, refresh_seconds: int | None = None) -> str:
    """Return the HTML page. Logs a message before each slow part.

    With `refresh_seconds`, an open page loads itself again after this time.
    """
    comparison = summaries.comparison
    logger.info("computing embeddings")
    pictures, no_picture = _pictures(summaries)
    logger.info("drawing charts")
    past = overfitting(summaries)
    measured = sensitivity(comparison)
    by_kind = compare_rows(comparison)
    measures = health(summaries)
    return ENVIRONMENT.get_template("page.html.jinja").render(
        comparison=comparison,
        narrative=narrative,
        caveats=caveats,
        definition_heads=DEFINITIONS,
        definitions=definition_rows(summaries),
        summaries=summaries,
        heads=columns(summaries),
        rows={name: row(summaries, summary) for name, summary in summaries.arms.items()},
        legend=[(name, plots.arm_variable(number), _dash(number)) for number, name in enumerate(summaries.arms)],
        forest=Markup(plots.forest(summaries)),
        curves=_curves(summaries),
        diagnostics=[
            Markup(chart)
            for group, suffix in (("embedding", ""), ("embedding_in_context", ", in context"))
            if (chart := _diagnostics(summaries, group, suffix))
        ],
        monitors=MONITORS,
        embeddings=Markup(plots.embeddings(pictures)) if pictures else "",
        pictures=pictures,
        no_picture=no_picture,
        examples=worst_examples(comparison),
        scores=rows_by_arm(summaries.scores),
        score_heads=["metric", *summaries.arms],
        losses=rows_by_arm(summaries.losses),
        loss_heads=["term", *summaries.arms],
        loss_remark=AUXILIARY_TERMS,
        tuning=narrative.tuning_sentences(summaries),
        refresh_seconds=refresh_seconds,
        sensitivity=sensitivity_rows(measured),
        sensitivity_heads=SENSITIVITY,
        sensitivity_remark=SENSITIVITY_REMARK,
        sensitivity_chart=Markup(plots.sensitivity(summaries, measured)),
        past=past,
        past_heads=PAST,
        by_kind=by_kind,
        kind_chart=Markup(plots.row_kinds(summaries, by_kind.arms)) if by_kind else "",
        kind_heads=table_heads(comparison, by_kind) if by_kind else [],
        kind_rows=table_rows(by_kind) if by_kind else [],
        past_rows=past_rows(past) if past else [],
        health=measures,
        health_heads=["measure", *summaries.arms],
        health_rows=rows_by_arm(measures.rows) if measures else [],
        health_remark=HEALTH_REMARK,
        no_health_difference=NO_HEALTH_DIFFERENCE,
        health_charts=_health_charts(summaries, measures) if measures else [],
    )


def _dash(number: int) -> str:
    style = plots.arm_style(number)[1]
    return "" if isinstance(style, str) else " ".join(str(2 * length) for length in style[1])


def _curves(summaries: Summaries) -> list[dict[str, Any]]:
    """Return the title, remark and chart of each measure that at least one run has."""
    metric = summaries.comparison.metric
    measures = {
        f"{metric}": (
            "At the checkpoints that were evaluated.",
            metric.name,
            lambda x_axis: metric_bands(summaries, metric, x_axis),
        ),
        "validation/loss/lm": (
            "Next-token loss on unseen records.",
            "nats per token",
            _bands_of(summaries, "validation/loss/lm"),
        ),
        "loss/lm": ("Next-token loss of the training batches.", "nats per token", _bands_of(summaries, "loss/lm")),
    }
    auxiliary_tags = [f"loss/{term}" for term in summaries.comparison.loss_terms if term != "lm"]
    measures |= {tag: (AUXILIARY_TERMS, "arbitrary units", _bands_of(summaries, tag)) for tag in auxiliary_tags}
    x_axis = AMOUNTS if not summaries.flops_unavailable_reason else ("tokens", "seconds")
    drawn = (
        {"title": title, "remark": remark, "svg": Markup(plots.curves(summaries, bands, unit, x_axis))}
        for title, (remark, unit, bands) in measures.items()
    )
    return [curve for curve in drawn if curve["svg"]]


def _diagnostics(summaries: Summaries, group: str, suffix: str) -> str:
    """Return charts of the embedding monitors of a group of metric tags; "" if no run has them.

    `suffix` ends the title of each chart.
    """
    validated = any(run.curve(f"validation/{group}/paired_cosine") for run in summaries.comparison.runs)
    prefix = f"validation/{group}/" if validated else f"{group}/"
    titles = {
        "paired_cosine": ("cosine of a pair", "cosine"),
        "shuffled_cosine": ("cosine of unrelated views", "cosine"),
        "retrieval_at_1": ("retrieval@1", "fraction of pairs"),
        "effective_rank": ("effective rank", "dimensions"),
    }
    return plots.diagnostics(
        summaries,
        {title + suffix: (unit, _bands_of(summaries, prefix + name)) for name, (title, unit) in titles.items()},
    )


def _health_charts(summaries: Summaries, measures: Health) -> list[Markup]:
    """Return the charts of the measures in which arms differ: first by layer, then against tokens."""
    titles = {
        GRADIENTS: ("gradient of each layer", "norm"),
        ACTIVATIONS: ("output of each layer", "RMS"),
        LOGITS: ("logits", "RMS"),
        LOG_Z: ("log Z", "nats"),
        CLIPPED: ("clipped steps", "fraction"),
    }
    profiles = {titles[tag][0]: (titles[tag][1], bands) for tag, bands in measures.profiles.items()}
    curves = {titles[tag][0]: (titles[tag][1], _bands_of(summaries, tag)) for tag in measures.tags}
    charts = (plots.layer_profiles(summaries, profiles), plots.diagnostics(summaries, curves))
    return [Markup(chart) for chart in charts if chart]


def _bands_of(summaries: Summaries, tag: str) -> Callable[[str], dict[str, Band]]:
    return lambda x_axis: tag_bands(summaries, tag, x_axis)


def _pictures(summaries: Summaries) -> tuple[dict[str, EmbeddingProjection], list[str]]:
    """Return the picture of each arm's first finished seed, and a message for each reason for missing pictures."""
    pictures: dict[str, EmbeddingProjection] = {}
    missing: dict[str, list[str]] = {}
    for name, summary in summaries.arms.items():
        if not summary.finished:
            missing.setdefault("no run is finished", []).append(name)
            continue
        try:
            pictures[name] = picture(summary.finished[0])
        except UserError as error:
            missing.setdefault(str(error), []).append(name)
    return pictures, [f"{narrative.join_names(names)}: {reason}" for reason, names in missing.items()]
