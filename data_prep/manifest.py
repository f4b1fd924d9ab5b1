"""What a preparation made, for machines (manifest.json) and for people (summary.md)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from data_prep.console import UserError
from data_prep.encode import shard_report
from data_prep.files import read_json
from data_prep.scan import scan_report
from data_prep.selection.drops import MAX_EXAMPLES, REASONS, unknown_tokens
from data_prep.shards import FORMAT
from data_prep.sources import Reader
from data_prep.tokenizer import Tokenizer
from data_prep.units import Job, Unit

Manifest = dict[str, Any]


def build_manifest(
    job: Job, settings: dict[str, Any], tokenizer: Tokenizer, readers: list[Reader], units: list[Unit]
) -> Manifest:
    """The manifest of all units, from their reports. Raises UserError where no record is left."""
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
        mine = [number for number, unit in enumerate(units) if unit.source == source]
        sources.append(
            {
                "weight": config.weight,
                "records": sum(scans[number]["records"] for number in mine),
                "kept": sum(reports[number]["kept"] for number in mine),
                "tokens": sum(
                    sum(shard["tokens"].values())
                    for number in mine
                    for shards in reports[number]["shards"].values()
                    for shard in shards
                ),
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
    """Counts and first examples by reason, in the order of REASONS; places are counted from the beginning of each file."""
    found: dict[str, dict[str, Any]] = {}
    for scan, report, describe in zip(scans, reports, _describers(readers, units, scans), strict=True):
        for reason, drop in [*scan["dropped"].items(), *report["dropped"].items()]:
            entry = found.setdefault(reason, {"count": 0, "first": []})
            entry["count"] += drop["count"]
            entry["first"] += [describe(*example) for example in drop["first"][: MAX_EXAMPLES - len(entry["first"])]]
    return {reason: found[reason] for reason in REASONS if reason in found}


def _unknown(
    split: str, readers: list[Reader], units: list[Unit], scans: list[dict[str, Any]], reports: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the unknown tokens of a split, the records that have some, and the first of these with their places."""
    entry: dict[str, Any] = {"tokens": 0, "records": 0, "first": []}
    for report, describe in zip(reports, _describers(readers, units, scans), strict=True):
        if of_unit := report.get("unknown", {}).get(split):  # a unit that an older version finished does not have it
            entry["tokens"] += of_unit["tokens"]
            entry["records"] += of_unit["records"]
            entry["first"] += [describe(*example) for example in of_unit["first"][: MAX_EXAMPLES - len(entry["first"])]]
    return entry


def _describers(
    readers: list[Reader], units: list[Unit], scans: list[dict[str, Any]]
) -> Iterator[Callable[[int, int, str], str]]:
    """Yield for each unit what turns an example (piece, position in it, note) into `place: note`; places count from the start of each file."""
    before: dict[tuple[int, str], int] = {}
    for unit, scan in zip(units, scans, strict=True):
        begins = []
        for piece, positions in zip(unit.pieces, scan["positions"], strict=True):
            begins.append(before.get((unit.source, piece.path), 0))
            before[unit.source, piece.path] = begins[-1] + positions
        yield partial(_describe, readers[unit.source], unit, begins)


def _describe(reader: Reader, unit: Unit, begins: list[int], piece: int, position: int, note: str) -> str:
    return f"{reader.place(unit.pieces[piece], position, begins[piece])}: {note}"


def check_not_empty(job: Job, readers: list[Reader], units: list[Unit]) -> None:
    """Raise UserError where the scan left no record."""
    scans = [read_json(scan_report(job, number)) for number in range(len(units))]
    if sum(scan["records"] - sum(drop["count"] for drop in scan["dropped"].values()) for scan in scans) == 0:
        raise UserError(f"no record is left: {drop_summary(job, readers, units)}")


def drop_summary(job: Job, readers: list[Reader], units: list[Unit]) -> str:
    """What the scan dropped and why, in one line that says what to look at."""
    scans = [read_json(scan_report(job, number)) for number in range(len(units))]
    return _reasons(_dropped(readers, units, scans, [{"dropped": {}}] * len(units)))


def _reasons(dropped: dict[str, Any]) -> str:
    reasons = "; ".join(
        f"{drop['count']:,} {reason} ({REASONS[reason]}; the first: {drop['first'][0]})"
        for reason, drop in dropped.items()
    )
    return f"{reasons or 'the sources hold no line'}; check data.views and the columns of the sources, and data.sequence_length"


def summary_line(manifest: Manifest) -> str:
    """Splits, records and tokens."""
    splits = ", ".join(
        f"{split} {entry['records']:,} records with {sum(entry['tokens'].values()):,} tokens"
        for split, entry in manifest["splits"].items()
    )
    return f"{splits}; vocabulary {manifest['tokenizer']['vocab_size']:,}"


def summary(job: Job, manifest: Manifest) -> str:
    """The corpus in Markdown: splits, sources with their shares, and what was dropped and why, with examples."""
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
            f"| {index} {config.type} {getattr(config, 'path', '')} | {config.split} | {source['records']:,} | {source['kept']:,} | "
            f"{source['tokens']:,} | {weight:g} | {share} |"
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
