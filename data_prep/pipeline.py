"""From sources to shards: units of work over several processes, restartable, identical for any number of them.

The folder `data.path` ends up with `manifest.json`, `tokenizer/` and one shard per unit and split. Until the
manifest stands, `.partial/` holds a report per finished unit; a run that finds them goes on with the rest.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.config import DataConfig, JsonSource
from data_prep.console import UserError, print_now
from data_prep.files import sha256_file, sync_file, try_lock, write_json
from data_prep.shards import FORMAT, MANIFEST, positions_needed, read_manifest, write_shard
from data_prep.sources import Reader, Unit, open_source
from data_prep.sources.record import Record
from data_prep.tokenizer import Tokenizer, take_over, train

SAMPLE_CHARACTERS = 20_000_000
"""Text read to train a tokenizer; more changes no piece worth having."""
EXAMPLES = 5
"""Places named per reason for dropping a record."""
REASONS = {
    "malformed": "the line is no record",
    "empty": "no view holds text",
    "one_sided": "a view holds no text; data.missing_views: keep takes the others",
    "too_long": "the record does not fit a row of data.sequence_length with the copies of its views",
}


def prepare(config: DataConfig, say: Callable[[str], None] = print_now) -> dict[str, Any]:
    """Prepare the corpus of `config` unless it stands already; return its manifest.

    Raises UserError for anything the user can mend; what was finished by then is kept for the next run.
    """
    if not config.sources:
        raise UserError("data.sources is empty: name at least one source")
    folder = Path(config.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            return _prepare(config, folder, say)
    except OSError as error:
        raise UserError(f"cannot write the corpus to {folder}: {error.strerror or error}"
                        f"{f' ({error.filename})' if error.filename else ''}") from None


def _prepare(config: DataConfig, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    readers = _open_sources(config)
    settings = {"data": config.preparation(), "files": _file_hashes(config)}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _check_same_settings(manifest["settings"], settings, folder)
        _check_still_there(manifest, folder)
        _remove_leftovers(folder)
        say(f"{folder} is prepared already, nothing to do: {_summary(manifest)}")
        return manifest
    _resume_or_restart(folder, settings, say)
    units = [Unit(source, *bounds) for source, reader in enumerate(readers) for bounds in reader.units()]
    tokenizer = _tokenizer(config, readers, units, folder, say)
    reports = _run_units(config, folder, units, say)
    manifest = _manifest(config, settings, tokenizer, reports)
    _check_not_empty(manifest)
    write_json(folder / MANIFEST, manifest)
    _remove_leftovers(folder)
    say(f"prepared {folder}: {_summary(manifest)}")
    if config.validation_fraction and "validation" not in manifest["splits"]:
        say("note: data.validation_fraction held no record back, so nothing will be validated: there are too few records")
    for reason, drop in manifest["dropped"].items():
        say(f"dropped {drop['count']:,} records as {reason} ({REASONS[reason]}), the first: {', '.join(drop['first'])}")
    return manifest


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = try_lock(folder / ".lock")
    if lock is None:
        raise UserError(f"another process is preparing {folder}; wait for it, or choose another data.path")
    with lock:
        yield


def _open_sources(config: DataConfig) -> list[Reader]:
    return [open_source(source, config.views, f"data.sources.{index}") for index, source in enumerate(config.sources)]


def _file_hashes(config: DataConfig) -> dict[str, str]:
    files = [Path(source.path) for source in config.sources if isinstance(source, JsonSource)]
    if config.tokenizer.path is not None:
        given = Path(config.tokenizer.path)
        inside = [file for pattern in ("*token*.json", "*.model") for file in sorted(given.glob(pattern))]
        files += inside if given.is_dir() else [given] * given.is_file()  # `take_over` names what is missing
    return {str(file): sha256_file(file) for file in files}


def _check_same_settings(stored: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    if stored == wanted:
        return
    changed = [f"data.{key}" for key in wanted["data"] if stored["data"].get(key) != wanted["data"][key]]
    before, now = stored["files"], wanted["files"]
    changed = changed or [f"content of {file}" for file in before | now if before.get(file) != now.get(file)]
    raise UserError(f"{folder} was prepared with another {' and '.join(changed)}; choose another data.path, or remove that folder to prepare it anew")


def _check_still_there(manifest: dict[str, Any], folder: Path) -> None:
    """Every shard with its size, and the tokenizer; what is inside the shards is checked when they are opened."""
    for entry in manifest["splits"].values():
        for shard in entry["shards"]:
            path = folder / shard["file"]
            if not path.exists() or path.stat().st_size != shard["bytes"]:
                raise UserError(f"the shard {path} is missing or damaged; remove the folder {folder} and prepare the corpus again")
    if not (folder / "tokenizer").exists() or Tokenizer.load(folder / "tokenizer").fingerprint != manifest["tokenizer"]["sha256"]:
        raise UserError(f"{folder / 'tokenizer'} is not the tokenizer of these shards; remove the folder {folder} and prepare the corpus again")


def _resume_or_restart(folder: Path, settings: dict[str, Any], say: Callable[[str], None]) -> None:
    """Keep what an interrupted run finished, if it was preparing the same thing; start afresh otherwise."""
    partial, stored = folder / ".partial", folder / ".partial" / "settings.json"
    if stored.exists():
        if json.loads(stored.read_text()) == settings:
            say(f"going on with an interrupted preparation: {len(list(partial.glob('unit-*.json')))} units are done")
            return
        say("the interrupted preparation had other settings: starting afresh")
        write_json(stored, None)  # else a kill while the old goes would leave some of it to a run with the old settings
        for old in (*partial.glob("unit-*.json"), *folder.glob("*.arrow")):
            old.unlink()
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    elif (folder / "tokenizer").exists() or any(folder.glob("*.arrow")):
        raise UserError(f"{folder} holds a tokenizer or shards, but no {MANIFEST} that says what of; "
                        "remove that folder, or choose another data.path")
    partial.mkdir(exist_ok=True)
    write_json(stored, settings)


def _remove_leftovers(folder: Path) -> None:
    """Remove what only an unfinished preparation needs, and temporary files of killed ones."""
    shutil.rmtree(folder / ".partial", ignore_errors=True)
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def _tokenizer(config: DataConfig, readers: list[Reader], units: list[Unit], folder: Path, say: Callable[[str], None]) -> Tokenizer:
    final = folder / "tokenizer"
    if final.exists():
        return Tokenizer.load(final)
    temporary = folder / ".partial" / "tokenizer"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    if config.tokenizer.path is not None:
        say(f"taking over the tokenizer {config.tokenizer.path}")
        take_over(Path(config.tokenizer.path), temporary)
    else:
        kind = config.tokenizer.model_type or "bpe"
        say(f"training a sentencepiece {kind} tokenizer of {config.tokenizer.vocab_size:,} pieces")
        train(_sample(config, readers, units), config.tokenizer.vocab_size, temporary, kind)
    for file in temporary.iterdir():
        sync_file(file)
    os.replace(temporary, final)
    return Tokenizer.load(final)


def _sample(config: DataConfig, readers: list[Reader], units: list[Unit]) -> Iterator[str]:
    """Text of the training split for the tokenizer: whole units, spread evenly over the corpus."""
    characters, left_out = 0, ""
    for unit in sorted(units, key=lambda unit: hashlib.sha256(repr(unit).encode()).digest()):
        reader = readers[unit.source]
        for record in reader.read(unit.start, unit.stop):
            if record.views is None and config.on_malformed == "fail":
                raise _malformed(reader, unit, record)
            if record.views is None or _lacking(config, record.views) or _split(config, unit, record.views) != "train":
                left_out = left_out or reader.where(unit.start, record.position)
                continue
            yield from filter(str.strip, record.views)
            characters += sum(map(len, record.views))
        if characters > SAMPLE_CHARACTERS:
            return
    if not characters:
        found = f"(the first that is none: {left_out})" if left_out else "(the sources hold no line)"
        raise UserError(f"no record to train a tokenizer on: none of split train has text in {' and '.join(config.views)} "
                        f"{found}; check data.views and the columns and splits of the sources"
                        + (", and whether data.validation_fraction leaves any" if config.validation_fraction else ""))


def _split(config: DataConfig, unit: Unit, views: tuple[str, ...]) -> str:
    """The split of a record: its source's, but for the held-out share of the training records, drawn by the target."""
    split = config.sources[unit.source].split
    if split == "train" and config.validation_fraction:
        target = next(view for view in reversed(views) if view.strip())
        draw = int.from_bytes(hashlib.sha256(target.encode()).digest()[:8]) / 2**64
        return "validation" if draw < config.validation_fraction else "train"
    return split


def _run_units(config: DataConfig, folder: Path, units: list[Unit], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run the units that have no report yet; return all reports in the order of the units."""
    reports = [folder / ".partial" / f"unit-{index:05d}.json" for index in range(len(units))]
    todo = [index for index, report in enumerate(reports) if not report.exists()]
    workers = min(config.workers or len(os.sched_getaffinity(0)), max(1, len(todo)))
    say(f"tokenizing {len(todo)} of {len(units)} units in {workers} {'process' if workers == 1 else 'processes'}")
    # forkserver: the workers start from a clean process, and quickly
    with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), initializer=_end_with_parent) as pool, \
            tqdm(total=len(todo), unit="unit", disable=len(todo) < 2 or None, mininterval=1) as bar:
        serialized = config.model_dump_json()
        running = [pool.submit(_run_unit, serialized, index, units[index]) for index in todo]
        try:
            for done in as_completed(running):
                done.result()
                bar.update()
        except BrokenProcessPool:
            raise UserError("a worker process of the preparation was killed (out of memory?); "
                            "start the same command again, or with a smaller data.workers") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return [json.loads(report.read_text()) for report in reports]


def _end_with_parent() -> None:
    """Let this worker die with the process that prepares: it would write on without the lock, and then wait forever."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


@cache
def _worker(serialized: str) -> tuple[DataConfig, list[Reader], Tokenizer]:
    """What every unit of a process needs, opened once."""
    config = DataConfig.model_validate_json(serialized)
    return config, _open_sources(config), Tokenizer.load(Path(config.path) / "tokenizer")


def _run_unit(serialized: str, index: int, unit: Unit) -> None:
    """Tokenize one unit; write a shard per split and, last, the report that says that they stand."""
    config, readers, tokenizer = _worker(serialized)
    reader = readers[unit.source]
    dropped: dict[str, dict[str, Any]] = {}

    def drop(reason: str, position: int) -> None:
        entry = dropped.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < EXAMPLES:
            entry["first"].append(reader.where(unit.start, position))

    kept = []
    for record in reader.read(unit.start, unit.stop):
        if record.views is None:
            if config.on_malformed == "fail":
                raise _malformed(reader, unit, record)
            drop("malformed", record.position)
        elif reason := _lacking(config, record.views):
            drop(reason, record.position)
        else:
            kept.append(record)
    tokens = [tokenizer.encode_batch([record.views[view] if record.views[view].strip() else "" for record in kept])
              for view in range(len(config.views))]
    lengths = np.array([[len(ids) for ids in view] for view in tokens]).reshape(len(config.views), -1).T
    fits = positions_needed(lengths) <= config.sequence_length
    members: dict[str, list[int]] = {}
    for row, record in enumerate(kept):
        if fits[row]:
            members.setdefault(_split(config, unit, record.views), []).append(row)
        else:
            drop("too_long", record.position)
    folder = Path(config.path)
    shards = {
        split: write_shard(folder / f"{split}-{index:05d}.arrow",
                           {name: [view[row] for row in rows] for name, view in zip(config.views, tokens, strict=True)},
                           tokenizer.vocab_size)
        for split, rows in members.items()
    }
    write_json(folder / ".partial" / f"unit-{index:05d}.json", {"shards": shards, "dropped": dropped})


def _lacking(config: DataConfig, views: tuple[str, ...]) -> str:
    """The reason to drop a record for the views that hold no text; empty to keep it."""
    present = [bool(view.strip()) for view in views]
    if not any(present):
        return "empty"
    return "" if all(present) or config.missing_views == "keep" else "one_sided"


def _malformed(reader: Reader, unit: Unit, record: Record) -> UserError:
    return UserError(f"{reader.where(unit.start, record.position)}: {record.problem}; "
                     "mend the line, or drop such lines with data.on_malformed=drop")


def _manifest(config: DataConfig, settings: dict[str, Any], tokenizer: Tokenizer, reports: list[dict[str, Any]]) -> dict[str, Any]:
    splits: dict[str, Any] = {}
    dropped: dict[str, Any] = {}
    for report in reports:
        for split, shard in report["shards"].items():
            splits.setdefault(split, []).append(shard)
        for reason, drop in report["dropped"].items():
            entry = dropped.setdefault(reason, {"count": 0, "first": []})
            entry["count"] += drop["count"]
            entry["first"] = (entry["first"] + drop["first"])[:EXAMPLES]
    return {
        "format": FORMAT,
        "views": list(config.views),
        "tokenizer": {"sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "settings": settings,
        "splits": {split: {
            "records": sum(shard["records"] for shard in shards),
            "incomplete": sum(shard["incomplete"] for shard in shards),
            "tokens": {view: sum(shard["tokens"][view] for shard in shards) for view in config.views},
            "longest": {view: max(shard["longest"][view] for shard in shards) for view in config.views},
            "positions_needed": max(shard["positions_needed"] for shard in shards),
            "shards": shards,
        } for split, shards in splits.items()},
        "dropped": dropped,
    }


def _check_not_empty(manifest: dict[str, Any]) -> None:
    if manifest["splits"]:
        return
    reasons = "; ".join(f"{drop['count']:,} {reason} ({REASONS[reason]}; the first: {drop['first'][0]})"
                        for reason, drop in manifest["dropped"].items())
    raise UserError(f"no record is left: {reasons or 'the sources hold no line'}; "
                    "check data.views and the columns of the sources, and data.sequence_length")


def _summary(manifest: dict[str, Any]) -> str:
    splits = ", ".join(f"{split} {entry['records']:,} records with {sum(entry['tokens'].values()):,} tokens"
                       for split, entry in manifest["splits"].items())
    return f"{splits}; vocabulary {manifest['tokenizer']['vocab_size']:,}"
