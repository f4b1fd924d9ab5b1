"""Run directories as arms: their differences and their names."""

import itertools
import re

import pytest
import yaml

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json, write_json
from pretrain.report.arms import read_comparison
from pretrain.report.page import markdown
from pretrain.report.summary import summarize
from pretrain.report.tables import columns
from tests.pretrain.report.tiny_study import copy_run


def test_run_directories_are_grouped_into_arms_by_their_differences(study, tmp_path):
    for arm in ("next_token", "llm_jepa"):
        for seed in (1, 2, 3):
            copy_run(study / "runs" / f"{arm}-seed1", tmp_path / f"{arm}{seed}", seed, 0.5 + 0.01 * seed)
    paths = sorted(tmp_path.iterdir())
    comparison = read_comparison(paths, None, None)
    assert {name: sorted(arm.runs) for name, arm in comparison.arms.items()} == {
        "next_token": [1, 2, 3],
        "llm_jepa": [1, 2, 3],
    }
    assert comparison.baseline == "next_token" and "not chosen in advance" in comparison.metric_origin
    assert "not chosen in advance" in markdown(summarize(comparison))
    validation = read_comparison(paths, None, "validation/loss/lm")
    assert not validation.metric.higher_is_better and len(summarize(validation).arms["llm_jepa"].values) == 3
    headings = columns(summarize(validation))
    assert headings.count("validation/loss/lm") == 1 and len(set(headings)) == len(headings)
    other = read_comparison(paths, "llm_jepa", None)
    assert list(other.arms) == ["llm_jepa", "next_token"]
    config = tmp_path / "llm_jepa3" / "config.yaml"
    config.write_text(config.read_text().replace("weight: 0.5", "weight: 0.25"))
    assert set(read_comparison(paths, None, None).arms) == {"next_token", "llm_jepa weight=0.5", "llm_jepa weight=0.25"}


def test_runs_of_different_corpora_have_no_baseline(study, tmp_path):
    for number in (1, 2):
        folder = tmp_path / f"run{number}"
        copy_run(study / "runs" / "llm_jepa-seed1", folder, 1, 0.5)
        values = yaml.safe_load((folder / "config.yaml").read_text())
        values["data"]["path"] = f"corpus{number}"
        values["objective"]["weight"] = number
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="the baseline is not clear"):
        read_comparison(paths, None, None)
    environment = read_json(folder / "environment.json")
    environment["data"]["corpus"] = "another"
    write_json(folder / "environment.json", environment)
    with pytest.raises(UserError, match=r"different corpora \(corpus1, corpus2\), so none is the baseline"):
        read_comparison(paths, None, None)


def test_seeds_that_differ_only_in_the_path_of_the_corpus_are_one_arm(study, tmp_path):
    for number, (arm, seed) in enumerate(itertools.product(("next_token", "llm_jepa"), (1, 2))):
        folder = tmp_path / f"run{number}"
        copy_run(study / "runs" / f"{arm}-seed1", folder, seed, 0.5)
        values = yaml.safe_load((folder / "config.yaml").read_text())
        values["data"] |= {"path": f"disk{number}/corpus", "workers": number + 1}
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
    paths = sorted(tmp_path.iterdir())
    comparison = read_comparison(paths, None, None)
    assert {name: sorted(arm.runs) for name, arm in comparison.arms.items()} == {
        "next_token": [1, 2],
        "llm_jepa": [1, 2],
    }
    assert "Besides the objective, arms differ in" not in markdown(summarize(comparison))
    values["data"]["lm_views"] = "last"
    (paths[-1] / "config.yaml").write_text(yaml.safe_dump(values))
    assert set(read_comparison(paths, None, None).arms) == {
        "next_token",
        "llm_jepa data.lm_views=all",
        "llm_jepa data.lm_views=last",
    }


def test_names_of_arms_are_unique_and_short(study, tmp_path):
    for number, folder in enumerate(("one", "two", "three")):
        copy_run(study / "runs" / "llm_jepa-seed1", tmp_path / folder, 1, 0.5)
        config = tmp_path / folder / "config.yaml"
        config.write_text(re.sub(r"path: .*corpus", f"path: {'long/' * 20}{number}", config.read_text()))
        environment = read_json(tmp_path / folder / "environment.json")
        environment["data"]["tokenizer"]["sha256"] = str(number)
        write_json(tmp_path / folder / "environment.json", environment)
    baseline = "llm_jepa data.path=long/long/long/long/long/long/…"
    names = list(read_comparison(sorted(tmp_path.iterdir()), baseline, None).arms)
    assert len(set(names)) == 3 and max(map(len, names)) < 60
