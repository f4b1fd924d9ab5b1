"""spider: write the SQL query for a question on a database, scored by the rows that it returns.

The data are Spider, or any other questions and queries with their SQLite files. Metrics, as fractions of the test rows:

    execution          the answer ended with the end token and returns the same rows as the target
    execution_filled   `execution` over the targets that return at least one row: two empty results are equal too easily
    exact              the answer ended and equals the target, ignoring white space, and case outside of quotes
    runs               the answer ended and runs without an error
    stopped            the answer ended with the end token

Suffix `_unseen`: over targets that are neither in the task's train rows (compared as for `exact`) nor, token for token,
in the training corpus.

If the target has an ORDER BY, the order of the rows must match too, except within ties. pretrain/tasks/sql/execution.py
and order.py compare the rows. A test row counts as wrong if its answer fails or exceeds the limits. It also counts as
wrong if its target fails or exceeds them (count `failed_gold`), or if its database is missing (count
`missing_database`).
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from data_prep.config import DataConfig
from data_prep.utils.config_file import LocalPath
from data_prep.utils.console import UserError
from data_prep.utils.progress import Progress
from pretrain.tasks.directions import MetricDirections, higher
from pretrain.tasks.options import AnswerTask
from pretrain.tasks.rows import RowRate, stopped
from pretrain.tasks.scoring import Answer, TaskResult, TaskRun, count_too_long_contexts, rate, rate_over_subset
from pretrain.tasks.sql.databases import find_databases
from pretrain.tasks.sql.execution import Outcome, QueryRunner, normalize_query, same_rows
from pretrain.tasks.sql.order import equal_up_to_ties, outer_order_by

METRICS: MetricDirections = higher(
    "execution", "exact", "execution_unseen", "exact_unseen", "runs", "stopped", "execution_filled"
)
ROW_RATES: dict[str, RowRate] = {
    "exact": lambda target, answer: answer.stopped and normalize_query(answer.text) == normalize_query(target),
    "stopped": stopped,
}
CHECKED_ROWS = 100
"""Number of test rows for which a database is searched at startup."""


class Config(AnswerTask):
    """Options of the task that writes the SQL query for a question and is scored by the rows that the query returns."""

    name: Literal["spider"]
    databases: LocalPath
    """Folder of SQLite files, named DB.sqlite or DB/DB.sqlite for the database DB; or one file for all rows."""

    SCORING_READS_TRAIN: ClassVar[bool] = True

    @property
    def paths(self) -> list[str]:
        """Path of the databases."""
        return [self.databases]

    def check_requirements(self, data: DataConfig, where: str) -> None:
        """Raise UserError if a file is missing, or if none of the first rows has a database."""
        super().check_requirements(data, where)
        path, key = Path(self.databases), f"{where}.databases"
        if not path.exists():
            raise UserError(f"{key}: there is no {path}; give a folder of SQLite files, or one file for all rows")
        if rows := self.first_rows(data, where, "test", CHECKED_ROWS):
            find_databases(rows, path, key)


def evaluate(run: TaskRun) -> TaskResult:
    """Generate answers to the test rows, run the answers and the targets, and compare the rows that they return."""
    rows = run.read_test()
    databases = find_databases(rows, Path(run.task.databases))
    answers = run.generate_answers(rows)
    metrics, counts = score([row.target for row in rows], answers, databases, run.unseen(rows, normalize_query))
    return TaskResult(len(rows), metrics, counts | count_too_long_contexts(answers))


class Verdict(NamedTuple):
    """Outcome of running a target and an answer."""

    gold_runs: bool
    gold_has_rows: bool
    runs: bool
    right: bool


def score(
    targets: Sequence[str],
    answers: Sequence[Answer],
    databases: Sequence[Path | None],
    is_unseen: Sequence[bool] | None,
) -> tuple[dict[str, float], dict[str, int]]:
    """Return the metrics, and the counts of unscorable rows, of targets that return no row, and of unseen targets."""
    rows = list(zip(targets, answers, databases, strict=True))
    verdicts = []
    with QueryRunner() as runner, Progress("running queries", len(rows)) as progress:
        judge_once = cache(partial(judge, runner))
        for target, answer, database in rows:
            verdicts.append(judge_once(database, target, answer.text if answer.stopped else None))
            progress.update(1)
    right = [verdict.right for verdict in verdicts]
    exact = [ROW_RATES["exact"](target, answer) for target, answer, _ in rows]
    return {
        "execution": rate(right),
        "exact": rate(exact),
        **rate_over_subset("execution_unseen", right, is_unseen),
        **rate_over_subset("exact_unseen", exact, is_unseen),
        "runs": rate(verdict.runs for verdict in verdicts),
        "stopped": rate(answer.stopped for answer in answers),
        **rate_over_subset("execution_filled", right, [verdict.gold_has_rows for verdict in verdicts]),
    }, {
        "failed_gold": sum(
            database is not None and not verdict.gold_runs
            for verdict, database in zip(verdicts, databases, strict=True)
        ),
        "missing_database": sum(database is None for database in databases),
        "empty_results": sum(verdict.gold_runs and not verdict.gold_has_rows for verdict in verdicts),
    } | ({"unseen": sum(is_unseen)} if is_unseen is not None else {})


def judge(runner: QueryRunner, database: Path | None, target: str, answer: str | None) -> Verdict:
    """Run a target and an answer on a database and compare their rows.

    `database` is None if it is missing; `answer` is None if it did not end with the end token.
    """
    if database is None:
        return Verdict(False, False, False, False)
    wanted = runner.run(database, target)
    given = runner.run(database, answer) if answer is not None else Outcome(None)
    right = False
    if wanted.rows is not None and given.rows is not None and wanted.columns == given.columns:
        right = same_rows(wanted.rows, given.rows, outer_order_by(target) is not None) or equal_up_to_ties(
            runner, database, target, wanted, given
        )
    return Verdict(wanted.rows is not None, bool(wanted.rows), given.rows is not None, right)
