"""A task that cannot be meant is refused before anything is computed."""

import pytest
from pydantic import ValidationError

from pretrain.config import EvaluationConfig, TaskConfig


@pytest.mark.parametrize("values, message", [
    ({"name": "gsm8k"}, "the task gsm8k needs rows: test"),
    ({"name": "spider", "test": "x"}, "spider needs databases"),
    ({"name": "loss", "test": "x", "databases": "y"}, "databases act on the task spider only"),
    ({"name": "geometry", "test": "x", "finetune": {"epochs": 1}}, "the task geometry trains nothing"),
    ({"name": "yelp", "test": "x", "finetune": {"epochs": 1}}, "give train too"),
    ({"name": "gsm8k", "test": {"type": "hub", "path": "x", "weight": 2}}, "weight and split are for data.sources"),
    ({"name": "gsm8k", "test": {"type": "text", "path": "x"}}, "'text'"),
    ({"name": "loss", "test": {"type": "hub", "path": "x"}}, "give test a path"),
    ({"name": "lm_eval"}, "needs harness"), ({"name": "lm_eval", "harness": ["a"], "test": "x"}, "leave out test"),
    ({"name": "nl_rx", "harness": ["a"]}, "harness acts on the task lm_eval only"), ({"name": "nl_rx", "label": "a/b"}, "label")])
def test_options_that_cannot_act_are_errors(values, message):
    with pytest.raises(ValidationError, match=message):
        TaskConfig(**values)


def test_tasks_of_one_name_take_labels_and_tasks_take_the_views_that_they_can():
    two = [{"name": "gsm8k", "test": "x"}, {"name": "gsm8k", "test": "y"}]
    with pytest.raises(ValidationError, match="give one a label"):
        EvaluationConfig(tasks=two)
    assert [task.title for task in EvaluationConfig(tasks=[two[0], two[1] | {"label": "other"}]).tasks] == ["gsm8k", "other"]
    for name in ("gsm8k", "retrieval"):
        TaskConfig(name=name, test="x").check_views(("text", "code"))
        with pytest.raises(ValueError, match=f"evaluation.tasks: {name}"):
            TaskConfig(name=name, test="x").check_views(("text",))
    TaskConfig(name="retrieval", test="x").check_views(("a", "b", "c"))
