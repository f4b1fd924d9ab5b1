"""Generator of docs/configuration.md from the schema: `python docs/make_configuration.py`.

A test checks that the page is up to date.
"""

import ast
import inspect
import itertools
import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from data_prep.utils.config_file import subsections
from pretrain import config as run_config

HEADER = """# Configuration

One YAML file describes a run. Every key can be overridden on the command line as `dotted.key=value`. This page is
generated from the schema by `docs/make_configuration.py`.
"""


def main() -> None:
    """Write configuration.md."""
    (Path(__file__).parent / "configuration.md").write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page as Markdown."""
    described: set[str] = set()
    return HEADER + "".join(_section(model, prefix, described) for model, prefix in _sections(run_config.RunConfig, ""))


def _sections(model: type[BaseModel], prefix: str) -> list[tuple[type[BaseModel], str]]:
    pairs = [(model, prefix)]
    for name, field in model.model_fields.items():
        pairs += [
            pair
            for subsection, path in subsections(field.annotation, prefix + name)
            for pair in _sections(subsection, path + ".")
        ]
    first_path: dict[type[BaseModel], str] = {}  # path at which a section first occurs; it is described there
    for section, path in pairs:
        first_path.setdefault(section, path)
    return [(section, path) for section, path in dict.fromkeys(pairs) if first_path[section] == path]


def _section(model: type[BaseModel], prefix: str, described: set[str]) -> str:
    """Return the table of a section.

    A key that another section at the same place also has is described only in the first of them.
    """
    title = f"`{prefix[:-1]}`" if prefix else "Top level"
    for key in ("type", "name"):
        choices = typing.get_args(_annotation(model, key))
        if len(choices) == 1:  # one of several sections, chosen by this key
            title += f", {key}: {choices[0]}"
    lines = [f"\n## {title}\n\n{_one_line(model.__doc__)}\n", "| key | type | default | |", "|---|---|---|---|"]
    notes, repeated = _attribute_docstrings(model), []
    for name, field in model.model_fields.items():
        note = _one_line(notes.get(name, "")).replace("|", chr(92) + "|")
        default = f"`{field.default}`"
        if field.default is PydanticUndefined:
            default = "required"
        elif isinstance(field.default, BaseModel):
            default = ""
        line = f"| `{prefix}{name}` | {_type(field.annotation)} | {default} | {note} |"
        if line in described:
            repeated.append(f"`{name}`")
        else:
            lines.append(line)
            described.add(line)
    return "\n".join(lines + ["", f"And {', '.join(repeated)}, as above."] * bool(repeated)) + "\n"


def _annotation(model: type[BaseModel], key: str) -> object:
    return model.model_fields[key].annotation if key in model.model_fields else None


def _attribute_docstrings(model: type[BaseModel]) -> dict[str, str]:
    if model is BaseModel:
        return {}
    inherited: dict[str, str] = {}
    for base in model.__bases__:
        inherited |= _attribute_docstrings(base)
    class_node = ast.parse(inspect.getsource(model)).body[0]
    assert isinstance(class_node, ast.ClassDef)
    for before, node in itertools.pairwise(class_node.body):
        if isinstance(before, ast.AnnAssign) and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inherited[ast.unparse(before.target)] = str(node.value.value)
    return inherited


def _type(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in arguments if part is not type(None)))
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (list, tuple):
        return "list of " + _type(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return "mapping" if origin is dict else getattr(annotation, "__name__", str(annotation))


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    main()
