"""Charts as inline SVG for the page: text stays text, colours are CSS variables of the page, and ids are unique."""

import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pretrain.report.curves import Band
from pretrain.report.embeddings import EmbeddingProjection
from pretrain.report.row_kinds import Difference
from pretrain.report.sensitivity import KeyScores
from pretrain.report.summary import Summaries

INK, GRID, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404"
"""Placeholders that `_svg` replaces by CSS variables of the page, like the colours of `arm_style`."""
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", FIRST: "var(--arm1)", SECOND: "var(--arm2)"}
HUES = 7
"""Number of arm colours in the page, not counting the baseline's. Further arms reuse them with a different dash."""
Dash = str | tuple[int, tuple[float, ...]]
DASHES: tuple[Dash, ...] = ("-", (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
BASELINE_DASH: Dash = (0, (4, 3))
"""Dashes of the baseline. The gaps keep an arm visible whose curve is close to the baseline."""
LABELLED = 8
"""Maximum number of arms for which a chart labels the ends of its lines."""
WIDTH = 11.6
"""Width of a chart in inches; the page rescales it."""
NAMES = {"tokens": "corpus tokens", "flops": "training FLOPs", "seconds": "training seconds"}
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_counter = itertools.count()

plt.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "lines.linewidth": 1.8,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "figure.constrained_layout.use": True,
        "text.parse_math": False,
    }
)


def arm_style(number: int) -> tuple[str, Dash]:
    """Return the placeholder colour and the dash for the number of an arm; 0 is the baseline."""
    return f"#05{number:02x}00", BASELINE_DASH if number == 0 else DASHES[(number - 1) // HUES % len(DASHES)]


def arm_variable(number: int) -> str:
    """Return the CSS variable of the colour for the number of an arm."""
    return "var(--arm0)" if number == 0 else f"var(--arm{(number - 1) % HUES + 1})"


def curves(summaries: Summaries, bands: Callable[[str], dict[str, Band]], label: str, x_axis: tuple[str, ...]) -> str:
    """Plot a measure against several amounts, side by side, with a common vertical axis; "" if no run has it."""
    panels = {amount: panel_bands for amount in x_axis if (panel_bands := bands(amount))}
    if not panels:
        return ""
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.9), sharey=True, squeeze=False)
    for axis, (amount, panel_bands) in zip(axes[0], panels.items(), strict=True):
        _draw_bands(axis, summaries, panel_bands)
        _label_amount(axis, amount, max(float(band.x.max()) for band in panel_bands.values()))
    _scale(axes[0][0], next(iter(panels.values())), label)
    last_bands = next(reversed(panels.values()))
    if len(last_bands) <= LABELLED:
        figure.canvas.draw()
        _name_lines(axes[0][-1], summaries, last_bands)
    return _svg(figure)


def diagnostics(summaries: Summaries, tags: dict[str, tuple[str, Callable[[str], dict[str, Band]]]]) -> str:
    """Plot several measures against tokens, one panel each; `tags` maps a title to its unit and bands."""
    panels = {title: (unit, panel_bands) for title, (unit, bands) in tags.items() if (panel_bands := bands("tokens"))}
    if not panels:
        return ""
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.9), squeeze=False)
    for axis, (title, (unit, panel_bands)) in zip(axes[0], panels.items(), strict=True):
        _draw_bands(axis, summaries, panel_bands)
        _label_amount(axis, "tokens", max(float(band.x.max()) for band in panel_bands.values()))
        axis.set_title(title)
        axis.set_ylabel(unit)
    return _svg(figure)


def layer_profiles(summaries: Summaries, panels: dict[str, tuple[str, dict[str, Band]]]) -> str:
    """Plot measures against the number of the layer, one panel each; "" if there are none.

    `panels` maps a title to its unit and bands.
    """
    if not panels:
        return ""
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.9), squeeze=False)
    for axis, (title, (unit, bands)) in zip(axes[0], panels.items(), strict=True):
        _draw_bands(axis, summaries, bands)
        _scale(axis, bands, unit)
        axis.set_xlabel("layer")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_title(title)
    return _svg(figure)


def sensitivity(summaries: Summaries, measured: dict[str, list[KeyScores]]) -> str:
    """Plot the score against each tuned key, one panel each, with a line for each arm; "" if there is none."""
    if not measured:
        return ""
    numbers = {name: number for number, name in enumerate(summaries.arms)}
    columns = min(len(measured), 3)
    rows = -(-len(measured) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(measured) :]:
        axis.set_visible(False)
    for axis, (key, arms) in zip(axes.flat, measured.items(), strict=False):
        for scores in arms:
            color, dash = arm_style(numbers[scores.arm])
            line: dict[str, Any] = {"linestyle": dash} if scores.has_numbers else {"linestyle": "none", "marker": "_"}
            axis.plot(scores.values, scores.means, color=color, label=scores.arm, **line)
            good = [scores.values[index] for index in scores.good]
            if scores.has_numbers:
                axis.plot(good, [scores.means[index] for index in scores.good], color=color, linewidth=5, alpha=0.35)
            for value, points in zip(scores.values, scores.scores, strict=True):
                axis.plot([value] * len(points), points, color=color, linestyle="none", marker="o", markersize=3.5)
        ticks = sorted({value for scores in arms for value in scores.values if not isinstance(value, str)})
        if ticks and ticks[0] > 0:
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axis.set_title(key)
        axis.set_ylabel(summaries.comparison.metric.name)
        if len(arms) <= LABELLED:
            axis.legend(frameon=False, fontsize=8.5)
    return _svg(figure)


def forest(summaries: Summaries) -> str:
    """Plot each arm's difference from the baseline: seeds, mean and interval; "" if there is no difference to show."""
    tests = [(name, test, mean) for name, test in summaries.tests.items() if (mean := test.mean) is not None]
    if not tests:
        return ""
    assert summaries.baseline is not None  # without a baseline there is no test
    figure, axis = plt.subplots(figsize=(WIDTH * 0.8, 0.75 + 0.42 * len(tests)))
    numbers = {name: number for number, name in enumerate(summaries.arms)}
    base = summaries.baseline.values
    for row, (name, test, mean) in enumerate(tests):
        color, _ = arm_style(numbers[name])
        values = summaries.arms[name].values
        if test.low is not None and test.high is not None:
            axis.plot([test.low, test.high], [row, row], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axis.plot(
            [values[seed] - base[seed] for seed in test.seeds],
            [row] * len(test.seeds),
            "o",
            color=color,
            markersize=4.5,
        )
        axis.plot([mean], [row], marker="|", color=INK, markersize=15, markeredgewidth=2)
    axis.axvline(0, color=INK, linewidth=1)
    axis.set_yticks(range(len(tests)), [name for name, _, _ in tests])
    axis.set_ylim(len(tests) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(
        f"difference from {summaries.comparison.baseline} in {summaries.comparison.metric}"
        + (" (right is better)" if summaries.comparison.metric.higher_is_better else " (left is better)")
    )
    return _svg(figure)


def row_kinds(summaries: Summaries, arms: dict[str, list[Difference]]) -> str:
    """Plot each arm's differences by kind of row, with intervals, one panel per arm; "" if there are none."""
    if not arms:
        return ""
    numbers = {name: number for number, name in enumerate(summaries.arms)}
    kinds = [difference.kind for difference in next(iter(arms.values()))]
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(WIDTH * (0.8 if columns == 1 else 1), rows * (0.8 + 0.24 * len(kinds))),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(arms) :]:
        axis.set_visible(False)
    for axis, (name, differences) in zip(axes.flat, arms.items(), strict=False):
        color, _ = arm_style(numbers[name])
        for height, difference in enumerate(differences):
            if difference.low is not None:
                ends = [difference.low, difference.high]
                axis.plot(ends, [height, height], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
            axis.plot([difference.mean], [height], "o", color=color, markersize=4.5)
        axis.axvline(0, color=INK, linewidth=1)
        axis.grid(axis="y", visible=False)
        axis.tick_params(labelbottom=True)  # the last row of panels may be incomplete
        axis.set_title(name)
    axes[0][0].set_yticks(range(len(kinds)), kinds)
    axes[0][0].set_ylim(len(kinds) - 0.4, -0.6)
    figure.supxlabel(f"difference from {summaries.comparison.baseline}", fontsize=9.5)
    return _svg(figure)


def embeddings(pictures: dict[str, EmbeddingProjection]) -> str:
    """Plot the projected embeddings, one panel per arm, all with the same scale."""
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    width = WIDTH * (columns if columns > 2 else 3) / 4 if columns < 4 else WIDTH
    figure, axes = plt.subplots(rows, columns, figsize=(width, rows * (width / columns + 0.3)), squeeze=False)
    half_range = 1.05 * max(
        float(np.abs(np.concatenate([picture.first, picture.second])).max()) for picture in pictures.values()
    )
    for axis in axes.flat[len(pictures) :]:
        axis.set_visible(False)
    for axis, (name, picture) in zip(axes.flat, pictures.items(), strict=False):
        axis.plot(
            *np.stack([picture.first, picture.second], axis=1).transpose(2, 1, 0), color=INK, linewidth=0.5, alpha=0.3
        )
        axis.plot(*picture.first.T, "o", color=FIRST, markersize=3.2, markeredgewidth=0, alpha=0.85)
        axis.plot(*picture.second.T, "^", color=SECOND, markersize=3.4, markeredgewidth=0, alpha=0.85)
        axis.set(xlim=(-half_range, half_range), ylim=(-half_range, half_range), aspect="equal")
        axis.set_title(f"{name}\n{picture.explained:.0%} of the variance", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.yaxis.set_major_locator(MaxNLocator(3))
    return _svg(figure)


def _draw_bands(axis: Axes, summaries: Summaries, bands: dict[str, Band]) -> None:
    for number, name in enumerate(summaries.arms):
        if (band := bands.get(name)) is None:
            continue
        color, dash = arm_style(number)
        many = len(band.x) > 12
        if len(band.x) == 1:
            axis.errorbar(
                band.x,
                band.mean,
                [band.mean - band.low, band.high - band.mean],
                color=color,
                marker="o",
                markersize=5,
                capsize=0,
                elinewidth=4,
                ecolor=matplotlib.colors.to_rgba(color, 0.35),
            )
        else:
            axis.fill_between(band.x, band.low, band.high, color=color, alpha=0.2, linewidth=0)
            axis.plot(
                band.x,
                band.mean,
                color=color,
                linestyle=dash,
                marker=None if many else "o",
                markersize=3.5,
                zorder=3 if number == 0 else 2,
            )


def _label_amount(axis: Axes, amount: str, largest: float) -> None:
    """Label the horizontal axis. The power of ten is in the label instead of at the ticks."""
    power = 3 * int(np.floor(np.log10(max(largest, 1)) / 3)) if largest >= 10_000 else 0
    unit = {0: "", 3: " (thousands)", 6: " (millions)", 9: " (billions)"}.get(
        power, f" (10{str(power).translate(SUPERSCRIPTS)})"
    )
    axis.set_xlabel(NAMES[amount] + unit)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**power:,.6g}"))
    axis.set_xlim(0, 1.03 * max(largest, 1))


def _scale(axis: Axes, bands: dict[str, Band], label: str) -> None:
    """Label the vertical axis; make it logarithmic if positive values span more than a factor of 5."""
    low = min(float(band.low.min()) for band in bands.values())
    high = max(float(band.high.max()) for band in bands.values())
    logarithmic = low > 0 and high / low > 5
    if logarithmic:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel(label + (", log scale" if logarithmic else ""))


def _name_lines(axis: Axes, summaries: Summaries, bands: dict[str, Band]) -> None:
    """Write the names of the arms to the right of the chart, as close to the ends of their lines as space allows."""
    to_axes = axis.transAxes.inverted()
    line_ends = {
        name: to_axes.transform(axis.transData.transform((band.x[-1], band.mean[-1])))[1]
        for name, band in bands.items()
    }
    order = sorted(line_ends, key=line_ends.__getitem__)
    gap = 0.085
    heights: list[float] = []
    for name in order:
        heights.append(max(line_ends[name], heights[-1] + gap if heights else 0.0))
    excess = max(0.0, heights[-1] - 1.0)
    heights[-1] -= excess
    for index in range(len(heights) - 2, -1, -1):
        heights[index] = min(heights[index], heights[index + 1] - gap)
    numbers = {name: number for number, name in enumerate(summaries.arms)}
    for name, height in zip(order, heights, strict=True):
        axis.text(
            1.03, height, name, transform=axis.transAxes, color=arm_style(numbers[name])[0], va="center", fontsize=9
        )


def _svg(figure: Figure) -> str:
    """Return the figure as an inline SVG element and close it.

    The XML declaration and metadata are removed because they contain URLs. Colours become CSS variables and ids become
    unique in the page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    for placeholder, variable in VARIABLES.items():
        text = text.replace(placeholder, variable)
    text = re.sub(r"#05([0-9a-f]{2})00", lambda match: arm_variable(int(match[1], 16)), text)
    id_prefix = f"c{next(_counter)}-"
    text = re.sub(r'\bid="', f'id="{id_prefix}', text)
    text = re.sub(r"url\(#", f"url(#{id_prefix}", text)
    text = re.sub(r'href="#', f'href="#{id_prefix}', text)
    return re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", text, count=1)
