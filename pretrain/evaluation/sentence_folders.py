"""Folders of an export for sentence-transformers: one for each view, and `A_to_B` for each prediction.

    modules.json config_sentence_transformers.json sentence_bert_config.json
    config.json model.safetensors                     the transformer, with the predictor tokens as its last tokens
    tokenizer.json tokenizer_config.json              a tokenizer that adds the special tokens and predictor tokens
    1_Pooling/ 2_Dense/ ...                           the last token, and the layers of the predictor MLP

Each folder is complete and needs no code of this project. The files of the weights are equal, so they are hard links to
the same file if the file system allows it.
"""

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import MODEL_MAPPING

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json, write_json
from pretrain.evaluation.embed import IN_CONTEXT_NOTE, Embedder, check_names
from pretrain.evaluation.export import atomic_folder, new_folder
from pretrain.models.families import FAMILY_MODULES
from pretrain.models.language_model import LanguageModel
from pretrain.models.view_templates import prediction_name

logger = logging.getLogger(__name__)

OPTION = "--sentence-transformers"
"""Option of the evaluation command that writes the folders."""
MODULES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
}
"""Classes of sentence-transformers, as modules.json names them."""


def write_sentence_folders(export: Path, folder: Path) -> None:
    """Write the folders of an export into a new folder; a kill never leaves it incomplete.

    Raises UserError if sentence-transformers could not load the model without code of this project, if the folder is
    not empty or cannot be written, or if names collide.
    """
    family = read_json(export / "config.json")["model_type"]
    if family in FAMILY_MODULES:
        raise UserError(
            f"{OPTION}: transformers does not include {family}, so sentence-transformers cannot load it without code "
            "of this project; use --embed"
        )
    with new_folder(folder, OPTION) as folder:
        embedder = Embedder(export)
        _check_class(embedder.model)
        views = {name: view for view, name in enumerate(embedder.names)}
        predictions = _predictions(embedder)
        check_names(export, views, predictions)
        with atomic_folder(folder) as temporary:
            temporary.mkdir()
            weights = temporary / ".weights"  # not a possible name of a view
            _write_transformer(embedder.model, weights)
            for name, view in (views | predictions).items():
                _link_folder(weights, temporary / name)
                _write_tokenizer(export, temporary / name, embedder, view, predict=name in predictions)
                _write_modules(temporary / name, embedder, predict=name in predictions)
            shutil.rmtree(weights)
    for name in views | predictions:
        logger.info(f"written to {folder / name}")
    if embedder.pairing.in_context:
        logger.info(IN_CONTEXT_NOTE)


def _check_class(model: LanguageModel) -> None:
    """Raise UserError if AutoModel would load another class than the transformer of the language model."""
    config = model.causal_lm.config
    loaded: Any = MODEL_MAPPING.get(type(config), None)
    if loaded is not type(model.transformer):
        raise UserError(
            f"{OPTION}: AutoModel of transformers does not load {type(model.transformer).__name__} for "
            f"{config.model_type}, so sentence-transformers cannot load it; use --embed"
        )


def _predictions(embedder: Embedder) -> dict[str, int]:
    """Return the name of each prediction that differs from the embedding of its source view, and this view."""
    if not embedder.predictor_ids and embedder.predictor_mlp is None:
        return {}
    names = embedder.names
    edges = embedder.pairing.edges(len(names))
    return {prediction_name(names[source], names[target]): source for source, target in edges}


def _write_transformer(model: LanguageModel, folder: Path) -> None:
    """Write the model without its output head; the predictor tokens become the last rows of its token embedding."""
    transformer = model.transformer
    if model.predictor is not None:
        embedding = transformer.get_input_embeddings()
        embedding.weight = nn.Parameter(torch.cat([embedding.weight.data, model.predictor.weight.data]))
        transformer.config.vocab_size = len(embedding.weight)
    transformer.save_pretrained(folder)


def _link_folder(source: Path, target: Path) -> None:
    """Copy a folder of files. The weights are linked if the file system allows it."""
    target.mkdir()
    for path in source.iterdir():
        copy = target / path.name
        if path.suffix == ".safetensors":
            with contextlib.suppress(OSError):  # the file system may not support links
                os.link(path, copy)
        if not copy.exists():
            shutil.copyfile(path, copy)


def _write_tokenizer(export: Path, folder: Path, embedder: Embedder, view: int, *, predict: bool) -> None:
    """Write the tokenizer of an export, which then adds the tokens around a text.

    A text that is too long for the positions of the model is cut off at its end; the added tokens remain.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(export / "tokenizer.json"))
    before, after = embedder.ids_around(view, predict=predict)
    parts = {name: ids for name, ids in (("before", before), ("after", after)) if ids}
    added = [
        {"id": name, "ids": ids, "tokens": [tokenizer.id_to_token(token) or "<predictor>" for token in ids]}
        for name, ids in parts.items()
    ]
    template = " ".join(name for name in ("before", "$A", "after") if name == "$A" or name in parts)
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=added)
    tokenizer.save(str(folder / "tokenizer.json"))
    limit = embedder.model.max_positions
    settings: dict[str, Any] = {
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "truncation_side": "right",
    }
    if limit < float("inf"):
        settings["model_max_length"] = int(limit)
    write_json(folder / "tokenizer_config.json", read_json(export / "tokenizer_config.json") | settings)


def _write_modules(folder: Path, embedder: Embedder, *, predict: bool) -> None:
    """Write the modules that follow the transformer, and the list of all modules."""
    write_json(folder / "sentence_bert_config.json", {"transformer_task": "feature-extraction"})
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write_module(
        folder / "1_Pooling", {"embedding_dimension": embedder.model.hidden_size, "pooling_mode": "lasttoken"}
    )
    if predict and embedder.predictor_mlp is not None:
        layers = [layer for layer in embedder.predictor_mlp.layers if isinstance(layer, nn.Linear)]
        for number, layer in enumerate(layers, 2):
            activation = nn.Identity if layer is layers[-1] else nn.GELU
            settings = {
                "in_features": layer.in_features,
                "out_features": layer.out_features,
                "bias": True,
                "activation_function": f"{activation.__module__}.{activation.__name__}",
            }
            _write_module(folder / f"{number}_Dense", settings)
            weights = {f"linear.{name}": weight.contiguous() for name, weight in layer.state_dict().items()}
            save_file(weights, folder / f"{number}_Dense" / "model.safetensors")
            modules.append((f"{number}_Dense", "Dense"))
    write_json(
        folder / "modules.json",
        [
            {"idx": number, "name": str(number), "path": path, "type": MODULES[kind]}
            for number, (path, kind) in enumerate(modules)
        ],
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {"model_type": "SentenceTransformer", "prompts": {}, "similarity_fn_name": "cosine"},
    )


def _write_module(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir()
    write_json(folder / "config.json", settings)
