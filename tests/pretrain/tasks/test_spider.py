"""The spider task: equality of results, on real and generated databases, and hostile queries."""

import json
import random
import shutil
import sqlite3
from collections import Counter, defaultdict

import psutil
import pytest

from data_prep.task_rows import Row
from data_prep.utils.console import UserError
from pretrain.evaluation.sql.make_databases import check_queries, make_databases
from pretrain.tasks.scoring import Answer
from pretrain.tasks.spider import judge, score
from pretrain.tasks.sql import execution
from pretrain.tasks.sql.databases import database_name, find_databases
from pretrain.tasks.sql.execution import QueryRunner, normalize_query, same_rows
from pretrain.tasks.sql.order import outer_order_by
from tests.pretrain.tasks.shared_data import DATA, empty_answers, gold_answers, real_rows, rotated
from tests.processes import TIMEOUT

TEN_ROWS = [(number, f"name {number % 3}", number / 7) for number in range(10)]


@pytest.fixture(autouse=True)
def long_wall_clock_limit(monkeypatch):
    """Raise the wall-clock limit, so queries end after their processor time and not because the machine is busy."""
    monkeypatch.setattr(execution, "PATIENCE", TIMEOUT)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("sql") / "with ?#%&.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (id INTEGER, name TEXT, share REAL)")
    connection.executemany("INSERT INTO t VALUES (?, ?, ?)", TEN_ROWS)
    connection.commit()
    connection.close()
    return path


def test_rows_are_compared_as_multisets_or_as_lists_if_the_target_orders():
    assert same_rows([(1, "a"), (2, "b")], [(2.0, "b"), (1, "a")], ordered=False)
    assert not same_rows([(1, "a"), (2, "b")], [(2, "b"), (1, "a")], ordered=True)
    assert not same_rows([(1,), (1,)], [(1,)], ordered=False)
    assert same_rows([(0.1 + 0.2, None)], [(0.3, None)], ordered=True) and not same_rows(
        [(0.3,)], [(0.3001,)], ordered=True
    )
    assert not same_rows([(1, 2)], [(2, 1)], ordered=False)  # the order of columns matters
    assert same_rows([(12345678901,)], [(12345678901.0,)], ordered=True)
    assert same_rows([(123456789012.4,), (1,)], [(1,), (123456789012,)], ordered=False)
    assert not same_rows([(12345678901,)], [(12345678902,)], ordered=True)  # integers are compared exactly
    assert not same_rows([("1",)], [(1,)], ordered=False) and not same_rows([], [(None,)], ordered=False)


@pytest.mark.parametrize(
    "query, ordered",
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order  by a limit 1", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT 'ORDER BY' FROM t -- ORDER BY a", False),
        ("SELECT a, rank() OVER (ORDER BY b) FROM t", False),
        ("WITH x AS (SELECT 1) SELECT * FROM x ORDER BY 1", True),
        ('SELECT "order by" FROM t /* ORDER BY a */', False),
    ],
)
def test_order_matters_only_if_the_outer_query_orders(query, ordered):
    for wrapped in (query, f"({query}\n)", f" ( ({query}\n) ) ; -- end"):
        assert (outer_order_by(wrapped) is not None) is ordered, wrapped


def test_parentheses_around_parts_do_not_enclose_the_query():
    assert outer_order_by("(SELECT 1) UNION (SELECT a FROM t ORDER BY a)") is None


@pytest.fixture(scope="module")
def players(tmp_path_factory):
    path = tmp_path_factory.mktemp("ties") / "players.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE player (id INTEGER, name TEXT COLLATE NOCASE, score INTEGER, share REAL)")
    connection.executemany(
        "INSERT INTO player VALUES (?, ?, ?, ?)",
        [
            (1, "ann", 3, 1 / 3),
            (2, "bob", 3, 0.1 + 0.2),
            (3, "cyd", 1, 0.5),
            (4, "Dee", 2, 0.5),
            (5, "dee", 2, None),
            (6, "bob", 3, 0.3),
        ],
    )
    connection.commit()
    connection.close()
    return path


BY_SCORE = "SELECT name FROM player ORDER BY score DESC"
DISTINCT = "SELECT DISTINCT name, score FROM player ORDER BY score"
COUNTS = "SELECT score AS s, count(*) AS n FROM player GROUP BY s HAVING n > 0 ORDER BY n > 1"
UNION = "SELECT id, score FROM player WHERE id < 3 UNION SELECT id, score FROM player WHERE id > 4 ORDER BY 2"


@pytest.mark.parametrize(
    "target, answer, right",
    [
        (BY_SCORE, "SELECT name FROM player ORDER BY score DESC, id DESC", True),
        (BY_SCORE, "SELECT name FROM player ORDER BY score DESC, name COLLATE BINARY DESC", True),
        (BY_SCORE, "SELECT name FROM player ORDER BY score", False),
        (BY_SCORE, "SELECT name FROM player ORDER BY id = 6, score DESC", False),
        (BY_SCORE, "SELECT name FROM player", False),
        (f"{BY_SCORE} LIMIT 2", "SELECT name FROM player WHERE id IN (2, 6)", True),
        (f"{BY_SCORE} LIMIT 2", "SELECT name FROM player WHERE id IN (2, 3)", False),
        (f"{BY_SCORE} LIMIT 2", f"{BY_SCORE} LIMIT 3", False),
        (f"{BY_SCORE} LIMIT 3 OFFSET 2", "SELECT name FROM player WHERE id IN (2, 4, 5)", True),
        (f"{BY_SCORE} LIMIT 2, 3", "SELECT name FROM player WHERE id IN (1, 4, 5)", True),
        (f"{BY_SCORE} LIMIT 2, 3", "SELECT name FROM player WHERE id IN (3, 4, 5) ORDER BY id DESC", False),
        # If the limit is not a plain number, only the rows of the target are correct.
        (f"{BY_SCORE} LIMIT 1 + 1", "SELECT name FROM player WHERE id IN (2, 6)", False),
        (f"{BY_SCORE} -- LIMIT 1\n ;", "SELECT name FROM player ORDER BY score DESC, id DESC", True),
        (DISTINCT, "SELECT DISTINCT name, score FROM player ORDER BY score, name DESC", True),
        (DISTINCT, "SELECT DISTINCT name, score FROM player ORDER BY -score, name", False),
        (COUNTS, "SELECT score, count(*) FROM player GROUP BY 1 ORDER BY count(*) > 1, 1", True),
        (COUNTS, "SELECT score, count(*) FROM player GROUP BY 1 ORDER BY count(*) > 1, 1 DESC", True),
        (COUNTS, "SELECT score, count(*) FROM player GROUP BY 1 ORDER BY 2 DESC, 1", False),
        (UNION, "SELECT id, score FROM player WHERE id NOT IN (3, 4) ORDER BY score, -id", True),
        (UNION, "SELECT id, score FROM player WHERE id NOT IN (3, 4) ORDER BY -score, id", False),
        (
            "SELECT share FROM player WHERE share < 0.4 ORDER BY score",
            "SELECT share FROM player WHERE share < 0.4 ORDER BY -share",
            True,
        ),
    ],
)
def test_tied_rows_may_be_in_any_order(players, target, answer, right):
    with QueryRunner() as runner:
        assert judge(runner, players, target, target).right
        assert judge(runner, players, target, answer).right is right


def test_normalization_changes_white_space_and_case_outside_quotes_only():
    assert normalize_query("SELECT  COUNT( * )\nFROM T WHERE a='It''s A' ;") == normalize_query(
        "select count(*) from t where A = 'It''s A'"
    )
    assert normalize_query("SELECT a FROM t WHERE a = 'x'") != normalize_query("SELECT a FROM t WHERE a = 'X'")


def test_an_answer_must_end_run_and_return_the_rows_of_the_target(database):
    target = "SELECT name, count(*) FROM t GROUP BY name"
    answers = {
        "SELECT name, sum(1.0) FROM t GROUP BY 1 ORDER BY 2 DESC": True,
        "SELECT name FROM t": False,
        "SELEC": False,
        "": False,
        "-- x": False,
        "SELECT count(*), name FROM t GROUP BY name": False,
        f"{target}; {target}": False,
        f"{target};": True,
    }
    for text, right in answers.items():
        assert score([target], [Answer(text, True)], [database], [True])[0]["execution"] == right, text
    endless = score([target], [Answer(target, False)], [database], [True])[0]
    assert (endless["execution"], endless["exact"]) == (0, 0)
    nothing = ["SELECT id, name FROM t WHERE 0"]
    for text, right in {"SELECT name, id FROM t WHERE 1 = 2": True, "SELECT 1 WHERE 0": False}.items():
        assert score(nothing, [Answer(text, True)], [database], None)[0]["execution"] == right, text


def test_rows_that_cannot_be_scored_are_wrong_and_counted(database):
    targets = ["SELECT nothing FROM t", "SELECT id FROM t", "SELECT id FROM t", "SELECT id FROM t WHERE 0"]
    metrics, counts = score(
        targets, gold_answers(targets), [database, None, database, database], [False, True, True, False]
    )
    assert (metrics["execution"], metrics["exact"], metrics["execution_unseen"], metrics["execution_filled"]) == (
        0.5,
        1,
        0.5,
        1,
    )
    assert counts == {"failed_gold": 1, "missing_database": 1, "empty_results": 1, "unseen": 2}
    metrics, counts = score(targets, gold_answers(targets), [database] * 4, None)
    assert "unseen" not in counts and not any("unseen" in name for name in metrics)


def test_databases_are_found_by_the_name_in_the_row(tmp_path):
    for path in ("a.sqlite", "b/b.sqlite"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    rows = [
        Row(("For db_id:[a]\n\nhow many", "SELECT 1"), {}),
        Row(("how many", "SELECT 1"), {"db_id": "b"}),
        Row(("how many", "SELECT 1"), {"db_id": "../a"}),
        Row(("how many", "SELECT 1"), {}),
    ]
    assert find_databases(rows, tmp_path) == [tmp_path / "a.sqlite", tmp_path / "b" / "b.sqlite", None, None]
    assert find_databases(rows, tmp_path / "a.sqlite") == [tmp_path / "a.sqlite"] * 4
    with pytest.raises(UserError, match=r"has no database for any row: the first row needs a.sqlite or a/a.sqlite"):
        find_databases(rows, tmp_path / "none")


def test_unreadable_database_files_are_refused(tmp_path, database):
    row, pointer, logged = Row(("how many", "SELECT 1"), {}), tmp_path / "pointer.sqlite", tmp_path / "logged.sqlite"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"pointer.sqlite .* is not a SQLite file"):
        find_databases([row], pointer)
    shutil.copy(database, logged)
    connection = sqlite3.connect(logged)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE new (a)")
    with pytest.raises(UserError, match=r"without the changes in logged.sqlite-wal; merge them"):
        find_databases([row], logged)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert find_databases([row], logged) == [logged]
    connection.close()


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
LONG_FUNCTION = "SELECT instr(hex(zeroblob(1000000)), hex(zeroblob(500000)) || 'x')"
ATTACKS = {
    "a write": [
        "DROP TABLE t",
        "DELETE FROM t",
        "INSERT INTO t VALUES (1, '', 0)",
        "CREATE TABLE u (a)",
        "UPDATE t SET id = 0",
        "VACUUM INTO 'x.db'",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA writable_schema = 1",
        "BEGIN",
        "REINDEX",
        "SELECT 1; DROP TABLE t",
        "PRAGMA hard_heap_limit = 0",
    ],
    "a different file": [
        "ATTACH 'other.sqlite' AS o",
        "SELECT load_extension('x.so')",
        "SELECT readfile('/etc/passwd')",
        "SELECT * FROM dbstat",
    ],
    "endless": [
        f"{ENDLESS} SELECT count(*) FROM n",
        "SELECT count(*) FROM " + ", ".join(f"t AS t{number}" for number in range(30)),
        f"{ENDLESS} SELECT sum(i) FROM n",
        LONG_FUNCTION,
    ],
    "memory": [
        f"{ENDLESS} SELECT group_concat(i) FROM n",
        "SELECT randomblob(2000000000)",
        "SELECT zeroblob(1000000000)",
        "SELECT printf('%.*c', 2000000000, 'x')",
        f"{ENDLESS} SELECT randomblob(4000000) FROM n",
        f"{ENDLESS} SELECT i FROM n ORDER BY -i",
        f"{ENDLESS} SELECT DISTINCT i FROM n",
        "SELECT replace(hex(zeroblob(1000000)), '0', hex(zeroblob(1000000)))",
        f"{ENDLESS} SELECT i FROM n",
    ],
    "the parser": [
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "SELECT 1 " + "UNION SELECT 1 " * 3000,
        "SELECT '" + "x" * 10**6 + "'",
        "\0",
        "SELECT \ud800",
    ],
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_attacks_fail_and_later_queries_run(database, kind):
    before, files = database.read_bytes(), set(database.parent.iterdir())
    with QueryRunner(seconds=0.5) as runner:
        for query in ATTACKS[kind]:
            outcome = runner.run(database, query)
            assert outcome.rows is None and 0 < len(outcome.error) < 400, query[:80]
            if runner._process is not None:
                worker = psutil.Process(runner._process.pid)
                assert worker.memory_info().rss < 700 << 20, query[:80]
            assert runner.run(database, "SELECT * FROM t").rows == TEN_ROWS, query[:80]
    assert database.read_bytes() == before and set(database.parent.iterdir()) == files


def test_the_processor_time_of_a_query_is_limited(database):
    with QueryRunner(seconds=0.5) as runner:
        assert runner.run(database, "SELECT 1").rows == [(1,)]
        worker = psutil.Process(runner._process.pid)
        assert "interrupted" in runner.run(database, f"{ENDLESS} SELECT count(*) FROM n").error
        assert worker.is_running()  # the kernel kills it only at 1.5 s of processor time
        assert "took longer" in runner.run(database, LONG_FUNCTION).error  # SQLite checks no clock within a function
        assert not worker.is_running()


SCHEMA = {
    "db_id": "shop",
    "table_names_original": ["customer", "Orders", "sqlite_sequence"],
    "column_names_original": [
        [-1, "*"],
        [0, "id"],
        [0, "Name"],
        [0, "city"],
        [1, "id"],
        [1, "customer_id"],
        [1, "price"],
        [1, "day of order"],
    ],
    "column_types": ["text", "number", "text", "text", "number", "number", "number", "time"],
    "primary_keys": [1, 4],
    "foreign_keys": [[5, 1]],
}
QUERIES = [
    "SELECT count(*) FROM customer WHERE city = 'Ulm'",
    'SELECT T2.price FROM customer AS T1 JOIN orders AS T2 ON T1.id = T2.customer_id WHERE T1.name = "Ann"',
    "SELECT name FROM customer WHERE city = 'Bonn' OR city = 'Ulm' ORDER BY name",
    "SELECT id FROM orders WHERE price > 950.5",
    "SELECT id FROM orders WHERE price < 3",
    "SELECT name FROM customer WHERE name LIKE '%ob%' AND city IN ('Rome', 'Oslo')",
    "SELECT count(*) FROM orders WHERE price BETWEEN 40 AND 42",
    "SELECT T1.name FROM customer AS T1 JOIN orders AS T2 ON T1.id = T2.customer_id GROUP BY T1.id HAVING count(*) > 1",
    "SELECT shoe FROM customer",
]


def test_generated_databases_answer_their_queries(tmp_path):
    make_databases([SCHEMA], {"shop": QUERIES}, tmp_path)
    failed, empty_results = check_queries({"shop": QUERIES}, tmp_path)
    assert len(failed) == 1 and "no such column: shoe" in failed[0] and empty_results == 0
    first = (tmp_path / "shop.sqlite").read_bytes()
    connection = sqlite3.connect(tmp_path / "shop.sqlite")
    assert connection.execute(
        "SELECT count(*) FROM orders WHERE customer_id NOT IN (SELECT id FROM customer)"
    ).fetchone() == (0,)
    assert connection.execute("SELECT count(*), count(DISTINCT id) FROM customer").fetchone()[0] >= 24
    connection.close()
    make_databases([SCHEMA], {"shop": QUERIES}, tmp_path)
    assert (tmp_path / "shop.sqlite").read_bytes() == first


def fraction_with_equal_results(targets, answers, databases):
    """Return the fraction of answers with the result of their target, computed with sqlite3, for harmless queries."""
    equal = 0
    for target, answer, database in zip(targets, answers, databases, strict=True):
        connection = sqlite3.connect(database)
        try:
            results = [connection.execute(query).fetchall() for query in (target, answer)]
            equal += results[0] == results[1] if outer_order_by(target) else Counter(results[0]) == Counter(results[1])
        except sqlite3.Error:
            pass
        connection.close()
    return equal / len(targets)


def check_scores(targets, databases, failing):
    new = [True] * len(targets)
    metrics, counts = score(targets, gold_answers(targets), databases, new)
    assert counts["failed_gold"] == failing and counts["missing_database"] == 0
    assert (
        metrics["execution"] == pytest.approx(1 - failing / len(targets))
        and metrics["execution_filled"] == metrics["exact"] == 1
    )
    metrics, _ = score(targets, empty_answers(targets), databases, new)
    assert metrics["execution"] == metrics["exact"] == metrics["runs"] == 0
    shuffled = rotated(targets)
    metrics, _ = score(targets, gold_answers(shuffled), databases, new)
    assert (
        metrics["execution"] == pytest.approx(fraction_with_equal_results(targets, shuffled, databases))
        and metrics["execution"] < 0.5
    )
    return counts


def test_gold_empty_and_shuffled_answers_on_a_small_set(tmp_path):
    make_databases([SCHEMA], {"shop": QUERIES}, tmp_path)
    check_scores(QUERIES, [tmp_path / "shop.sqlite"] * len(QUERIES), failing=1)


def test_gold_empty_and_shuffled_answers_on_geography():
    targets = [row.target for row in real_rows("geography/test.jsonl")]
    # Two targets name a table of a different database.
    check_scores(targets, [DATA / "geography" / "geography.sqlite"] * len(targets), failing=2)


def test_gold_empty_and_shuffled_answers_on_spider(tmp_path):
    rows = real_rows("spider/test.jsonl")
    rows = random.Random(0).sample(rows, 300)
    queries = defaultdict(list)
    for row in rows:
        queries[database_name(row)].append(row.target)
    schemas = [
        schema for schema in json.loads((DATA / "spider" / "tables.json").read_text()) if schema["db_id"] in queries
    ]
    make_databases(schemas, queries, tmp_path)
    failed, _ = check_queries(queries, tmp_path)
    databases = find_databases(rows, tmp_path)
    counts = check_scores([row.target for row in rows], databases, failing=len(failed))
    assert len(failed) <= 3 and counts["empty_results"] < 0.12 * len(rows)
