"""Docstring pairs of Python files: the pairs match the parsed code, and unparsable files are counted."""

import ast
import inspect
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from data_prep.utils.console import UserError
from tests.commands import ROOT
from tests.data_prep.sources.source_helpers import open_reader, read_views, read_with_locations, write

LIBRARY = Path(sysconfig.get_path("stdlib"))


def reader(path, names=("text", "code"), **more):
    return open_reader(names, type="python", path=path, **more)


def read_one(tmp_path, source: str, **more) -> list[tuple]:
    write(tmp_path / "a.py", source.encode())
    return read_views(reader(tmp_path / "a.py", **more))


@pytest.mark.parametrize(
    "source, pairs",
    [
        (
            'def f(a):\n    """Doc.\n\n      more\n    end"""\n    return a\n',
            [("Doc.\n\n  more\nend", "def f(a):\n    return a")],
        ),
        ('def f():\n    "only a docstring"\n', []),
        ("def f():\n    return 1\n", []),
        ('def f():\n    """  """\n    return 1\n', []),
        ('def f():\n    b"bytes"\n    return 1\n', []),
        ('def f():\n    f"{1}"\n    return 1\n', []),
        (
            'class A:\n    """Class."""\n\n    @property\n    # note\n    @wraps(\n        1)\n'
            '    def f(self):  # end\n        """Doc."""\n\n'
            "        # why\n        return 1  # x\n",
            [("Doc.", "@property\n# note\n@wraps(\n    1)\ndef f(self):  # end\n\n    # why\n    return 1  # x")],
        ),
        ('async def f():\n\t"""Doc."""\n\tawait g()\n', [("Doc.", "async def f():\n\tawait g()")]),
        ('def f(): "Doc."; return 1\n', [("Doc.", "def f(): return 1")]),
        ('def f():\n    "größe"; x = "ü"; return x\n', [("größe", 'def f():\n    x = "ü"; return x')]),
        ('def f(): "Doc."; \\\n  return 1\n', [("Doc.", "def f(): return 1")]),
        ('def f():\n    ("one "\n     "two")  # noqa\n    return 1', [("one two", "def f():\n    return 1")]),
        ('def f():\r\n    """A\r\n    b"""\r\n    return 1\r\n', [("A\nb", "def f():\n    return 1")]),
        (
            'def f():\n    """Doc."""\n    def g():\n        """Inner."""\n'
            "        @deco\n        def h(): pass\n        return 2\n    return g\n",
            [
                (
                    "Doc.",
                    'def f():\n    def g():\n        """Inner."""\n'
                    "        @deco\n        def h(): pass\n        return 2\n    return g",
                ),
                ("Inner.", "def g():\n    @deco\n    def h(): pass\n    return 2"),
            ],
        ),
        (
            'def f():\n    """Doc."""\n    @deco\n    def g(): pass\n',
            [("Doc.", "def f():\n    @deco\n    def g(): pass")],
        ),
        ('\ufeffdef f():\n    """Doc."""\n    x = """\ntext\n"""\n', [("Doc.", 'def f():\n    x = """\ntext\n"""')]),
        (
            'class A:\n    @(\n        deco)\n    def f(self):\n        """Doc."""\n        return 1',
            [("Doc.", "@(\n    deco)\ndef f(self):\n    return 1")],
        ),
        (
            'if x:\n    try:\n        def f():\n            """Doc."""\n            return 1\n    except E: pass\n',
            [("Doc.", "def f():\n    return 1")],
        ),
        ("", []),
        ("# nothing\n", []),
        (
            'def f():\n    """a\x0cb"""\n    return 1\n\x0c\ndef g():\n    "Doc."\n    return 2',
            [("a\x0cb", "def f():\n    return 1"), ("Doc.", "def g():\n    return 2")],
        ),
    ],
)
def test_pairs_are_the_docstring_and_the_remaining_function(tmp_path, source, pairs):
    assert read_one(tmp_path, source) == pairs


def test_columns_of_a_function(tmp_path):
    write(
        tmp_path / "pkg" / "sub" / "__init__.py",
        b'class A:\n    async def f(self, a: int, *, b="x") -> list[int]:\n        """Doc."""\n        return 1\n',
    )
    write(tmp_path / "pkg" / "mod.py", b'def g(x, /): "Doc2"; return x\n')
    write(tmp_path / "alone.py", b'def h(): "Doc3"; return x\n')
    views = {"text": "{module} {name} {signature}", "code": "docstring"}
    expected = [
        ("alone h h()", "Doc3"),
        ("pkg.mod g g(x, /)", "Doc2"),
        ("pkg.sub f f(self, a: int, *, b='x') -> list[int]", "Doc."),
    ]
    assert read_views(reader(tmp_path, views=views)) == expected
    assert read_views(reader(tmp_path / "alone.py", views=views)) == expected[:1]
    with pytest.raises(
        UserError, match="a python source has no column 'body', only docstring, code, name, signature, module"
    ):
        reader(tmp_path, views={"code": "body"})
    assert read_views(reader(tmp_path, ("only",)))[0] == ("def h(): return x",)


def test_groups_are_the_top_level_packages_in_order(tmp_path):
    function = b'def f():\n    "Doc."\n    return 1\n'
    for name in (
        "b/x.py",
        "b-c/x.py",
        "a.py",
        "b/sub/y.py",
        "b.py",
        "z/__init__.py",
        ".venv/x.py",
        "b/notes.txt",
        "c/__pycache__/x.pyc",
    ):
        write(tmp_path / "tree" / name, function)
    write(tmp_path / "elsewhere" / "y.py", function)
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "aa").symlink_to(
        tmp_path / "tree" / "z"
    )  # the target of the link is read once, under its real name
    source = reader(tmp_path / "tree")
    assert [
        (Path(piece.path).relative_to(tmp_path / "tree").as_posix(), record.group, record.position)
        for piece in source.pieces()
        for record in source.read(piece)
    ] == [
        ("a.py", "a", 1),
        ("b/sub/y.py", "b", 1),
        ("b/x.py", "b", 1),
        ("b-c/x.py", "b-c", 1),
        ("b.py", "b", 1),
        ("z/__init__.py", "z", 1),
    ]


@pytest.mark.parametrize(
    "content, line, problem",
    [
        (b"def f(:\n", 1, "SyntaxError: "),
        (b"x = 1\n  y = 2\n", 2, "IndentationError: unexpected indent"),
        (b"print 'two'\n", 1, "SyntaxError: Missing parentheses"),
        (b"x = '\0'\n", 1, "source code string cannot contain null bytes"),
        (b"# ok\nx = '\xff'\n", 1, "SyntaxError: invalid or missing encoding"),
        (b"# coding: no-such\n", 1, "SyntaxError: unknown encoding: no-such"),
        (b"# coding: hex\nx\n", 1, "LookupError: 'hex' is not a text encoding"),
        (b"# coding: ascii\nx = '\xc3\xbc'\n", 1, "UnicodeDecodeError: "),
        (b"(" * 300 + b")" * 300, 1, "too many nested parentheses"),
        (b"-" * 100_000 + b"1", 1, "MemoryError: nested too deeply"),
        (b"x" + b".y" * 100_000, 1, "RecursionError: "),
        (b"x = " + b"1 + " * 100_000 + b"1", 1, "RecursionError: "),
        (b"x = 1\n" * 800_000, 1, "ValueError: a file of more than 4 MiB"),
        (b'def f():\n    """Doc.\n', 2, "SyntaxError: unterminated triple-quoted"),
        (b"\tx = 1\n", 1, "IndentationError: "),
        (b"if x:\n\ty\n        z\n", 3, "TabError: "),
        (b"x = 0777\n", 1, "SyntaxError: leading zeros"),
        (b"x = " + b"9" * 5000, 1, "SyntaxError: Exceeds the limit"),
    ],
)
def test_an_unparsable_file_is_counted_and_does_not_affect_other_files(tmp_path, content, line, problem):
    write(tmp_path / "pkg" / "a.py", content)
    write(tmp_path / "pkg" / "b.py", b'def f():\n    "Doc."\n    return 1\n')
    source = reader(tmp_path)
    (record,) = source.read(source.pieces()[0])
    assert record.views is None and record.reason == "unparsable" and record.group == "pkg"
    assert problem in record.problem and "\n" not in record.problem and len(record.problem) <= 200
    if "RecursionError" not in problem:
        assert record.position == line
    assert read_with_locations(source)[1] == (("Doc.", "def f():\n    return 1"), f"{tmp_path}/pkg/b.py:1")


def test_a_docstring_with_a_lone_surrogate_is_unparsable(tmp_path):
    write(tmp_path / "a.py", b'def f():\n    "\\ud83d"\n    return 1\ndef g():\n    "Doc."\n    return 1\n')
    (problem, location), good = read_with_locations(reader(tmp_path))
    assert problem == ("unparsable", "'docstring' holds a lone surrogate, which is not valid text")
    assert location == f"{tmp_path}/a.py:1"
    assert good[0][0] == "Doc."


def test_syntax_warnings_of_the_code_are_not_printed(tmp_path):
    write(
        tmp_path / "a.py",
        b'def f():\n    "\\d bad escape"\n    x is 1\n    assert (1, "x")\n    return 1if 1else"\\p"\n',
    )
    code = (
        "from data_prep.config import PythonSource; from data_prep.sources import open_source\n"
        f"source = open_source(PythonSource(type='python', path={str(tmp_path)!r}), ('a', 'b'), 's')\n"
        "print(len(list(source.read(source.pieces()[0]))))"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_pairs_of_the_standard_library_keep_their_meaning():
    """Check that each pair parses to the function without its docstring.

    Whitespace in strings is ignored because dedenting a function also changes its strings.
    """

    def is_documented_function(node: ast.AST) -> bool:
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        return bool(is_function and ast.get_docstring(node) and len(node.body) > 1)

    class WhitespaceRemover(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            return ast.Constant("".join(node.value.split())) if isinstance(node.value, str) else node

    pairs = 0
    for package in ("json", "asyncio", "email", "unittest"):
        source = reader(LIBRARY / package, views={"text": "docstring", "code": "code"})
        for piece in source.pieces():
            functions = [
                node for node in ast.walk(ast.parse(Path(piece.path).read_bytes())) if is_documented_function(node)
            ]
            functions.sort(key=lambda node: node.lineno)
            for function, record in zip(functions, source.read(piece), strict=True):
                assert record.views[0] == inspect.cleandoc(ast.get_docstring(function, clean=False))
                assert record.position == function.lineno
                (parsed,) = ast.parse(record.views[1]).body
                function.body = function.body[1:]
                assert ast.dump(WhitespaceRemover().visit(parsed)) == ast.dump(WhitespaceRemover().visit(function)), (
                    piece.path,
                    function.lineno,
                )
                pairs += 1
    assert pairs > 600


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no file that ends in \.py"):
        reader(tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*absent \(data\.sources\.0\.path\): No such file"):
        reader(tmp_path / "absent")


def test_the_package_of_a_globbed_file_starts_after_the_fixed_part(tmp_path):
    for name in ("src/a/x.py", "src/a/deep/y.py", "src/b/x.py"):
        write(tmp_path / name, b'def f():\n    "Doc."\n    return 1\n')
    for pattern in ("src/**/*.py", "src/*", "src/*/"):
        source = reader(f"{tmp_path}/{pattern}")
        assert [record.group for piece in source.pieces() for record in source.read(piece)] == ["a", "a", "b"]
