"""Decontamination has the same results as a reference that uses sets of substrings."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.selection.contamination import OVERLAP_LETTERS, Contamination, normalized_letters

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
WORDS = [
    "list",
    "the",
    "names",
    "of",
    "all",
    "dogs",
    "that",
    "bark",
    "at",
    "cats",
    "in",
    "Größe",
    "or",
    "NUMBER",
    "7",
    "x",
]


def find_by_substrings(contexts: list[str], batch: list[tuple[str, ...]]) -> list[bool]:
    """Apply the two rules of contamination with sets of substrings.

    This is valid for alphabetic scripts, whose letters count as one each, and for contexts without common phrases.
    """
    tests = {normalized_letters(context) for context in contexts} - {""}
    substrings = {
        test[start : start + OVERLAP_LETTERS] for test in tests for start in range(len(test) - OVERLAP_LETTERS + 1)
    }

    def contaminated(views: tuple[str, ...]) -> bool:
        present = [normalized_letters(view) for view in views if view]
        return any(view in tests for view in present[:-1] or present) or any(
            view[start : start + OVERLAP_LETTERS] in substrings
            for view in present
            for start in range(len(view) - OVERLAP_LETTERS + 1)
        )

    return [contaminated(views) for views in batch]


def assert_matches_reference(contexts: list[str], batch: list[tuple[str, ...]]) -> list[str]:
    found = Contamination(contexts).find(batch)
    assert [bool(line) for line in found] == find_by_substrings(contexts, batch)
    assert not any("\n" in line for line in found)
    return found


@settings(deadline=None, max_examples=100)
@example(seed=1, contexts=0, records=3)
@given(seed=st.integers(0, 2**32), contexts=st.integers(0, 8), records=st.integers(0, 30))
def test_random_records_match_the_reference(seed, contexts, records):
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return rng.choice([" ", ", ", "\n", "\u2019 "]).join(rng.choices(WORDS, k=rng.randint(0, longest)))

    tests = [text(rng.choice([2, 40])) for _ in range(contexts)]

    def view() -> str:
        # About half of the views contain a part of a test context that is about as long as the threshold.
        if tests and rng.random() < 0.5:
            test = rng.choice(tests).swapcase()
            start = rng.randrange(len(test) + 1)
            return (
                rng.choice(["", text(6)])
                + test[start : start + rng.choice([80, 90, 100, 110, 400])]
                + rng.choice(["", text(6)])
            )
        return rng.choice(["", text(3), text(60), rng.choice([*tests, ""]).upper()])

    assert_matches_reference(tests, [tuple(view() for _ in range(rng.randint(1, 4))) for _ in range(records)])


@pytest.mark.parametrize("around", range(9))
def test_an_overlap_is_found_anywhere_and_one_letter_less_is_not(around):
    context = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=400))
    for length, expected in ((OVERLAP_LETTERS, True), (OVERLAP_LETTERS - 1, False)):
        for start in (0, 1, 200, 400 - length):
            inside = context[start : start + length]
            assert bool(Contamination([context]).find([("q", "Z" * around + inside + "Z" * 99)])[0]) == expected
            assert bool(Contamination([context]).find([("q" * around, inside)])[0]) == expected
            assert bool(Contamination([inside]).find([("y" * around + context, "")])[0]) == expected


def test_an_overlap_does_not_span_views_or_records():
    context = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=80))
    assert (
        assert_matches_reference([context], [(context[:40], context[40:]), (context[:30],), (context[30:],)])
        == [""] * 3
    )
    assert Contamination([context[:60], context[60:]]).find([("q", context)]) == [""]


def test_the_target_may_equal_a_test_context_and_a_document_may_not():
    found = Contamination(["What is 2 + 3?"]).find(
        [
            ("five is", "what is 23"),
            ("what is 23", "five"),
            ("what is 23", ""),
            ("", "What is 23"),
            ("a", "WHAT IS 2-3", "b"),
            ("", "a", "what is 23"),
            ("what is 24",),
            (),
        ]
    )
    assert found == ["", *["equals the test context 'What is 2 + 3?'"] * 4, "", "", ""]


def test_the_reason_names_the_context_and_the_shared_text():
    context = (
        "Natalia sold clips to 48 of her friends in April,\n"
        "and then she sold half as many clips in May. How many clips did she sell?"
    )
    (line,) = Contamination(["another one", context]).find([("Homework", f"Q: {context[10:].upper()} A: 72")])
    assert line == (
        "shares 'ld clips to 48 of her friends in April, and then she sold half as many clips in May. How man' "
        "with the test context "
        "'Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How …'"
    )


@pytest.mark.parametrize(
    "text",
    [
        "пример вопроса о том, сколько яблок осталось у Маши после того, как она отдала половину своих яблок Пете",
        "小明有十二个苹果，他把其中的一半给了小红，然后又买了五个苹果，请问小明现在一共有多少个苹果？",
        "राम के पास बारह सेब हैं और वह उनमें से आधे सीता को दे देता है तो अब उसके पास कितने सेब बचे हैं यह बताइए और समझाइए",
    ],
)
def test_other_scripts_are_compared_too(text):
    other = text[: len(text) // 4] + text[len(text) // 2 :]
    found = Contamination([text, "q"]).find(
        [
            (f"See: {text} (source)", "x"),
            (text.replace(" ", "\u3000"), "x"),
            (other, "x"),
            (text[:16], "y"),
            ("x", text[:-1]),
        ]
    )
    for number, line in enumerate(found[:3]):  # the result is the same in a batch of mostly English text
        batch = [
            ("many words of English " * 50, "x"),
            [(f"See: {text} (source)", "x"), (text, "x"), (other, "x")][number],
        ]
        assert Contamination([text, "q"]).find(batch) == ["", line]
    assert [line[:6] for line in found] == ["shares", "equals", "", "", "shares"]
    assert text[5:9] in found[0]


def test_case_accents_and_punctuation_are_ignored():
    assert normalized_letters("Größe, ＦＵＬＬ \u2019n\u2019 café ½") == "grossefullncafe12"
    assert normalized_letters("कि") != normalized_letters("की") and normalized_letters("!?…\U0001f600") == ""
    for composed in ("Où est l'élève?", "Ångström"):
        assert Contamination([composed]).find([(unicodedata.normalize("NFD", composed).upper(), "x")])[0]
    assert Contamination(["пара"]).find([("паpа", "x"), ("ПАРА", "x")])[1]
    assert Contamination(["!?", "", "…"]).find([("??", "x"), ("", "x"), ("", ""), ("a", "b")]) == [""] * 4
    assert Contamination(["ab c"]).find([("a\0bc", "x"), ("\0", "x"), ("a\0", "bc")]) == [
        "equals the test context 'ab c'",
        "",
        "",
    ]
    assert Contamination(["a\ud800b"]).find([("a b", "x"), ("\ud800", "x")]) == [
        "equals the test context 'a\\ud800b'",
        "",
    ]
    assert Contamination([]).find([("a",)]) == [""]


def test_a_common_instruction_is_not_contamination():
    instruction = (
        "Below is a description. Write the regular expression that matches just the lines that are described, "
        "and nothing else: "
    )
    rng = random.Random(0)
    tests = [instruction + " ".join(rng.choices(WORDS, k=8)) for _ in range(300)]
    question = (
        "how many boxes of seventeen pencils does a school with four hundred and eleven pupils need "
        "if each of them is to have two"
    )
    index = Contamination([*tests, instruction + question])
    found = index.find(
        [
            (instruction + "lines with a dog", "dog"),
            (tests[5], "x"),
            ("Note: " + question, "y"),
            (instruction + question[:60], "z"),
        ]
    )
    assert [line[:6] for line in found] == ["", "equals", "shares", ""]


@pytest.mark.parametrize(
    "name, records, contaminated", [("nl-rx-synth", 8000, 40), ("spider", 6587, 22), ("gsm8k", 7473, 3)]
)
def test_verbatim_leaks_in_public_splits_are_found_and_templates_are_not(name, records, contaminated):
    if not (DATA / name).exists():
        pytest.skip("the public sets are not in ../shared/data")
    train, test = (
        [
            tuple(message["content"] for message in json.loads(line)["messages"][1:])
            for line in (DATA / name / f"{split}.jsonl").open()
        ]
        for split in ("train", "test")
    )
    found = assert_matches_reference([context for context, _ in test], train)
    assert (len(train), sum(map(bool, found))) == (records, contaminated)
