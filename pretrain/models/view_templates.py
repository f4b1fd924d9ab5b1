"""How an export encodes a view on its own: which special tokens stand around it. A test compares with the read-outs of pretrain/data/layout.py."""

from typing import Any, NamedTuple

from pretrain.data.layout import Pairing
from pretrain.objectives.configs import ObjectiveConfig, objective_configs


class ViewTemplate(NamedTuple):
    """The special tokens before and after a view, by name: bos, sep or eos. The last token's hidden state is the embedding."""

    before: tuple[str, ...]
    after: tuple[str, ...]


def objective_from_export(jepa: dict[str, Any]) -> ObjectiveConfig:
    """Return the objective that jepa.json of an export names."""
    return objective_configs()[jepa["objective"]["name"]].model_validate(jepa["objective"])


def pairing_from_export(jepa: dict[str, Any]) -> Pairing:
    """Which view predicts which; for an objective without pairs, each view the next one, without predictor tokens."""
    return objective_from_export(jepa).pairing or Pairing()


def view_template(jepa: dict[str, Any], view: int) -> ViewTemplate:
    """Of the view of a record that has all views of jepa.json."""
    if objective_from_export(jepa).layout == "independent":
        return ViewTemplate(("bos",), ("eos",))
    if view:
        return ViewTemplate((), ("eos",))
    return ViewTemplate(("bos",), ("sep",) if len(jepa["views"]) > 1 else ("eos",))
