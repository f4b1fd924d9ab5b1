"""Statistics of a prepared corpus, as text: lengths of views, missing views, and tokens by source."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.selection.drops import unknown_tokens
from data_prep.shards import open_shard, read_manifest, row_lengths
from data_prep.tools.show import display_width, padded

BAR = 40
"""Width of the longest bar, in columns."""
EIGHTHS = " ▏▎▍▌▋▊▉"


def stats(folder: Path, name: str) -> Iterator[str]:
    """Yield texts about one split: a table of the views, a histogram of the lengths of each view, and the sources.

    Every record is counted. Memory is limited to the lengths of one shard and a counter for each length.
    """
    manifest = read_manifest(folder)
    split = manifest["splits"][name]
    counts, incomplete = _length_counts(folder, manifest, split)
    yield "\n".join(
        [
            f"{name}: {split['records']:,} records, {sum(split['tokens'].values()):,} tokens; "
            f"{incomplete / split['records']:.1%} of the records lack a view",
            *_table(manifest["views"], counts),
        ]
    )
    for view, view_counts in zip(manifest["views"], counts, strict=True):
        if view_counts.any():
            yield "\n".join([f"{name}, {view}: records by tokens", *_histogram(view_counts)])
    configured = manifest["settings"]["data"]["sources"]
    sources = [config | totals for config, totals in zip(configured, manifest["sources"], strict=True)]
    yield "\n".join([f"{name}: tokens by source", *_sources(sources, split["shards"])])
    if unknown := unknown_tokens(name, split):
        yield unknown


def _length_counts(folder: Path, manifest: dict[str, Any], split: dict[str, Any]) -> tuple[list[np.ndarray], int]:
    """Return the number of records by length for each view, and the number of records that lack a view."""
    views = manifest["views"]
    counts = [np.zeros(split["longest"][view] + 1, np.int64) for view in views]
    incomplete = 0
    for entry in tqdm(split["shards"], unit="shard", disable=None, leave=False, mininterval=1):
        lengths = row_lengths([(open_shard(folder, entry, views), np.arange(entry["records"]))])
        for view_counts, column in zip(counts, lengths.T, strict=True):
            view_counts += np.bincount(column, minlength=len(view_counts))
        incomplete += int((lengths == 0).any(axis=1).sum())
    for view_counts in counts:
        view_counts[0] = 0  # exclude the records that lack the view
    return counts, incomplete


def quantile(counts: np.ndarray, fraction: float) -> float:
    """Return a quantile of a sample in which value v occurs `counts[v]` times, with linear interpolation."""
    cumulative = np.cumsum(counts)
    position = fraction * (cumulative[-1] - 1)
    low, high = np.searchsorted(cumulative, [np.floor(position), np.ceil(position)], side="right")
    return float(low + (high - low) * (position - np.floor(position)))


def _table(views: list[str], counts: list[np.ndarray]) -> list[str]:
    names = max(4, *(display_width(view) for view in views))
    lines = [
        f"  {padded('view', names)} {'records':>13} {'tokens':>15} "
        f"{'mean':>9} {'median':>9} {'90%':>9} {'99%':>9} {'longest':>9}"
    ]
    for view, view_counts in zip(views, counts, strict=True):
        records, tokens = int(view_counts.sum()), int(view_counts @ np.arange(len(view_counts)))
        numbers: list[float] = []
        if records:
            quantiles = [quantile(view_counts, fraction) for fraction in (0.5, 0.9, 0.99)]
            numbers = [tokens / records, *quantiles, np.flatnonzero(view_counts)[-1]]
        lines.append(
            f"  {padded(view, names)} {records:>13,} {tokens:>15,} "
            + " ".join(f"{number:,.1f}".removesuffix(".0").rjust(9) for number in numbers)
        )
    return lines


def _bins(longest: int) -> list[int]:
    """Return the lower bounds of the bins (1, 2, 3, 4, 6, 8, 12, 16, 24, ...), and the first bound beyond `longest`."""
    bounds = [1, 2, 3]
    while bounds[-1] <= longest:
        bounds.append(2 * bounds[-2])
    return bounds


def _histogram(counts: np.ndarray) -> list[str]:
    """Return one line per bin, from the first to the last non-empty bin."""
    bounds = _bins(len(counts) - 1)
    bin_counts = [int(counts[low:high].sum()) for low, high in itertools.pairwise(bounds)]
    used = np.flatnonzero(bin_counts)
    lines = []
    for number in range(used[0], used[-1] + 1):
        low, high, count = bounds[number], bounds[number + 1] - 1, bin_counts[number]
        lengths = f"{low:,}" if low == high else f"{low:,}–{high:,}"
        bar = _bar(count / max(bin_counts))
        lines.append(f"  {lengths:>15} {count:>13,} {count / sum(bin_counts):>6.1%} {bar}".rstrip())
    return lines


def _bar(fraction: float) -> str:
    eighths = round(fraction * BAR * 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _sources(sources: list[dict[str, Any]], shards: list[dict[str, Any]]) -> list[str]:
    """Return a table of the records and tokens of each source, and of its weighted fraction of an epoch."""
    totals = np.zeros((len(sources), 2), np.int64)
    for shard in shards:
        totals[shard["source"]] += shard["records"], sum(shard["tokens"].values())
    epoch_tokens = totals[:, 1] * [source["weight"] for source in sources]
    lines = [f"  {'records':>13} {'tokens':>15} {'share':>6} {'weight':>6} {'of an epoch':>11}  source"]
    for number, source in enumerate(sources):
        records, tokens = totals[number].tolist()
        if records:
            lines.append(
                f"  {records:>13,} {tokens:>15,} {tokens / totals[:, 1].sum():>6.1%} {source['weight']:>6g} "
                f"{epoch_tokens[number] / epoch_tokens.sum():>11.1%}  data.sources.{number} {' '.join(_label(source))}"
            )
    return lines


def _label(source: dict[str, Any]) -> Iterator[str]:
    """Yield the type and the name or path of a source."""
    yield source.get("type", "")
    yield from (str(source[key]) for key in ("path", "name") if source.get(key))
