"""Every metric that the project itself computes declares its direction; test_job.py holds the results of each task against the table."""

from typing import get_args

from pretrain.objectives.configs.regularizers import RegularizerConfig
from pretrain.tasks import task_configs
from pretrain.tasks.directions import VALIDATION, directions_of


def test_the_table_has_each_task_and_each_term_of_the_loss():
    assert all(directions_of(task) for task in task_configs().keys() - {"lm_eval"}) and directions_of("nothing") == directions_of("a.b") == {}
    terms = {"lm", "jepa", *(get_args(kind.model_fields["name"].annotation)[0] for kind in RegularizerConfig.__subclasses__())}
    assert {name for name in directions_of(VALIDATION) if name.startswith("loss/")} == {f"loss/{term}" for term in terms}
