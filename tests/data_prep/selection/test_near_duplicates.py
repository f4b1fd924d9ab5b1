"""Near-duplicates, compared with the Jaccard similarity and the sketches of all pairs."""

import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.selection import near_duplicates
from data_prep.selection.duplicates import dropped
from data_prep.selection.near_duplicates import (
    DEFAULT_THRESHOLD,
    NUM_HASHES,
    RECALL,
    band_shape,
    resolve_near,
    sketch,
    write_sketches,
)

REPO_ROOT = Path(__file__).resolve().parents[3]
DATA = REPO_ROOT.parent / "shared" / "data"
Record = tuple[str, ...]


def find_near_duplicates(
    folder: Path,
    units: list[list[Record]],
    ranks: list[list[int]] | None = None,
    parts: int = 1,
    threshold: float = 0.8,
) -> list[list[int]]:
    """Return the indices of the dropped records of each unit.

    Ordinals are written as 2 * index + 1, so they differ from the indices.
    """
    signatures, bands = (
        [folder / f"{kind}-{unit}.npy" for unit in range(len(units))] for kind in ("signatures", "bands")
    )
    for unit, records in enumerate(units):
        write_sketches(
            signatures[unit],
            bands[unit],
            *sketch(records, threshold),
            np.arange(len(records)) * 2 + 1,
            np.array(ranks[unit] if ranks else [2] * len(records), int),
        )
    outs = [folder / f"out-{part}.npy" for part in range(parts)]
    for part in reversed(range(parts)):
        resolve_near(signatures, bands, part, parts, outs[part], threshold)
    return [((dropped(outs, unit) - 1) // 2).tolist() for unit in range(len(units))]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    padded = ["", "", "", "", *words, "", "", "", ""]
    return {tuple(padded[start : start + 5]) for start in range(len(padded) - 4)} if words else set()


def similarity(one: list[set], other: list[set]) -> float:
    return min(len(a & b) / len(a | b) if a | b else 1.0 for a, b in zip(one, other, strict=True))


def check_against_all_pairs(found: list[int], records: list[Record]) -> int:
    """Check that records well above the threshold are found, and records well below it are not.

    Return the number of records above the threshold.
    """
    sets = [[shingles(view) for view in record] for record in records]
    holders: dict[tuple[str, ...], list[int]] = {}
    found = set(found)
    above = missed = 0
    for index, shingle_sets in enumerate(sets):
        # Only these earlier records are compared, because all other records have a similarity near 0. Shingles that
        # are mostly padding are skipped, because unrelated texts share them.
        candidates = {earlier for shingle in shingle_sets[0] if shingle[3] for earlier in holders.get(shingle, [])}
        closest = max((similarity(shingle_sets, sets[earlier]) for earlier in candidates), default=0.0)
        for shingle in shingle_sets[0]:
            holders.setdefault(shingle, []).append(index)
        if index in found:
            assert closest >= 0.68, (records[index], closest)
        if closest >= 0.8:
            above += 1
            missed += index not in found
        if closest >= 0.92:
            assert index in found, (records[index], closest)
    assert missed <= 0.1 * above + 1
    return above


def edit(text: str, rng: random.Random) -> str:
    words = text.split()
    for _ in range(rng.randint(0, 3)):
        words[rng.randrange(len(words))] = rng.choice(["other", "words", "HERE,"])
    return "  ".join(words).upper() if rng.random() < 0.2 else " ".join(words)


def synthetic_records(count: int, seed: int) -> list[Record]:
    """Return records of 10 to 150 words per view, from a small vocabulary.

    Half of them are edited copies of earlier ones, and some copies have an edited target too.
    """
    rng = random.Random(seed)
    records = []
    for _ in range(count):
        if records and rng.random() < 0.5:
            context, target = rng.choice(records)
            records.append((edit(context, rng), rng.choice([target, target, edit(target, rng)])))
        else:
            records.append(
                tuple(" ".join(f"w{rng.randrange(300)}" for _ in range(rng.randint(10, 150))) for _ in range(2))
            )
    return records


def test_edited_copies_are_found_according_to_jaccard_similarity(tmp_path):
    records = synthetic_records(600, 0)
    (found,) = find_near_duplicates(tmp_path, [records])
    assert check_against_all_pairs(found, records) > 100


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32), parts=st.sampled_from([1, 2, 5]), threshold=st.sampled_from([0.5, 0.8, 0.9]))
def test_a_record_is_dropped_if_an_earlier_one_shares_a_band_and_is_near(seed, parts, threshold):
    rng = random.Random(seed)
    records = synthetic_records(60, seed)
    ranks = [rng.randrange(3) for _ in records]
    cuts = sorted(rng.choices(range(61), k=3))
    bounds = list(zip([0, *cuts], [*cuts, 60], strict=True))
    signatures, bands = sketch(records, threshold)
    order = sorted(range(60), key=lambda index: (ranks[index], index))

    def near(earlier: int, later: int) -> bool:
        shares_band = (bands[earlier] == bands[later]).all(axis=1).any()
        equal_hashes = (signatures[earlier] == signatures[later]).sum(axis=-1)
        return shares_band and (equal_hashes >= threshold * NUM_HASHES).all()

    expected = [any(near(earlier, later) for earlier in order[: order.index(later)]) for later in range(60)]
    with tempfile.TemporaryDirectory() as folder:
        found = find_near_duplicates(
            Path(folder), [records[a:b] for a, b in bounds], [ranks[a:b] for a, b in bounds], parts, threshold
        )
    dropped_indices = [index + a for (a, _), indices in zip(bounds, found, strict=True) for index in indices]
    assert dropped_indices == np.flatnonzero(expected).tolist()


LONG = " ".join(f"word{number}" for number in range(100))


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ((LONG, "a"), (LONG, "a"), True),
        ((LONG, "a"), (LONG.replace("word50", "other"), "a"), True),
        ((LONG, "a"), (LONG.upper().replace(" ", "\n"), "A"), True),
        ((LONG, "a"), (LONG, "b"), False),  # a different target, such as another label
        ((LONG, "a"), (LONG, ""), False),
        ((LONG, ""), ("", LONG), False),
        (("", LONG), ("", LONG), True),
        (("lines with a dog", "dog"), ("lines with a cat", "dog"), False),
        ((LONG, "~(.*)"), (LONG, "(.*)"), False),
        ((LONG, LONG.replace("word50", "other")), (LONG.replace("word50", "other"), LONG), True),
        # These texts have the same ten repeated shingles, and different shingles at the beginning.
        (("猫" + "一二三四五六七八九十" * 9, "x"), ("犬" + "一二三四五六七八九十" * 9, "x"), False),
        (("".join(map(chr, range(0x4E00, 0x4E64))), "x"), ("".join(map(chr, range(0x4E01, 0x4E64))), "x"), True),
    ],
)
def test_records_are_near_duplicates_if_every_view_is(tmp_path, first, second, expected):
    assert find_near_duplicates(tmp_path, [[first], [second]]) == [[], [0] if expected else []]
    assert find_near_duplicates(tmp_path, [[first], [second]], [[2], [0]]) == [[0] if expected else [], []]


def test_a_chain_of_edits_keeps_only_its_first_record(tmp_path):
    chain = [(LONG.replace("word", "other", step),) for step in range(0, 100, 2)]
    (found,) = find_near_duplicates(tmp_path, [chain])
    assert found == list(range(1, 50))
    (found,) = find_near_duplicates(tmp_path, [[chain[0], chain[-1]]])
    assert found == []


def test_large_groups_are_cut_and_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(near_duplicates, "LARGEST_GROUP", 10)
    records = [(LONG,)] * 25 + [("another " + LONG,), ("quite another text",)]
    assert find_near_duplicates(tmp_path, [records[:7], records[7:]]) == [
        [1, 2, 3, 4, 5, 6],
        [n for n in range(19) if n not in (3, 13)],
    ]


def test_a_group_whose_size_is_a_multiple_of_the_largest_is_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(near_duplicates, "LARGEST_GROUP", 10)
    assert find_near_duplicates(tmp_path, [[(LONG,)] * 20], threshold=1.0) == [[n for n in range(20) if n % 10]]


def test_records_without_words_are_near_duplicates_of_each_other(tmp_path):
    assert find_near_duplicates(tmp_path, [[(" ", "")], [("\n", "\t")], [(LONG, "")]]) == [[], [0], []]


def test_no_records_and_no_units(tmp_path):
    assert find_near_duplicates(tmp_path, [[], [(LONG,)], []], parts=2) == [[], [], []]
    resolve_near([], [], 0, 1, tmp_path / "out.npy")
    assert dropped([tmp_path / "out.npy"], 0).tolist() == []


def used_shape(threshold: float, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Return the number of bands in a sketch and of hashes in each, measured by changing one hash at a time."""
    # Row 0 has the hashes 0, and row 1 + n differs from it in hash n.
    hashes = np.concatenate([np.zeros((1, NUM_HASHES)), np.eye(NUM_HASHES)]).astype(np.uint32)
    monkeypatch.setattr(near_duplicates, "_minhash", lambda shingles, ends: hashes)
    _, bands = sketch([("text",)] * len(hashes), threshold)
    hashes_per_band = (bands[1:] != bands[0]).any(axis=2).sum(axis=0)
    (length,) = set(hashes_per_band.tolist())
    return bands.shape[1], length


def test_the_bands_of_a_sketch_find_pairs_at_every_threshold(monkeypatch):
    for threshold in np.arange(31, 1001) / 1000:
        bands, length = used_shape(threshold, monkeypatch)
        assert 1 - (1 - threshold**length) ** bands >= RECALL, threshold
        assert (bands, length) == band_shape(threshold)


def test_the_bands_at_the_default_threshold_stay_the_same(monkeypatch):
    assert used_shape(DEFAULT_THRESHOLD, monkeypatch) == (18, 7)


def test_a_missing_library_is_a_user_error_with_the_install_command():
    program = (
        "import sys; sys.modules['rensa'] = None\n"
        "from data_prep.selection import near_duplicates\n"
        "near_duplicates.sketch([('a',)])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPO_ROOT)
    assert done.stderr.splitlines()[-1].startswith(
        "data_prep.utils.console.UserError: removing near-duplicates requires the package rensa"
    )
    assert "pip install '.[near-duplicates]'" in done.stderr


def test_real_glosses_and_news_pairs(tmp_path):
    if not (DATA / "wordnet").exists() or not (DATA / "paraphrase").exists():
        pytest.skip("the public sets are not in ../shared/data")
    with (
        (DATA / "wordnet" / "synsets.jsonl").open() as glosses,
        (DATA / "paraphrase" / "mrpc_train.jsonl").open() as pairs,
    ):
        records = [(row["text_a"],) for row in map(json.loads, pairs)][:800] + [
            (json.loads(next(glosses))["gloss"],) for _ in range(1000)
        ]
    rng = random.Random(0)
    records += [(edit(text, rng),) for (text,) in rng.sample(records, 250)]
    (found,) = find_near_duplicates(tmp_path, [records])
    assert check_against_all_pairs(found, records) > 50


@pytest.mark.parametrize("name", ["nl-rx-synth", "spider"])
def test_almost_only_exact_copies_among_templated_records_are_dropped(tmp_path, name):
    if not (DATA / name).exists():
        pytest.skip("the public sets are not in ../shared/data")
    with (DATA / name / "test.jsonl").open() as lines:
        records = [
            tuple(" ".join(message["content"].lower().split()) for message in json.loads(line)["messages"][1:])
            for line in lines
        ]
    seen = set()
    copies = []
    for index, record in enumerate(records):
        if record in seen:
            copies.append(index)
        seen.add(record)
    (found,) = find_near_duplicates(tmp_path, [records])
    assert set(copies) <= set(found) and len(found) <= len(copies) + len(records) // 500
