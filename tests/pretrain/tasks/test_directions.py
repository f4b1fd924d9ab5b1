"""Every metric of the project declares its direction. test_job.py checks the metrics of task results."""

from typing import get_args

from pretrain.config import parse_task
from pretrain.objectives.configs.regularizers import RegularizerConfig
from pretrain.tasks import task_configs
from pretrain.tasks.directions import VALIDATION, direction, metric_directions


def test_every_task_and_every_loss_term_declares_directions():
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


def test_only_metrics_of_retrieval_may_have_a_prediction_direction_as_prefix():
    assert direction("retrieval", "code_to_text_recall_at_10") == direction("retrieval", "mrr") == "higher"
    assert direction("retrieval", "code_to_text_exact") is direction("nl_rx", "foo_to_bar_exact") is None
    views = ("text", "code")
    retrieval, text = (
        parse_task({"name": "retrieval", "test": "x"}, "task"),
        parse_task({"name": "text", "test": "x"}, "task"),
    )
    assert (
        retrieval.reports_metric("code_to_text_mrr", views)
        and retrieval.reports_metric("mrr", views)
        and not retrieval.reports_metric("foo_to_bar_mrr", views)
    )
    assert text.reports_metric("exact", views) and not text.reports_metric("bleu", views)
    assert parse_task({"name": "text", "test": "x", "similarity": ["bleu"]}, "task").reports_metric("bleu", views)
