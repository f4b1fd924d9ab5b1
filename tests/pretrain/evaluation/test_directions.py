"""Every metric that the project itself computes declares its direction; test_job.py holds the results of each task against the table."""

from typing import get_args

from pretrain.config import TaskConfig
from pretrain.evaluation.directions import METRICS, VALIDATION
from pretrain.objectives.configs.regularizers import RegularizerConfig


def test_the_table_has_each_task_and_each_term_of_the_loss():
    assert METRICS.keys() == {*get_args(TaskConfig.model_fields["name"].annotation), VALIDATION}
    terms = {"lm", "jepa", *(get_args(kind.model_fields["name"].annotation)[0] for kind in RegularizerConfig.__subclasses__())}
    assert {name for name in METRICS[VALIDATION] if name.startswith("loss/")} == {f"loss/{term}" for term in terms}
