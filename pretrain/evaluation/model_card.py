"""The parts of an export's README.md that make it a model card: metadata for the hub, and the figures of the run.

A card contains no absolute path: it names local files and folders without their parent folders.
"""

from pathlib import Path
from typing import Any, TypeGuard

import torch
import yaml
from pydantic import TypeAdapter

from data_prep.config import HubSource, NlrxSource, Source
from data_prep.shards import MANIFEST
from data_prep.utils.files import read_json_or_none
from pretrain.config import RunConfig
from pretrain.data.corpus import was_trained_on
from pretrain.evaluation.results import SCORING_VERSION, read_results, scoring_version
from pretrain.objectives.base import ModelShape, build_objective
from pretrain.run_folder import HUB, loss_terms, read_metrics, step_name
from pretrain.sections import BUDGETS
from pretrain.training.checkpoint import read_progress

CACHED_MODEL = "models--"
"""Beginning of the folder of a model in the cache of the hub: models--ORG--NAME, which contains snapshots/COMMIT."""
TERMS = {
    "llm_jepa": "the distance between the predicted and the actual embedding of the other view, as the mean over pairs "
    "(LLM-JEPA, arXiv 2509.14252)",
    "semantic_tube": "the curvature of the path of the hidden states, as the mean over spans (Semantic Tube "
    "Prediction, arXiv 2602.22617)",
    "nitp": "1 - cos between a projection of the last hidden state and a shallow hidden state of the next token, as "
    "the mean over target tokens (NITP, arXiv 2605.24956)",
    "nextlat": "the smooth L1 error of the predicted next hidden state, as the mean over target tokens (NextLat, arXiv "
    "2511.05963)",
}
"""Auxiliary term of each objective that has one, `jepa` in the formula."""
DISTANCES = {
    "cosine": "1 - cos(prediction, target)",
    "l2": "|prediction - target|, the Euclidean distance",
    "mse": "the mean squared difference of the components of prediction and target",
    "info_nce": "-log softmax(cos(prediction, targets) / temperature) at the target, among the targets of the micro "
    "step",
}
"""Formula of each distance of LLM-JEPA."""


def render_metadata(config: RunConfig, family: str) -> str:
    """Return the YAML front matter that the hub reads."""
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [family, config.objective.name.replace("_", "-")],
    }
    if base := _base_model(config.model.init_from):
        metadata["base_model"] = base
    if datasets := [source.path for source in config.data.sources if _is_on_hub(source)]:
        metadata["datasets"] = list(dict.fromkeys(datasets))
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n"


def render_figures(run_dir: Path, config: RunConfig, step: int) -> str:
    """Return the sections on data, objective, training and evaluation up to a step, in Markdown."""
    sections = {
        "Data": _data(run_dir, config),
        "Objective": _objective(config),
        "Training": _training(run_dir, config, step),
        "Evaluation": _evaluation(run_dir, step),
    }
    return "".join(f"## {title}\n\n{text}\n\n" for title, text in sections.items())


def _data(run_dir: Path, config: RunConfig) -> str:
    manifest = read_json_or_none(Path(config.data.path) / MANIFEST)
    if manifest is None or not was_trained_on(run_dir, manifest):
        splits = (read_json_or_none(run_dir / "environment.json") or {}).get("data", {}).get("corpus", {})
        counts = ", ".join(f"{entry['records']:,} {split} records" for split, entry in splits.items())
        names = ", ".join(_source_name(source) for source in config.data.sources)
        return f"Sources: {names or 'unknown'}. The corpus has {counts or 'an unknown number of records'}."
    rows = [["source", "split", "records", "tokens", "uses per epoch"]]
    rows += [
        [_source_name(source), source.split, f"{entry['kept']:,}", f"{entry['tokens']:,}", _uses(source)]
        for source, entry in zip(_sources(config), manifest["sources"], strict=True)
    ]
    totals = ", ".join(
        f"{entry['records']:,} records and {sum(entry['tokens'].values()):,} tokens for {split}"
        for split, entry in manifest["splits"].items()
    )
    return f"{_table(rows)}\n\nThe corpus has {totals}, after duplicates and unusable records were dropped."


def _sources(config: RunConfig) -> list[Source]:
    """Return the sources that the run lists. If it lists none, return the sources in the manifest of the corpus."""
    if config.data.sources:
        return config.data.sources
    manifest = read_json_or_none(Path(config.data.path) / MANIFEST)
    if manifest is None:
        return []
    described = zip(manifest["settings"]["data"]["sources"], manifest["sources"], strict=True)
    sources = [stored | {"weight": entry["weight"]} for stored, entry in described]
    return TypeAdapter(list[Source]).validate_python(sources)


def _objective(config: RunConfig) -> str:
    objective = config.objective
    with torch.random.fork_rng(devices=[]):  # the weights of an objective are drawn
        # the weights of the terms do not depend on the shape
        weights = build_objective(objective, ModelShape(width=1, layers=10**6)).weights
    varies = "f * " if objective.changes_during_run else ""
    terms = [f"L_{name}" if name == "lm" else f"{varies}{weight:g} * L_{name}" for name, weight in weights.items()]
    lines = [f"    L = {' + '.join(terms)}", "", "- `L_lm`: the next-token cross-entropy per target token"]
    for name in weights:
        if name == "jepa":
            lines.append(f"- `L_jepa`: {TERMS[objective.name]}")
        elif name == "kl":
            lines.append("- `L_kl`: the KL divergence between the next-token distributions of both states")
        elif name != "lm":
            lines.append(f"- `L_{name}`: a regularizer against collapse of the embeddings")
    if varies:
        lines.append(
            "- `f`: a factor that depends on the consumed fraction of the budget (`weight_schedule`, `active`)"
        )
    if distance := getattr(objective, "distance", None):
        lines.append(f"- distance `{distance}`: {DISTANCES[distance]}")
    if objective.pairing is not None:
        lines.append(f"- predictor tokens: {config.predictor_tokens} per context")
    settings = yaml.safe_dump(objective.model_dump(mode="json", exclude_none=True), sort_keys=False)
    return "\n".join([*lines, "", "All settings:", "", "```yaml", settings.rstrip(), "```"])


def _training(run_dir: Path, config: RunConfig, step: int) -> str:
    metrics = [line for line in read_metrics(run_dir) if line["step"] <= step]
    progress = read_progress(run_dir / "checkpoints" / step_name(step))
    rows = [["figure", "value", "step"]]
    rows.append(["steps", f"{step:,}", str(step)])
    budgets = {key: getattr(config.train, key) for key in BUDGETS}
    rows += [[f"budget in {key}", f"{value:,}", ""] for key, value in budgets.items() if value is not None]
    if progress is not None:
        rows.append(["corpus tokens", f"{progress.tokens:,}", str(step)])
        rows.append(["records", f"{progress.records:,}", str(step)])
    terms = loss_terms(metrics)
    tags = ["loss/total", *(f"loss/{term}" for term in terms), *(f"validation/loss/{term}" for term in terms)]
    for tag in tags:
        values = [(line[tag], line["step"]) for line in metrics if line.get(tag) is not None]
        if values:
            rows.append([f"`{tag}`", f"{values[-1][0]:.4f}", str(values[-1][1])])
    start = ""
    if config.model.init_from is not None:
        start = f"The training started from the weights of `{Path(config.model.init_from).name}`.\n\n"
    return start + _table(rows)


def _evaluation(run_dir: Path, step: int) -> str:
    """Return the newest results of each task up to the step."""
    newest: dict[str, dict[str, Any]] = {}
    valid = [result for result in read_results(run_dir) if scoring_version(result) == SCORING_VERSION]
    for result in sorted(valid, key=lambda result: int(result["step"])):
        if result["step"] <= step:
            newest[result["task"]] = result
    if not newest:
        return "There were no results of downstream tasks when this export was written."
    rows = [["task", "step", "finetuned", "metric", "value"]]
    for task, result in newest.items():
        finetuned = "yes" if result.get("finetune") is not None else "no"
        rows += [
            [task, str(result["step"]), finetuned, name, f"{value:.4f}"] for name, value in result["metrics"].items()
        ]
    return _table(rows)


def _uses(source: Source) -> str:
    return f"{source.weight:g}" if source.split == "train" else ""


def _source_name(source: Source) -> str:
    """Return the name of a source without the folders of a local path."""
    if isinstance(source, NlrxSource):
        return "NL-RX grammar (generated)"
    if _is_on_hub(source):
        return f"[{source.path}](https://huggingface.co/datasets/{source.path})"
    return f"{Path(source.path or '').name or 'files'} ({source.type})"


def _is_on_hub(source: Source) -> TypeGuard[HubSource]:
    return isinstance(source, HubSource) and not source.path.startswith((".", "/")) and not Path(source.path).exists()


def _base_model(folder: str | None) -> str | None:
    """Return the hub's name of the model in a folder; None if it is not known.

    It is known for a snapshot in the cache of the hub, and for an export that has been pushed.
    """
    if folder is None:
        return None
    path = Path(folder).absolute()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith(CACHED_MODEL):
        return path.parent.parent.name.removeprefix(CACHED_MODEL).replace("--", "/")
    pushed: dict[str, str] = read_json_or_none(path.parent.parent / HUB / path.name) or {}
    return pushed.get("repo")


def _table(rows: list[list[str]]) -> str:
    heading, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *body])
