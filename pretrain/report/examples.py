"""Test rows on which the arms differ most, or on which all arms fail."""

from dataclasses import dataclass
from typing import Any

from data_prep.files import read_json_lines
from pretrain.report.arms import Comparison
from pretrain.report.runs import Run
from pretrain.run_folder import step_name

EACH_KIND = 3
"""Number of examples of each kind."""
FIELDS = {"context", "target", "answer", "stopped"}


@dataclass(frozen=True)
class Answer:
    """Answer of an arm to a test row."""

    arm: str
    text: str
    """Answer of the arm's first seed that has answers."""
    right: int
    """Number of seeds that wrote exactly the target and stopped."""
    seeds: int


@dataclass(frozen=True)
class Example:
    """Test row with the answers of the arms."""

    context: str
    target: str
    answers: list[Answer]

    @property
    def by_text(self) -> dict[str, list[Answer]]:
        """Answers by text, so arms that wrote the same text are together; the target comes first."""
        texts: dict[str, list[Answer]] = {}
        for answer in sorted(self.answers, key=lambda answer: answer.text != self.target):
            texts.setdefault(answer.text, []).append(answer)
        return texts


def worst_examples(comparison: Comparison) -> dict[str, list[Example]]:
    """Return examples by kind of failure, the clearest first; empty if no run has answers of the metric's task."""
    written = {
        arm.name: [rows for run in arm.runs.values() if (rows := _answers(run, comparison.metric.task))]
        for arm in comparison.arms.values()
    }
    written = {name: runs for name, runs in written.items() if runs}
    if not written:
        return {}
    shared = set.intersection(*(set(rows) for runs in written.values() for rows in runs))
    order = [key for key in next(iter(written.values()))[0] if key in shared]
    examples = [
        Example(key[0], key[1], [_answer(name, [rows[key] for rows in runs]) for name, runs in written.items()])
        for key in order
    ]
    kinds: dict[str, list[Example]] = {}
    baseline = comparison.baseline
    if baseline in written and len(written) > 1:
        lead = {id(example): _lead(example, baseline) for example in examples}
        by_lead = sorted(examples, key=lambda example: lead[id(example)])
        kinds[f"{baseline} writes the target, the other arms do not"] = [one for one in by_lead if lead[id(one)] < 0]
        kinds[f"the other arms write the target, {baseline} does not"] = [
            one for one in reversed(by_lead) if lead[id(one)] > 0
        ]
    kinds["no arm writes the target"] = [one for one in examples if not any(answer.right for answer in one.answers)]
    return {kind: chosen[:EACH_KIND] for kind, chosen in kinds.items() if chosen}


def _lead(example: Example, baseline: str) -> float:
    """Return the mean fraction of right seeds of the other arms, minus the baseline's fraction."""
    fractions = {answer.arm: answer.right / answer.seeds for answer in example.answers}
    baseline_fraction = fractions.pop(baseline)
    return sum(fractions.values()) / len(fractions) - baseline_fraction


def _answer(name: str, rows: list[dict[str, Any]]) -> Answer:
    return Answer(
        name, rows[0]["answer"], sum(row["answer"] == row["target"] and row["stopped"] for row in rows), len(rows)
    )


def _answers(run: Run, task: str) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return the rows of a finished run's last answers; empty if there are none.

    The key is the context, the target, and the number of earlier rows with the same two.
    """
    path = (
        run.folder / "evaluation" / "answers" / f"{task}-{step_name(run.last['step'])}.jsonl" if run.finished else None
    )
    if path is None or not path.is_file():
        return {}
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in read_json_lines(path):
        if row.keys() >= FIELDS:
            repeats = 0
            while (row["context"], row["target"], repeats) in rows:
                repeats += 1
            rows[row["context"], row["target"], repeats] = row
    return rows
