"""Lengths and shares of a prepared corpus, as text: how long its views are, what is missing, where its tokens come from."""

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
"""Columns of the longest bar."""
EIGHTHS = " ▏▎▍▌▋▊▉"


def stats(folder: Path, name: str) -> Iterator[str]:
    """Texts about one split: a table of the views, a histogram of each one's lengths, and the sources.

    Every record is counted; memory holds one shard's lengths and one counter per length.
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
    for view, of_view in zip(manifest["views"], counts, strict=True):
        if of_view.any():
            yield "\n".join([f"{name}, {view}: records by tokens", *_histogram(of_view)])
    sources = [
        given | made for given, made in zip(manifest["settings"]["data"]["sources"], manifest["sources"], strict=True)
    ]
    yield "\n".join([f"{name}: tokens by source", *_sources(sources, split["shards"])])
    if unknown := unknown_tokens(name, split):
        yield unknown


def _length_counts(folder: Path, manifest: dict[str, Any], split: dict[str, Any]) -> tuple[list[np.ndarray], int]:
    """For each view how many records have it in each length, and how many records lack some view."""
    views = manifest["views"]
    counts = [np.zeros(split["longest"][view] + 1, np.int64) for view in views]
    incomplete = 0
    for entry in tqdm(split["shards"], unit="shard", disable=None, leave=False, mininterval=1):
        lengths = row_lengths([(open_shard(folder, entry, views), np.arange(entry["records"]))])
        for of_view, column in zip(counts, lengths.T, strict=True):
            of_view += np.bincount(column, minlength=len(of_view))
        incomplete += int((lengths == 0).any(axis=1).sum())
    for of_view in counts:
        of_view[0] = 0  # those are the records that lack it
    return counts, incomplete


def quantile(counts: np.ndarray, share: float) -> float:
    """Linear interpolation between the order statistics, of `counts[v]` values v each."""
    below = np.cumsum(counts)
    place = share * (below[-1] - 1)
    low, high = np.searchsorted(below, [np.floor(place), np.ceil(place)], side="right")
    return float(low + (high - low) * (place - np.floor(place)))


def _table(views: list[str], counts: list[np.ndarray]) -> list[str]:
    names = max(4, *(display_width(view) for view in views))
    lines = [
        f"  {padded('view', names)} {'records':>13} {'tokens':>15} {'mean':>9} {'median':>9} {'90%':>9} {'99%':>9} {'longest':>9}"
    ]
    for view, of_view in zip(views, counts, strict=True):
        records, tokens = int(of_view.sum()), int(of_view @ np.arange(len(of_view)))
        numbers = (
            [tokens / records, *(quantile(of_view, share) for share in (0.5, 0.9, 0.99)), np.flatnonzero(of_view)[-1]]
            if records
            else []
        )
        lines.append(
            f"  {padded(view, names)} {records:>13,} {tokens:>15,} "
            + " ".join(f"{number:,.1f}".removesuffix(".0").rjust(9) for number in numbers)
        )
    return lines


def _bins(longest: int) -> list[int]:
    """First lengths of the bins: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... and the first one beyond `longest`."""
    bounds = [1, 2, 3]
    while bounds[-1] <= longest:
        bounds.append(2 * bounds[-2])
    return bounds


def _histogram(counts: np.ndarray) -> list[str]:
    """A line a bin, from the first to the last that holds a record."""
    bounds = _bins(len(counts) - 1)
    held = [int(counts[low:high].sum()) for low, high in itertools.pairwise(bounds)]
    used = np.flatnonzero(held)
    lines = []
    for number in range(used[0], used[-1] + 1):
        low, high = bounds[number], bounds[number + 1] - 1
        lines.append(
            f"  {f'{low:,}' if low == high else f'{low:,}–{high:,}':>15} {held[number]:>13,} {held[number] / sum(held):>6.1%} "
            f"{_bar(held[number] / max(held))}".rstrip()
        )
    return lines


def _bar(share: float) -> str:
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _sources(sources: list[dict[str, Any]], shards: list[dict[str, Any]]) -> list[str]:
    """What each source holds, and what part of an epoch it is by its weight."""
    held = np.zeros((len(sources), 2), np.int64)
    for shard in shards:
        held[shard["source"]] += shard["records"], sum(shard["tokens"].values())
    of_epoch = held[:, 1] * [source["weight"] for source in sources]
    lines = [f"  {'records':>13} {'tokens':>15} {'share':>6} {'weight':>6} {'of an epoch':>11}  source"]
    for number, source in enumerate(sources):
        records, tokens = held[number].tolist()
        if records:
            lines.append(
                f"  {records:>13,} {tokens:>15,} {tokens / held[:, 1].sum():>6.1%} {source['weight']:>6g} "
                f"{of_epoch[number] / of_epoch.sum():>11.1%}  data.sources.{number} {' '.join(_named(source))}"
            )
    return lines


def _named(source: dict[str, Any]) -> Iterator[str]:
    yield source.get("type", "")
    yield from (str(source[key]) for key in ("path", "name") if source.get(key))
