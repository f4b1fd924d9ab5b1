"""The documentation matches the code."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement

from pretrain.models.families import family_names
from tests.commands import ROOT


def load_generator(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_up_to_date():
    page = load_generator("make_configuration").page()
    assert (ROOT / "docs" / "configuration.md").read_text() == page, "run: python docs/make_configuration.py"


MODELS = (ROOT / "docs" / "models.md").read_text()


def test_the_page_of_models_has_all_families_of_transformers():
    assert f"transformers {transformers.__version__}," in MODELS, "run: python docs/make_models.py"
    rows = re.findall(r"^\| `(.*?)` \| (passed|refused|not built) \| (.*) \|$", MODELS, re.MULTILINE)
    assert [family for family, _, _ in rows] == family_names(), "run: python docs/make_models.py"
    assert all(bool(reason.strip()) == (result != "passed") for _, result, reason in rows)
    for kind in ("passed", "refused", "not built"):
        assert f"**{kind}** ({sum(result == kind for _, result, _ in rows)})" in MODELS


@pytest.mark.parametrize(
    "family", ["bert", "bloom", "gemma3", "gemma3_text", "gemma4_assistant", "mamba", "ministral", "mixtral", "openelm"]
)
def test_the_page_of_models_has_the_result_of_the_check(family):
    make_models = load_generator("make_models")
    assert make_models.line(make_models.check_family(family)) in MODELS, "run: python docs/make_models.py"


def test_a_family_whose_check_crashes_does_not_lose_the_other_rows(monkeypatch, tmp_path):
    make_models = load_generator("make_models")
    script = tmp_path / "crash.py"
    script.write_text(
        "import json, os, sys\n"
        "for family in sys.argv[1:]:\n"
        "    if family == 'b': os._exit(9)\n"
        "    print(json.dumps([family, 'passed', '']), flush=True)\n"
    )
    monkeypatch.setattr(make_models, "__file__", str(script))
    rows = list(make_models.check_families(["a", "b", "c"]))
    assert [(row.family, row.result) for row in rows] == [("a", "passed"), ("b", "not built"), ("c", "passed")]
    assert rows[1].reason == "its check ended with exit code 9"


def test_the_lock_file_has_the_versions_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.lower().replace("_", "-") for line in (ROOT / "requirements.lock").read_text().splitlines()]
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = project["optional-dependencies"]
    for requirement in map(Requirement, [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["test"]]):
        version = locked[requirement.name.lower().replace("_", "-")]
        assert version in requirement.specifier, (requirement, version)


def test_no_page_has_a_placeholder_or_a_dead_link():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        assert not re.search(r"@[A-Z0-9]+@", text), page
        for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
            target = page.parent / path if path else page
            assert target.exists(), (page, path)
            assert not anchor or anchor in anchors(target), (page, path, anchor)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub generates them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
