"""spider: write the SQL for a question on a database, scored by what it gives there. Spider, or any set of questions and queries with SQLite files.

execution: the answer ended with the end token and gives the same rows as the target, in the same order where the target orders them, but for ties
(pretrain/tasks/sql/execution.py and order.py tell when rows are the same). A row counts as wrong where the answer fails or goes beyond the
limits, and where the target does (failed_gold) or its database is missing (missing_database). execution_filled: on targets that give any row at all,
for two queries that give nothing are easily the same. exact: the answer is the target but for white space, and case outside of quotes. runs: the
answer ended and gives rows, or none, without an error. `_unseen`: on targets that stand neither in the task's train rows, compared like exact,
nor token for token in the training corpus.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

from data_prep.config import DataConfig
from data_prep.config_file import LocalPath
from data_prep.console import UserError
from pretrain.tasks.directions import MetricDirections, higher
from pretrain.tasks.options import AnswerTask
from pretrain.tasks.scoring import Answer, TaskResult, TaskRun, count_too_long_contexts, rate, rate_over_subset
from pretrain.tasks.sql.databases import find_databases
from pretrain.tasks.sql.execution import Outcome, QueryRunner, normal, same_rows
from pretrain.tasks.sql.order import equal_up_to_ties, outer_order_by

METRICS: MetricDirections = higher(
    "execution", "exact", "execution_unseen", "exact_unseen", "runs", "stopped", "execution_filled"
)
ROWS_LOOKED_AT = 100
"""Rows whose databases are looked for at the start of a run."""


class Config(AnswerTask):
    """Write the SQL for a question, scored by the rows that it returns."""

    name: Literal["spider"]
    databases: LocalPath
    """A folder of SQLite files, DB.sqlite or DB/DB.sqlite by the database's name, or one file for all rows."""

    @property
    def paths(self) -> list[str]:
        """The databases."""
        return [self.databases]

    def check_requirements(self, data: DataConfig, where: str) -> None:
        """Raise UserError, see `TaskConfig.check_requirements`, also if none of the first rows has a database."""
        super().check_requirements(data, where)
        path, key = Path(self.databases), f"{where}.databases"
        if not path.exists():
            raise UserError(f"{key}: there is no {path}; give a folder of SQLite files, or one file for all rows")
        if rows := self.first_rows(data, where, "test", ROWS_LOOKED_AT):
            find_databases(rows, path, key)


def evaluate(run: TaskRun) -> TaskResult:
    """Answer the test rows, run answers and targets, score."""
    rows = run.read_test()
    databases = find_databases(rows, Path(run.task.databases))
    answers = run.generate_answers(rows)
    metrics, counts = score([row.target for row in rows], answers, databases, run.unseen(rows, normal))
    return TaskResult(len(rows), metrics, counts | count_too_long_contexts(answers))


class Verdict(NamedTuple):
    """What running a target and an answer came to."""

    gold_runs: bool
    gold_gives_rows: bool
    runs: bool
    right: bool


def score(
    targets: Sequence[str],
    answers: Sequence[Answer],
    databases: Sequence[Path | None],
    is_unseen: Sequence[bool] | None,
) -> tuple[dict[str, float], dict[str, int]]:
    """Rates, and counts of rows that could not be scored, of targets that give no row, and of unseen ones."""
    from tqdm import tqdm

    rows = list(zip(targets, answers, databases, strict=True))
    with QueryRunner() as runner:
        judge_once = cache(partial(judge, runner))
        verdicts = [
            judge_once(database, target, answer.text if answer.stopped else None)
            for target, answer, database in tqdm(rows, desc="running queries", unit="row", mininterval=1, disable=None)
        ]
    right = [verdict.right for verdict in verdicts]
    exact = [answer.stopped and normal(answer.text) == normal(target) for target, answer, _ in rows]
    return {
        "execution": rate(right),
        "exact": rate(exact),
        **rate_over_subset("execution_unseen", right, is_unseen),
        **rate_over_subset("exact_unseen", exact, is_unseen),
        "runs": rate(verdict.runs for verdict in verdicts),
        "stopped": rate(answer.stopped for answer in answers),
        **rate_over_subset("execution_filled", right, [verdict.gold_gives_rows for verdict in verdicts]),
    }, {
        "failed_gold": sum(
            database is not None and not verdict.gold_runs
            for verdict, database in zip(verdicts, databases, strict=True)
        ),
        "missing_database": sum(database is None for database in databases),
        "empty_results": sum(verdict.gold_runs and not verdict.gold_gives_rows for verdict in verdicts),
    } | ({"unseen": sum(is_unseen)} if is_unseen is not None else {})


def judge(runner: QueryRunner, database: Path | None, target: str, answer: str | None) -> Verdict:
    """Run a target and an answer, None for one that did not end, on a database, None where it is missing."""
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
