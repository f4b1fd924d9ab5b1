"""Findings of the checks, the comparison of nodes, and the output as a table or JSON."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Level = Literal["ok", "warn", "fail"]
Facts = Mapping[str, dict[str, Any]]
"""Facts of a topic by node."""
WIDTH = 24
"""Width of the column of check names, in characters."""
FEW = 4
"""Maximum number of names that a line lists. Further names are only counted."""


@dataclass(frozen=True)
class Finding:
    """One result of a check; a line of the table."""

    check: str
    level: Level
    seen: str
    remedy: str = ""
    """Action that fixes the problem; only for warn and fail."""
    nodes: tuple[str, ...] = ()
    """Affected nodes; empty if the finding concerns the run as a whole."""


def merge_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Merge findings that differ only in their nodes, and return them in the order of their first occurrence."""
    nodes: dict[Finding, list[str]] = {}
    for finding in findings:
        nodes.setdefault(replace(finding, nodes=()), []).extend(finding.nodes)
    return [replace(finding, nodes=tuple(affected)) for finding, affected in nodes.items()]


def format_table(findings: Iterable[Finding]) -> str:
    """Return a table: each finding with its remedy below it, and a last line with the number of findings per level."""
    lines = []
    for finding in findings:
        nodes = f"{', '.join(finding.nodes)}: " if finding.nodes else ""
        lines.append(f"{finding.level:4}  {finding.check:{WIDTH}}  {nodes}{finding.seen}")
        if finding.remedy:
            lines.append(f"{'':{WIDTH + 8}}-> {finding.remedy}")
    counts = count_levels(findings)
    return "\n".join([*lines, "", f"{counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail"])


def count_levels(findings: Iterable[Finding]) -> dict[Level, int]:
    """Return the number of findings of each level."""
    levels = [finding.level for finding in findings]
    return {level: levels.count(level) for level in ("ok", "warn", "fail")}


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Return the findings as JSON-serializable values."""
    return [asdict(finding) for finding in findings]


def shorten_list(names: list[str]) -> str:
    """Return the first FEW names as text, followed by the number of remaining names."""
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")


def format_bytes(number: float) -> str:
    """Return a number of bytes as text, in GiB or MiB."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.{0 if number >= 2**20 else 3}f} MiB"


def check_identical(check: str, values: Mapping[str, Any], local_value: Any, prefix: str, remedy: str) -> list[Finding]:
    """Check that all nodes have the same value.

    The finding names the nodes that differ from this machine. If no node has this machine's value, the finding names
    the nodes that differ from the most common value. `prefix` is the text in front of the value.
    """
    counts = Counter(values.values())
    if len(counts) <= 1:
        value = next(iter(counts), None)
        return [Finding(check, "ok", str(value))]
    usual = local_value if local_value in counts else counts.most_common(1)[0][0]
    return [
        Finding(
            check,
            "fail",
            f"{prefix} {value}, {usual} elsewhere",
            remedy,
            tuple(node for node in values if values[node] == value),
        )
        for value in counts
        if value != usual
    ]
