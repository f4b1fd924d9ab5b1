"""Reports of real runs: their content, and the page, which is self-contained."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json, write_json
from pretrain.report.arms import read_comparison
from pretrain.report.cost import flops_per_token
from pretrain.report.embeddings import picture
from pretrain.report.runs import read_run
from pretrain.run_folder import read_metrics
from tests.commands import run_command
from tests.pretrain.report.report_helpers import assert_self_contained, parse_table, render_report
from tests.pretrain.report.tiny_study import ROWS, SEEDS, change_lines, copy_run


@pytest.fixture(scope="module")
def reported(study, tmp_path_factory) -> tuple[str, Path]:
    """Return the output of the command on the study, and the folder that it writes."""
    folder = tmp_path_factory.mktemp("output")
    return run_command([sys.executable, "launcher/report.py", str(study), "--output", str(folder)]).stdout, folder


def test_the_command_writes_a_table_and_a_page(study, reported):
    printed, folder = reported
    assert (folder / "REPORT.md").read_text() == printed.removesuffix("\n")
    rows = parse_table(printed)
    assert list(rows) == ["next_token", "llm_jepa"] and rows["next_token"]["verdict"] == "baseline"
    for arm, row in rows.items():
        lines = [read_metrics(study / "runs" / f"{arm}-seed{seed}")[-1] for seed in SEEDS]
        assert row["seeds"] == "2 of 2"
        assert row["tokens"] == f"{np.mean([line['tokens'] for line in lines]):,.0f}"
        assert row["seconds"] == f"{np.mean([line['seconds'] for line in lines]):,.0f}"
        assert row["validation/loss/lm"].startswith(f"{np.mean([line['validation/loss/lm'] for line in lines]):.4f} ± ")
    assert float(rows["llm_jepa"]["FLOPs a token"].removeprefix("× ")) > 1.1  # it also computes copies of the targets
    assert "Metric: chosen in study.json" in printed
    scores = parse_table(printed.partition("## All scores")[2])
    for name in ("exact", "equal", "prefix", "contains", "stopped", "exact_unseen"):
        for arm in rows:
            values = [
                json.loads((study / "runs" / f"{arm}-seed{seed}" / "evaluation" / "results.jsonl").read_text())[
                    "metrics"
                ][name]
                for seed in SEEDS
            ]
            assert scores[f"nl\\_rx/{name}" if f"nl\\_rx/{name}" in scores else f"nl_rx/{name}"][arm].startswith(
                f"{np.mean(values):.4f}"
            )


def test_a_report_is_written_into_the_run_or_next_to_several_runs(study, tmp_path):
    for seed in SEEDS:
        copy_run(study / "runs" / f"next_token-seed{seed}", tmp_path / f"seed{seed}", seed, 0.5)
    runs = [str(tmp_path / f"seed{seed}") for seed in SEEDS]
    for paths, folder in ((runs[:1], tmp_path / "seed1"), (runs, tmp_path)):
        done = run_command([sys.executable, "launcher/report.py", *paths])
        last = done.stderr.splitlines()[-1]
        assert last == f"report written to {folder / 'report.html'} and {folder / 'REPORT.md'}"
        assert (folder / "report.html").exists() and (folder / "REPORT.md").exists()


def test_the_page_is_self_contained_and_complete(reported):
    text = (reported[1] / "report.html").read_text()
    page = assert_self_contained(text)
    words = " ".join(page.text)
    for expected in (
        "nl_rx/exact",
        "loss/jepa",
        "training FLOPs",
        "training seconds",
        "retrieval@1",
        "effective rank",
        "Blue circles: prediction",
        "no arm writes the target",
        "How each number was computed",
        "finished",
    ):
        assert expected in words, expected
    assert "No picture of" not in words and "FLOPs are not counted" not in words
    assert sum(tag == "svg" for tag, _ in page.found) >= 8


def test_a_term_that_no_code_knows_is_in_the_table_and_in_a_chart(study_with_values):
    study = study_with_values({"plain": {1: 0.7, 2: 0.7}, "new": {1: 0.7, 2: 0.7}})
    for seed in SEEDS:
        values = {"loss/new_term": 0.5, "validation/loss/new_term": seed}
        change_lines(study / f"arm1-{seed}" / "metrics.jsonl", lambda line, values=values: line.update(values))
    text, page = render_report(study, metric="validation/loss/new_term")
    losses = parse_table(text.partition("## Validation losses")[2])
    names = [name.replace("\\_", "_") for name in losses]
    assert names == [f"validation/loss/{term}" for term in ("lm", "jepa", "new_term")]
    assert list(losses.values())[2]["new"] == "1.5000 ± 0.7071" and list(losses.values())[2]["plain"] == "–"
    assert re.findall(r"<h3>(loss/\w+)</h3>", page) == ["loss/lm", "loss/jepa", "loss/new_term"]
    assert not read_comparison([study], None, "validation/loss/new_term").metric.higher_is_better


def test_a_verdict_states_its_numbers(study_with_values):
    study = study_with_values({"plain": {1: 0.70, 2: 0.69, 3: 0.71}, "better": {1: 0.80, 2: 0.80, 3: 0.81}})
    text, page = render_report(study)
    assert (
        "better helps: nl\\_rx/exact" in text.replace("_", "\\_")
        and "0.8033 against 0.7000 for plain (+0.1033 over 3 seeds, 95% interval" in text
    )
    assert parse_table(text)["better"]["verdict"] == "helps" and "few" in text
    assert '<p class="verdict">better helps:' in page and "no checkpoint is exported" in page


def test_lower_is_better_if_the_study_declares_it(study_with_values):
    study = study_with_values({"plain": {1: 0.7, 2: 0.71, 3: 0.73}, "less": {1: 0.5, 2: 0.51, 3: 0.52}})
    change_lines(study / "study.json", lambda values: values["metric"].update(higher_is_better=False))
    assert parse_table(render_report(study, page=False)[0])["less"]["verdict"] == "helps"


def test_measured_speeds_and_processor_seconds_are_reported(study_with_values):
    study = study_with_values({"plain": {1: 0.7, 2: 0.71}, "wide": {1: 0.7, 2: 0.71}, "same": {1: 0.7, 2: 0.71}})
    # The arms have processor times in the ratios 2 and 4 by seed, and the same wall-clock time.
    for number in range(3):
        for seed in (1, 2):
            factor = 2 * seed if number == 1 else 1

            def change(line, factor=factor):
                line.update(seconds=line["step"], tokens=line["step"] * 100, processor_seconds=factor * line["step"])

            change_lines(study / f"arm{number}-{seed}" / "metrics.jsonl", change)
    ratios = {"wide": (0.3, 0.25, 0.5), "same": (1.02, 0.97, 1.04)}
    calibration = {
        name: {
            "baseline": "plain",
            "unit": "processor seconds",
            "speed_ratio": dict(zip(("median", "low", "high"), values, strict=True)),
        }
        for name, values in ratios.items()
    }
    change_lines(study / "study.json", lambda values: values.update(calibration=calibration, matched_by="seconds"))
    text, page = render_report(study)
    for sentence in (
        "measured in processor seconds before the runs. Median and range over the rounds, relative to plain: "
        "wide 0.30 (0.25 to 0.50) and same 1.02 (0.97 to 1.04; counts as equally fast).",
        "1.00 times the seconds (1.00 to 1.00 by seed) and 3.00 times the processor seconds (2.00 to 4.00 by seed)",
        "The study is matched by processor seconds, but the arms differ in processor seconds",
    ):
        assert sentence in text and sentence in page
    assert "before the runs" not in render_report(study, page=False, baseline="same")[0]

    def forget(line):
        if line["step"] == 1:
            line.pop("processor_seconds")

    change_lines(study / "arm1-1" / "metrics.jsonl", forget)
    text, _ = render_report(study, page=False)
    assert "4.00 times the processor seconds of plain" in text and "differ in seconds" not in text


def test_a_collapsing_arm_does_not_help(study_with_values):
    study = study_with_values({"plain": {1: 0.7, 2: 0.71, 3: 0.73}, "collapsed": {1: 0.7, 2: 0.71, 3: 0.73}})
    tag = "validation/embedding/shuffled_cosine"
    for number, cosines in enumerate([(0.01, 0.02, 0.03), (0.98, 0.99, 0.985)]):
        for seed, cosine in enumerate(cosines, 1):
            change_lines(
                study / f"arm{number}-{seed}" / "metrics.jsonl", lambda line, cosine=cosine: line.update({tag: cosine})
            )
    text, _ = render_report(study, page=False, metric=tag)
    assert parse_table(text)["collapsed"]["verdict"] == "hurts"


def test_collapse_is_judged_for_every_objective_with_pairs(study_with_values):
    study = study_with_values({"plain": {1: 0.7}, "pairs": {1: 0.7}, "new": {1: 0.7}})
    collapsed = {"paired_cosine": 0.999, "shuffled_cosine": 0.99, "retrieval_at_1": 0.01, "effective_rank": 1.2}
    for folder in study.glob("arm*"):
        change_lines(
            folder / "metrics.jsonl",
            lambda line: line.update({f"validation/embedding/{name}": value for name, value in collapsed.items()}),
        )
    config = study / "arm2-1" / "config.yaml"
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(values | {"objective": values["objective"] | {"name": "next_jepa"}}))
    text, _ = render_report(study, page=False)
    assert "The embeddings of pairs (seed 1) and new (seed 1) have collapsed" in text
    values["objective"] = {"name": "semantic_tube", "weight": 0.1}
    config.write_text(yaml.safe_dump(values))
    text, _ = render_report(study, page=False)
    assert "The embeddings of pairs (seed 1) have collapsed" in text, "a tube objective has no pairs"


def test_targets_in_context_have_a_row_and_charts(study_with_values):
    study = study_with_values({"plain": {1: 0.7}, "pairs": {1: 0.7}})
    found = {"paired_cosine": 0.93, "shuffled_cosine": 0.04, "retrieval_at_1": 0.875, "effective_rank": 17.5}
    change_lines(
        study / "arm1-1" / "metrics.jsonl",
        lambda line: line.update({f"validation/embedding_in_context/{name}": value for name, value in found.items()}),
    )
    _, page = render_report(study)
    row = re.search(r"<tr><td>pairs, targets in context</td>(.*?)</tr>", page)[1]
    assert re.findall(r"<td>([\d.]*)</td>", row) == ["0.9300", "0.0400", "0.8750", "17.5", ""]
    assert "plain, targets in context" not in page


def test_embeddings_of_the_export_are_shown_if_the_corpus_is_missing(study_with_values):
    study = study_with_values({"plain": {1: 0.7}, "other": {1: 0.7}})
    random = np.random.default_rng(0)
    for folder in study.glob("arm*"):
        config = folder / "config.yaml"
        config.write_text(re.sub(r"path: .*corpus", "path: nowhere", config.read_text()))
        (folder / "export" / "step-00000006" / "embeddings").mkdir(parents=True)
        arrays = {name: random.normal(size=(20, 8)).astype(np.float32) for name in ("text", "code", "text_to_code")}
        arrays["text_to_code"][3] = np.nan
        np.savez(folder / "export" / "step-00000006" / "embeddings" / "pairs.npz", **arrays)
    text, page = render_report(study)
    assert "Blue circles: text_to_code. Orange triangles: code." in page and "No picture of" not in page
    assert "FLOPs are not counted" in page and "nowhere does not exist" in page
    assert {row["FLOPs"] for row in parse_table(text).values()} == {"–"}
    assert_self_contained(page)
    for arm, flops in (("plain", 2.0), ("other", 3.0)):
        change_lines(
            study / "study.json", lambda values, arm=arm, flops=flops: values["arms"][arm].update(flops_per_token=flops)
        )
    rows = parse_table(render_report(study, page=False)[0])  # values recorded in the study need no corpus
    tokens = {arm: int(row["tokens"].replace(",", "")) for arm, row in rows.items()}
    assert {arm: row["FLOPs"] for arm, row in rows.items()} == {
        "plain": f"{2 * tokens['plain']:,}",
        "other": f"{3 * tokens['other']:,}",
    }
    assert rows["other"]["FLOPs a token"] == "× 1.50"


def test_flops_and_pictures_are_not_computed_from_a_different_corpus(study, tmp_path):
    run_dir = tmp_path / "llm_jepa-seed1"
    shutil.copytree(study / "runs" / "llm_jepa-seed1", run_dir)
    run = read_run(run_dir)
    assert flops_per_token(run) > 0 and picture(run).explained > 0
    environment = read_json(run_dir / "environment.json")
    environment["data"]["corpus"]["train"]["sha256"] = "0" * 64
    write_json(run_dir / "environment.json", environment)
    for read in (flops_per_token, picture):
        with pytest.raises(UserError, match=rf"corpus does not hold the corpus that {run_dir} was trained on"):
            read(run)


def test_the_sources_of_a_branch_are_named(study_with_values):
    study = study_with_values({"plain": {1: 0.7, 2: 0.6, 3: 0.8}, "pairs": {1: 0.7, 2: 0.6, 3: 0.8}})
    run_dir = study / "arm1-2"
    environment = read_json(run_dir / "environment.json")
    sources = [
        {"run": "first", "step": 40, "differences": []},
        {"run": "second", "step": 1200, "differences": ["x is 1"]},
    ]
    write_json(run_dir / "environment.json", environment | {"lineage": sources})
    text, page = render_report(study)
    expected = "arm1-2 branches from step 40 of first, then step 1,200 of second (x is 1)."
    assert expected in text.replace("\\", "") and expected in page


def test_the_correction_for_several_arms_is_reported(study_with_values):
    study = study_with_values(
        {
            "plain": {1: 0.70, 2: 0.69, 3: 0.71},
            "a": {1: 0.72, 2: 0.70, 3: 0.7245},
            "b": {1: 0.70, 2: 0.70, 3: 0.70},
            "c": {1: 0.5, 2: 0.49, 3: 0.512},
        }
    )
    several, _ = render_report(study, page=False)
    rows = parse_table(several)
    assert rows["c"]["verdict"] == "hurts" and rows["b"]["verdict"] == "no difference found"
    assert "3 arms are compared with one baseline" in several and "p (Holm)" in rows["a"]
    assert "c (−0.1993) hurts" in several and "no difference was found" in several


def test_the_correction_counts_the_arms_that_were_tested(study_with_values):
    plain = {1: 0.70, 2: 0.69, 3: 0.71}
    good, broken = {1: 0.72, 2: 0.70, 3: 0.7245}, {1: 0.70, 2: math.nan, 3: 0.70}
    text, page = render_report(study_with_values({"plain": plain, "good": good, "broken": broken}))
    alone, _ = render_report(study_with_values({"plain": plain, "good": good}), page=False)
    assert parse_table(text)["good"]["p"] == parse_table(alone)["good"]["p"] != "1.000"
    assert (
        "after correction" not in text
        and "arms are compared with one baseline" not in text
        and "corrected for" not in page
    )
    assert (
        "broken: no verdict, because the values of seed 2 are not finite in both arms" in text
        and parse_table(text)["broken"]["p"] == "–"
    )
    third = {1: 0.5, 2: 0.49, 3: 0.512}
    text, _ = render_report(
        study_with_values({"plain": plain, "good": good, "broken": broken, "third": third}), page=False
    )
    assert "after correction for 2 arms" in text and "2 arms are compared with one baseline" in text


def test_ties_are_reported(study_with_values):
    same = {1: 0.70, 2: 0.69, 3: 0.71}
    text, _ = render_report(study_with_values({"plain": same, "twin": same}), page=False)
    assert "**twin: no difference from plain found in nl_rx/exact" in text and "same values in every seed" in text
    zero = dict.fromkeys(same, 0.0)
    text, _ = render_report(study_with_values({"plain": zero, "as bad": zero}), page=False)
    assert (
        "as bad: no verdict, because all runs have the same value, 0 (for example, no answer is right yet" in text
        and "(--metric)" in text
    )
    text, _ = render_report(study_with_values({"plain": same, "noise": {1: 0.71, 2: 0.68, 3: 0.712}}), page=False)
    assert "no difference found" in text and "would have been found with a probability of at least 80%" in text


def test_one_seed_allows_no_verdict(study_with_values):
    text, page = render_report(study_with_values({"plain": {1: 0.7}, "better": {1: 0.9}}))
    assert (
        "better: no verdict, because one seed does not show the spread between seeds" in text
        and parse_table(text)["better"]["verdict"] == "no verdict"
    )
    assert_self_contained(page)


def test_missing_and_unfinished_runs_are_reported_and_not_counted(study_with_values):
    study = study_with_values(
        {"plain": {seed: 0.7 + seed / 1000 for seed in range(1, 5)}, "other": {seed: 0.7 for seed in range(1, 5)}}
    )
    shutil.rmtree(study / "arm1-1")
    (study / "arm1-2" / "status.json").write_text(json.dumps({"status": "running", "step": 3, "reason": ""}))
    change_lines(study / "arm1-3" / "evaluation" / "results.jsonl", lambda line: line.update(step=3))
    text, page = render_report(study)
    assert parse_table(text)["other"]["seeds"] == "1 of 4" and "no verdict" in text
    for expected in (
        "seed 1 is missing",
        "seed 2 is running at step 6",
        "seed 3 has no nl_rx/exact at its last step",
    ):
        assert expected in text and expected in page
    assert_self_contained(page)


def test_a_study_without_runs_has_a_report(study_with_values):
    study = study_with_values({"plain": {1: 0.7}, "other": {1: 0.7}})
    for folder in ("arm0-1", "arm1-1"):
        shutil.rmtree(study / folder)
    text, page = render_report(study)
    assert "no verdict" in text and "0 of 1" in text and "No run has logged anything yet" in page


def test_results_with_different_settings_are_not_counted(study_with_values):
    study = study_with_values({"plain": {1: 0.7, 2: 0.7, 3: 0.7}, "other": {1: 0.7, 2: 0.71, 3: 0.9}})
    change_lines(study / "arm1-3" / "evaluation" / "results.jsonl", lambda line: line.update(rows=ROWS + 1))
    text, _ = render_report(study, page=False)
    assert parse_table(text)["other"]["nl_rx/exact"].startswith("0.7050") and "or only under other settings" in text


def test_scores_of_different_versions_are_reported_and_never_averaged(study_with_values):
    study = study_with_values({"plain": {1: 0.7, 2: 0.7, 3: 0.71}, "other": {1: 0.7, 2: 0.72, 3: 0.9}})
    old = study / "arm1-3" / "evaluation" / "results.jsonl"
    change_lines(old, lambda line: line.pop("scoring"))
    text, _ = render_report(study, page=False)
    assert (
        parse_table(text)["other"]["nl_rx/exact"].startswith("0.7100")
        and parse_table(text)["other"]["seeds"] == "2 of 3"
    )
    assert "version 2 is compared, excluding arm1-3 (version 1). Evaluate the excluded runs" in text.replace("\\", "")
    line = json.loads(old.read_text())
    again = line | {"scoring": 2, "metrics": line["metrics"] | {"exact": 0.74}}
    old.write_text(old.read_text() + json.dumps(again) + "\n")  # the evaluation keeps both results
    text, _ = render_report(study, page=False)
    assert parse_table(text)["other"]["nl_rx/exact"].startswith("0.7200") and "different versions" not in text
    for path in study.glob("arm*/evaluation/results.jsonl"):
        if path != old:
            path.write_text(
                path.read_text()
                + "".join(
                    json.dumps(json.loads(line) | {"scoring": 1, "metrics": {"exact": 0.1}}) + "\n"
                    for line in path.read_text().splitlines()
                )
            )
    assert parse_table(render_report(study, page=False)[0])["other"]["nl_rx/exact"].startswith("0.7200"), (
        "all runs have both versions, so only the newest should count"
    )


def test_the_newest_scoring_is_compared_although_most_runs_have_an_older_one(study_with_values):
    study = study_with_values({"plain": {1: 0.7, 2: 0.7, 3: 0.71}, "other": {1: 0.7, 2: 0.72, 3: 0.9}})
    for path in study.glob("arm*/evaluation/results.jsonl"):
        if path.parts[-3] not in ("arm0-1", "arm1-1"):
            change_lines(path, lambda line: line.pop("scoring"))
    text = render_report(study, page=False)[0].replace("\\", "")
    assert "version 2 is compared, excluding arm0-2 (version 1), arm0-3 (version 1), arm1-2" in text


def test_arms_may_differ_in_the_finetuning_objective(study_with_values):
    study = study_with_values({"plain": {1: 0.5, 2: 0.51, 3: 0.52}, "other": {1: 0.7, 2: 0.71, 3: 0.73}})
    for arm, objective in enumerate(("next_token", "llm_jepa")):
        finetuning = {"finetune": {"epochs": 1}, "finetune_objective": {"name": objective}}
        for seed in (1, 2, 3):
            run_dir = study / f"arm{arm}-{seed}"
            config = yaml.safe_load((run_dir / "config.yaml").read_text()) | {
                "evaluation": {"tasks": [{"name": "nl_rx", "rows": ROWS} | finetuning]}
            }
            (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
            change_lines(
                run_dir / "evaluation" / "results.jsonl",
                lambda line, finetuning=finetuning: line["settings"].update(finetuning),
            )
    text, _ = render_report(study, page=False)
    assert (
        parse_table(text)["other"]["verdict"] == "helps"
        and "finetuning of nl_rx.finetune_objective.name (next_token, llm_jepa)" in text
    )


def test_hostile_text_is_escaped(study_with_values):
    hostile = "<script>alert(1)</script> | \"><img src='http://evil/x'> $\\frac$ \u2028 \x85 {{ 7 * 7 }} `x` [a](b)"
    study = study_with_values({"plain": {1: 0.7, 2: 0.7, 3: 0.72}, hostile: {1: 0.7, 2: 0.71, 3: 0.7}}, name=hostile)
    for path in study.glob("arm*/evaluation/answers/*.jsonl"):
        change_lines(
            path, lambda line: line.update(answer=hostile, context=hostile, target=line["target"] + "</code></table>")
        )
    text, page = render_report(study)
    assert len(parse_table(text)) == 2 and "<script" not in text and "<img" not in text
    found = assert_self_contained(page)
    assert hostile in "".join(found.text)


def test_a_single_run_is_shown_without_a_verdict(study):
    text, _ = render_report(study / "runs" / "llm_jepa-seed1", page=False)
    assert "No verdict: there is only one arm, llm_jepa" in text and list(parse_table(text)) == ["llm_jepa"]


def test_user_errors_are_one_line_with_exit_code_2(study, tmp_path):
    done = run_command([sys.executable, "launcher/report.py", str(tmp_path)], check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is neither a run directory" in done.stderr
    run = study / "runs" / "llm_jepa-seed1"
    copy_run(run, tmp_path / "twin", 1, 0.5)
    (tmp_path / "study.json").write_text("{}")
    for paths, choices, expected in [
        ([study], (None, "nl_rx/exakt"), "no run has the metric nl_rx/exakt; available: nl_rx/contains"),
        ([study], (None, "exact"), "is not of the form TASK/NAME"),
        ([study], ("nobody", None), "the baseline 'nobody' is not an arm"),
        ([study, run], (None, None), "pass it as the only path"),
        ([run, tmp_path / "twin"], (None, None), "have the same training settings and the same seed"),
        ([tmp_path], (None, None), "is not a valid study file"),
    ]:
        with pytest.raises(UserError, match=re.escape(expected)):
            read_comparison(paths, *choices)
