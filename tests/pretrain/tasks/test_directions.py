"""Every metric that the project itself computes declares its direction; test_job.py holds the results of each task against the table."""

from typing import get_args

from pretrain.config import parse_task
from pretrain.objectives.configs.regularizers import RegularizerConfig
from pretrain.tasks import task_configs
from pretrain.tasks.directions import VALIDATION, direction, metric_directions


def test_the_table_has_each_task_and_each_term_of_the_loss():
    assert (
        all(metric_directions(task) for task in task_configs().keys() - {"lm_eval"})
        and metric_directions("nothing") == metric_directions("a.b") == {}
    )
    terms = {
        "lm",
        "jepa",
        *(get_args(kind.model_fields["name"].annotation)[0] for kind in RegularizerConfig.__subclasses__()),
    }
    assert {name for name in metric_directions(VALIDATION) if name.startswith("loss/")} == {
        f"loss/{term}" for term in terms
    }


def test_a_direction_of_prediction_is_a_prefix_of_metrics_of_retrieval_alone():
    assert direction("retrieval", "code_to_text_recall_at_10") == direction("retrieval", "mrr") == "higher"
    assert direction("retrieval", "code_to_text_exact") is direction("nl_rx", "foo_to_bar_exact") is None
    two = ("text", "code")
    retrieval, text = (
        parse_task({"name": "retrieval", "test": "x"}, "task"),
        parse_task({"name": "text", "test": "x"}, "task"),
    )
    assert (
        retrieval.reports_metric("code_to_text_mrr", two)
        and retrieval.reports_metric("mrr", two)
        and not retrieval.reports_metric("foo_to_bar_mrr", two)
    )
    assert text.reports_metric("exact", two) and not text.reports_metric("bleu", two)
    assert parse_task({"name": "text", "test": "x", "similarity": ["bleu"]}, "task").reports_metric("bleu", two)
