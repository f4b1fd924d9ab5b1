"""text: write a text, which is compared with the target.

Metrics, as fractions of the test rows:

    exact      the answer is the target and ended with the end token
    prefix     the answer starts with the target
    contains   the target is a part of the answer
    stopped    the answer ended with the end token

Suffix `_unseen`: over targets that are neither in the training corpus nor in the task's train rows.

chrf and bleu are the similarity of all answers to their targets, between 0 and 1. sacrebleu computes them with its
default settings (Popović 2015; Papineni et al. 2002). White space around an answer or a target is ignored.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

from data_prep.config import DataConfig
from pretrain.tasks.directions import MetricDirections, higher
from pretrain.tasks.options import AnswerTask, check_package
from pretrain.tasks.rows import RowRate, contains, exact, mean_rates, prefix, stopped
from pretrain.tasks.scoring import Answer, TaskResult, TaskRun, count_too_long_contexts, rate_over_subset

METRICS: MetricDirections = higher("exact", "prefix", "contains", "stopped", "exact_unseen", "chrf", "bleu")
Similarity = Literal["chrf", "bleu"]


def _stripped(is_right: RowRate) -> RowRate:
    """Return a rate that ignores white space around the target and the answer."""
    return lambda target, answer: is_right(target.strip(), answer._replace(text=answer.text.strip()))


ROW_RATES: dict[str, RowRate] = {
    "exact": _stripped(exact),
    "prefix": _stripped(prefix),
    "contains": _stripped(contains),
    "stopped": stopped,
}


class Config(AnswerTask):
    """Options of the task that writes a text, which is compared with the target."""

    name: Literal["text"]
    similarity: list[Similarity] = []
    """Additional sacrebleu scores: chrf, bleu. They need the extra `similarity`."""

    SCORING_READS_TRAIN: ClassVar[bool] = True

    def reports_metric(self, metric: str, views: tuple[str, ...]) -> bool:
        """Return whether the task reports a metric; sacrebleu scores only if `similarity` lists them."""
        return metric not in get_args(Similarity) or metric in self.similarity

    def check_requirements(self, data: DataConfig, where: str) -> None:
        """Raise UserError if a file is missing, or if sacrebleu is needed and not installed."""
        super().check_requirements(data, where)
        if self.similarity:
            check_package("sacrebleu", "similarity", f"{where}.similarity")


def evaluate(run: TaskRun) -> TaskResult:
    """Generate answers to the test rows and score the answers."""
    rows = run.read_test()
    answers = run.generate_answers(rows)
    targets = [row.target for row in rows]
    is_unseen = run.unseen(rows)
    metrics = score(targets, answers, is_unseen) | similarities(targets, answers, run.task.similarity)
    counts = {"unseen": sum(is_unseen)} if is_unseen is not None else {}
    return TaskResult(len(rows), metrics, counts | count_too_long_contexts(answers))


def score(targets: Sequence[str], answers: Sequence[Answer], is_unseen: Sequence[bool] | None) -> dict[str, float]:
    """Return the metrics over all rows, and `exact_unseen` over the rows with an unseen target."""
    is_exact = [ROW_RATES["exact"](target, answer) for target, answer in zip(targets, answers, strict=True)]
    return mean_rates(ROW_RATES, targets, answers) | rate_over_subset("exact_unseen", is_exact, is_unseen)


def similarities(targets: Sequence[str], answers: Sequence[Answer], names: Sequence[Similarity]) -> dict[str, float]:
    """Return the named sacrebleu scores over all rows, between 0 and 1."""
    if not names:
        return {}
    import sacrebleu

    compute: dict[Similarity, Callable[..., Any]] = {"chrf": sacrebleu.corpus_chrf, "bleu": sacrebleu.corpus_bleu}
    texts = [answer.text.strip() for answer in answers]
    references = [[target.strip() for target in targets]]
    return {name: compute[name](texts, references).score / 100 for name in names}
