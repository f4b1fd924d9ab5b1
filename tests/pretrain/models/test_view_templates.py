"""Templates of views: the special tokens around a view that is encoded separately."""

import pytest

from pretrain.models.view_templates import ViewTemplate, view_template

BOS_EOS = ViewTemplate(("bos",), ("eos",))
BOS_SEP = ViewTemplate(("bos",), ("sep",))
EOS = ViewTemplate((), ("eos",))


@pytest.mark.parametrize("name", ["next_token", "llm_jepa"])
@pytest.mark.parametrize(
    ("layout", "views", "expected"),
    [
        ("joint", 1, [BOS_EOS]),
        ("joint", 2, [BOS_SEP, EOS]),
        ("joint", 3, [BOS_SEP, EOS, EOS]),
        ("independent", 1, [BOS_EOS]),
        ("independent", 3, [BOS_EOS] * 3),
    ],
)
def test_a_template_has_the_special_tokens_of_the_layout(name, layout, views, expected):
    jepa = {"objective": {"name": name, "layout": layout}, "views": [f"view{number}" for number in range(views)]}
    assert [view_template(jepa, view) for view in range(views)] == expected
