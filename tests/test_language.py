"""Plain English: phrases that a reader has to decode are counted, and the ones that are left have a reason.

Three rows of the table of phrases cannot be expressed as patterns: `where` for if, `as` and `for` for because, and
`before` for in front of.
"""

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT

PHRASES = {
    r"(?<!there )(?<!or )\b(?:is|are|was|were|be) no (?!longer|more|one\b|better)\w+": "is not a",
    r"(?-i:(?<!there )\b(?:is|are|was|were|holds?|has|have|had|needs?) none\b)": "there is no",
    r"\b(?:stands?|stood|lies?|lay) (?:in|at|on|beside|there|before|behind|under|between|alone|outside)\b": "is in",
    r"\b(?:go|goes|going|gone|went) on\b": "resumes, continues",
    r"(?<![`\w.])(?:tells?|told|says?|said|spoken?)\b(?! apart|\\|`)|\bwithout a word\b": "reports, prints",
    r"\b(?:mend|mends|mended|mending)\b|\bspoil\w*": "fix; corrupt",
    r"\b(?:is|are|was|were|be|stays?|stayed|not|still) whole\b|\bwhole or\b|\bsounds?\b": "complete; valid",
    r"\brests\b|\bkeys(?: of \S+)? rest\b|\bresting\b|\bs[ia]ts? out\b|\bt(?:ake|akes|aking|ook)(?: no)? part\b": (
        "are ignored"
    ),
    r"\bbehind\b": "after",
    r"\b(?:come|comes|coming|came)(?: down)? to\b|\bas many as\b|\b(?:that|those) of\b": "equals; name it again",
    r"\b(?:take|takes|taking|taken|took)(?: it| them)? over\b": "imports",
    r"\b(?:leave|leaves|leaving|left) (?:\w+ ){0,3}out\b": "skips",
    r"\bask(?:s|ed|ing)?(?: \w+){0,2} for\b|\b(?:is|are|was|were) asked\b": "requests; is called",
    r"\b(?:give|gives|giving|given|gave)(?: \w+){0,2} back\b|\bgives\b(?! up)": "returns, yields",
    r"\bby (?:itself|themselves|himself)\b|\bon (?:its|their) own\b": "automatically, separately",
    r"\bof (?:its|their) own(?! \w)|\bof (?:its|their) own (?:and|or|in|at|for|with|that|when|if)\b": "its own X",
    r"\b(?:a|the|what|this|which|same|equal|large|small|\d+%) share of\b": "a fraction of",
    r"\bwhat (?:\w+ ){1,3}(?:takes?|costs?)\b": "resource estimate, cost",
    r"\bso that\b|\bsuch an? |\bthose (?:that|which|who)\b": "and; this; the ones that",
    r"\bhangs? since\b": "has been hanging for",
    r"\bsigns? of life\b": "heartbeat",
    r"\bthe other ranks?\b|\bthe others\b": "peers",
}
"""Phrase to avoid (a regular expression) -> what to write instead."""

ACCEPTED = {
    ("pretrain/cluster/checks_nodes.py", "'ahead of' if offset > 0 else 'behind'"): "A clock is behind another clock.",
    ("tests/cluster/test_doctor.py", r"(100|99)\.\d s behind"): "It quotes the message on clocks.",
    ("tests/data_prep/selection/test_selection.py", "So I asked: {LEAK}; and he said"): "It is the text of a record.",
    ("tests/pretrain/training/test_bf16.py", "stands in for"): "The idiom means to replace.",
    ("tests/pretrain/training/test_sixty_steps.py", "says {number"): "It is the text of a record.",
}
"""(file, text around one phrase) -> why the phrase stays. At most 40."""

ACCEPTED_DOCSTRINGS: dict[tuple[str, str], str] = {}
"""(file, beginning of a docstring) -> why it may begin with that word. At most 10."""

NOT_PROSE = {".cff", ".xz", ".png", ".json", ".jsonl", ".lock", ".html", ".gz"}
RECORDS = re.compile(r"docs/studies/\w+/")
"""Folders with what the studies wrote when they ran."""


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    files = [
        ROOT / name for name in listed if not RECORDS.match(name) and name not in ("LICENSE", "tests/test_language.py")
    ]
    return [path for path in files if path.suffix not in NOT_PROSE and path.is_file()]


def python_texts(source: str) -> Iterator[str]:
    """Yield the comments and strings of Python code, adjacent ones joined, and the names that it defines as words."""
    kind, parts = None, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NL, tokenize.NEWLINE) and kind == tokenize.COMMENT:
            continue
        if token.type == tokenize.NL and kind == tokenize.STRING:
            continue
        if token.type != kind and parts:
            yield " ".join(parts)
            parts = []
        kind = token.type
        if kind == tokenize.COMMENT:
            parts.append(token.string.lstrip("# "))
        elif kind == tokenize.STRING:
            parts.append(re.sub(r"^\w*(\"\"\"|'''|\"|')|(\"\"\"|'''|\"|')$", "", token.string))
    yield " ".join(parts)
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    yield from (name.replace("_", " ").strip() for name in names if "_" in name.strip("_"))


def texts(name: str, content: str) -> Iterator[str]:
    """Yield the texts of a file, with single spaces."""
    for text in python_texts(content) if name.endswith(".py") else [re.sub(r"\n\s*# ?", "\n", content)]:
        yield re.sub(r"\s+", " ", text)


def find_phrases(name: str, content: str) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield each phrase with its entry in ACCEPTED, or else with its surroundings, and what to write instead."""
    for text in texts(name, content):
        for phrase, better in PHRASES.items():
            for match in re.finditer(phrase, text, re.IGNORECASE):
                for file, around in ACCEPTED:
                    start = text.find(around)
                    if file == name and start != -1 and start <= match.start() and match.end() <= start + len(around):
                        yield (file, around), better
                        break
                else:
                    yield (name, text[max(0, match.start() - 40) : match.end() + 40]), better


def test_phrases_that_have_to_be_decoded_are_gone():
    found: Counter[tuple[str, str]] = Counter()
    unlisted = []
    for path in tracked_files():
        for entry, better in find_phrases(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")):
            found[entry] += 1
            if entry not in ACCEPTED:
                unlisted.append(f"{entry[0]}: {entry[1]!r}: write {better!r}")
    assert not unlisted, "\n".join(unlisted)
    assert found == Counter(ACCEPTED.keys()), "an accepted phrase is gone or is there twice"
    assert len(ACCEPTED) <= 40 and all(ACCEPTED.values())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.py", '"""Return the step from which the run goes on."""\n'),
        ("a.py", "# The run\n# goes\n# on from step 5.\n"),
        ("a.py", 'print("the run goes "\n      "on from step 5")\n'),
        ("a.py", "print(f'the run goes on from {step}')\n"),
        ("a.py", "def run_that_goes_on(): pass\n"),
        ("a.md", "A run\ngoes on.\n"),
        ("a.yaml", "# A run goes\n# on.\nname: a\n"),
        ("Makefile", "# make run    goes on\n"),
        ("pretrain/cluster/checks_nodes.py", "# a rank is behind the wall\n"),
    ],
)
def test_a_phrase_is_found_in_every_kind_of_text(name, content):
    [(entry, _)] = find_phrases(name, content)
    assert entry not in ACCEPTED


def test_docstrings_begin_with_a_verb_or_a_noun():
    found = []
    for path in tracked_files():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # an attribute's docstring is an expression too
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                text = node.value.value.strip()
                if re.match(r"(Of|What|Whose|That|Where|How|Which)\b", text):
                    found.append((str(path.relative_to(ROOT)), text))
    unlisted = [
        (name, text[:60])
        for name, text in found
        if not any(name == file and text.startswith(start) for file, start in ACCEPTED_DOCSTRINGS)
    ]
    assert not unlisted, unlisted
    assert len(found) <= 10 and len(found) >= len(ACCEPTED_DOCSTRINGS)
