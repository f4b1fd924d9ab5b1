"""Rules for imports between packages, checked in the source.

Imports inside functions and under TYPE_CHECKING count too, because a reader has to know the imported module.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.commands import ROOT

LAYERS = ("launcher", "pretrain", "data_prep")
"""Packages in order. Each may import itself and the packages that follow it."""
DATA_PREP_NEEDS = {
    "datasets",
    "mpi4py",
    "numpy",
    "pyarrow",
    "pydantic",
    "rensa",
    "sentencepiece",
    "tokenizers",
    "tqdm",
    "yaml",
}
"""Third-party packages that data_prep imports. torch is not one of them."""
Graph = dict[str, dict[str, set[str]]]
"""Unit -> the units that it imports -> the file and line of each import."""


def source_files(root: Path, package: str) -> Iterator[Path]:
    return (root / package).rglob("*.py")


def imported_names(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the dotted names that a file imports, each with its line: `a.b.c` for `from a.b import c`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write an absolute import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def unit_of(root: Path, name: str) -> str:
    """Return the unit of a dotted name: a subpackage with everything in it, or a file directly in a package."""
    package, *rest = name.split(".")
    if rest and ((root / package / rest[0]).is_dir() or (root / package / f"{rest[0]}.py").is_file()):
        return f"{package}.{rest[0]}"
    return package  # its __init__.py


def import_graph(root: Path) -> Graph:
    """Return the imports between units."""
    graph: Graph = defaultdict(lambda: defaultdict(set))
    for package in LAYERS:
        for path in source_files(root, package):
            relative = path.relative_to(root)
            unit = unit_of(root, ".".join(relative.with_suffix("").parts))
            for name, line in imported_names(path):
                if name.split(".")[0] in LAYERS and unit_of(root, name) != unit:
                    graph[unit][unit_of(root, name)].add(f"{relative}:{line}")
    return graph


def layer_violations(graph: Graph) -> list[str]:
    """Return the imports of a package that precedes the importing package in LAYERS, or of a file of launcher."""
    found = []
    for unit, targets in graph.items():
        layer = LAYERS.index(unit.split(".")[0])
        for target, places in targets.items():
            package = target.split(".")[0]
            if package == LAYERS[0] or LAYERS.index(package) < layer:
                found += [f"{place} imports {target}" for place in sorted(places)]
    return found


def find_cycle(graph: Graph) -> list[str]:
    """Return the imports that form a cycle, in the order of the cycle, or an empty list if there is no cycle."""
    done: set[str] = set()

    def visit(unit: str, path: list[str]) -> list[str]:
        if unit in path:
            return [*path[path.index(unit) :], unit]
        if unit not in done:
            for target in sorted(graph.get(unit, ())):
                if cycle := visit(target, [*path, unit]):
                    return cycle
            done.add(unit)
        return []

    for unit in sorted(graph):
        if cycle := visit(unit, []):
            return [
                f"{importer} imports {target}: {', '.join(sorted(graph[importer][target]))}"
                for importer, target in pairwise(cycle)
            ]
    return []


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(ROOT)


def test_imports_go_from_launcher_to_pretrain_to_data_prep(graph):
    assert layer_violations(graph) == []


def test_there_are_no_import_cycles(graph):
    assert find_cycle(graph) == []


def test_data_prep_does_not_import_torch():
    found = {name.split(".")[0] for path in source_files(ROOT, "data_prep") for name, _ in imported_names(path)}
    assert found - sys.stdlib_module_names - {"data_prep"} == DATA_PREP_NEEDS


def test_only_planning_training_and_the_module_of_imports_import_deepspeed():
    users = {
        path.relative_to(ROOT).parts[:2]
        for package in LAYERS
        for path in source_files(ROOT, package)
        for name, _ in imported_names(path)
        if name.split(".")[0] == "deepspeed"
    }
    assert users == {("pretrain", "imports.py"), ("pretrain", "planning"), ("pretrain", "training")}


@pytest.mark.parametrize(
    "importing",
    [
        "from pretrain.two import other\n",
        "def late():\n    from pretrain.two import other\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pretrain.two.other\n",
    ],
)
def test_a_cycle_is_found_in_any_kind_of_import(tmp_path, importing):
    for name, source in {
        "pretrain/one.py": importing,
        "pretrain/two/__init__.py": "",
        "pretrain/two/other.py": "import pretrain.three\n",
        "pretrain/three.py": "from pretrain import one\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    cycle = find_cycle(import_graph(tmp_path))
    assert [place.split(":")[0] for place in cycle] == [
        "pretrain.one imports pretrain.two",
        "pretrain.two imports pretrain.three",
        "pretrain.three imports pretrain.one",
    ]
    (tmp_path / "pretrain" / "three.py").write_text("")
    assert find_cycle(import_graph(tmp_path)) == []


def test_an_import_that_violates_the_layers_is_found(tmp_path):
    for package, source in {
        "data_prep": "import pretrain.two\n",
        "pretrain": "def late():\n    import launcher.run\n",
        "launcher": "",
    }.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
        (tmp_path / package / "one.py").write_text(source)
    assert layer_violations(import_graph(tmp_path)) == [
        "pretrain/one.py:2 imports launcher",
        "data_prep/one.py:1 imports pretrain",
    ]
