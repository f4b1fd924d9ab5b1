"""Plain English: phrases that a reader has to decode are counted, and the ones that are left have a reason."""

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.commands import ROOT

PHRASES = {
    r"(?<!there )(?<!or )\b(?:is|are|was|were|be) no (?!longer|more|one\b|better)\w+": "is not a",
    r"(?-i:(?<!there )\b(?:is|are|was|were|holds?) none\b)": "there is no",
    r"\b(?:stand|stands|stood|lie|lies|lay) (?:in|at|on|beside|there|next|before|behind|under|between)\b": "is in",
    r"\b(?:go|goes|going|gone|went) on\b": "resumes, continues",
    r"\b(?:tells|told|says|said|speaks|spoken)\b|\bwithout a word\b": "reports, prints, logs",
    r"\b(?:mend|mends|mended|mending)\b|\bspoil\w*": "fix; corrupt",
    r"\b(?:is|are|was|were|be|stay|stays|stayed|not|still) whole\b|\bwhole or\b|\bsounds?\b": "complete; valid",
    r"\brests\b|\bkeys(?: of \S+)? rest\b|\bresting\b|\bsits? out\b|\bt(?:ake|akes|aking|ook) part\b": "are ignored",
    r"\bbehind\b": "after",
    r"\b(?:come|comes|coming|came) to\b|\bas many as\b|\b(?:that|those) of\b": "equals; name it again",
    r"\b(?:take|takes|taking|taken|took) over\b": "imports",
    r"\b(?:leave|leaves|leaving|left) (?:\w+ )?out\b": "skips",
    r"\bask(?:s|ed|ing)? for\b|\b(?:is|are|was|were) asked\b": "requests; is called",
    r"\b(?:give|gives|giving|given|gave) (?:it |them )?back\b|\bgives\b(?! up)": "returns, yields",
    r"\bby (?:itself|themselves|himself)\b|\bo[fn] (?:its|their) own(?! \w+s?\b)": "automatically, separately",
    r"\b(?:a|the|what|this|which|same|equal) share of\b": "a fraction of",
    r"\bwhat (?:a run|it|one|they|this) (?:takes?|costs?)\b": "resource estimate, cost",
    r"\bso that\b|\bsuch an? \b|\bthose (?:that|which|who)\b": "and; this; the ones that",
    r"\bhangs? since\b": "has been hanging for",
    r"\bsigns? of life\b": "heartbeat",
    r"\bthe other ranks\b|\bthe others\b": "peers",
}
"""Phrase to avoid (a regular expression) -> what to write instead."""

ACCEPTED = {
    ("pretrain/cluster/checks_nodes.py", "behind"): "A clock is behind another clock.",
    ("tests/cluster/test_doctor.py", "s behind"): "It quotes the message on clocks.",
    ("tests/data_prep/selection/test_selection.py", "he said"): "It is the text of a record.",
    ("tests/pretrain/training/test_bf16.py", "stands in for"): "The idiom means to replace.",
    ("tests/pretrain/training/test_sixty_steps.py", "says {number"): "It is the text of a record.",
}
"""(file, phrase with its surroundings) -> why it stays. At most 40."""

ACCEPTED_DOCSTRINGS: dict[tuple[str, str], str] = {}
"""(file, beginning of a docstring) -> why it may begin with that word. At most 10."""

PROSE = (".md", ".toml", ".yaml", ".sh", ".jinja", ".sbatch")


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    records = re.compile(r"docs/studies/\w+/")  # what studies wrote when they ran
    return [ROOT / name for name in listed if not records.match(name) and (ROOT / name) != Path(__file__)]


def texts(path: Path) -> Iterator[str]:
    """Yield the comments and strings of a Python file, or the whole text of another file, with single spaces."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield re.sub(r"\s+", " ", source)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            yield re.sub(r"\s+", " ", token.string)


def is_prose(path: Path) -> bool:
    return path.suffix in (".py", *PROSE) or path.name in ("Dockerfile", "Makefile")


def test_phrases_that_have_to_be_decoded_are_gone():
    found: Counter[tuple[str, str]] = Counter()
    unlisted = []
    for path in filter(is_prose, tracked_files()):
        name = str(path.relative_to(ROOT))
        for text in texts(path):
            for phrase, better in PHRASES.items():
                for match in re.finditer(phrase, text, re.IGNORECASE):
                    around = text[max(0, match.start() - 40) : match.end() + 40]
                    entry = next((entry for entry in ACCEPTED if entry[0] == name and entry[1] in around), None)
                    found[entry or (name, around)] += 1
                    if entry is None:
                        unlisted.append(f"{name}: {around!r}: write {better!r}")
    assert not unlisted, "\n".join(unlisted)
    assert not ACCEPTED.keys() - found.keys(), "accepted, but gone: remove the entries"
    assert found.total() <= 40 and all(ACCEPTED.values())


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
