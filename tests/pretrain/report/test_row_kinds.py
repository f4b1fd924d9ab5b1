"""The section of the report on the kinds of rows that an arm gains or loses."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import yaml
from scipy.stats import t

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json_lines
from pretrain.report import row_kinds as module
from pretrain.report.arms import read_comparison
from pretrain.report.row_kinds import (
    ALL_ROWS,
    FEWEST_ROWS,
    MOST_KINDS,
    compare_rows,
    differences_by_kind,
    group_rows,
    interval,
    name_frequency,
    quartiles,
)
from pretrain.report.statistics import confidence_interval
from tests.pretrain.report.report_helpers import assert_self_contained, parse_table, render_report
from tests.pretrain.report.tiny_study import change_lines

HOSTILE = "</td><script>alert(1)</script>|`\\b*[x](y)\n# & ~(\x00"


def slow_interval(differences: list[list[int]]) -> tuple[float, float]:
    """Compute the interval of a table of seeds and rows, cell by cell."""
    seeds, rows = len(differences), len(differences[0])
    mean = sum(map(sum, differences)) / (seeds * rows)
    seed_means = [sum(row) / rows for row in differences]
    row_means = [sum(differences[s][r] for s in range(seeds)) / seeds for r in range(rows)]
    of_seeds = rows * sum((value - mean) ** 2 for value in seed_means) / (seeds - 1)
    of_rows = seeds * sum((value - mean) ** 2 for value in row_means) / (rows - 1)
    residual = sum(
        (differences[s][r] - seed_means[s] - row_means[r] + mean) ** 2 for s in range(seeds) for r in range(rows)
    ) / ((seeds - 1) * (rows - 1))
    variance = (of_seeds + max(0, of_rows - residual)) / (seeds * rows)
    half_width = t.ppf(0.975, min(seeds, rows) - 1) * math.sqrt(variance)
    return mean - half_width, mean + half_width


def test_differences_by_kind_equal_a_slow_computation_and_find_the_known_gains():
    draw = random.Random(3)
    gains = {"long": 0.5, "short": 0.0, "odd": -0.3}
    names = [draw.choice(list(gains)) for _ in range(400)]
    hard = [draw.random() for _ in names]  # rows that are hard for every seed
    baseline = [[draw.random() < 0.3 + 0.3 * value for value in hard] for _ in range(5)]
    arm = [
        [draw.random() < 0.3 + 0.3 * value + gains[name] for value, name in zip(hard, names, strict=True)]
        for _ in range(5)
    ]
    kinds = {name: np.array([name == other for other in names]) for name in gains} | {ALL_ROWS: np.ones(400, bool)}
    for found in differences_by_kind(np.array(arm), np.array(baseline), kinds):
        chosen = [index for index in range(400) if kinds[found.kind][index]]
        table = [[int(arm[seed][row]) - int(baseline[seed][row]) for row in chosen] for seed in range(5)]
        assert (found.low, found.high) == pytest.approx(slow_interval(table))
        assert found.mean == pytest.approx(sum(map(sum, table)) / (5 * len(chosen)))
        assert (found.seeds, found.rows) == (5, len(chosen))
        if found.kind in gains:
            assert abs(found.mean - gains[found.kind]) < 0.15
        if gains.get(found.kind):
            assert found.low * found.high > 0  # the interval excludes 0


def test_an_interval_is_never_narrower_than_the_t_test_over_seeds():
    draw = np.random.default_rng(0)
    for _ in range(200):
        differences = draw.integers(-1, 2, (draw.integers(2, 6), draw.integers(FEWEST_ROWS, 40))).astype(float)
        found, seed_means = interval(differences), differences.mean(axis=1)
        if found is None:  # by chance, there is no spread
            assert np.ptp(seed_means) < 1e-6
            continue
        (low, high), alone = found, confidence_interval(seed_means, 0.05)
        assert low <= alone[0] + 1e-12 and high >= alone[1] - 1e-12
    shared = np.tile(draw.integers(-1, 2, 40), (4, 1)).astype(float)  # all seeds agree: only the rows vary
    low, high = interval(shared)
    assert (high - low) / 2 == pytest.approx(t.ppf(0.975, 3) * shared[0].std(ddof=1) / math.sqrt(40))


def test_the_interval_of_rows_with_effects_equals_a_slow_computation():
    draw = np.random.default_rng(2)
    for seeds in (2, 3, 6):
        table = draw.integers(0, 2, (seeds, 40)) + np.where(np.arange(40) < 20, 3, -3)  # the rows differ
        assert interval(table.astype(float)) == pytest.approx(slow_interval(table.tolist()))


def test_the_interval_contains_the_true_difference_in_most_samples_of_seeds_and_rows():
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        effects = draw.normal(0, 0.15, (6, 1)) + draw.normal(0.1, 0.3, (1, 50)) + draw.normal(0, 0.5, (6, 50))
        low, high = interval(effects)
        covered += low < 0.1 < high
    assert 0.94 <= covered / 400 <= 1


def test_there_is_no_interval_without_spread_or_with_too_few_seeds_or_rows():
    mixed = np.tile([1.0, 0.0, -1.0], (3, 10))
    assert interval(mixed) is not None
    assert interval(mixed[:1]) is interval(np.ones((3, 50))) is None
    assert interval(mixed[:, :9]) is None and interval(mixed[:, :10]) is not None


def test_rows_are_grouped_by_texts_and_by_quartiles_of_numbers():
    assert quartiles([1, 1, 1, 1]) == [("1",)] * 4
    assert quartiles([5, 1, 3, 2000]) == [("5",), ("1",), ("3",), ("2,000",)]
    assert quartiles([1, 2, 2, 2, 2, 2, 2, 9]) == [("1 to 2",)] * 7 + [("9",)]
    sizes = list(range(1, 13))
    rows = [{"uses": ("a", "b") if size > 6 else ("a",), "length": size} for size in sizes]
    kinds = group_rows(rows)
    assert list(kinds) == [
        ALL_ROWS, "uses: b", "length: 1 to 3", "length: 4 to 6", "length: 7 to 9", "length: 10 to 12",
    ]  # fmt: skip
    assert kinds["uses: b"].tolist() == [size > 6 for size in sizes]
    assert sum(mask.astype(int) for name, mask in kinds.items() if name.startswith("length")).tolist() == [1] * 12
    assert len(group_rows([{"x": (str(number),)} for number in range(50)])) == MOST_KINDS
    assert [name_frequency(count) for count in (0, 1, 2, 10, 11)] == ["0", "1", "2 to 10", "2 to 10", "more than 10"]


def write_answers(study, answers_of, task: str | None = None, metric: str | None = None) -> None:
    """Write answers for every run: `answers_of` maps (arm number, seed) to lines, or to None to delete the file."""
    study_json = json.loads((study / "study.json").read_text())
    if metric:
        study_json["metric"] |= {"task": task, "name": metric}
        (study / "study.json").write_text(json.dumps(study_json))
    for number, arm in enumerate(study_json["arms"].values()):
        for seed, path in arm["runs"].items():
            folder = study / path / "evaluation" / "answers"
            for old in folder.glob("*.jsonl"):
                old.unlink()
            lines = answers_of(number, int(seed))
            if lines is not None:
                step = read_json_lines(study / path / "metrics.jsonl")[-1]["step"]
                file = folder / f"{task or 'nl_rx'}-step-{step:08d}.jsonl"
                file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            if task:
                config = yaml.safe_load((study / path / "config.yaml").read_text())
                config["evaluation"] = {"tasks": [{"name": task, "test": "test.jsonl"}]}
                (study / path / "config.yaml").write_text(yaml.safe_dump(config))
                change_lines(
                    study / path / "evaluation" / "results.jsonl",
                    lambda line: line.update(task=task, metrics={metric: 0.5}),
                )


def lines_with_gain(number: int, seed: int, targets: list[str], gain) -> list[dict]:
    """Return answers of which the baseline (arm 0) has a third right, and other arms also the targets with `gain`."""
    lines = []
    for row, target in enumerate(targets):
        right = (row + seed) % 3 == 0 or (number > 0 and gain(target) and (row + seed) % 7 > 0)
        lines.append(
            {"context": f"row {row}", "target": target, "answer": target if right else HOSTILE, "stopped": True}
        )
    return lines


ARMS = {"next_token": {1: 0.1, 2: 0.2, 3: 0.3}, "mine": {1: 0.2, 2: 0.3, 3: 0.4}}
TARGETS = list(itertools.islice(itertools.cycle(["(dog)|([0-9])", "~(dog)", r".*\bdog\b.*", "((a)+){2,}"]), 120))


def test_the_report_shows_the_kinds_of_regexes_that_an_arm_gains(study_with_values):
    study = study_with_values(ARMS)
    write_answers(study, lambda number, seed: lines_with_gain(number, seed, TARGETS, lambda target: "|" in target))
    markdown, page = render_report(study)
    section = markdown[markdown.index("## Which rows?") :]
    lines = [line.split(" | ") for line in section.replace("\\|", "OR").splitlines() if line.startswith("| mine")]
    by_kind = {line[2]: line for line in lines}
    assert by_kind["operators: or: OR"][3] == "30" and by_kind["operators: or: OR"][6].startswith("+0.5")
    assert by_kind["operators: not: ~"][6] == "+0.0000" and by_kind["operators: not: ~"][7].startswith("–")
    assert set(by_kind) >= {ALL_ROWS, "operators: repeated: {n,}", "nested parentheses: 2"} and len(lines) <= MOST_KINDS
    shown = sum(" to " in line[7] for line in lines)
    assert f"Intervals shown: {shown}. They are exploratory" in section and shown
    assert "do not have the exact of the result that is compared" in section  # study_with_values invents the results
    assert_self_contained(page)
    assert "Which rows?" in page and "operators: or: |" in page and "<script>" not in page
    assert len(parse_table(section)) == 1  # all lines belong to the only arm with a difference


def test_runs_without_answers_are_named_and_skipped(study_with_values):
    study = study_with_values(ARMS)

    def answers(number: int, seed: int) -> list[dict] | None:
        lines = lines_with_gain(number, seed, TARGETS, lambda target: True)
        return None if (number, seed) == (1, 2) else lines[:-5] if (number, seed) == (0, 1) else lines

    write_answers(study, answers)
    found = compare_rows(read_comparison([study], None, None))
    assert [difference.seeds for difference in found.arms["mine"]] == [2] * len(found.arms["mine"])
    assert found.arms["mine"][0].rows == len(TARGETS) - 5
    assert "These runs have no answers at the end of training: mine (seed 2)." in found.remarks
    assert "These runs are not used, because their partner has no answers: next_token (seed 2)." in found.remarks
    assert "5 rows are skipped, because some of these runs have not answered them." in found.remarks

    write_answers(study, lambda number, seed: None)
    assert "This section needs the answers of finished runs" in render_report(study)[1]
    write_answers(
        study, lambda number, seed: [{"context": f"{seed} {number}", "target": "x", "answer": "x", "stopped": True}]
    )
    assert "different test rows" in compare_rows(read_comparison([study], None, None)).problem


def test_a_rate_that_does_not_follow_from_the_answers_is_replaced(study_with_values):
    study = study_with_values(ARMS)
    write_answers(study, lambda number, seed: lines_with_gain(number, seed, TARGETS, lambda target: "|" in target))
    found = compare_rows(read_comparison([study], None, "nl_rx/equal"))
    assert found.rate == "exact" and "nl_rx/equal does not follow from the saved answers" in found.remarks[0]
    assert compare_rows(read_comparison([study], None, "nl_rx/stopped")).rate == "stopped"
    assert compare_rows(read_comparison([study], None, "validation/loss/lm:lower")) is None


def test_other_tasks_use_lengths_and_the_frequency_of_the_target(study_with_values, monkeypatch):
    study = study_with_values(ARMS)
    targets = ["good"] * 60 + ["terrible"] * 40 + [HOSTILE] * 12 + ["rare"]
    counts = {"good": 0, "terrible": 5, HOSTILE: 1, "rare": 99}
    write_answers(
        study,
        lambda number, seed: lines_with_gain(number, seed, targets, lambda target: target == "terrible"),
        "text",
        "exact",
    )

    def no_corpus(run, config, split):
        raise UserError("the corpus does not exist")

    monkeypatch.setattr(module, "open_corpus", no_corpus)
    found = compare_rows(read_comparison([study], None, None))
    kinds = {difference.kind: difference.rows for difference in found.arms["mine"]}
    assert kinds["target in the test rows: 1"] == 1 and kinds["target in the test rows: more than 10"] == 112
    monkeypatch.setattr(module, "_count_in_corpus", lambda folder, texts: [counts[text] for text in texts])
    monkeypatch.setattr(module, "open_corpus", lambda run, config, split: type("Opened", (), {"folder": run.folder}))
    found = compare_rows(read_comparison([study], None, None))
    kinds = {difference.kind: difference for difference in found.arms["mine"]}
    prefix = "target in the training split"
    assert [kinds[f"{prefix}: {name}"].rows for name in ("0", "1", "2 to 10", "more than 10")] == [60, 12, 40, 1]
    assert kinds[f"{prefix}: 2 to 10"].mean > 0.4 and kinds[f"{prefix}: 0"].mean == 0
    assert kinds[f"{prefix}: more than 10"].low is None and len(kinds) <= MOST_KINDS
    assert sum(difference.rows for kind, difference in kinds.items() if "of the target" in kind) == len(targets)


def test_a_real_study_has_the_section(study):
    markdown, page = render_report(study)
    assert "## Which rows?" in markdown and "Which rows?" in page
    assert "do not have the" not in markdown  # the saved answers have the results of the evaluations
