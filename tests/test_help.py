"""The help of each command: every argument is described, and a default is written as `default: VALUE`."""

import ast

from tests.commands import ROOT, run_command

PACKAGES = ("launcher", "pretrain", "data_prep")


def arguments():
    """Yield the location of each argument of the commands, and its options as source text."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", options


def test_each_argument_is_described_with_its_default():
    count = 0
    for place, options in arguments():
        count += 1
        assert "help" in options, f"{place} has no help"
        has_default = "const" in options or options.get("default", "[]") not in ("[]", "None")
        if has_default and options.get("help") != "argparse.SUPPRESS":
            assert "default: " in options["help"], f"{place}: the help lacks `default: ...`"
        assert "(default" not in options["help"] and "by default" not in options["help"], place
    assert count > 50


def test_the_help_of_init_names_its_output_file():
    text = " ".join(run_command(["python", "launcher/init.py", "--help"]).stdout.split())
    assert "configuration file to write; default: configs/mine.yaml" in text
