"""What a check says, and how it is shown."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Level = Literal["ok", "warn", "fail"]
WIDTH = 24
"""Of the column of checks."""
FEW = 4
"""Names that a line lists before it counts."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    level: Level
    seen: str
    remedy: str = ""
    """What to do; of warn and fail alone."""
    nodes: tuple[str, ...] = ()
    """Where; empty where it concerns the run as a whole."""


def merge_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that say the same of several nodes as one, where the first of them stood."""
    nodes: dict[Finding, list[str]] = {}
    for finding in findings:
        nodes.setdefault(replace(finding, nodes=()), []).extend(finding.nodes)
    return [replace(finding, nodes=tuple(where)) for finding, where in nodes.items()]


def format_table(findings: Iterable[Finding]) -> str:
    """A line for each finding, the remedy below it, and a last line that counts."""
    lines = []
    for finding in findings:
        where = f"{', '.join(finding.nodes)}: " if finding.nodes else ""
        lines.append(f"{finding.level:4}  {finding.check:{WIDTH}}  {where}{finding.seen}")
        if finding.remedy:
            lines.append(f"{'':{WIDTH + 8}}-> {finding.remedy}")
    counts = count_levels(findings)
    return "\n".join([*lines, "", f"{counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail"])


def count_levels(findings: Iterable[Finding]) -> dict[Level, int]:
    """How many findings of each level there are."""
    levels = [finding.level for finding in findings]
    return {level: levels.count(level) for level in ("ok", "warn", "fail")}


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """The findings as plain values."""
    return [asdict(finding) for finding in findings]


def shorten_list(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")


def format_bytes(number: float) -> str:
    """Bytes for people."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.{0 if number >= 2**20 else 3}f} MiB"
