"""Descriptions of a prepared corpus for programs (manifest.json) and for people (summary.md)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from data_prep.encode import shard_report
from data_prep.scan import scan_report
from data_prep.selection.drops import MAX_EXAMPLES, REASONS, unknown_tokens
from data_prep.shards import FORMAT
from data_prep.sources import Reader
from data_prep.tokenizer import Tokenizer
from data_prep.units import Job, Unit
from data_prep.utils.console import UserError
from data_prep.utils.files import read_json

Manifest = dict[str, Any]


def build_manifest(
    job: Job, settings: dict[str, Any], tokenizer: Tokenizer, readers: list[Reader], units: list[Unit]
) -> Manifest:
    """Return the manifest, built from the reports of all units. Raises UserError if no record is left."""
    scans = [read_json(scan_report(job, number)) for number in range(len(units))]
    reports = [read_json(shard_report(job, number)) for number in range(len(units))]
    splits: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        for split, shards in report["shards"].items():
            splits.setdefault(split, []).extend(shards)
    dropped = _dropped(readers, units, scans, reports)
    if not splits:
        raise UserError(f"no record is left: {_reasons(dropped)}")
    sources = []
    for source, config in enumerate(job.data.sources):
        source_units = [number for number, unit in enumerate(units) if unit.source == source]
        shards_by_split = [shards for number in source_units for shards in reports[number]["shards"].values()]
        sources.append(
            {
                "weight": config.weight,
                "records": sum(scans[number]["records"] for number in source_units),
                "kept": sum(reports[number]["kept"] for number in source_units),
                "tokens": sum(sum(shard["tokens"].values()) for shards in shards_by_split for shard in shards),
            }
        )
    return {
        "format": FORMAT,
        "views": list(job.data.views),
        "tokenizer": {"sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "settings": settings,
        "sources": sources,
        "splits": {
            split: _split_entry(job, shards) | {"unknown": _unknown(split, readers, units, scans, reports)}
            for split, shards in splits.items()
        },
        "dropped": dropped,
    }


def _split_entry(job: Job, shards: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: sum(shard[name] for shard in shards) for name in ("records", "incomplete", "continued")} | {
        "tokens": {view: sum(shard["tokens"][view] for shard in shards) for view in job.data.views},
        "longest": {view: max(shard["longest"][view] for shard in shards) for view in job.data.views},
        "positions_needed": max(shard["positions_needed"] for shard in shards),
        "shards": shards,
    }


def _dropped(
    readers: list[Reader], units: list[Unit], scans: list[dict[str, Any]], reports: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the number of dropped records and the first examples by reason, in the order of REASONS.

    Positions in the examples are counted from the beginning of each file.
    """
    dropped: dict[str, dict[str, Any]] = {}
    for scan, report, describe in zip(scans, reports, _describers(readers, units, scans), strict=True):
        for reason, drop in [*scan["dropped"].items(), *report["dropped"].items()]:
            entry = dropped.setdefault(reason, {"count": 0, "first": []})
            entry["count"] += drop["count"]
            entry["first"] += [describe(*example) for example in drop["first"][: MAX_EXAMPLES - len(entry["first"])]]
    return {reason: dropped[reason] for reason in REASONS if reason in dropped}


def _unknown(
    split: str, readers: list[Reader], units: list[Unit], scans: list[dict[str, Any]], reports: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the number of unknown tokens of a split, and the number and the first of the records with such tokens."""
    entry: dict[str, Any] = {"tokens": 0, "records": 0, "first": []}
    for report, describe in zip(reports, _describers(readers, units, scans), strict=True):
        if unknown := report.get("unknown", {}).get(split):  # reports of earlier versions lack this key
            entry["tokens"] += unknown["tokens"]
            entry["records"] += unknown["records"]
            entry["first"] += [describe(*example) for example in unknown["first"][: MAX_EXAMPLES - len(entry["first"])]]
    return entry


def _describers(
    readers: list[Reader], units: list[Unit], scans: list[dict[str, Any]]
) -> Iterator[Callable[[int, int, str], str]]:
    """Yield for each unit a function that formats an example (piece, position in the piece, note) as `place: note`.

    Positions in the result are counted from the beginning of each file.
    """
    next_position: dict[tuple[int, str], int] = {}
    for unit, scan in zip(units, scans, strict=True):
        offsets = []
        for piece, positions in zip(unit.pieces, scan["positions"], strict=True):
            offsets.append(next_position.get((unit.source, piece.path), 0))
            next_position[unit.source, piece.path] = offsets[-1] + positions
        yield partial(_describe, readers[unit.source], unit, offsets)


def _describe(reader: Reader, unit: Unit, offsets: list[int], piece: int, position: int, note: str) -> str:
    return f"{reader.place(unit.pieces[piece], position, offsets[piece])}: {note}"


def check_not_empty(job: Job, readers: list[Reader], units: list[Unit]) -> None:
    """Raise UserError if the scan dropped all records."""
    scans = [read_json(scan_report(job, number)) for number in range(len(units))]
    if sum(scan["records"] - sum(drop["count"] for drop in scan["dropped"].values()) for scan in scans) == 0:
        raise UserError(f"no record is left: {drop_summary(job, readers, units)}")


def drop_summary(job: Job, readers: list[Reader], units: list[Unit]) -> str:
    """Return one line with the records that the scan dropped, the reasons, and the settings to check."""
    scans = [read_json(scan_report(job, number)) for number in range(len(units))]
    return _reasons(_dropped(readers, units, scans, [{"dropped": {}}] * len(units)))


def _reasons(dropped: dict[str, Any]) -> str:
    reasons = "; ".join(
        f"{drop['count']:,} {reason} ({REASONS[reason]}; the first: {drop['first'][0]})"
        for reason, drop in dropped.items()
    )
    remedy = "check data.views and the columns of the sources, and data.sequence_length"
    return f"{reasons or 'the sources are empty'}; {remedy}"


def summary_line(manifest: Manifest) -> str:
    """Return one line with the splits, records, tokens and vocabulary size."""
    splits = ", ".join(
        f"{split} {entry['records']:,} records with {sum(entry['tokens'].values()):,} tokens"
        for split, entry in manifest["splits"].items()
    )
    return f"{splits}; vocabulary {manifest['tokenizer']['vocab_size']:,}"


def summary(job: Job, manifest: Manifest) -> str:
    """Return a summary in Markdown: splits, sources, and dropped records by reason with examples."""
    lines = [
        "# Corpus",
        "",
        f"Views: {', '.join(manifest['views'])}. Vocabulary: {manifest['tokenizer']['vocab_size']:,}.",
        "",
    ]
    lines += ["| split | records | tokens | shards |", "|---|---|---|---|"]
    lines += [
        f"| {split} | {entry['records']:,} | {sum(entry['tokens'].values()):,} | {len(entry['shards']):,} |"
        for split, entry in manifest["splits"].items()
    ]
    lines += [
        "",
        "| source | split | read | kept | tokens | weight | tokens of an epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    weights = [source.weight if source.split == "train" else 0.0 for source in job.data.sources]
    total = sum(weight * source["tokens"] for weight, source in zip(weights, manifest["sources"], strict=True))
    for index, (source, config, weight) in enumerate(zip(manifest["sources"], job.data.sources, weights, strict=True)):
        share = f"{weight * source['tokens'] / total:.1%}" if total and weight else "-"
        lines.append(
            f"| {index} {config.type} {getattr(config, 'path', '')} | {config.split} | {source['records']:,} "
            f"| {source['kept']:,} | {source['tokens']:,} | {weight:g} | {share} |"
        )
    if unknown := [line for split, entry in manifest["splits"].items() if (line := unknown_tokens(split, entry))]:
        lines += ["", "## Unknown tokens", "", *unknown]
    lines += ["", "## Dropped", ""]
    if not manifest["dropped"]:
        lines.append("Nothing.")
    for reason, drop in manifest["dropped"].items():
        lines += [
            f"{drop['count']:,} as `{reason}`: {REASONS[reason]}. The first:",
            "",
            *(f"    {place}" for place in drop["first"]),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"
