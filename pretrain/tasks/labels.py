"""Tasks of labels: choose one of a few words for a text.

likelihood: of all labels the target is the most likely answer, the end token included; a tie is no choice. generation: the written answer is
the target and ended with the end token. prefix: it starts with the target (what the LLM-JEPA paper reports). majority: the share of the most common
label, which a model reaches that looks at no text. The labels are the targets of the test rows and of the train rows.
"""

from collections import Counter
from collections.abc import Sequence

from data_prep.console import UserError
from pretrain.tasks.scoring import Answer, TaskResult, TaskRun, beyond_positions, rate, sole_best, without_room

MOST_LABELS = 50


def evaluate_labels(run: TaskRun) -> TaskResult:
    """Weigh the labels for each test row, write an answer, score both."""
    rows = run.read_test()
    targets = [row.target for row in rows]
    labels = sorted({*targets, *(row.target for row in run.read_train())})
    if len(labels) > MOST_LABELS:
        raise UserError(f"task.test has {len(labels)} different targets, but a task of labels takes at most {MOST_LABELS}; look at the columns")
    answers = run.answer(rows)
    likelihoods = run.log_likelihoods([(row.context, labels) for row in rows])
    counts = {"labels": len(labels)} | without_room(answers) | beyond_positions(likelihoods)
    return TaskResult(len(rows), score(targets, labels, likelihoods, answers), counts)


def score(targets: Sequence[str], labels: Sequence[str], likelihoods: Sequence[Sequence[float]], answers: Sequence[Answer]) -> dict[str, float]:
    """Rates over all rows; `likelihoods` (rows, labels) are log-likelihoods."""
    return {
        "likelihood": rate(sole_best(values, labels.index(target)) for target, values in zip(targets, likelihoods, strict=True)),
        "generation": rate(answer.text == target and answer.stopped for target, answer in zip(targets, answers, strict=True)),
        "prefix": rate(answer.text.startswith(target) for target, answer in zip(targets, answers, strict=True)),
        "stopped": rate(answer.stopped for answer in answers),
        "majority": max(Counter(targets).values()) / len(targets),
    }
