"""Study files: their errors, and the presets."""

import pytest

from data_prep.utils.console import UserError
from pretrain.studies.calibration import fingerprint
from pretrain.studies.config import as_override, load_study
from pretrain.studies.matching import load_base_config
from tests.commands import ROOT


@pytest.mark.parametrize("preset", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_loads_with_each_of_its_arms(preset):
    study = load_study(preset, [])
    assert study.config.name == preset.stem and len(study.config.seeds) >= 3
    configs = {arm: study.run_config(arm, study.config.seeds[0]) for arm in study.config.arms}
    assert len({config.objective.model_dump_json() for config in configs.values()}) == len(configs)
    assert {config.train.model_dump_json() for config in configs.values()} == {
        study.run_config(study.config.baseline, 7).train.model_dump_json()
    }


def test_the_grid_of_the_paper_is_complete():
    arms = load_study(ROOT / "configs" / "studies" / "lambda_k_grid.yaml", []).config.arms
    found = {
        (arm["objective"]["weight"], arm["objective"]["predictor_tokens"])
        for arm in arms.values()
        if arm["objective"]["name"] == "llm_jepa"
    }
    assert found == {(weight, k) for weight in (0.5, 1, 2, 4) for k in range(5)}


def test_a_preset_applies_to_a_different_base(folder, monkeypatch):
    monkeypatch.chdir(folder)
    overrides = ["base=base.yaml", "name=mine", "seeds=[1, 2]", "metric={task: loss, name: lm}"]
    study = load_study(ROOT / "configs" / "studies" / "does_it_help.yaml", overrides)
    assert study.run_config("semantic_tube", 2).data.path == str(folder / "corpus")
    assert str(study.folder) == "runs/mine"


def test_changes_of_the_base_apply_to_all_arms_and_an_arm_may_change_the_same_key(make_study):
    arms = {"plain": {"objective.name": "next_token"}, "jepa": {"model.shape.num_hidden_layers": 3}}
    study = make_study(base_changes={"train.steps": 7, "model.shape.num_hidden_layers": 4}, arms=arms)
    assert load_base_config(study).train.steps == 7
    found = {arm: study.run_config(arm, 1) for arm in arms}
    assert {arm: config.train.steps for arm, config in found.items()} == {"plain": 7, "jepa": 7}
    assert {arm: config.model.shape["num_hidden_layers"] for arm, config in found.items()} == {"plain": 4, "jepa": 3}


def test_a_metric_has_the_direction_that_its_task_declares_or_the_one_given(make_study):
    loss, given = {"task": "loss", "name": "lm"}, {"task": "loss", "name": "lm", "higher_is_better": True}
    metrics = (loss, given, loss | {"name": "retrieval_at_1"})
    assert [make_study(metric=metric).config.metric.higher_is_better for metric in metrics] == [False, True, True]


def test_a_measured_speed_belongs_to_one_configuration_and_launch_command(make_study):
    def fingerprint_of(**changes):
        study = make_study(**changes)
        return fingerprint(study.run_config("jepa", 1), study.config)

    assert fingerprint_of() == fingerprint_of()
    assert (
        len(
            {
                fingerprint_of(),
                fingerprint_of(arms={"plain": {}, "jepa": {"objective.weight": 2}}),
                fingerprint_of(launch="deepspeed --num_gpus 2"),
                fingerprint_of(launch="deepspeed"),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    "value", [1e-05, "a: b", None, True, "1e5", {"name": "llm_jepa", "weight": 0.5}, [1, 2], "x" * 300]
)
def test_override_values_survive_the_command_line(value):
    import yaml

    key, _, text = as_override("a.b", value).partition("=")
    assert key == "a.b" and yaml.safe_load(text) == value and "\n" not in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sedes": [1]}, "nearest known key is 'seeds'"),
        ({"data": {}}, "the known keys there are name, base, base_changes, output_dir, seeds, matched_by"),
        ({"seeds": [1, 1]}, "seeds lists a seed twice"),
        ({"baseline": "plian"}, "baseline is 'plian', but the arms are plain, jepa"),
        ({"matched_by": "time"}, "matched_by: Input should be 'tokens', 'flops', 'seconds' or 'none'"),
        ({"metric": {"task": "nl_rx", "name": "exact"}}, "has the tasks loss"),
        ({"metric": {"task": "loss", "name": "exact"}}, "metric.name is 'exact', but the task loss reports lm, jepa"),
        (
            {"metric": {"task": "loss", "name": "exact", "higher_is_better": True}},
            "metric.name is 'exact', but the task loss reports lm, jepa",
        ),
        ({"metric": {"task": "loss", "name": "paired_cosine"}}, "set metric.higher_is_better to true or false"),
        ({"arms": {"plain": {"objective.nmae": "next_token"}}}, "arms.plain: unknown key 'objective.nmae'"),
        ({"arms": {"plain": {"seed": 3}}}, "seed is set by the study"),
        ({"arms": {"plain": {"train.steps": 3}}}, "remove train.steps, or set matched_by: none"),
        ({"arms": {"plain/x": {}}}, "'plain/x' cannot be the name of an arm"),
        ({"base": "none.yaml"}, "none.yaml: No such file"),
        ({"launch": "deepspeed", "slurm": {}}, "launch and slurm exclude each other"),
        (
            {"parallel_runs": 2, "launch": "deepspeed"},
            "parallel_runs starts each run as one process on this machine, so launch cannot be set too",
        ),
        ({"base_changes": {"checkpoint": {"resume": "never"}}}, "checkpoint.resume is set by the study; remove it"),
        ({"base_changes": {"train.epoch": 3}}, "base_changes: unknown key 'train.epoch'"),
        ({"base_changes": {"seed": 3}}, "base_changes: seed is set by the study; remove it"),
        ({"parallel_runs": 2, "slurm": {}}, "so slurm cannot be set too"),
        ({"launch": "deepspeed --num_gpus '8"}, "launch is not a valid command line: No closing quotation"),
    ],
)
def test_errors_are_reported(write_study, changes, expected):
    with pytest.raises(UserError) as error:
        load_study(write_study(**changes), [])
    assert expected in str(error.value)


def test_the_runs_of_a_study_do_not_push_to_one_repository(make_study):
    with pytest.raises(UserError, match=r"arms\.jepa: all runs of a study .* remove export\.hub"):
        make_study(arms={"plain": {}, "jepa": {"export.hub.repo": "lab/tiny"}})
