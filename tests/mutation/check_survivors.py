"""Compare the mutants that survived `make mutants` with accepted.toml.

Print a table and the unlisted survivors. Exit with 1 if a survivor is not listed, or if a listed one no longer survives.
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
    """Changed lines of the original, stripped."""
    after: str
    """The same lines of the mutant, stripped."""


@dataclass(frozen=True)
class Rule:
    """A kind of mutant that is accepted everywhere: deleting every match of `ignore` makes both versions equal."""

    ignore: re.Pattern[str]
    reason: str

    def accepts(self, mutant: Mutant) -> bool:
        return self.ignore.sub("", mutant.before) == self.ignore.sub("", mutant.after)


def read_accepted() -> tuple[list[Rule], dict[Mutant, str]]:
    """Return the rules and the accepted mutants with their reasons."""
    document = tomllib.loads(ACCEPTED.read_text(encoding="utf-8"))
    rules = [Rule(re.compile(entry["ignore"]), entry["reason"]) for entry in document.get("rule", [])]
    mutants = {}
    for entry in document.get("mutant", []):
        for after in entry["after"] if isinstance(entry["after"], list) else [entry["after"]]:
            mutants[Mutant(entry["file"], entry["function"], entry["before"], after)] = entry["reason"]
    return rules, mutants


def find_mutants() -> Iterator[tuple[Mutant, str, str]]:
    """Yield the mutants of the last run that were not killed (None: killed), mutmut's names and the results."""
    for path in sorted(walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        for name, exit_code in data.exit_code_by_key.items():
            status = status_by_exit_code[exit_code]
            yield describe(name, path) if status not in KILLED else Mutant(str(path), "", "", ""), name, status


def describe(name: str, path: Path) -> Mutant:
    """Return what a mutant changes."""
    function, class_name = orig_function_and_class_names_from_key(name)
    lines = get_diff_for_mutant(name, path=path).splitlines()
    before, after = ("\n".join(line[1:].strip() for line in lines if line.startswith(sign) and not line.startswith(sign * 3)) for sign in "-+")
    return Mutant(str(path), f"{class_name}.{function}" if class_name else function, before, after)


def main() -> int:
    rules, accepted = read_accepted()
    total, killed, listed, unlisted = Counter(), Counter(), Counter(), Counter()
    surviving: set[Mutant] = set()
    for mutant, name, status in find_mutants():
        total[mutant.file] += 1
        if status in KILLED:
            killed[mutant.file] += 1
        elif mutant in accepted or any(rule.accepts(mutant) for rule in rules):
            listed[mutant.file] += 1
            surviving.add(mutant)
        else:
            unlisted[mutant.file] += 1
            print(f"{mutant.file}: {mutant.function}: {status}, not in {ACCEPTED.name}: mutmut show {name}\n"
                  f"  - {mutant.before}\n  + {mutant.after}")
    stale = [mutant for mutant in accepted if mutant not in surviving]
    for mutant in stale:
        print(f"{mutant.file}: {mutant.function}: listed in {ACCEPTED.name} but killed, or no longer a mutant: remove it\n"
              f"  - {mutant.before}\n  + {mutant.after}")
    print(f"{'file':40}{'mutants':>10}{'killed':>10}{'accepted':>10}{'unlisted':>10}")
    for file in [*total, None]:
        columns = [count.total() if file is None else count[file] for count in (total, killed, listed, unlisted)]
        print(f"{file or 'all':40}" + "".join(f"{number:10}" for number in columns))
    return 1 if stale or unlisted.total() or not total.total() else 0


if __name__ == "__main__":
    sys.exit(main())
