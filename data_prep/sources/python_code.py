"""Docstring and function pairs, mined from a tree of Python files."""

import ast
import inspect
import io
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from data_prep.config import PythonSource
from data_prep.sources import files
from data_prep.sources.record import Piece, Record
from data_prep.sources.views import Row, check_columns, first_and_last, make_mapping

LARGEST_FILE = 4 << 20
COLUMNS = ("docstring", "code", "name", "signature", "module")
UNPARSABLE = "unparsable"
Function = ast.FunctionDef | ast.AsyncFunctionDef


class PythonCode:
    """Reader of the functions and methods that have a docstring and a body; a file is a piece."""

    note = ""
    """Always empty: other files in a tree of programs are normal."""

    def __init__(self, source: PythonSource, views: tuple[str, ...], name: str):
        self.root = files.glob_root(source.path or "")
        self.files = sorted(
            files.find_files(source, name, (".py",), follow_links=False), key=lambda path: Path(path).parts
        )
        self.mapping = make_mapping(source, views, name, first_and_last(views, "docstring", "code"))
        check_columns(self.mapping, COLUMNS, "a python source", name)
        self.provided_views = self.mapping.provided_views

    def pieces(self) -> list[Piece]:
        """Divide the source into pieces; see `Reader.pieces`."""
        sizes = {path: files.size_of(path) for path in self.files}
        return [Piece(path, 0, size, size) for path, size in sizes.items() if size]

    def read(self, piece: Piece) -> Iterator[Record]:
        """Read a piece; see `Reader.read`."""
        module = self._module(piece.path)
        with files.open_piece(piece) as file:
            content = file.read(LARGEST_FILE + 1)
        try:
            rows = self._rows(content, ".".join(module))
        except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None) or 1
            problem = " ".join(
                f"{type(error).__name__}: {getattr(error, 'msg', None) or str(error) or 'nested too deeply'}".split()
            )
            yield Record(None, line, problem[:200], UNPARSABLE, module[0])
            return
        for line, row in rows:
            for record in self.mapping.records(row, line):
                # A docstring with a lone surrogate must not stop the preparation: tests of Unicode have them.
                yield record._replace(group=module[0], reason=UNPARSABLE if record.views is None else record.reason)

    def _rows(self, content: bytes, module: str) -> list[tuple[int, Row]]:
        text, functions = parse(content)
        lines = text.split("\n")
        # Making a signature takes as long as parsing the function.
        signature = signature_of if "signature" in self.mapping.columns else lambda function: None
        return [
            (
                function.lineno,
                {
                    "docstring": inspect.cleandoc(ast.get_docstring(function, clean=False) or ""),
                    "code": code_of(function, lines),
                    "name": function.name,
                    "signature": signature(function),
                    "module": module,
                },
            )
            for function in functions
        ]

    def count(self, piece: Piece) -> int:
        """Count positions; see `Reader.count`."""
        return 0

    def place(self, piece: Piece, position: int, before: int) -> str:
        """Return the location of a record; see `Reader.place`."""
        return f"{piece.path}:{position}"

    def _module(self, path: str) -> tuple[str, ...]:
        """Return the parts of the module's name; the first is its top-level package."""
        relative = Path(path).relative_to(self.root) if self.root.is_dir() else Path(Path(path).name)
        parts = relative.with_suffix("").parts
        return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


def parse(content: bytes) -> tuple[str, list[Function]]:
    """Return the text of a file with Python's newlines, and its functions that have a docstring and a body, in order.

    Raises any error of decoding or parsing, and ValueError for a file that is too large.
    """
    if len(content) > LARGEST_FILE:
        raise ValueError(f"a file of more than {LARGEST_FILE >> 20} MiB")
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    text = io.StringIO(content.decode(encoding), newline=None).read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about the parsed code, such as "invalid escape sequence"
        tree = ast.parse(text)
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, Function) and len(node.body) > 1 and (ast.get_docstring(node) or "").strip()
    ]
    return text, sorted(functions, key=lambda node: (node.lineno, node.col_offset))


def signature_of(function: Function) -> str:
    """Return `name(arguments) -> annotation` on one line."""
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{function.name}({ast.unparse(function.args)}){returns}"


def code_of(function: Function, lines: list[str]) -> str:
    """Return the source of a function with its decorators and without its docstring.

    `lines` are the lines of the file. The indentation of the function is removed from every line that has it, even
    within strings.
    """
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)]) - 1
    while function.decorator_list and not lines[first].lstrip().startswith("@"):
        first -= 1  # the decorator is in parentheses, and ast does not record their position
    docstring, after = function.body[:2]
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset].decode()
    if before.strip() or after.lineno == docstring.end_lineno:  # the docstring shares a line
        rest = [
            before + lines[after.lineno - 1].encode()[after.col_offset :].decode(),
            *lines[after.lineno : function.end_lineno],
        ]
    else:
        rest = lines[docstring.end_lineno : function.end_lineno]
    indentation = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    return "\n".join(line.removeprefix(indentation) for line in lines[first : docstring.lineno - 1] + rest)
