"""Files of a source: finding them, dividing them into pieces, and reading their lines in bounded memory."""

import glob
import gzip
import itertools
import os
import shlex
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from data_prep.config import FileSource
from data_prep.sources.record import Piece
from data_prep.utils.console import UserError

BLOCK_BYTES = 1 << 20
"""Bytes read at a time."""
SMALL_BLOCK = 1 << 16
"""Bytes read at a time by a reader that loses the whole block before a corrupt place."""
MAX_LINE_BYTES = 16 << 20
SMALLEST_PIECE, LARGEST_PIECE = 4 << 20, 64 << 20
SHOWN_FILES = 3
"""Number of files that a note about skipped files names."""
PIECES = 256
"""Approximate number of pieces of a source of uncompressed files."""
OPENERS: dict[str | None, Callable[[str], Any]] = {
    None: lambda path: open(path, "rb", buffering=0),  # noqa: SIM115
    ".gz": gzip.open,
    ".zst": lambda path: pa.CompressedInputStream(pa.OSFile(path), "zstd"),
}
"""File openers by suffix. Python's gzip returns the data before a corrupt place; Arrow's reader loses the block."""
TO_UTF_8 = "convert the file with iconv -f ENCODING -t UTF-8 FILE > NEW; ENCODING is often LATIN1 or UTF-16"
"""Remedy for a file in another encoding."""
WINDOW_TOO_LONG = "requires too much memory"
"""Part of zstd's error for a frame whose window exceeds 128 MiB, the default limit of its decoders."""


class CorruptFileError(Exception):
    """Error raised for a compressed file that cannot be read to its end; the message is one line."""


def find_files(source: FileSource, name: str, suffixes: tuple[str, ...], follow_links: bool = True) -> list[str]:
    """Return the sorted files of a source: one file, the files of a folder with a suffix, or the matches of a glob.

    Raises UserError if there are none, or if one cannot be read.
    """
    return find_files_with_note(source, name, suffixes, follow_links)[0]


def find_files_with_note(
    source: FileSource, name: str, suffixes: tuple[str, ...], follow_links: bool = True
) -> tuple[list[str], str]:
    """Return the files of a source (see `find_files`), and a note about skipped files, or ""."""
    path = source.path
    key = f"{name}.path"
    skipped: list[str] = []
    if path is None:
        raise UserError(f"{key} is not set: set it on the command line, {key}=FILE")
    if os.path.isdir(path):
        paths = _list_readable(path, suffixes, follow_links, skipped)
        if not paths:
            raise UserError(
                f"{path} ({key}) holds no file" + (f" that ends in {', '.join(suffixes)}" if any(suffixes) else "")
            )
    elif os.path.lexists(path) or not glob.has_magic(path):
        paths = [path]
    else:
        matches = glob.glob(path, recursive=True)
        paths = [
            file
            for match in matches
            for file in (_list_readable(match, suffixes, follow_links, skipped) if os.path.isdir(match) else [match])
        ]
        if not paths:
            raise UserError(f"no file matches {path} ({key}): check the pattern")
    for file in paths:
        _check_readable(file, key)
    return sorted(set(paths)), skipped_files_note(set(skipped) - set(paths), path, key)


def skipped_files_note(skipped: set[str], folder: str, key: str) -> str:
    """Return a line that names the skipped files below a folder; empty if there are none."""
    if not skipped:
        return ""
    count = f"{len(skipped):,} files" if len(skipped) > 1 else "1 file"
    examples = ", ".join([*sorted(skipped)[:SHOWN_FILES], *(["..."] if len(skipped) > SHOWN_FILES else [])])
    return f"note: {folder} ({key}): skipping {count} by name: {examples}"


def files_below(folder: str) -> list[str]:
    """Return all files below a folder except hidden ones; none if there is no such folder."""
    return sorted(str(file) for file in Path(folder).rglob("*") if file.is_file() and not file.name.startswith("."))


def glob_root(path: str) -> Path:
    """Return the folder that contains all files of a glob; a path that is not a glob is returned unchanged."""
    parts = Path(path).parts
    if os.path.lexists(path) or not glob.has_magic(path):
        return Path(path)
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))


def _list_readable(folder: str, suffixes: tuple[str, ...], follow_links: bool, skipped: list[str]) -> list[str]:
    """Return the files below a folder with one of the suffixes, and add all other files to `skipped`.

    A hidden folder is added as a whole. If links to folders are followed, each folder is visited once.
    """

    def fail(error: OSError) -> None:
        raise read_error(error.filename, error)

    paths: list[str] = []
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=follow_links):
        folders.sort()
        skipped += [os.path.join(parent, name, "") for name in folders if name.startswith(".")]
        below = [os.path.join(parent, name) for name in folders if not name.startswith(".")]
        below = [path for path in below if follow_links or not os.path.islink(path)]
        folders[:] = [os.path.basename(path) for path in _unseen(below, seen)]
        selected = {name for name in names if name.endswith(suffixes) and not name.startswith(".")}
        paths += [os.path.join(parent, name) for name in selected]
        skipped += [os.path.join(parent, name) for name in names if name not in selected]
    return paths


def _unseen(folders: list[str], seen: set[str]) -> Iterator[str]:
    """Yield the folders whose resolved paths are not in `seen`, and add them to it."""
    for folder in folders:
        resolved = os.path.realpath(folder)
        if resolved not in seen:
            seen.add(resolved)
            yield folder


def _check_readable(file: str, key: str) -> None:
    try:
        file.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of the file {file!r} ({key}) is not UTF-8: rename it") from None
    try:
        if os.path.exists(file) and not os.path.isfile(file):
            raise UserError(f"{file} ({key}) is not a file")
        with open(file, "rb"):
            pass
    except OSError as error:
        raise UserError(f"cannot read {file} ({key}): {error.strerror}") from None


def read_error(path: str, error: OSError) -> UserError:
    """Return the error for a file that cannot be read."""
    return UserError(f"cannot read {path}: {' '.join(str(error.strerror or error).split())}")


def compression_suffix(path: str) -> str | None:
    """Return the suffix of a compressed file, or None."""
    return suffix if (suffix := Path(path).suffix) in OPENERS else None


@contextmanager
def open_piece(piece: Piece) -> Iterator[BinaryIO]:
    """Yield the file of a piece at its first byte, decompressed if its name ends in .gz or .zst.

    Raises UserError if it cannot be read.
    """
    try:
        with OPENERS[compression_suffix(piece.path)](piece.path) as file:
            if size_of(piece.path) < piece.stop:
                raise UserError(f"{piece.path} became shorter while it was being prepared: run the same command again")
            yield file
    except OSError as error:
        raise read_error(piece.path, error) from None


def block_reader(file: BinaryIO, path: str) -> Callable[[], bytes]:
    """Return a function that returns the next block of an open file, empty at the end.

    It raises CorruptFileError if the file is corrupt there, and UserError if the file is valid but needs too much
    memory.
    """
    if compression_suffix(path) is None:
        return lambda: file.read(BLOCK_BYTES)
    if not os.path.getsize(path):

        def empty() -> bytes:
            raise CorruptFileError("the compressed file is empty, so its writing was interrupted: replace it")

        return empty

    read_some, size = (file.read1, BLOCK_BYTES) if isinstance(file, gzip.GzipFile) else (file.read, SMALL_BLOCK)

    def read() -> bytes:
        try:
            return read_some(size)
        except (OSError, EOFError, zlib.error) as error:
            if WINDOW_TOO_LONG in str(error):
                raise UserError(
                    f"{path} was compressed with a window of more than 128 MiB, e.g. by `zstd --long=31`. This reader "
                    "does not support such windows; the file is not corrupt. Compress it again: "
                    f"zstd -d --long=31 -c {shlex.quote(path)} | zstd -o NEW.zst"
                ) from None
            raise CorruptFileError(
                "the compressed file is truncated or corrupt here, and the rest is lost "
                f"({' '.join(str(error).split())}): replace it"
            ) from None

    return read


def byte_pieces(files: list[str], uncut: Collection[str] = ()) -> list[Piece]:
    """Return the pieces of files: byte ranges of uncompressed files, and whole files if compressed or in `uncut`.

    The ranges grow with the total size.
    """
    sizes = {path: size_of(path) for path in files}
    length = piece_length(sum(size for path, size in sizes.items() if compression_suffix(path) is None))
    pieces = []
    for path, size in sizes.items():
        step = size if compression_suffix(path) or path in uncut else length
        # An empty compressed file is a piece too, because only reading it reports that it is corrupt.
        cuts = [*range(0, size, step), size] if size else [0, 0] if compression_suffix(path) else []
        pieces += [Piece(path, start, stop, stop - start) for start, stop in itertools.pairwise(cuts)]
    return pieces


def size_of(path: str) -> int:
    """Return the size of a file in bytes. Raises UserError if it cannot be read."""
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise read_error(path, error) from None


def piece_length(total: int) -> int:
    """Return the bytes per piece: a power of two between 4 and 64 MiB that divides `total` into about 256 pieces."""
    return min(max(1 << max(total // PIECES - 1, 0).bit_length(), SMALLEST_PIECE), LARGEST_PIECE)


def skip_to_line(file: BinaryIO, start: int) -> int:
    """Move to the first line that starts at byte `start` or later, and return the position of that line."""
    if start:
        file.seek(start - 1)  # the byte before `start` may be the newline of the previous line
        at = start - 1
        while block := file.read(BLOCK_BYTES):
            end = block.find(b"\n") + 1
            if end:
                at += end
                break
            at += len(block)
        file.seek(at)
        return at
    return 0


def lines(read: Callable[[], bytes], length: int = sys.maxsize) -> Iterator[bytes | None]:
    """Yield the lines that start in the next `length` bytes, without newline; None for a line of more than 16 MiB.

    The file must be at the start of a line.
    """
    held, too_long = b"", False  # the current line
    while (length > 0 or held or too_long) and (block := read()):
        if length < len(block):  # the last line of the piece may extend past it, and ends in this block
            end = block.find(b"\n", max(length - 1, 0)) + 1
            block = block[:end] or block
        length -= len(block)
        first, *others = block.split(b"\n")
        block_lines: list[bytes | None] = [
            None if too_long or len(held) + len(first) > MAX_LINE_BYTES else held + first,
            *others,
        ]
        last = block_lines.pop()
        yield from block_lines
        held, too_long = last or b"", last is None
    if too_long:
        yield None
    elif held:
        yield held


def count_lines(piece: Piece) -> int:
    """Return the number of lines that start in a byte range of an uncompressed file."""
    with open_piece(piece) as file:
        if piece.start:
            file.seek(piece.start - 1)
        count = int(piece.start == 0)
        remaining = piece.stop - max(piece.start - 1, 0) - 1
        while remaining > 0 and (block := file.read(min(remaining, BLOCK_BYTES))):
            count += block.count(b"\n")
            remaining -= len(block)
    return count


def is_complete_file(piece: Piece) -> bool:
    """Return whether a piece is a complete file."""
    return compression_suffix(piece.path) is not None or (piece.start == 0 and piece.stop == size_of(piece.path))
