"""Special tokens around a view that an export encodes separately, as in the layout of its objective."""

from dataclasses import fields
from typing import Any, NamedTuple

from data_prep.layout import Pairing, SpecialTokenIds, make_layout
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
    views = len(jepa["views"])
    names = [field.name for field in fields(SpecialTokenIds)]
    specials = SpecialTokenIds(*range(len(names)))
    layout = make_layout(objective_from_export(jepa).layout, specials, views=views, pairing=Pairing())
    segment = layout.separate_segment(view)
    suffix = segment.suffix
    if view == views - 1 and segment.last_suffix is not None:
        suffix = segment.last_suffix
    return ViewTemplate(tuple(names[token] for token in segment.prefix), tuple(names[token] for token in suffix))


def prediction_name(view: str, predicted_view: str) -> str:
    """Return the name of the array, or of the folder, of a prediction."""
    return f"{view}_to_{predicted_view}"
