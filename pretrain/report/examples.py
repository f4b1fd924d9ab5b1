"""Test rows on which the arms differ most, or on which all arms fail."""

from dataclasses import dataclass
from typing import Any

from data_prep.utils.files import read_json_lines
from pretrain.report.arms import Comparison
from pretrain.report.runs import Run
from pretrain.run_folder import step_name

EXAMPLES_PER_KIND = 3
"""Maximum number of examples of each kind."""
FIELDS = {"context", "target", "answer", "stopped"}
"""Keys that a line of the answers must have."""


@dataclass(frozen=True)
class Answer:
    """Answer of an arm to a test row."""

    arm: str
    text: str
    """Answer of the first of the arm's seeds that have answers."""
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
        """Answers by text, so arms that wrote the same text are together. Answers equal to the target come first."""
        texts: dict[str, list[Answer]] = {}
        for answer in sorted(self.answers, key=lambda answer: answer.text != self.target):
            texts.setdefault(answer.text, []).append(answer)
        return texts


def worst_examples(comparison: Comparison) -> dict[str, list[Example]]:
    """Return examples by kind of failure, the clearest first; empty if no run has answers to the metric's task."""
    answers = {
        arm.name: [rows for run in arm.runs.values() if (rows := read_answers(run, comparison.metric.task))]
        for arm in comparison.arms.values()
    }
    answers = {name: runs for name, runs in answers.items() if runs}
    if not answers:
        return {}
    shared = set.intersection(*(set(rows) for runs in answers.values() for rows in runs))
    order = [key for key in next(iter(answers.values()))[0] if key in shared]
    examples = [
        Example(key[0], key[1], [_answer(name, [rows[key] for rows in runs]) for name, runs in answers.items()])
        for key in order
    ]
    kinds: dict[str, list[Example]] = {}
    baseline = comparison.baseline
    if baseline in answers and len(answers) > 1:
        lead = {id(example): _lead(example, baseline) for example in examples}
        by_lead = sorted(examples, key=lambda example: lead[id(example)])
        kinds[f"{baseline} writes the target, the other arms do not"] = [
            example for example in by_lead if lead[id(example)] < 0
        ]
        kinds[f"the other arms write the target, {baseline} does not"] = [
            example for example in reversed(by_lead) if lead[id(example)] > 0
        ]
    kinds["no arm writes the target"] = [
        example for example in examples if not any(answer.right for answer in example.answers)
    ]
    return {kind: chosen[:EXAMPLES_PER_KIND] for kind, chosen in kinds.items() if chosen}


def _lead(example: Example, baseline: str) -> float:
    """Return the mean fraction of seeds with a right answer in the other arms, minus that fraction in the baseline."""
    fractions = {answer.arm: answer.right / answer.seeds for answer in example.answers}
    baseline_fraction = fractions.pop(baseline)
    return sum(fractions.values()) / len(fractions) - baseline_fraction


def _answer(name: str, rows: list[dict[str, Any]]) -> Answer:
    return Answer(
        name, rows[0]["answer"], sum(row["answer"] == row["target"] and row["stopped"] for row in rows), len(rows)
    )


def read_answers(run: Run, task: str) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return the rows of a finished run's last answers; empty if there are none.

    A key is the context, the target, and the number of earlier rows with the same context and target.
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
