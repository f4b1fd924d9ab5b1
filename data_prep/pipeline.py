"""From sources to shards, in phases of restartable tasks over many processes; the result is the same for any number of them.

    scan        every unit is read, filtered and compared with the test files               data_prep/scan.py
    duplicates  ranges of the fingerprints of all records are searched for equal ones       data_prep/selection/duplicates.py, near_duplicates.py
    tokenizer   trained on a sample of what is left, or taken over                          data_prep/tokenizer.py
    encode      every unit is read again, and what is left of it becomes shards             data_prep/encode.py

The folder `data.path` ends up with `manifest.json`, `summary.md`, `tokenizer/` and one shard per unit and split. Until the manifest stands,
`.partial/` holds what each finished task left; a run that finds it goes on with the rest.
"""

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from data_prep import inputs
from data_prep.config import DataConfig, HubSource, TaskTest
from data_prep.console import UserError, print_now
from data_prep.encode import encode_unit, kept_records, shard_report
from data_prep.executor import Executor, LocalExecutor, Task
from data_prep.files import read_json, read_json_or_none, sync_file, try_lock, write_json, write_text
from data_prep.holdout import find_frequent_targets, load_frequent_targets, split_function
from data_prep.manifest import Manifest, build_manifest, check_not_empty, drop_summary, summary, summary_line
from data_prep.progress import Progress
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
from data_prep.tokenizer import Tokenizer, import_tokenizer, train
from data_prep.units import Job, Unit, make_units, open_job

SAMPLE_CHARACTERS = 20_000_000
"""Text read to train a tokenizer; more changes no piece worth having."""
SAMPLE_OF_UNIT = 200_000
"""Characters of it that come from one unit, at least."""
TRIED_TEXTS, TRIED_CHARACTERS = 2000, 1000
"""Of the corpus, and of each text, on which a tokenizer that is taken over is tried."""
UNASSIGNED = "\U0010fffe"
"""A character that no vocabulary has."""
SUMMARY = "summary.md"
SETTINGS = "settings.json"
"""File with the settings of an unfinished preparation, in `.partial`."""


def prepare(
    config: DataConfig,
    tests: Sequence[TaskTest] = (),
    say: Callable[[str], None] = print_now,
    executor: Executor | None = None,
) -> Manifest:
    """Prepare the corpus of `config` unless it stands already; return its manifest.

    `tests` are rows that training must not see. Every process of a `crew` calls this; without one, `data.workers` processes are started.
    Raises UserError for anything the user can mend; what was finished by then is kept for the next run.
    """
    if not config.sources:
        raise UserError("data.sources is empty: name at least one source")
    executor = executor or LocalExecutor(config.workers)
    job = Job(data=config, tests=tuple(tests) if config.decontaminate else ())
    try:
        return _Preparation(job, executor, say if executor.is_main else lambda text: None).run()
    except BrokenPipeError:  # of what is said, not of the corpus
        raise
    except OSError as error:
        raise UserError(
            f"cannot write the corpus to {config.path}: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}"
        ) from None


class _Preparation:
    """One preparation, in every process of the crew."""

    def __init__(self, job: Job, executor: Executor, say: Callable[[str], None]):
        self.job, self.executor, self.say = job, executor, say
        self.serialized = job.model_dump_json()
        self.folder = Path(job.data.path)
        self.readers: list[Reader] = []
        self.units: list[Unit] = []
        self.file_stats: inputs.FileStats = {}
        self.lock: IO[bytes] | None = None

    def run(self) -> Manifest:
        try:
            self.executor.run_on_main(self._take_lock)
            self.job = self.job.model_copy(update={"commits": self.executor.run_on_main(self._commits)})
            self.serialized = self.job.model_dump_json()
            self.readers = self.executor.run_on_all(lambda: open_job(self.serialized)[1])
            return self.executor.run_on_main(self._standing) or self._make()
        finally:
            self.executor.close()
            if self.lock:
                self.lock.close()

    def _make(self) -> Manifest:
        for reader in self.readers:
            if reader.note:
                self.say(reader.note)
        self.units, self.file_stats = self.executor.run_on_main(self._begin)
        if self.job.data.tokenizer.path is not None:
            self.executor.run_on_main(self._make_tokenizer)  # before the long scan: it may be no tokenizer
        self._each_unit("scanning", scan_unit, scan_report)
        self.executor.run_on_main(lambda: check_not_empty(self.job, self.readers, self.units))
        self.executor.run_on_main(self._decide_holdout)
        self._checksums()
        self._find_duplicates()
        self.executor.run_on_main(self._make_tokenizer)
        self.executor.run_on_main(self._try_tokenizer)
        self._each_unit("tokenizing", encode_unit, shard_report)
        return self.executor.run_on_main(self._finish)

    def _take_lock(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = try_lock(self.folder / ".lock")
        if self.lock is None:
            raise UserError(f"another process is preparing {self.folder}; wait for it, or choose another data.path")

    def _commits(self) -> tuple[str | None, ...]:
        """Return the commit of each source on the hub: if this folder was prepared from one, or in part, that one, else the newest."""
        manifest = read_json_or_none(self.folder / MANIFEST) or {}
        before = manifest.get("settings") or read_json_or_none(self.job.partial / SETTINGS) or {}
        if "commits" in before and before.get("data") == self.job.data.shard_settings():
            return tuple(before["commits"])
        return tuple(
            commit_of(source, f"data.sources.{number}") if isinstance(source, HubSource) else None
            for number, source in enumerate(self.job.data.sources)
        )

    def _settings(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """Return what decides the content of a corpus, for its manifest or an interrupted preparation."""
        commits = {"commits": list(self.job.commits)} if any(self.job.commits) else {}
        return {"data": self.job.data.shard_settings(), "tests": self.job.test_descriptions, "files": files} | commits

    def _standing(self) -> Manifest | None:
        """The manifest of a corpus that was prepared before. Raises UserError where it was made from other settings or files."""
        if self.job.data.decontaminate and not self.job.tests:
            self.say("note: evaluation.tasks has no test rows, so no record is dropped for being in them")
        if not (self.folder / MANIFEST).exists():
            return None
        manifest = read_manifest(self.folder)
        inputs.check_unchanged(manifest["settings"], self.job, inputs.file_stats(self.job, self.readers), self.folder)
        _check_still_there(manifest, self.folder)
        self._remove_leftovers()
        self.say(f"{self.folder} is prepared already, nothing to do: {summary_line(manifest)}")
        return manifest

    def _begin(self) -> tuple[list[Unit], inputs.FileStats]:
        """Keep what an interrupted run finished, if it was preparing the same thing; start afresh otherwise."""
        file_stats = inputs.file_stats(self.job, self.readers)
        settings = self._settings(file_stats)
        partial, stored = self.job.partial, self.job.partial / SETTINGS
        if {"tests": []} | (read_json_or_none(stored) or {}) == settings:  # earlier versions did not record tests
            scanned, done = (len(list((partial / phase).glob("*[0-9].json"))) for phase in ("scan", "shards"))
            self.say(f"going on with an interrupted preparation: {scanned:,} units are scanned, {done:,} are done")
        else:
            if stored.exists():
                self.say("the interrupted preparation had other settings: starting afresh")
                write_json(
                    stored, None
                )  # else a kill while the old goes would leave some of it to a run with the old settings
                for old in self.folder.glob("*.arrow"):
                    old.unlink()
                for old in (self.folder / "tokenizer", *(path for path in partial.iterdir() if path.is_dir())):
                    shutil.rmtree(old, ignore_errors=True)
                contexts_file(partial).unlink(missing_ok=True)
            elif (self.folder / "tokenizer").exists() or any(self.folder.glob("*.arrow")):
                raise UserError(
                    f"{self.folder} holds a tokenizer or shards, but no {MANIFEST} that says what of; "
                    "remove that folder, or choose another data.path"
                )
            partial.mkdir(exist_ok=True)
            write_json(stored, settings)
        for name in ("scan", "files", "duplicate", "near_duplicate", "shards"):
            (partial / name).mkdir(exist_ok=True)
        self._read_contexts()
        return make_units(self.readers), file_stats

    def _read_contexts(self) -> None:
        """Write the contexts of the tests for all processes, before the long scan: a row may be malformed."""
        if contexts_file(self.job.partial).exists():
            return
        contexts: dict[str, None] = {}
        for test in self.job.tests:
            found = read_contexts(self.job.data, test)
            if note := skipped_files_note(test):
                self.say(note)
            short = count_short_contexts(found)
            self.say(
                f"kept out of training: {len(found):,} contexts of {describe_test(test)}"
                + (
                    f", {short:,} of them only where a training context equals them: they are shorter than {OVERLAP_LETTERS} letters"
                    if short
                    else ""
                )
            )
            contexts |= dict.fromkeys(found)
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
        """Do the tasks whose file, which each writes last, is not there yet."""
        # one process looks: others may find files that were written since by those that have begun
        left = set(self.executor.run_on_main(lambda: [number for number, out in enumerate(tasks) if not out.exists()]))
        todo = [task for number, task in enumerate(tasks.values()) if number in left]
        if todo:
            self.say(f"{title} {len(todo):,} of {len(tasks):,} {what} in {self.executor.description}")
        self.executor.run(function, todo, Progress(title, sum(task.size for task in todo), self.say))

    def _decide_holdout(self) -> None:
        for source, count in enumerate(
            find_frequent_targets(self.job, self.units, lambda number: target_file(self.job, number))
        ):
            if count:
                self.say(
                    f"note: data.sources.{source} has {count:,} frequent target{'s' * (count > 1)}, such as a label, whose records are held out "
                    "for validation by their context: these targets are on both sides"
                )

    def _checksums(self) -> None:
        groups = inputs.groups(self.file_stats, piece_length(sum(size for size, _ in self.file_stats.values())))
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
        """Note all but one of the records that are the same across the whole corpus, or nearly."""
        kinds = {"none": [], "exact": ["duplicate"], "near": ["duplicate", "near_duplicate"]}[self.job.data.deduplicate]
        records = self.executor.run_on_main(
            lambda: sum(read_json(scan_report(self.job, number))["records"] for number in range(len(self.units)))
        )
        for kind in kinds:
            keys = near_duplicates.num_bands(self.job.near_threshold) if kind == "near_duplicate" else 1
            parts = duplicates.num_parts(records * keys)
            outs = [self.job.partial / kind / f"{part:05d}.npy" for part in range(parts)]
            self._phase(
                "looking for duplicates in",
                "parts",
                find_duplicates,
                {
                    out: Task((self.serialized, kind, len(self.units), part, parts, out), 1)
                    for part, out in enumerate(outs)
                },
            )

    def _make_tokenizer(self) -> None:
        final, temporary, wanted = self.folder / "tokenizer", self.job.partial / "tokenizer", self.job.data.tokenizer
        if final.exists():
            return
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if wanted.path is not None:
            self.say(f"taking over the tokenizer {wanted.path}")
            import_tokenizer(Path(wanted.path), temporary, self.say)
        else:
            assert wanted.vocab_size is not None  # it has this or a path
            kind = wanted.model_type or "bpe"
            self.say(f"training a sentencepiece {kind} tokenizer of {wanted.vocab_size:,} pieces")
            texts = self._sample()
            first = next(texts, None)
            if first is None:
                raise UserError(
                    "no record to train a tokenizer on: none of split train is left; look at the splits of the sources"
                    + (" and data.validation_fraction: " if self.job.data.validation_fraction else ": ")
                    + drop_summary(self.job, self.readers, self.units)
                )
            train(itertools.chain([first], texts), wanted.vocab_size, temporary, kind)
        for file in temporary.iterdir():
            sync_file(file)
        os.replace(temporary, final)

    def _try_tokenizer(self) -> None:
        """Say so where a tokenizer that was taken over loses some of the text."""
        if self.job.data.tokenizer.path is None:
            return
        tokenizer = Tokenizer.load(self.folder / "tokenizer")
        if tokenizer.unknown_id is None and tokenizer.encode_batch([UNASSIGNED]) == [[]]:
            self.say(
                f"WARNING: the tokenizer {self.job.data.tokenizer.path} has neither bytes nor an unknown token, so characters that it does not "
                "know are left out, uncounted; take one that has either"
            )
        texts = [text[:TRIED_CHARACTERS] for text in itertools.islice(self._sample(), TRIED_TEXTS)]
        decoded = map(tokenizer.decode, tokenizer.encode_batch(texts))
        lost = [(text, back) for text, back in zip(texts, decoded, strict=True) if text != back]
        if lost:
            first = next((at for at, (one, other) in enumerate(zip(*lost[0], strict=False)) if one != other), 0)
            text, back = (repr(text[max(0, first - 20) : first + 20]) for text in lost[0])
            self.say(
                f"WARNING: the tokenizer {self.job.data.tokenizer.path} does not give back {len(lost):,} of {len(texts):,} texts; "
                f"of the first, {text} becomes {back}"
            )

    def _sample(self) -> Iterator[str]:
        """Text of the training split for the tokenizer: the beginnings of units that are spread over the corpus."""
        characters = 0
        limit = max(SAMPLE_OF_UNIT, SAMPLE_CHARACTERS // len(self.units)) if self.units else 0
        for number in sorted(range(len(self.units)), key=lambda number: hashlib.sha256(str(number).encode()).digest()):
            unit, of_unit = self.units[number], 0
            split_of = split_function(self.job.data, unit.source, load_frequent_targets(self.job, unit.source))
            for _, record in kept_records(self.job, self.readers[unit.source], number, unit):
                if split_of(record) == "train":
                    yield from filter(str.strip, record.texts)
                    of_unit += sum(map(len, record.texts))
                    if of_unit >= limit:
                        break
            characters += of_unit
            if characters >= SAMPLE_CHARACTERS:
                return

    def _finish(self) -> Manifest:
        if inputs.file_stats(self.job, self.readers) != self.file_stats:
            raise UserError(
                "a file of the sources changed while the corpus was prepared; start again when nothing writes to them"
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
        self.say(f"prepared {self.folder}: {summary_line(manifest)}")
        if self.job.data.validation_fraction and "validation" not in manifest["splits"]:
            self.say(
                "note: data.validation_fraction held no record back, so nothing will be validated: there are too few records"
            )
        for number, source in enumerate(manifest["sources"]):
            if not source["records"]:
                self.say(f"WARNING: data.sources.{number} has no records")
            elif not source["kept"]:
                self.say(
                    f"WARNING: nothing is kept of data.sources.{number}, {source['records']:,} records: look at its columns and at {SUMMARY}"
                )
        for split, entry in manifest["splits"].items():
            if line := unknown_tokens(split, entry):
                self.say(f"WARNING: {line}")
        for reason, drop in manifest["dropped"].items():
            self.say(
                f"dropped {drop['count']:,} records as {reason} ({REASONS[reason]}), the first: {drop['first'][0]}"
            )
        return manifest

    def _remove_leftovers(self) -> None:
        """Remove what only an unfinished preparation needs, and temporary files of killed ones."""
        shutil.rmtree(self.job.partial, ignore_errors=True)
        for temporary in self.folder.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)


def find_duplicates(serialized: str, kind: str, units: int, part: int, parts: int, out: Path) -> int:
    """A task: the duplicates or near-duplicates in one part of what the records of all units are recognised by."""
    job, _ = open_job(serialized)
    exact, signatures, bands = (
        [fingerprint_file(job, number, name) for number in range(units)] for name in ("exact", "signatures", "bands")
    )
    if kind == "duplicate":
        duplicates.resolve(exact, part, parts, out)
    else:
        near_duplicates.resolve_near(signatures, bands, part, parts, out, job.near_threshold)
    return 0


def _check_still_there(manifest: Manifest, folder: Path) -> None:
    """Every shard with its size, and the tokenizer; what is inside the shards is checked where they are read."""
    for entry in manifest["splits"].values():
        for shard in entry["shards"]:
            path = folder / shard["file"]
            if not path.exists() or path.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"the shard {path} is missing or damaged; remove the folder {folder} and prepare the corpus again"
                )
    if (
        not (folder / "tokenizer").exists()
        or Tokenizer.load(folder / "tokenizer").fingerprint != manifest["tokenizer"]["sha256"]
    ):
        raise UserError(
            f"{folder / 'tokenizer'} is not the tokenizer of these shards; remove the folder {folder} and prepare the corpus again"
        )
