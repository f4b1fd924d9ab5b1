"""nl_rx: write the target for a context, scored as text.

exact: the answer is the target and ended with the end token. prefix: it starts with the target (what the LLM-JEPA
paper reports). contains: the target stands in it. stopped: it ended with the end token.
"""

import json
from collections.abc import Sequence

from data_prep.config import task_source
from data_prep.files import write_text
from data_prep.tokenizer import Tokenizer
from pretrain.evaluation.finetune import finetune
from pretrain.evaluation.generate import Answer, answer
from pretrain.evaluation.pairs import GRAMMAR_ROWS, grammar_source, read_pairs
from pretrain.evaluation.tasks.task_run import TaskResult, TaskRun
from pretrain.run_folder import step_name


def evaluate(run: TaskRun) -> TaskResult:
    """Finetune on the train rows where the task says so, answer the test rows, score."""
    views, task = run.config.data.views, run.task
    if task.test is not None:
        test = task_source(run.config.data, task.test)
    else:
        test = grammar_source(run.folder / "data", "test", views, task.rows or GRAMMAR_ROWS)
    pairs = read_pairs(test, views, "task.test", task.rows)
    model = run.export
    name = f"{task.name}-{step_name(run.step)}"
    if task.finetune is not None:
        train = task_source(run.config.data, task.train) if task.train is not None else grammar_source(run.folder / "data", "finetune", views)
        model = finetune(run.config, task, run.export, train, run.folder, name)
    tokenizer = Tokenizer.load(model)
    longest = max(map(len, tokenizer.encode_batch([target for _, target in pairs])))
    answers = answer(model, [context for context, _ in pairs], max_new_tokens=2 * longest + 1)
    _write_answers(run, name, pairs, answers)
    return TaskResult(len(pairs), score([target for _, target in pairs], answers))


def score(targets: Sequence[str], answers: Sequence[Answer]) -> dict[str, float]:
    """Rates over all rows."""
    rows = list(zip(targets, answers, strict=True))
    return {
        "exact": sum(answer.text == target and answer.stopped for target, answer in rows) / len(rows),
        "prefix": sum(answer.text.startswith(target) for target, answer in rows) / len(rows),
        "contains": sum(target in answer.text for target, answer in rows) / len(rows),
        "stopped": sum(answer.stopped for _, answer in rows) / len(rows),
    }


def _write_answers(run: TaskRun, name: str, pairs: list[tuple[str, str]], answers: list[Answer]) -> None:
    folder = run.folder / "answers"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"context": context, "target": target, "answer": answer.text, "stopped": answer.stopped}, ensure_ascii=False)
             for (context, target), answer in zip(pairs, answers, strict=True)]
    write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
