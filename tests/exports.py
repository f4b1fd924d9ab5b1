"""Exports of models without a run."""

from pretrain.models.export import write_export
from pretrain.models.export_readme import render_readme

VIEWS = ("text", "code")
"""Views of the exports of tests."""
OBJECTIVES = [
    {"name": "next_token"},
    {"name": "next_token", "layout": "independent"},
    {"name": "llm_jepa", "predictor_tokens": 2, "direction": "both"},
    {"name": "llm_jepa", "predictor_tokens": 1, "layout": "independent", "direction": "backward"},
    {"name": "llm_jepa", "predictor_tokens": 2, "predictor_placement": "prepend"},
    {"name": "llm_jepa", "predictor_tokens": 1, "target": "in_context"},
    {"name": "llm_jepa", "predictor_tokens": 2, "predictor_mlp": 12},
    {"name": "llm_jepa", "predictor_tokens": 0, "predictor_mlp": 12, "direction": "both"},
    {"name": "nitp"},
    {"name": "regularized", "regularizers": [{"name": "coding_rate", "weight": 0.5}]},
    {
        "name": "llm_jepa",
        "predictor_tokens": 2,
        "predictor_placement": "prepend",
        "direction": "both",
        "layout": "independent",
    },
]
"""Objectives whose exports differ in their views, predictions or weights."""


def write_model_export(folder, prepared, model, tokens, jepa, family, objective=None):
    """Write an export of a model as the evaluation does, and return its folder."""
    skeleton = folder / "skeleton"
    model.causal_lm.config.save_pretrained(skeleton)
    for file in (prepared / "tokenizer").iterdir():
        (skeleton / file.name).write_bytes(file.read_bytes())
    state = model.state_dict()
    if objective is not None:
        state |= {f"objective.{name}": weight for name, weight in objective.state_dict().items()}
    write_export(
        folder / "export",
        skeleton,
        state,
        jepa,
        render_readme(jepa, family, tokens, bool(objective and objective.state_dict())),
    )
    return folder / "export"
