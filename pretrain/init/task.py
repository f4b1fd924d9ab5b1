"""The choice of a downstream task for the target of a corpus."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.inspection.columns import MOST_LABELS
from data_prep.inspection.find import Values
from data_prep.inspection.look import Inspection
from data_prep.inspection.raw_rows import TEXT_COLUMNS
from data_prep.tasks.yelp import LABELS as STARS
from pretrain.tasks.gsm8k import final_number

MOST = 0.9
"""Fraction of the targets that must have a form."""
EXAMINED = 1000
"""Number of targets that are examined."""
LONG_TEXT = 20
"""Median number of characters from which the similarity of a text to the target is worth reporting."""
DATABASE_SUFFIXES = (".sqlite", ".sqlite3", ".db")
DATABASE_FOLDERS = ("database", "databases", "test_database")
PLACEHOLDER = "TEST_FILE"
"""Path in a task that is a comment because there are no test rows."""


@dataclass
class TaskChoice:
    """Downstream tasks for a corpus."""

    tasks: list[dict[str, Any]]
    """Entries of `evaluation.tasks`."""
    reason: str
    questions: list[str] = field(default_factory=list)
    off: str = ""
    """Reason why the tasks are only a comment; empty if they are evaluated."""

    @property
    def is_labels(self) -> bool:
        """Whether the targets are labels. All test rows are scored then: a file is often sorted by label."""
        return self.tasks[0]["name"] in ("yelp", "rotten_tomatoes")


def choose_task(inspection: Inspection, rows: int | None, held_out: str | None) -> TaskChoice:
    """Return the tasks that fit the target. Without test rows they are only a comment.

    `rows` is the largest number of test rows that are evaluated; None: all. `held_out` is the file of the training rows
    that are the test rows, if there is no test split.
    """
    if inspection.is_text:
        choice = TaskChoice([{"name": "loss"}], "plain documents have no answers to score, so it is the loss on them")
    else:
        choice = _by_target(inspection)
    if choice.is_labels:
        choice.questions.append(
            "with few different targets, the second loss only distinguishes labels, and a search is not useful: "
            "compare with objective.name=next_token"
        )
    test = held_out or test_rows(inspection)
    if test is None:
        choice.off = "the data have no test split: "
        if inspection.found.kind not in TEXT_COLUMNS:
            choice.off += "divide them into files named train and test in one folder and run jepa-init on it, or "
        choice.off += f"replace {PLACEHOLDER} by a file of JSON lines and remove the #"
    count = len(inspection.samples["test"].rows) if "test" in inspection.samples else 0
    for task in choice.tasks:
        task["test"] = PLACEHOLDER if test is None else test
        if rows is not None and count > rows and not choice.is_labels:
            task["rows"] = rows
    return choice


def test_rows(inspection: Inspection) -> str | dict[str, Any] | None:
    """Return the test rows as a task names them, or None if there are none."""
    values: Values | None = inspection.found.splits.get("test")
    if values is None:
        return None
    if values["type"] == "json":
        return values["path"]  # read with the views of the training source
    return values | {"views": inspection.choice.mapping}


def _by_target(inspection: Inspection) -> TaskChoice:
    targets = [record[-1] for record in inspection.records]
    targets = targets[:: max(1, len(targets) // EXAMINED)][:EXAMINED]
    target = inspection.choice.target
    content = target.content if target is not None else "text"
    name = target.name if target is not None else ""
    if content == "labels" and target is not None and 1 < target.distinct <= MOST_LABELS:
        labels = set(target.examples)
        if labels <= set(STARS):
            return TaskChoice([{"name": "yelp"}], "the targets are stars from 1 to 5")
        if labels <= {"Good", "Bad"}:
            return TaskChoice([{"name": "rotten_tomatoes"}], "the targets are Good and Bad")
        label = "".join(letter if letter.isalnum() else "_" for letter in name.rpartition(".")[2])
        reason = f"it scores any labels, here the {len(labels)} of {name}"
        return TaskChoice([{"name": "rotten_tomatoes", "label": f"label_{label}"}], reason)
    if sum(final_number(text) is not None for text in targets) >= MOST * len(targets):
        return TaskChoice([{"name": "gsm8k"}], "the targets end in #### and a number, which is compared")
    if content == "SQL":
        return _sql(inspection)
    if content == "regex":
        return TaskChoice(
            [{"name": "nl_rx"}], "the targets are regexes, which are compared by the lines that they match"
        )
    if len(inspection.choice.views) > 2:
        return TaskChoice([{"name": "retrieval"}], "it compares the embeddings of all views")
    text: dict[str, Any] = {"name": "text"}
    if content == "numbers":
        return TaskChoice([text], "the targets are numbers, which are compared as text")
    choice = TaskChoice(
        [text, {"name": "retrieval"}], "text compares the answers with the targets; retrieval compares the embeddings"
    )
    if target is not None and target.median >= LONG_TEXT:
        if importlib.util.find_spec("sacrebleu"):
            text["similarity"] = ["chrf"]
        else:
            choice.questions.append(
                "targets are long, so few answers are exact: similarity: [chrf] in the task text needs the extra "
                "similarity"
            )
    return choice


def _sql(inspection: Inspection) -> TaskChoice:
    databases = find_databases(Path(inspection.where).expanduser())
    if databases is not None:
        reason = "the targets are SQL queries, which are compared by the rows that they return"
        return TaskChoice([{"name": "spider", "databases": str(databases)}], reason)
    choice = TaskChoice([{"name": "text"}], "without SQLite files, the queries are compared as text")
    choice.questions.append(
        "with SQLite files, compare the rows that queries return: {name: spider, databases: FOLDER}; they can be made "
        "from a tables.json by python -m pretrain.evaluation.sql.make_databases"
    )
    return choice


def find_databases(where: Path) -> Path | None:
    """Return the SQLite file or the folder of SQLite files next to the data, or None."""
    folder = where if where.is_dir() else where.parent
    for name in DATABASE_FOLDERS:
        if any(path.suffix in DATABASE_SUFFIXES for path in (folder / name).glob("**/*")):
            return folder / name
    found = sorted(path for path in folder.glob("*") if path.suffix in DATABASE_SUFFIXES)
    return found[0] if len(found) == 1 else folder if found else None
