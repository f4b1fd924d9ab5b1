"""The configuration of a run: the `data` section of data_prep and the sections that training adds."""

import logging
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import yaml
from pydantic import Field, PrivateAttr, field_validator, model_validator

from data_prep.config import DataConfig
from data_prep.layout import Layout, SpecialTokenIds
from data_prep.utils.config_file import LocalPath, Section, apply_overrides, load_yaml, parse_yaml, validate
from data_prep.utils.console import UserError
from pretrain.deepspeed_options import check_deepspeed
from pretrain.objectives.configs import ObjectiveConfig, objective_configs
from pretrain.sections import (
    BUDGETS,
    DECAYS,
    WARMUPS,
    BranchConfig,
    CheckpointConfig,
    ExportConfig,
    HubConfig,
    ModelConfig,
    MonitorConfig,
    TrainConfig,
)
from pretrain.tasks import task_configs
from pretrain.tasks.options import AnswerTask, TaskConfig

if TYPE_CHECKING:
    ObjectiveSection = ObjectiveConfig
    TaskSection = TaskConfig
else:  # the classes are discovered at run time
    ObjectiveSection = Annotated[Union[tuple(objective_configs().values())], Field(discriminator="name")]  # noqa: UP007
    TaskSection = Annotated[Union[tuple(task_configs().values())], Field(discriminator="name")]  # noqa: UP007


logger = logging.getLogger(__name__)


class EvaluationConfig(Section):
    """The downstream evaluation job."""

    every: int = Field(default=0, ge=0)
    """Steps between background evaluations during training, a multiple of checkpoint.every; 0: no background
    evaluation."""
    device: str = "cpu"
    """Device of background evaluations: cpu, or cuda:N for a GPU that training does not use. N is its number in
    nvidia-smi."""
    tasks: list[TaskSection] = []
    """Tasks to evaluate, in the background and with launcher/evaluate.py."""

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        if not re.fullmatch(r"cpu|cuda:\d+", device):
            raise ValueError("must be cpu, or cuda:N such as cuda:3")
        return device

    @field_validator("tasks")
    @classmethod
    def _check_unique_names(cls, tasks: list[TaskConfig]) -> list[TaskConfig]:
        if len({task.title for task in tasks}) < len(tasks):
            raise ValueError("two tasks have the same name: give one of them a label")
        return tasks


class RunConfig(Section):
    """The configuration of one run."""

    name: str = Field(min_length=1, pattern=r"^\w[\w.+-]*$")
    """Name of the run; `{dotted.key}` is replaced by the value of that key."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed for the initial weights, the record order and loss dropout."""
    output_dir: LocalPath = "runs"
    """Parent folder of the run directory, which is `output_dir/name`."""
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveSection
    """Training objective, chosen by its name; see below."""
    train: TrainConfig
    branch_from: BranchConfig | None = None
    """Start from the checkpoint of another run instead of from initial weights. The budget includes the steps before
    this checkpoint."""
    deepspeed: dict[str, Any] = {}
    """Options passed through to DeepSpeed; keys that the project computes are rejected."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig | None = None
    """Exports of checkpoints."""
    evaluation: EvaluationConfig = EvaluationConfig()
    monitor: MonitorConfig = MonitorConfig()

    @field_validator("deepspeed")
    @classmethod
    def _check_deepspeed_section(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_deepspeed(value)
        return value

    @model_validator(mode="after")
    def _check_views_of_objective(self) -> "RunConfig":
        objective = self.objective
        views = list(self.data.views)
        if objective.pairing is not None and len(views) == 1:
            key = "name" if objective.model_copy(update={"regularizers": []}).pairing else "regularizers"
            remedy = "remove it" if key == "regularizers" else "choose an objective without pairs, such as next_token"
            raise ValueError(
                f"objective.{key} needs pairs of views, but data.views are {views}: {remedy}, or prepare several "
                "data.views"
            )
        if objective.spans == "views" and (len(views) == 1 or objective.layout != "joint"):
            raise ValueError(
                "objective.form: views needs two views in one text: set several data.views and objective.layout=joint"
            )
        return self

    @model_validator(mode="after")
    def _check_active_steps(self) -> "RunConfig":
        steps = self.train.steps
        active = getattr(self.objective, "active", None)
        if steps is not None and active is not None and math.floor(active[1] * steps) <= math.floor(active[0] * steps):
            raise ValueError(
                f"objective.active is {list(active)}, but no step of train.steps={steps} ends there; widen it"
            )
        return self

    @model_validator(mode="after")
    def _check_evaluation_interval(self) -> "RunConfig":
        if self.evaluation.every % self.checkpoint.every:
            raise ValueError(
                f"evaluation.every ({self.evaluation.every}) must be a multiple of checkpoint.every "
                f"({self.checkpoint.every})"
            )
        if self.evaluation.every and not self.evaluation.tasks:
            raise ValueError("evaluation.every is set, but evaluation.tasks is empty: add a task, or remove the key")
        return self

    @model_validator(mode="after")
    def _check_profile(self) -> "RunConfig":
        profile, steps = self.monitor.profile, self.train.steps
        if profile is not None and steps is not None and profile.steps[1] > steps:
            raise ValueError(f"monitor.profile.steps ends at step {profile.steps[1]}, but train.steps is {steps}")
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> "RunConfig":
        if self.train.optimizer.name == "muon":
            if self.model.lora:
                raise ValueError("train.optimizer: muon trains whole matrices; use adamw with model.lora")
            zero = self.deepspeed.get("zero_optimization", {})
            if zero.get("round_robin_gradients") and zero.get("stage", 3) < 3:
                raise ValueError(
                    "train.optimizer: muon does not find its matrices with "
                    "deepspeed.zero_optimization.round_robin_gradients; remove one of the two"
                )
            offload = zero.get("offload_optimizer")
            if isinstance(offload, dict) and offload.get("device") == "nvme":
                raise ValueError(
                    "train.optimizer: muon cannot gather matrices whose states are on NVMe; use adamw, "
                    "or offload the optimizer to cpu"
                )
        return self

    @model_validator(mode="after")
    def _check_gradient_diagnostics(self) -> "RunConfig":
        if self.monitor.gradients_every and self.model.lora:
            raise ValueError(
                "monitor.gradients_every measures the gradients of all weights, but model.lora trains adapters only: "
                "remove one of the two"
            )
        if (
            self.monitor.gradients_every
            and self.train.compile
            and self.deepspeed.get("zero_optimization", {}).get("stage", 3) == 3
        ):
            raise ValueError(
                "monitor.gradients_every cannot measure layers that train.compile has compiled under ZeRO stage 3: "
                "remove one of the two, or set deepspeed.zero_optimization.stage to 1 or 2"
            )
        return self

    @model_validator(mode="after")
    def _check_layer_measurements(self) -> "RunConfig":
        offload = self.deepspeed.get("zero_optimization", {}).get("offload_optimizer")
        if self.monitor.layers_every and isinstance(offload, dict) and offload.get("device") == "nvme":
            raise ValueError(
                "monitor.layers_every cannot measure gradients on NVMe: set it to 0, or offload the optimizer to cpu"
            )
        return self

    def make_layout(self, specials: SpecialTokenIds, views: int) -> Layout:
        """Return the layout of a training record of `views` views."""
        return self.objective.make_layout(specials, views, self.data.lm_views, self.data.train_end_token)

    def validation_layouts(self, specials: SpecialTokenIds, views: int) -> dict[str, Layout]:
        """Return the layouts of validation by group of metric tags; see ObjectiveConfig.validation_layouts."""
        return self.objective.validation_layouts(specials, views, self.data.lm_views, self.data.train_end_token)

    @property
    def run_dir(self) -> Path:
        """The run directory, output_dir/name."""
        return Path(self.output_dir) / self.name

    @property
    def hub(self) -> HubConfig | None:
        """The repository that receives exports, export.hub."""
        return self.export.hub if self.export else None

    @property
    def predictor_tokens(self) -> int:
        """Number of predictor tokens per context, k; 0 without pairs."""
        return self.objective.pairing.predictor_tokens if self.objective.pairing else 0

    _ignored_keys: list[str] = PrivateAttr(default_factory=list)

    @property
    def ignored_keys(self) -> list[str]:
        """Keys of `objective` that are set but have no effect with next_token."""
        return self._ignored_keys


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a run after applying and checking overrides. Raises UserError naming the key."""
    shape_overrides = [override for override in overrides if override.startswith("model.shape.")]
    other_overrides = [override for override in overrides if override not in shape_overrides]
    values = load_yaml(path, other_overrides, tuple(RunConfig.model_fields))
    shape = values.get("model", {}).get("shape") if isinstance(values.get("model"), dict) else None
    if isinstance(shape, str):
        values["model"]["shape"] = _read_shape(Path(path).parent / Path(shape).expanduser())
    apply_overrides(values, shape_overrides)
    _replace_alternatives(values.get("train"), overrides)
    ignored = _remove_ignored_keys(values.get("objective"))
    config = validate(RunConfig, values)
    for number, task in enumerate(config.evaluation.tasks):
        check_task(config, task, f"evaluation.tasks.{number}")
    config._ignored_keys = ignored
    return config


def _replace_alternatives(train: Any, overrides: Sequence[str]) -> None:
    """Remove the budget, warm-up and decay of the file if an override sets it by a different key."""
    if not isinstance(train, dict):
        return
    named = [override.partition("=")[0] for override in overrides]
    for alternatives in (BUDGETS, WARMUPS, DECAYS):
        set_keys = [key for key in alternatives if train.get(key) is not None]
        overridden = [key for key in set_keys if f"train.{key}" in named]
        for key in set_keys:
            if overridden and key not in overridden:
                new = ", ".join(f"train.{name}={train[name]}" for name in overridden)
                logger.info(f"note: {new} replaces train.{key}={train[key]} of the configuration")
                del train[key]


def parse_task(values: dict[str, Any], where: str) -> TaskConfig:
    """Return the options of one task. `where` is its dotted key, which starts the message of a UserError."""
    configs = task_configs()
    if values.get("name") not in configs:
        raise UserError(f"{where}.name: unknown task {values.get('name')!r}: choose one of {', '.join(configs)}")
    return validate(configs[values["name"]], values, where)


def check_task(config: RunConfig, task: TaskConfig, where: str) -> None:
    """Raise UserError if the task, or its finetuning, would fail on every checkpoint of this run.

    `where` is the dotted key of the task, which starts the message.
    """
    try:
        task.check_views(config.data.views)
        task.check_objective(config.objective)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if not task.finetunes:
        return
    try:
        train = finetuning_config(config, task, config.data, "export", config.output_dir, "finetuning").train
    except UserError as error:
        raise UserError(f"{where}.{_with_task_key(str(error))}") from None
    if train.global_batch_rows % train.micro_batch_rows:
        raise UserError(
            f"{where}.finetune: global_batch_rows ({train.global_batch_rows}) must be a multiple of micro_batch_rows "
            f"({train.micro_batch_rows}); finetuning uses the values of train unless finetune sets them"
        )


def _with_task_key(message: str) -> str:
    """Return an error in a finetuning configuration, KEY: MESSAGE, with the task's key instead of the run's key."""
    message = message.removeprefix("configuration: ")
    keys = {"train": "finetune", "objective": "finetune_objective", "model": "finetune_lora"}
    section = re.split(r"\W", message, maxsplit=1)[0]
    if section in keys:
        return f"{keys[section]}{message.removeprefix(section)}"
    unknown = re.match(r"unknown key '(\w+)", message)
    return f"{keys.get(unknown[1], 'finetune') if unknown else 'finetune'}: {message}"


def finetuning_config(
    config: RunConfig, task: TaskConfig, data: DataConfig, export: str, output_dir: str, name: str
) -> RunConfig:
    """Return the configuration of the run that finetunes `export` on `data`.

    It is the configuration of the pretraining run, with the changes that the task sets. Raises UserError if it is not
    valid.
    """
    assert isinstance(task, AnswerTask)
    assert task.finetune is not None  # checked by the caller
    train = config.train.model_dump(exclude_none=True)
    if any(budget in task.finetune for budget in BUDGETS):
        changed = train | config.train.without_budget()
        train = {key: value for key, value in changed.items() if value is not None}
    for alternatives in (WARMUPS, DECAYS):
        if any(key in task.finetune for key in alternatives):
            train = {key: value for key, value in train.items() if key not in alternatives}
    values = config_values(config)
    values |= {
        "name": name,
        "output_dir": output_dir,
        "data": data.model_dump(mode="json", exclude_none=True) | {"lm_views": "last"},
        "model": {
            "init_from": export,
            "attention": config.model.attention,
            "lora": task.finetune_lora and task.finetune_lora.model_dump(),
        },
        "objective": task.finetune_objective or {"name": "next_token"},
        "train": train | task.finetune,
        "branch_from": None,
        "checkpoint": {"every": sys.maxsize, "keep": 1},
        "export": None,
        "evaluation": {},
        "monitor": {"log_every": config.monitor.log_every, "loggers": []},
    }
    return validate(RunConfig, values)


def _remove_ignored_keys(objective: Any) -> list[str]:
    """Remove the keys of other objectives if the objective is next_token, and return them.

    This makes objective.name=next_token the only override that the baseline of a run needs.
    """
    if not isinstance(objective, dict) or objective.get("name") != "next_token":
        return []
    configs = objective_configs()
    all_keys = {key for config in configs.values() for key in config.model_fields}
    other_keys = all_keys - set(configs["next_token"].model_fields)
    ignored = [key for key in objective if key in other_keys]
    for key in ignored:
        del objective[key]
    return ignored


def _read_shape(path: Path) -> Any:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"model.shape: cannot read {path} ({error.strerror}): set a path relative to the configuration file"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(
            f"model.shape: {path} is not valid YAML: {' '.join(str(error).split())}; fix the file"
        ) from None


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML that `load_config` reads back, without unset and ignored options."""
    return yaml.safe_dump(config_values(config), sort_keys=False, allow_unicode=True)


def config_values(config: RunConfig) -> dict[str, Any]:
    """Return the plain values that `dump_config` writes."""
    return config.model_dump(mode="json", exclude_none=True)
