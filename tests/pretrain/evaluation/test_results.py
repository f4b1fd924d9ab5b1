"""Results in results.jsonl: when a checkpoint counts as evaluated, and the final table."""

import pytest

from pretrain.config import parse_task
from pretrain.evaluation.results import SCORING_VERSION, append_result, is_evaluated, result_key
from pretrain.evaluation.summary import print_summary
from tests.pretrain.report.tiny_study import change_lines

TASK = parse_task({"name": "nl_rx"}, "task")


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "evaluation").mkdir()
    for step in (1, 2):
        append_result(
            tmp_path,
            result_key(TASK, step) | {"rows": 9, "finetune": None, "metrics": {"exact": step / 4}},
            tensorboard=False,
        )
    return tmp_path


def test_a_result_of_an_older_scoring_version_is_evaluated_again(run_dir):
    assert is_evaluated(run_dir, TASK, 1)
    for change in (lambda line: line.update(scoring=SCORING_VERSION - 1), lambda line: line.pop("scoring")):
        change_lines(run_dir / "evaluation" / "results.jsonl", change)
        assert not is_evaluated(run_dir, TASK, 1)


def test_the_final_table_separates_scoring_versions(run_dir, capsys):
    results = run_dir / "evaluation" / "results.jsonl"
    change_lines(results, lambda line: line.pop("scoring"))
    append_result(
        run_dir, result_key(TASK, 2) | {"rows": 9, "finetune": None, "metrics": {"exact": 0.75}}, tensorboard=False
    )
    print_summary(run_dir)
    tables = [part.strip().splitlines() for part in capsys.readouterr().out.strip().split("\n\n")]
    values = {
        lines[0].split("  ")[0]: [line.split()[-1] for line in lines[2:]]
        for lines in tables
        if lines[0].startswith("nl_rx")
    }
    assert values == {"nl_rx, scoring 1": ["0.2500", "0.5000"], "nl_rx": ["0.7500"]}


def test_the_final_table_names_the_metrics_that_it_has_no_room_for(tmp_path, capsys):
    (tmp_path / "evaluation").mkdir()
    metrics = {f"metric{number}": 0.5 for number in range(8)}
    append_result(
        tmp_path,
        {"step": 3, "task": "text", "rows": 4, "finetune": None, "metrics": metrics, "scoring": SCORING_VERSION},
        tensorboard=False,
    )
    print_summary(tmp_path)
    assert "(also in results.jsonl: metric6, metric7)" in capsys.readouterr().out
