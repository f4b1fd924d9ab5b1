"""Compare the mutants that survived `make mutants` with accepted.toml.

Prints the unlisted survivors and a table. Exits with code 1 if a survivor is not listed, or if a listed mutant does not
survive.
"""

import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
from mutmut.utils.format_utils import orig_function_and_class_names_from_key

ACCEPTED = Path(__file__).with_name("accepted.toml")
KILLED = {"killed", "timeout", "segfault"}


@dataclass(frozen=True)
class Mutant:
    """A small change of one statement."""

    file: str
    function: str
    before: str
    """Changed lines of the original, without indentation."""
    after: str
    """The same lines of the mutant, without indentation."""


@dataclass(frozen=True)
class Accepted:
    """An entry of accepted.toml, which lists mutants of the same lines that may survive."""

    file: str
    function: str
    before: str
    after: tuple[str, ...] | None
    """Accepted versions of the lines; None means any version."""
    reason: str

    def accepts(self, mutant: Mutant) -> bool:
        same_lines = (self.file, self.function, self.before) == (mutant.file, mutant.function, mutant.before)
        return same_lines and (self.after is None or mutant.after in self.after)


@dataclass(frozen=True)
class Rule:
    """A kind of mutant that is accepted everywhere.

    A mutant is of this kind if its two versions are equal after all matches of `ignore` are deleted.
    """

    ignore: re.Pattern[str]
    reason: str

    def accepts(self, mutant: Mutant) -> bool:
        return self.ignore.sub("", mutant.before) == self.ignore.sub("", mutant.after)


def read_accepted() -> tuple[list[Rule], list[Accepted]]:
    """Return the rules and entries of accepted.toml."""
    document = tomllib.loads(ACCEPTED.read_text(encoding="utf-8"))
    rules = [Rule(re.compile(rule["ignore"]), rule["reason"]) for rule in document.get("rule", [])]
    entries = []
    for entry in document.get("mutant", []):
        after = None if entry["after"] == "*" else tuple(entry["after"])
        entries.append(Accepted(entry["file"], entry["function"], entry["before"], after, entry["reason"]))
    return rules, entries


def results() -> Iterator[tuple[Path, str, str]]:
    """Yield the file, the name in mutmut and the result of each mutant."""
    for path in sorted(walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        for name, exit_code in data.exit_code_by_key.items():
            yield path, name, status_by_exit_code[exit_code]


def describe(name: str, path: Path) -> Mutant:
    """Return the description of a mutant by its name in mutmut."""
    function, class_name = orig_function_and_class_names_from_key(name)
    lines = get_diff_for_mutant(name, path=path).splitlines()
    before, after = (
        "\n".join(line[1:].strip() for line in lines if line.startswith(sign) and not line.startswith(sign * 3))
        for sign in "-+"
    )
    return Mutant(str(path), f"{class_name}.{function}" if class_name else function, before, after)


def main() -> int:
    rules, entries = read_accepted()
    columns = {name: Counter() for name in ("mutants", "killed", "accepted", "unlisted")}
    accepted_versions: dict[Accepted, set[str]] = {entry: set() for entry in entries}
    for path, name, status in results():
        columns["mutants"][str(path)] += 1
        if status in KILLED:
            columns["killed"][str(path)] += 1
            if status != "timeout":  # a slow machine causes timeouts too, so a listed mutant may survive or time out
                continue
        mutant = describe(name, path)
        entry = next((entry for entry in entries if entry.accepts(mutant)), None)
        if entry:
            accepted_versions[entry].add(mutant.after)
        if status in KILLED:
            continue
        if entry or any(rule.accepts(mutant) for rule in rules):
            columns["accepted"][str(path)] += 1
        else:
            columns["unlisted"][str(path)] += 1
            print(
                f"{mutant.file}: {mutant.function}: {status}, not in {ACCEPTED.name} (mutmut show {name})\n"
                f"  - {mutant.before}\n  + {mutant.after}"
            )
    stale = [
        (entry, after)
        for entry in entries
        for after in entry.after or ["*"]
        if after not in accepted_versions[entry] and (entry.after or not accepted_versions[entry])
    ]
    for entry, after in stale:
        print(
            f"{entry.file}: {entry.function}: in {ACCEPTED.name}, but killed or not a mutant. Remove the entry.\n"
            f"  - {entry.before}\n  + {after}"
        )
    print(f"{'':40}" + "".join(f"{name:>10}" for name in columns))
    for file in columns["mutants"]:
        print(f"{file:40}" + "".join(f"{column[file]:10}" for column in columns.values()))
    print(f"{'all':40}" + "".join(f"{column.total():10}" for column in columns.values()))
    return 1 if stale or columns["unlisted"] or not columns["mutants"] else 0


if __name__ == "__main__":
    sys.exit(main())
