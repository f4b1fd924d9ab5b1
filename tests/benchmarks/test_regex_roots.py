"""The labels of benchmarks/regex_roots.py are the outermost rules of the derivations."""

import json
import sys

from benchmarks.regex_roots import root
from data_prep.nlrx_grammar import RULES, generate
from tests.commands import run_command
from tests.data_prep.test_nlrx_grammar import derivations


def test_the_root_is_the_rule_that_derives_the_expression(tmp_path):
    pairs = [generate(5, "test", index) for index in range(600)]
    found = {code: root(code) for _, code in pairs}
    assert len(set(found.values())) > 10 and set(found.values()) <= set(RULES)
    for text, code in pairs:
        assert found[code] in {tree.rule for tree in derivations(text, code)}, code

    source, output = tmp_path / "pairs.jsonl", tmp_path / "labels" / "roots.jsonl"
    source.write_text("".join(json.dumps({"text": text, "code": code}) + "\n" for text, code in pairs))
    run_command([sys.executable, "benchmarks/regex_roots.py", str(source), str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows == [{"text": text, "code": code, "root": found[code]} for text, code in pairs]
