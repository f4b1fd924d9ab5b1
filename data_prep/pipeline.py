"""The preparation of a corpus from its sources to shards, in phases of restartable tasks.

    scan        read and filter every unit, compare it with the test files    data_prep/scan.py
    duplicates  find equal and similar fingerprints across all records        data_prep/selection/*duplicates.py
    tokenizer   train a tokenizer on a sample of the remaining records,       data_prep/tokenizer.py
                or import one
    encode      read every unit again and write its kept records to shards    data_prep/encode.py

The result does not depend on the number of processes. At the end, the folder `data.path` contains `manifest.json`,
`summary.md`, `tokenizer/` and the shards of each unit and split. Until the manifest is written, `.partial/` contains
the results of the finished tasks; the next run resumes from them.
"""

import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from data_prep import inputs
from data_prep.config import DataConfig, HubSource, TaskTest
from data_prep.encode import encode_unit, kept_records, shard_report
from data_prep.executor import Executor, LocalExecutor, Task
from data_prep.holdout import find_frequent_targets, load_frequent_targets, split_function
from data_prep.make_tokenizer import import_tokenizer, train
from data_prep.manifest import Manifest, build_manifest, check_not_empty, drop_summary, summary, summary_line
from data_prep.phase_progress import PhaseProgress
from data_prep.scan import fingerprint_file, scan_report, scan_unit, target_file
from data_prep.selection import duplicates, near_duplicates
from data_prep.selection.contamination import OVERLAP_LETTERS
from data_prep.selection.drops import REASONS, unknown_tokens
from data_prep.selection.task_contexts import (
    contexts_file,
    count_short_contexts,
    describe_test,
    read_contexts,
    skipped_files_note,
)
from data_prep.shards import MANIFEST, read_manifest
from data_prep.sources import Reader
from data_prep.sources.files import piece_length
from data_prep.sources.hub import commit_of
from data_prep.tokenizer import Tokenizer
from data_prep.units import Job, Unit, make_units, open_job
from data_prep.utils.console import UserError
from data_prep.utils.files import read_json, read_json_or_none, sync_file, try_lock, write_json, write_text

logger = logging.getLogger(__name__)

SAMPLE_CHARACTERS = 20_000_000
"""Size of the sample on which a tokenizer is trained. A larger sample hardly changes the pieces."""
MIN_UNIT_SAMPLE = 200_000
"""Minimum number of characters of this sample that are read from one unit."""
CHECKED_TEXTS, CHECKED_CHARACTERS = 2000, 1000
"""Number of texts, and of characters per text, on which an imported tokenizer is checked."""
UNASSIGNED = "\U0010fffe"
"""A noncharacter of Unicode, which is in no vocabulary."""
SUMMARY = "summary.md"
SETTINGS = "settings.json"
"""File with the settings of an unfinished preparation, in `.partial`."""


def prepare(config: DataConfig, tests: Sequence[TaskTest] = (), executor: Executor | None = None) -> Manifest:
    """Prepare the corpus of `config` unless it exists already, and return its manifest.

    `tests` are rows that training must not see. Every process of an `executor` calls this function. Without an
    executor, `data.workers` processes are started. Raises UserError for errors that the user can fix; the results of
    finished tasks are kept for the next run.
    """
    if not config.sources:
        raise UserError("data.sources is empty: name at least one source")
    executor = executor or LocalExecutor(config.workers)
    job = Job(data=config, tests=tuple(tests) if config.decontaminate else ())
    try:
        return _Preparation(job, executor).run()
    except BrokenPipeError:  # an error of the console output, not of writing the corpus
        raise
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"cannot write the corpus to {config.path}: {error.strerror or error}{file}; free space or change the "
            "permissions there, or choose a different data.path"
        ) from None


class _Preparation:
    """One preparation, in every process of the executor."""

    def __init__(self, job: Job, executor: Executor):
        self.job, self.executor = job, executor
        self.serialized = job.model_dump_json()
        self.folder = Path(job.data.path)
        self.readers: list[Reader] = []
        self.units: list[Unit] = []
        self.file_stats: inputs.FileStats = {}
        self.lock: IO[bytes] | None = None

    def run(self) -> Manifest:
        """Return the manifest of the corpus, and prepare the corpus first if necessary."""
        try:
            self.executor.run_on_main(self._take_lock)
            self.job = self.job.model_copy(update={"commits": self.executor.run_on_main(self._commits)})
            self.serialized = self.job.model_dump_json()
            self.readers = self.executor.run_on_all(lambda: open_job(self.serialized)[1])
            return self.executor.run_on_main(self._existing) or self._make()
        finally:
            self.executor.close()
            if self.lock:
                self.lock.close()

    def _make(self) -> Manifest:
        for reader in self.readers:
            if reader.note:
                logger.info(reader.note)
        self.units, self.file_stats = self.executor.run_on_main(self._begin)
        if self.job.data.tokenizer.path is not None:
            self.executor.run_on_main(self._make_tokenizer)  # before the long scan, because the import may fail
        self._each_unit("scanning", scan_unit, scan_report)
        self.executor.run_on_main(lambda: check_not_empty(self.job, self.readers, self.units))
        self.executor.run_on_main(self._decide_holdout)
        self._checksums()
        self._find_duplicates()
        self.executor.run_on_main(self._make_tokenizer)
        self.executor.run_on_main(self._check_tokenizer)
        self._each_unit("tokenizing", encode_unit, shard_report)
        return self.executor.run_on_main(self._finish)

    def _take_lock(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = try_lock(self.folder / ".lock")
        if self.lock is None:
            raise UserError(f"another process is preparing {self.folder}; wait for it, or choose a different data.path")

    def _commits(self) -> tuple[str | None, ...]:
        """Return the commit of each source on the hub.

        If this folder contains a finished or interrupted preparation, its commits are used; otherwise the newest ones.
        """
        manifest = read_json_or_none(self.folder / MANIFEST) or {}
        earlier = manifest.get("settings") or read_json_or_none(self.job.partial / SETTINGS) or {}
        if "commits" in earlier and earlier.get("data") == self.job.data.shard_settings():
            return tuple(earlier["commits"])
        return tuple(
            commit_of(source, f"data.sources.{number}") if isinstance(source, HubSource) else None
            for number, source in enumerate(self.job.data.sources)
        )

    def _settings(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that determine the content of a corpus, as the manifest and `.partial` record them."""
        commits = {"commits": list(self.job.commits)} if any(self.job.commits) else {}
        return {"data": self.job.data.shard_settings(), "tests": self.job.test_descriptions, "files": files} | commits

    def _existing(self) -> Manifest | None:
        """Return the manifest of an existing corpus, or None.

        Raises UserError if the corpus was made from other settings or files.
        """
        if self.job.data.decontaminate and not self.job.tests:
            logger.info("note: evaluation.tasks has no test rows: no contaminated record can be dropped")
        if not (self.folder / MANIFEST).exists():
            return None
        manifest = read_manifest(self.folder)
        inputs.check_unchanged(manifest["settings"], self.job, inputs.file_stats(self.job, self.readers), self.folder)
        _check_intact(manifest, self.folder)
        self._remove_leftovers()
        logger.info(f"{self.folder} is already prepared, nothing to do: {summary_line(manifest)}")
        return manifest

    def _begin(self) -> tuple[list[Unit], inputs.FileStats]:
        """Return the units and file stats.

        The results of an interrupted preparation are kept if its settings and input files are unchanged;
        otherwise they are removed.
        """
        file_stats = inputs.file_stats(self.job, self.readers)
        settings = self._settings(file_stats)
        partial = self.job.partial
        stored = partial / SETTINGS
        if {"tests": []} | (read_json_or_none(stored) or {}) == settings:  # earlier versions did not record tests
            scanned, tokenized = (len(list((partial / phase).glob("*[0-9].json"))) for phase in ("scan", "shards"))
            logger.info(
                f"resuming an interrupted preparation: {scanned:,} units are scanned, {tokenized:,} are tokenized"
            )
        else:
            if stored.exists():
                logger.info("the interrupted preparation had different settings: starting from scratch")
                # Invalidate the settings first: after a kill during the removal, a run with the old settings must not
                # resume from the remaining files.
                write_json(stored, None)
                for old_shard in self.folder.glob("*.arrow"):
                    old_shard.unlink()
                for old_folder in (self.folder / "tokenizer", *(path for path in partial.iterdir() if path.is_dir())):
                    shutil.rmtree(old_folder, ignore_errors=True)
                contexts_file(partial).unlink(missing_ok=True)
            elif (self.folder / "tokenizer").exists() or any(self.folder.glob("*.arrow")):
                raise UserError(
                    f"{self.folder} contains a tokenizer or shards, but no {MANIFEST} that describes them; "
                    "remove that folder, or choose a different data.path"
                )
            partial.mkdir(exist_ok=True)
            write_json(stored, settings)
        for name in ("scan", "files", "duplicate", "near_duplicate", "shards"):
            (partial / name).mkdir(exist_ok=True)
        self._read_contexts()
        return make_units(self.readers), file_stats

    def _read_contexts(self) -> None:
        """Write the contexts of the tests for all processes. Malformed rows are reported before the long scan."""
        if contexts_file(self.job.partial).exists():
            return
        contexts: dict[str, None] = {}
        for test in self.job.tests:
            test_contexts = read_contexts(self.job.data, test)
            if note := skipped_files_note(test):
                logger.info(note)
            line = f"kept out of training: {len(test_contexts):,} contexts of {describe_test(test)}"
            if short := count_short_contexts(test_contexts):
                line += f"; {short:,} of them have fewer than {OVERLAP_LETTERS} letters and "
                line += "are compared only with whole contexts"
            logger.info(line)
            contexts |= dict.fromkeys(test_contexts)
        write_json(contexts_file(self.job.partial), list(contexts))

    def _each_unit(
        self, title: str, function: Callable[[str, int, Unit], int], report: Callable[[Job, int], Path]
    ) -> None:
        tasks = {
            report(self.job, number): Task((self.serialized, number, unit), unit.size)
            for number, unit in enumerate(self.units)
        }
        self._phase(title, "units", function, tasks)

    def _phase(self, title: str, what: str, function: Callable[..., int], tasks: dict[Path, Task]) -> None:
        """Run the tasks whose output file does not exist yet. Every task writes this file last."""
        # Only the main process checks for the files: its peers may already be writing some.
        missing = self.executor.run_on_main(lambda: {number for number, out in enumerate(tasks) if not out.exists()})
        todo = [task for number, task in enumerate(tasks.values()) if number in missing]
        if todo:
            logger.info(f"{title} {len(todo):,} of {len(tasks):,} {what} in {self.executor.description}")
        self.executor.run(function, todo, PhaseProgress(title, sum(task.size for task in todo)))

    def _decide_holdout(self) -> None:
        for source, count in enumerate(
            find_frequent_targets(self.job, self.units, lambda number: target_file(self.job, number))
        ):
            if count:
                logger.info(
                    f"note: data.sources.{source} has {count:,} frequent target{'s' * (count > 1)}, such as a label: "
                    "their records are held out by context, and these targets are in both splits"
                )

    def _checksums(self) -> None:
        groups = inputs.group_by_size(self.file_stats, piece_length(sum(size for size, _ in self.file_stats.values())))
        outs = [self.job.partial / "files" / f"{number:06d}.json" for number in range(len(groups))]
        self._phase(
            "checksums of",
            "groups of files",
            inputs.write_checksums,
            {
                out: Task((out, group), sum(self.file_stats[path][0] for path in group))
                for out, group in zip(outs, groups, strict=True)
            },
        )

    def _find_duplicates(self) -> None:
        """Find the duplicates and near-duplicates of the whole corpus, and write all but one of each group to files."""
        kinds = {"none": [], "exact": ["duplicate"], "near": ["duplicate", "near_duplicate"]}[self.job.data.deduplicate]
        records = self.executor.run_on_main(
            lambda: sum(read_json(scan_report(self.job, number))["records"] for number in range(len(self.units)))
        )
        for kind in kinds:
            keys = near_duplicates.band_shape(self.job.near_threshold)[0] if kind == "near_duplicate" else 1
            parts = duplicates.num_parts(records * keys)
            outs = [self.job.partial / kind / f"{part:05d}.npy" for part in range(parts)]
            self._phase(
                "searching for duplicates in",
                "parts",
                find_duplicates,
                {
                    out: Task((self.serialized, kind, len(self.units), part, parts, out), 1)
                    for part, out in enumerate(outs)
                },
            )

    def _make_tokenizer(self) -> None:
        config = self.job.data.tokenizer
        final = self.folder / "tokenizer"
        temporary = self.job.partial / "tokenizer"
        if final.exists():
            return
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if config.path is not None:
            logger.info(f"importing the tokenizer {config.path}")
            import_tokenizer(Path(config.path), temporary)
        else:
            assert config.vocab_size is not None  # the configuration has either this or a path
            kind = config.model_type or "bpe"
            logger.info(f"training a sentencepiece {kind} tokenizer of {config.vocab_size:,} pieces")
            texts = self._sample()
            first = next(texts, None)
            if first is None:
                raise UserError(
                    "no record to train a tokenizer on: split train is empty; check the splits of the sources"
                    + (" and data.validation_fraction: " if self.job.data.validation_fraction else ": ")
                    + drop_summary(self.job, self.readers, self.units)
                )
            train(itertools.chain([first], texts), config.vocab_size, temporary, kind)
        for file in temporary.iterdir():
            sync_file(file)
        os.replace(temporary, final)

    def _check_tokenizer(self) -> None:
        """Warn if an imported tokenizer loses some of the text."""
        if self.job.data.tokenizer.path is None:
            return
        tokenizer = Tokenizer.load(self.folder / "tokenizer")
        if tokenizer.unknown_id is None and tokenizer.encode_batch([UNASSIGNED]) == [[]]:
            logger.warning(
                f"the tokenizer {self.job.data.tokenizer.path} has neither bytes nor an unknown token: "
                "unknown characters are dropped and not counted; use a tokenizer that has either"
            )
        texts = [text[:CHECKED_CHARACTERS] for text in itertools.islice(self._sample(), CHECKED_TEXTS)]
        decoded = map(tokenizer.decode, tokenizer.encode_batch(texts))
        changed = [(text, result) for text, result in zip(texts, decoded, strict=True) if text != result]
        if changed:
            first = next((at for at, (one, other) in enumerate(zip(*changed[0], strict=False)) if one != other), 0)
            text, result = (repr(text[max(0, first - 20) : first + 20]) for text in changed[0])
            logger.warning(
                f"the tokenizer {self.job.data.tokenizer.path} does not reproduce {len(changed):,} of "
                f"{len(texts):,} texts; in the first, {text} becomes {result}"
            )

    def _sample(self) -> Iterator[str]:
        """Yield texts of the training split for the tokenizer, from the beginnings of units in pseudo-random order."""
        characters = 0
        limit = max(MIN_UNIT_SAMPLE, SAMPLE_CHARACTERS // len(self.units)) if self.units else 0
        for number in sorted(range(len(self.units)), key=lambda number: hashlib.sha256(str(number).encode()).digest()):
            unit = self.units[number]
            unit_characters = 0
            split_of = split_function(self.job.data, unit.source, load_frequent_targets(self.job, unit.source))
            for _, record in kept_records(self.job, self.readers[unit.source], number, unit):
                if split_of(record) == "train":
                    yield from filter(str.strip, record.texts)
                    unit_characters += sum(map(len, record.texts))
                    if unit_characters >= limit:
                        break
            characters += unit_characters
            if characters >= SAMPLE_CHARACTERS:
                return

    def _finish(self) -> Manifest:
        if inputs.file_stats(self.job, self.readers) != self.file_stats:
            raise UserError(
                "a file of the sources changed during the preparation; "
                "run the preparation again while no other process writes to the sources"
            )
        checksums = inputs.read_checksums(self.job.partial / "files")
        settings = self._settings(
            {path: {"bytes": size, "sha256": checksums[path]} for path, (size, _) in self.file_stats.items()}
        )
        manifest = build_manifest(
            self.job, settings, Tokenizer.load(self.folder / "tokenizer"), self.readers, self.units
        )
        write_text(self.folder / SUMMARY, summary(self.job, manifest))
        write_json(self.folder / inputs.FILE_STATS_NAME, self.file_stats)
        write_json(self.folder / MANIFEST, manifest)
        self._remove_leftovers()
        logger.info(f"prepared {self.folder}: {summary_line(manifest)}")
        if self.job.data.validation_fraction and "validation" not in manifest["splits"]:
            logger.info(
                "note: data.validation_fraction held out no record (there are too few), so training will not validate"
            )
        for number, source in enumerate(manifest["sources"]):
            if not source["records"]:
                logger.warning(f"data.sources.{number} has no records")
            elif not source["kept"]:
                logger.warning(
                    f"data.sources.{number} has {source['records']:,} records, but none of them was kept; "
                    f"check its columns, and see {SUMMARY}"
                )
        for split, entry in manifest["splits"].items():
            if line := unknown_tokens(split, entry):
                logger.warning(line)
        for reason, drop in manifest["dropped"].items():
            logger.info(
                f"dropped {drop['count']:,} records as {reason} ({REASONS[reason]}), the first: {drop['first'][0]}"
            )
        return manifest

    def _remove_leftovers(self) -> None:
        """Remove the files of an unfinished preparation, and temporary files of killed processes."""
        shutil.rmtree(self.job.partial, ignore_errors=True)
        for temporary in self.folder.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)


def find_duplicates(serialized: str, kind: str, units: int, part: int, parts: int, out: Path) -> int:
    """Find the duplicates or near-duplicates in one part of the fingerprints of all units (run as a task)."""
    job, _ = open_job(serialized)
    exact, signatures, bands = (
        [fingerprint_file(job, number, name) for number in range(units)] for name in ("exact", "signatures", "bands")
    )
    if kind == "duplicate":
        duplicates.resolve(exact, part, parts, out)
    else:
        near_duplicates.resolve_near(signatures, bands, part, parts, out, job.near_threshold)
    return 0


def _check_intact(manifest: Manifest, folder: Path) -> None:
    """Raise UserError if a shard is missing or has the wrong size, or if the tokenizer has changed.

    The content of a shard is checked when it is read.
    """
    for entry in manifest["splits"].values():
        for shard in entry["shards"]:
            path = folder / shard["file"]
            if not path.exists() or path.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"the shard {path} is missing or corrupt; remove the folder {folder} and prepare the corpus again"
                )
    if (
        not (folder / "tokenizer").exists()
        or Tokenizer.load(folder / "tokenizer").fingerprint != manifest["tokenizer"]["sha256"]
    ):
        raise UserError(
            f"{folder / 'tokenizer'} is not the tokenizer of these shards; "
            f"remove the folder {folder} and prepare the corpus again"
        )
