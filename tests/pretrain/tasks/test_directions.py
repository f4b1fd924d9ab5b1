"""Every metric of the project declares its direction. test_job.py checks the metrics of task results."""

from pretrain.config import parse_task
from pretrain.tasks import task_configs
from pretrain.tasks.directions import VALIDATION, direction, metric_directions


def test_every_task_declares_directions_and_lower_is_better_for_every_loss_term():
    assert (
        all(metric_directions(task) for task in task_configs().keys() - {"lm_eval"})
        and metric_directions("nothing") == metric_directions("a.b") == {}
    )
    assert direction(VALIDATION, "loss/new_term") == direction("loss", "new_term") == "lower"
    assert direction(VALIDATION, "embedding/nothing") is direction("geometry", "new_term") is None


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
