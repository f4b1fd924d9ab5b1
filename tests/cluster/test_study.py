"""A study whose runs are jobs on a real Slurm cluster."""

import json

import pytest
import yaml

from pretrain.evaluation.results import read_results
from tests.cluster.slurm import missing_requirements, running_cluster
from tests.pretrain.studies.conftest import folder, write_study  # noqa: F401  fixtures

pytestmark = [pytest.mark.skipif(bool(missing_requirements()), reason=missing_requirements()), pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def test_each_run_is_a_job_followed_by_its_evaluation(cluster, write_study, folder):  # noqa: F811
    path, study = write_study(slurm={"train": "--ntasks=2", "evaluate": ""}), folder / "studies" / "two"
    output = cluster.run_command("python", "launcher/study.py", path)
    assert "2 runs submitted, 0 of 2 done" in output, output
    assert "0 runs submitted, 0 of 2 done" in cluster.run_command("python", "launcher/study.py", path)
    jobs = json.loads((study / "study.json").read_text())["jobs"]
    for run, (training, evaluation) in jobs.items():
        log = study / "logs" / f"{run}.log"
        assert cluster.wait_for_job(training, log)["JobState"] == "COMPLETED", log.read_text()
        assert cluster.wait_for_job(evaluation, log)["JobState"] == "COMPLETED", log.read_text()
        assert len(read_results(study / run)) == 1
    assert "0 runs submitted, 2 of 2 done" in cluster.run_command("python", "launcher/study.py", path)

    base = yaml.safe_load((folder / "base.yaml").read_text())
    base["evaluation"]["tasks"].append(base["evaluation"]["tasks"][0] | {"label": "later"})
    (folder / "later.yaml").write_text(yaml.safe_dump(base))
    assert "2 runs submitted, 0 of 2 done" in cluster.run_command(
        "python", "launcher/study.py", path, f"base={folder / 'later.yaml'}"
    )
    for run, (evaluation,) in json.loads((study / "study.json").read_text())["jobs"].items():
        log = study / "logs" / f"{run}.log"
        assert cluster.wait_for_job(evaluation, log)["JobState"] == "COMPLETED", log.read_text()
        assert [result["task"] for result in read_results(study / run)] == ["loss", "later"]
    assert "0 runs submitted, 2 of 2 done" in cluster.run_command(
        "python", "launcher/study.py", path, f"base={folder / 'later.yaml'}"
    )


def test_options_that_sbatch_refuses_are_reported_in_one_line(cluster, write_study):  # noqa: F811
    path = write_study(name="refused", slurm={"train": "--no-such-option"})
    output = cluster.run_command("python", "launcher/study.py", path, check=False)
    assert "error: sbatch refused plain-seed1: " in output and "Traceback" not in output, output
