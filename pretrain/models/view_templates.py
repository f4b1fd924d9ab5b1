"""Special tokens around a view: encoded separately or in the text of all views, as in the layout of an objective."""

from dataclasses import fields
from typing import Any, NamedTuple

from data_prep.layout import Layout, Pairing, Segment, SpecialTokenIds, make_layout
from pretrain.objectives.configs import ObjectiveConfig, objective_configs

NAMES = [field.name for field in fields(SpecialTokenIds)]
"""Names of the special tokens."""


class ViewTemplate(NamedTuple):
    """The special tokens before and after a view, by name: bos, sep or eos.

    The hidden state of the last token of a text is the embedding of its last view.
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
    return _template(_layout(jepa).separate_segment(view), view, len(jepa["views"]))


def text_templates(jepa: dict[str, Any]) -> list[ViewTemplate]:
    """Return the template of each view in the text of all views, for the joint layout."""
    layout, views = _layout(jepa), len(jepa["views"])
    (stream,) = layout.documents
    return [_template(layout.segments[index], view, views) for view, index in enumerate(stream)]


def _layout(jepa: dict[str, Any]) -> Layout:
    """Return a layout whose token ids are the numbers of the special tokens in NAMES."""
    specials = SpecialTokenIds(*range(len(NAMES)))
    return make_layout(objective_from_export(jepa).layout, specials, views=len(jepa["views"]), pairing=Pairing())


def _template(segment: Segment, view: int, views: int) -> ViewTemplate:
    suffix = segment.suffix
    if view == views - 1 and segment.last_suffix is not None:
        suffix = segment.last_suffix
    return ViewTemplate(tuple(NAMES[token] for token in segment.prefix), tuple(NAMES[token] for token in suffix))


def prediction_name(view: str, predicted_view: str) -> str:
    """Return the name of the array, or of the folder, of a prediction."""
    return f"{view}_to_{predicted_view}"
