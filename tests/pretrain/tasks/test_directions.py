"""Every metric that the project itself computes declares its direction; test_job.py holds the results of each task against the table."""

from typing import get_args

from pretrain.config import parse_task
from pretrain.objectives.configs.regularizers import RegularizerConfig
from pretrain.tasks import task_configs
from pretrain.tasks.directions import VALIDATION, direction, directions_of


def test_the_table_has_each_task_and_each_term_of_the_loss():
    assert all(directions_of(task) for task in task_configs().keys() - {"lm_eval"}) and directions_of("nothing") == directions_of("a.b") == {}
    terms = {"lm", "jepa", *(get_args(kind.model_fields["name"].annotation)[0] for kind in RegularizerConfig.__subclasses__())}
    assert {name for name in directions_of(VALIDATION) if name.startswith("loss/")} == {f"loss/{term}" for term in terms}


def test_a_direction_of_prediction_is_a_prefix_of_metrics_of_retrieval_alone():
    assert direction("retrieval", "code_to_text_recall_at_10") == direction("retrieval", "mrr") == "higher"
    assert direction("retrieval", "code_to_text_exact") is direction("nl_rx", "foo_to_bar_exact") is None
    two = ("text", "code")
    retrieval, text = parse_task({"name": "retrieval", "test": "x"}, "task"), parse_task({"name": "text", "test": "x"}, "task")
    assert retrieval.gives("code_to_text_mrr", two) and retrieval.gives("mrr", two) and not retrieval.gives("foo_to_bar_mrr", two)
    assert text.gives("exact", two) and not text.gives("bleu", two)
    assert parse_task({"name": "text", "test": "x", "similarity": ["bleu"]}, "task").gives("bleu", two)
