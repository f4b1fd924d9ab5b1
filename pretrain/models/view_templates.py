"""Special tokens around a view that an export encodes separately.

A test checks that the embeddings match the read-outs of pretrain/data/layout.py.
"""

from typing import Any, NamedTuple

from pretrain.data.layout import Pairing
from pretrain.objectives.configs import ObjectiveConfig, objective_configs


class ViewTemplate(NamedTuple):
    """The special tokens before and after a view, by name: bos, sep or eos.

    The hidden state of the last token is the embedding.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]


def objective_from_export(jepa: dict[str, Any]) -> ObjectiveConfig:
    """Return the objective that an export's jepa.json specifies."""
    return objective_configs()[jepa["objective"]["name"]].model_validate(jepa["objective"])


def pairing_from_export(jepa: dict[str, Any]) -> Pairing:
    """Return the pairing of the objective; without one, each view predicts the next without predictor tokens."""
    return objective_from_export(jepa).pairing or Pairing()


def view_template(jepa: dict[str, Any], view: int) -> ViewTemplate:
    """Return the template of a view, for a record that has all views of jepa.json."""
    if objective_from_export(jepa).layout == "independent":
        return ViewTemplate(("bos",), ("eos",))
    if view:
        return ViewTemplate((), ("eos",))
    return ViewTemplate(("bos",), ("sep",) if len(jepa["views"]) > 1 else ("eos",))
