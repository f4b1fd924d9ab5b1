"""Errors of a configuration, its corpus and its run folder that are found before the model is built."""

import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.config import evaluation_tests
from data_prep.layout import Layout, SpecialTokenIds, positions_needed
from data_prep.make_tokenizer import find_tokenizer, import_tokenizer
from data_prep.selection.task_contexts import list_test_files
from data_prep.tokenizer_difference import first_difference
from data_prep.units import Job
from data_prep.utils.console import UserError
from data_prep.utils.files import sha256_file
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus, check_data_section, source_weights
from pretrain.run_folder import list_steps
from pretrain.tasks.options import check_package
from pretrain.training.loggers import check_loggers

logger = logging.getLogger(__name__)

LENGTHS_AT_ONCE = 1 << 18
"""Number of records whose lengths are read together."""


def check(config: RunConfig, corpus: Corpus | None) -> None:
    """Raise UserError for errors that can be found before the model is built.

    If there is no corpus, the checks that need its shards are skipped.
    """
    if corpus is not None:
        _check_views(config, corpus)
        source_weights(corpus.manifest, config.data.sources)
        check_data_section(config.data, corpus.manifest)
        if config.model.init_from is not None and not list_steps(config.run_dir / "checkpoints"):
            _check_same_tokenizer(config.model.init_from, corpus)
        corpus.read(np.array([0, len(corpus) - 1]))  # reports missing shards early
        _check_pairs(config, corpus)
        _check_lengths(config, corpus)
    check_loggers(config.monitor.loggers)
    if config.model.lora:
        check_package("peft", "lora", "model.lora")
    for number, task in enumerate(config.evaluation.tasks):
        task.check_requirements(config.data, f"evaluation.tasks.{number}")
    if corpus is not None and config.data.decontaminate:
        _check_decontaminated(config, corpus)
    steps = list_steps(config.run_dir / "checkpoints")
    if config.checkpoint.resume == "never" and steps:
        raise UserError(
            f"checkpoint.resume is never, but {config.run_dir} contains checkpoints up to step {steps[-1]}; "
            "choose another `name`, or remove that folder"
        )
    if config.checkpoint.resume == "must" and not steps:
        raise UserError(
            f"checkpoint.resume is must, but {config.run_dir} contains no checkpoint; set it to auto to start a new run"
        )


def _check_decontaminated(config: RunConfig, corpus: Corpus) -> None:
    """Warn about test files that data_prep did not compare with the training data."""
    settings = corpus.manifest["settings"]
    compared = settings["data"].get("decontaminate", True)
    compared_hashes = {file["sha256"] for file in settings.get("files", {}).values()} if compared else set()
    recorded = settings.get("tests", []) if compared else []
    for test in evaluation_tests(config.data, config.evaluation.model_dump(mode="json", exclude_none=True)):
        (described,) = Job(data=config.data, tests=(test,)).test_descriptions
        files = list_test_files(test)
        not_compared: list[str | None]
        if files:
            not_compared = [path for path in files if sha256_file(Path(path)) not in compared_hashes]
        else:
            not_compared = [] if described in recorded else [test.source.path]
        if not_compared:
            logger.warning(
                f"{config.data.path} was not decontaminated against {not_compared[0]} (task {test.task}): its "
                "questions may be in the training data; prepare a different data.path with this configuration, or set "
                "data.decontaminate=false"
            )


def _check_views(config: RunConfig, corpus: Corpus) -> None:
    if tuple(corpus.manifest["views"]) != config.data.views:
        raise UserError(
            f"data.views are {list(config.data.views)}, but {config.data.path} was prepared with "
            f"{corpus.manifest['views']}: set data.views to these, or prepare a different data.path"
        )


def _check_same_tokenizer(folder: str, corpus: Corpus) -> None:
    """Raise UserError if the model in a folder was not trained with the token ids of the corpus."""
    if not Path(folder).is_dir():
        return  # loading the model reports the missing folder
    try:
        find_tokenizer(Path(folder))
    except UserError:
        logger.info(
            f"note: model.init_from: {folder} has no tokenizer, so it is unknown whether its model was trained with "
            "the token ids of the corpus"
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        model_tokenizer = import_tokenizer(Path(folder), Path(temporary) / "tokenizer", notes_level=logging.DEBUG)
        difference = first_difference(model_tokenizer, corpus.tokenizer)
    if difference is not None:
        raise UserError(
            f"model.init_from: the tokenizer of {folder} differs from the tokenizer of {corpus.folder} ({difference}); "
            f"prepare the corpus with data.tokenizer.path set to {folder}"
        )


def _check_pairs(config: RunConfig, corpus: Corpus) -> None:
    """Raise UserError if no record has the pairs or spans that the objective needs."""
    layout = config.make_layout(SpecialTokenIds(0, 0, 0, 0, 0), corpus.views)
    if corpus.entry["incomplete"] < len(corpus):
        return  # some record has all views
    for lengths in _all_lengths(corpus):
        all_paired = np.ones(len(lengths), bool)
        segment_lengths = layout.segment_lengths(lengths, all_paired)
        pairs, spans = layout.pairs(segment_lengths, all_paired), layout.count_spans(segment_lengths)
        if (pairs.any() or not layout.read_outs) and (spans.any() or not layout.spans):
            return
    raise UserError(
        f"objective.name is {config.objective.name}, but no record of {config.data.path} has two views: "
        "choose next_token, or check data.views and the columns of the sources"
    )


def _all_lengths(corpus: Corpus) -> Iterator[np.ndarray]:
    """Yield the lengths of all records in batches (n, views)."""
    for start in range(0, len(corpus), LENGTHS_AT_ONCE):
        yield corpus.lengths(np.arange(start, min(start + LENGTHS_AT_ONCE, len(corpus))))


def _check_lengths(config: RunConfig, corpus: Corpus) -> None:
    """Raise UserError if a record, with all copies that the objective or the validation needs, is longer than a row."""
    length = config.data.sequence_length
    specials = SpecialTokenIds(0, 0, 0, 0, 0)  # the layout needs only their number

    def longest(split: Corpus, layout: Layout) -> int:
        bound = min(layout.positions(split.longest).max(), _max_positions_from_manifest(split, layout))
        if bound <= length:
            return bound
        if len(split) > LENGTHS_AT_ONCE:
            logger.info(
                f"note: reading the lengths of {len(split):,} records, because the manifest does not show whether all "
                f"fit data.sequence_length={length}"
            )
        return max(layout.positions(lengths).max() for lengths in _all_lengths(split))

    needed = longest(corpus, config.make_layout(specials, corpus.views))
    if "validation" in corpus.manifest["splits"]:
        held_out = Corpus(config.data.path, "validation")
        for layout in config.validation_layouts(specials, corpus.views).values():
            needed = max(needed, longest(held_out, layout))
    if needed > length:
        raise UserError(
            f"data.sequence_length is {length}, too short for the records of {config.data.path} with this objective: "
            f"the longest needs {needed} positions; raise it, or prepare the corpus again with a smaller "
            "data.sequence_length, which drops and counts longer records"
        )


def _max_positions_from_manifest(corpus: Corpus, layout: Layout) -> float:
    """Return an upper bound of the positions of a record, from `positions_needed` of the manifest.

    The bound is infinite if the layout may need more positions than `positions_needed` counts. For each number of
    present views, both numbers are linear in the lengths. It is therefore enough to compare them for lengths of 1, and
    for one very long view at a time.
    """
    shapes = np.concatenate(
        [
            (np.ones((count + 1, corpus.views)) + np.eye(count + 1, corpus.views, -1) * 10**6)
            * (np.arange(corpus.views) < count)
            for count in range(1, corpus.views + 1)
        ]
    ).astype(np.int64)
    if (layout.positions(shapes) > positions_needed(shapes)).any():
        return math.inf
    # data_prep cuts documents into pieces that fit its data.sequence_length
    piece_length = corpus.manifest["settings"]["data"]["sequence_length"] if corpus.entry["continued"] else 0
    return max(corpus.entry["positions_needed"], piece_length)
