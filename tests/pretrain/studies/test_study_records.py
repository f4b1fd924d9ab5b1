"""A study continues on another machine from study.json and the records of its finished runs."""

import shutil
import threading

import pytest
import yaml

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json
from pretrain.report.arms import read_comparison
from pretrain.report.page import markdown
from pretrain.report.summary import summarize
from tests.pretrain.studies.fake_runs import FakeStudies
from tests.processes import TIMEOUT


@pytest.fixture
def studies(monkeypatch):
    return FakeStudies(monkeypatch)


def copy_to_other_machine(study, folder):
    """Copy study.json and the records of a study to a folder, and return that folder."""
    folder.mkdir(parents=True)
    shutil.copy(study / "study.json", folder)
    shutil.copytree(study / "records", folder / "records")
    return folder


def report(study):
    return markdown(summarize(read_comparison([study], None, None)))


def test_a_study_resumes_elsewhere_without_repeating_runs(studies, write_study, folder, tmp_path, capsys):
    path = write_study(name="moved", seeds=[1, 2])
    uninterrupted = studies.start(path, f"output_dir={tmp_path / 'uninterrupted'}")
    assert uninterrupted[0] == 0 and len(studies.trained) == 4
    studies.failing = {"jepa-seed1", "plain-seed2", "jepa-seed2"}
    code, here = studies.start(path, f"output_dir={tmp_path / 'here'}")
    assert code == 1 and [record.name for record in (here / "records").iterdir()] == ["plain-seed1.tar.xz"]
    assert "No verdict yet: 3 of 4 runs are missing" in report(here)

    elsewhere = copy_to_other_machine(here, tmp_path / "elsewhere" / "moved")
    other_tests = tmp_path / "other tests.jsonl"  # the same test file in a different place
    shutil.copy(folder / "pairs.jsonl", other_tests)
    base = yaml.safe_load((folder / "base.yaml").read_text())
    base["evaluation"]["tasks"][0]["test"] = str(other_tests)
    base["data"]["path"] = str(tmp_path / "corpus")  # the study prepares it again
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    studies.failing = set()
    moved = [f"output_dir={elsewhere.parent}", f"base={tmp_path / 'base.yaml'}"]
    capsys.readouterr()
    assert studies.start(path, *moved)[0] == 0
    assert studies.trained == ["jepa-seed1", "plain-seed2", "jepa-seed2"]
    assert not (elsewhere / "plain-seed1").exists() and len(list((elsewhere / "records").iterdir())) == 4
    assert report(elsewhere) == report(uninterrupted[1])
    printed = capsys.readouterr().out
    assert f"copy or commit {elsewhere / 'study.json'} and {elsewhere / 'records'}" in printed
    assert studies.start(path, *moved)[0] == 0 and studies.trained == []

    last = copy_to_other_machine(elsewhere, tmp_path / "last" / "moved")
    assert studies.start(path, f"output_dir={last.parent}")[0] == 0 and studies.trained == []
    assert report(last) == report(uninterrupted[1])


def test_the_settings_and_tasks_of_a_record_are_checked(studies, write_study, folder, tmp_path):
    path = write_study(name="checked")
    _, here = studies.start(path, f"output_dir={tmp_path / 'here'}")
    there = copy_to_other_machine(here, tmp_path / "there" / "checked")
    changed = write_study(
        name="checked", arms={"plain": {"objective.name": "next_token"}, "jepa": {"objective.weight": 2}}
    )
    with pytest.raises(UserError) as raised:
        studies.start(changed, f"output_dir={there.parent}")
    assert f"{there}/records/jepa-seed1.tar.xz contains a run with a different objective.weight" in str(raised.value)
    base = yaml.safe_load((folder / "base.yaml").read_text())
    base["evaluation"]["tasks"].append(base["evaluation"]["tasks"][0] | {"label": "again"})
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(base))
    path = write_study(name="checked")
    more = f"base={tmp_path / 'more.yaml'}"
    with pytest.raises(UserError, match=r"plain-seed1.tar.xz has no result of again .* delete the record"):
        studies.start(path, f"output_dir={there.parent}", more)
    before = (here / "records" / "plain-seed1.tar.xz").read_bytes()
    assert studies.start(path, f"output_dir={here.parent}", more)[0] == 0 and studies.trained == []
    assert (here / "records" / "plain-seed1.tar.xz").read_bytes() != before  # evaluated again, from its checkpoint


def test_a_damaged_record_stops_the_study_until_it_is_deleted(studies, write_study, tmp_path):
    path = write_study(name="damaged")
    _, here = studies.start(path, f"output_dir={tmp_path / 'here'}")
    there = copy_to_other_machine(here, tmp_path / "there" / "damaged")
    record = there / "records" / "plain-seed1.tar.xz"
    record.write_bytes(record.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cannot read .*plain-seed1.tar.xz: .* delete it to have the run repeated"):
        studies.start(path, f"output_dir={there.parent}")
    assert studies.trained == []
    record.unlink()
    assert studies.start(path, f"output_dir={there.parent}")[0] == 0 and studies.trained == ["plain-seed1"]


def test_the_number_of_seeds_follows_from_a_pilot(studies, write_study, tmp_path, caplog):
    pilot = {"detect": 0.1, "pilot": [2, 3, 5], "most": 12}
    path, output = write_study(name="pilot", seeds=pilot), f"output_dir={tmp_path}"
    studies.failing = {"jepa-seed5"}
    code, study = studies.start(path, output)
    assert code == 1 and len(studies.trained) == 6
    assert read_json(study / "study.json")["power"] == pilot | {"arms": ["plain", "jepa"]}
    assert "No verdict yet: the number of seeds follows from the pilot, of which 1 of 6 runs is missing" in report(
        study
    )
    studies.failing = set()
    with caplog.at_level("INFO"):
        assert studies.start(path, output)[0] == 0
    power = read_json(study / "study.json")["power"]
    further = [seed for seed in range(6, 18)][: len(power["seeds"])]
    assert power["seeds"] == further and 3 <= len(further) < 12 and not power["limit_reached"]
    assert studies.trained == ["jepa-seed5", *(f"{arm}-seed{seed}" for seed in further for arm in ("plain", "jepa"))]
    assert "pilot: the largest standard deviation of the differences from the baseline is" in caplog.text
    text = report(study)
    assert (
        f"The number of seeds, {len(further)}, follows from a pilot" in text
        and f"{len(further)} of {len(further)}" in text
    )
    assert studies.start(path, output)[0] == 0 and studies.trained == []

    strict = write_study(name="pilot", seeds=pilot | {"detect": 0.0001})
    studies.failing = {"jepa-seed17"}
    assert studies.start(strict, output)[0] == 1
    power = read_json(study / "study.json")["power"]
    assert power["limit_reached"] and power["seeds"] == list(range(6, 18)) and power["detectable"] > 0.0001
    assert "No verdict yet: 1 of 24 runs is missing" in report(study)
    # A run that never finishes: list the other seeds.
    assert studies.start(write_study(name="pilot", seeds=[2, 3, 5, *range(6, 17)]), output)[0] == 0
    assert studies.trained == [] and "11 of 11" in report(study) and "No verdict yet" not in report(study)


def test_the_first_seed_can_be_removed(studies, write_study, tmp_path):
    studies.failing = {"jepa-seed3"}
    output = f"output_dir={tmp_path}"
    code, study = studies.start(write_study(name="first", seeds=[3, 1]), output)
    assert code == 1
    assert studies.start(write_study(name="first", seeds=[1, 2]), output)[0] == 0
    assert studies.trained == ["plain-seed2", "jepa-seed2"] and "No verdict yet" not in report(study)


def test_a_pilot_on_slurm_is_decided_at_the_next_start(studies, write_study, tmp_path, monkeypatch):
    submitted = []
    monkeypatch.setattr("pretrain.studies.main.sys.exit", lambda code: code)
    monkeypatch.setattr(
        "pretrain.studies.slurm.submit_runs", lambda folder, launcher, slurm, runs, record: submitted.append(runs) or 0
    )
    path, output = write_study(name="jobs", seeds={"detect": 0.1}, slurm={}), f"output_dir={tmp_path}"
    studies.start(path, output)
    assert [run.seed for run in submitted[-1]] == [1, 1, 2, 2, 3, 3]
    studies.start(write_study(name="jobs", seeds=[1, 2, 3]), output)  # the jobs run
    studies.start(write_study(name="jobs", seeds={"detect": 0.1}, slurm={}), output)
    assert {run.seed for run in submitted[-1]} >= {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("parallel", [1, 2])
def test_no_run_starts_after_one_that_lacks_the_metric(studies, write_study, tmp_path, parallel):
    path = write_study(name="metric", seeds=[1, 2, 3], parallel_runs=parallel, metric={"task": "loss", "name": "jepa"})
    with pytest.raises(UserError, match=r"-seed1 has no loss/jepa at its last step; loss reports lm\. Set metric"):
        studies.start(path, f"output_dir={tmp_path}")
    assert 1 <= len(studies.trained) <= parallel


def test_training_and_evaluation_of_runs_at_the_same_time_use_one_gpu_each(studies, write_study, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    both_run, train = threading.Barrier(2, timeout=TIMEOUT), studies.train

    def train_together(*arguments):
        both_run.wait()
        return train(*arguments)

    monkeypatch.setattr(studies, "train", train_together)
    path = write_study(name="gpus", seeds=[1, 2], parallel_runs=2)
    assert studies.start(path, f"output_dir={tmp_path}")[0] == 0
    assert sorted(map(sorted, studies.gpus.values())) in ([["0"], ["0"], ["1"], ["1"]],)
