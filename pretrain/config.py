"""The whole configuration of a run: the `data` section of data_prep and everything that training adds."""

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import Field, PrivateAttr, field_validator, model_validator

from data_prep.config import DataConfig, HubSource, JsonSource, TaskSource
from data_prep.config_file import LocalPath, Section, apply_overrides, load_yaml, validate
from data_prep.console import UserError
from pretrain.data.layout import Layout, Specials
from pretrain.deepspeed_options import check_deepspeed
from pretrain.objectives.configs import ObjectiveConfig, objective_configs

DEFAULT_DECAY_FRACTION = 0.2

Family = Literal["llama", "gemma2", "olmo2", "openelm"]


class LoraConfig(Section):
    """Low-rank adapters of every linear map of the transformer layers (Hu et al., arXiv 2106.09685).

    Besides them only the predictor tokens are trained. Needs the extra `lora`. Exports hold the merged weights.
    """

    rank: int = Field(gt=0)
    alpha: float = Field(gt=0)
    """What an adapter adds is scaled by alpha / rank."""


class ModelConfig(Section):
    """What is trained."""

    family: Family | None = None
    """Llama 3, Gemma 2, OLMo 2 or OpenELM."""
    shape: dict[str, Any] | None = None
    """Fields of the family's Hugging Face configuration; in a file, the path of a YAML file of them, relative to the
    configuration. The vocabulary and the special tokens come from the corpus."""
    init_from: LocalPath | None = None
    """An export or another local Hugging Face folder to start from, instead of random weights."""
    lora: LoraConfig | None = None
    """Train adapters of the model of init_from, instead of all of it."""
    attention: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"
    """auto: FlexAttention on CUDA; on CPU SDPA with the visibility mask, for gemma2, which caps attention scores, eager."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelConfig":
        if self.init_from is None and (self.family is None or self.shape is None):
            raise ValueError("give family and shape (random weights) or init_from (a folder to start from)")
        if self.init_from is not None and (self.family is not None or self.shape is not None):
            raise ValueError("family and shape come with the folder of init_from: leave them out")
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora adapts a trained model: give init_from, or leave it out")
        return self


if TYPE_CHECKING:
    ObjectiveSection = ObjectiveConfig
else:  # the classes are found at run time
    ObjectiveSection = Annotated[Union[tuple(objective_configs().values())], Field(discriminator="name")]  # noqa: UP007


BUDGETS = ("steps", "tokens", "records", "epochs")
"""Keys of `train`, of which a run has exactly one."""


class TrainConfig(Section):
    """How long, in what batches, and with which optimizer."""

    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    records: int | None = Field(default=None, gt=0)
    epochs: int | None = Field(default=None, gt=0)
    """The budget: exactly one of the four. Tokens are corpus tokens, without copies, predictor tokens or padding."""
    global_batch_rows: int = Field(gt=0)
    """Rows of one optimizer step, over all ranks."""
    micro_batch_rows: int = Field(gt=0)
    """Rows of one forward pass on one rank."""
    learning_rate: float = Field(gt=0)
    """The highest rate of AdamW."""
    schedule: Literal["cosine", "linear", "warmup_stable_decay"] = "cosine"
    """How the rate falls after the warm-up, over the consumed fraction of the budget."""
    warmup_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the budget in which the rate rises linearly to learning_rate."""
    decay_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the budget at the end in which warmup_stable_decay falls; default 0.2."""
    final_rate: float = Field(default=0.1, ge=0, le=1)
    """The rate at the end, as a share of learning_rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """On matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    gradient_clipping: float = Field(default=1.0, gt=0)
    """Largest global L2 norm of the gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of forward and backward; master weights and optimizer state are fp32 in any case."""
    activation_checkpointing: bool = False
    """Keep the input of each transformer layer only, and compute the layer again in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile of the transformer layers. Takes a C++ compiler, and time at every start."""
    on_spike: Literal["warn", "skip", "rewind"] = "warn"
    """Answer to a loss spike, a step of which one loss term is far above its last values: a warning, no update, or an end of the run.
    After such an end the next start resumes from the checkpoint before and skips the records of that step and of the one before it."""
    spike_score: float = Field(default=10.0, gt=0)
    """Distance of a spike from the median, in standard deviations estimated by the median absolute deviation. Compared are the last 100
    values of the term, of those steps whose number of tokens or pairs is similar, at least 20."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        budgets = [budget for budget in BUDGETS if getattr(self, budget) is not None]
        if len(budgets) != 1:
            raise ValueError(f"the budget is exactly one of steps, tokens, records and epochs, not {' and '.join(budgets) or 'none'}; unset one "
                             "with train.KEY=null")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}: both must be at least 0 and below 1")
        if self.schedule == "warmup_stable_decay" and self.warmup_fraction + (self.decay_fraction or DEFAULT_DECAY_FRACTION) > 1:
            raise ValueError("warmup_fraction and decay_fraction together exceed the run")
        if self.decay_fraction is not None and self.schedule != "warmup_stable_decay":
            raise ValueError("decay_fraction acts on the schedule warmup_stable_decay only; leave it out")
        return self


class CheckpointConfig(Section):
    """When the state is saved, and what a start does with what it finds."""

    every: int = Field(default=500, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(default=3, gt=0)
    """Newest checkpoints kept."""
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints of steps that this divides are kept for good."""
    background: bool = True
    """Write on a thread of its own, from a copy of the state in host memory, while training goes on."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on from the newest good checkpoint, if there is one. must: an error without one. never: an error with one."""


GENERATIVE = ("nl_rx", "gsm8k", "spider", "rotten_tomatoes", "yelp", "nq_open", "hellaswag")
"""Tasks of pairs, which can be finetuned on; the others look at the checkpoint as it is."""


class TaskConfig(Section):
    """A downstream task of the evaluation job, see docs/evaluation.md."""

    name: Literal["nl_rx", "gsm8k", "spider", "rotten_tomatoes", "yelp", "nq_open", "hellaswag", "retrieval", "geometry", "loss",
                  "lm_eval"]
    """nl_rx: write the regex for a description. gsm8k: the final answer of a problem. spider: write SQL, scored by its results. rotten_tomatoes,
    yelp: labels. nq_open: short answers. hellaswag: choose an ending. retrieval: find the other view. geometry: how the embeddings of the
    views lie to each other. loss: both losses. lm_eval: tasks of the Language Model Evaluation Harness."""
    label: str | None = Field(default=None, pattern=r"^\w[\w.+-]*$", max_length=100)
    """What results and tables call the task; default its name. Tells two tasks of one name apart."""
    train: LocalPath | TaskSource | None = None
    test: LocalPath | TaskSource | None = None
    """A file of JSON lines, or a source of type json or hub as in data.sources. Without them `nl_rx` draws unseen pairs from the embedded
    grammar."""
    databases: LocalPath | None = None
    """Of spider: a folder of SQLite files, DB.sqlite or DB/DB.sqlite by the database's name, or one file for all rows."""
    harness: list[LocalPath] | None = Field(default=None, min_length=1)
    """Of lm_eval: the harness' names of its tasks, or YAML files of tasks."""
    rows: int | None = Field(default=None, gt=0)
    """Test rows used, the first ones; default all (1,000 of the embedded grammar)."""
    finetune: dict[str, Any] | None = None
    """Keys of `train` that a finetuning on the task's train split sets over those of the run; null evaluates the
    checkpoint as it is."""
    finetune_objective: dict[str, Any] | None = None
    """What the finetuning minimises: keys of `objective`; default next_token."""
    finetune_lora: LoraConfig | None = None
    """Finetune adapters alone, instead of the whole model."""

    @property
    def title(self) -> str:
        """What results and tables call it."""
        return self.label or self.name

    def check_views(self, views: tuple[str, ...]) -> None:
        """Raise ValueError where the task cannot be put on records of these views."""
        if self.name in GENERATIVE and len(views) != 2:
            raise ValueError(f"the task {self.name} takes the second of two views for the answer to the first, but data.views are {list(views)}")
        if self.name in ("retrieval", "geometry") and len(views) < 2:
            raise ValueError(f"the task {self.name} compares two views, but data.views are {list(views)}")

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "TaskConfig":
        if self.name not in GENERATIVE and (self.finetune is not None or self.train is not None):
            raise ValueError(f"the task {self.name} trains nothing: leave out train and finetune")
        if self.name not in ("nl_rx", "lm_eval") and self.test is None:
            raise ValueError(f"the task {self.name} needs rows: test")
        if self.name == "lm_eval" and self.test is not None:
            raise ValueError("the task lm_eval brings its own rows: leave out test")
        if (self.name == "lm_eval") != (self.harness is not None):
            raise ValueError("the task lm_eval needs harness, a list of the harness' tasks" if self.name == "lm_eval" else
                             f"harness acts on the task lm_eval only, not on {self.name}: leave it out")
        if self.name in ("retrieval", "geometry") and self.rows == 1:
            raise ValueError(f"the task {self.name} compares rows: give rows at least 2, or leave it out")
        if self.name == "loss" and isinstance(self.test, HubSource):
            raise ValueError("the task loss reads a file of pairs: give test a path")
        if (self.name == "spider") != (self.databases is not None):
            raise ValueError("the task spider needs databases, a folder of SQLite files" if self.name == "spider" else
                             f"databases act on the task spider only, not on {self.name}: leave them out")
        if self.test is not None and self.finetune is not None and self.train is None:
            raise ValueError("finetune needs rows to train on that belong to test: give train too")
        if self.finetune is None and (self.finetune_objective is not None or self.finetune_lora is not None):
            raise ValueError("finetune_objective and finetune_lora act with finetune only: give it too, such as finetune: {epochs: 2}")
        if self.finetune_objective is not None:
            _check_objective(self.finetune_objective)
        for source in (self.train, self.test):
            if isinstance(source, JsonSource | HubSource) and (source.weight != 1 or source.split != "train"):
                raise ValueError("weight and split are for data.sources: leave them out of a task's train and test")
        for key in self.finetune or {}:
            if key not in TrainConfig.model_fields:
                nearest = difflib.get_close_matches(key, TrainConfig.model_fields, 1, 0.0)[0]
                raise ValueError(f"finetune: unknown key {key!r} of train; the nearest known one is {nearest!r}")
        return self


class _Objective(Section):
    objective: ObjectiveSection


def _check_objective(values: dict[str, Any]) -> None:
    """Raise ValueError for keys that are no objective."""
    try:
        validate(_Objective, {"objective": values})
    except UserError as error:
        raise ValueError(f"finetune_objective: {error}") from None


class EvaluationConfig(Section):
    """The downstream evaluation job."""

    every: int = Field(default=0, ge=0)
    """Steps between checkpoints that are evaluated in the background while training goes on; 0: none."""
    tasks: list[TaskConfig] = []
    """What an evaluation does, for checkpoints in the background and by the command."""

    @field_validator("tasks")
    @classmethod
    def _unique_names(cls, tasks: list[TaskConfig]) -> list[TaskConfig]:
        if len({task.title for task in tasks}) < len(tasks):
            raise ValueError("two tasks have the same name: give one a label")
        return tasks


class MonitorConfig(Section):
    """What is written down on the way."""

    log_every: int = Field(default=10, gt=0)
    """Steps between progress lines, metrics and embedding diagnostics."""
    validate_every: int = Field(default=100, gt=0)
    """Steps between validations; the last step is always validated. Without a validation split there are none."""
    validation_records: int = Field(default=1000, gt=1)
    """Records of a validation: spread evenly over the validation split, always the same."""
    gradients_every: int = Field(default=0, ge=0)
    """Steps between measurements of the gradient of each loss term: its norm, and its cosine with that of the next-token loss; 0: none.
    One takes as long as a step for each term."""
    hang_seconds: float = Field(default=600.0, ge=10)
    """A run of which no rank has moved for so long, after its first step, ends, and says which rank is missing."""
    tensorboard: bool = True
    """Whether to write TensorBoard files beside metrics.jsonl."""


class RunConfig(Section):
    """One run."""

    name: str = Field(min_length=1, pattern=r"^\w[\w.+-]*$")
    """Name of the run; `{dotted.key}` inside stands for the value of a key."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides the initial weights, the order of the records and loss dropout."""
    output_dir: LocalPath = "runs"
    """The run directory is output_dir/name."""
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveSection
    """What is minimised, see below; the name chooses."""
    train: TrainConfig
    deepspeed: dict[str, Any] = {}
    """Passed through to DeepSpeed; keys that the project computes are refused."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    monitor: MonitorConfig = MonitorConfig()

    @field_validator("deepspeed")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_deepspeed(value)
        return value

    @model_validator(mode="after")
    def _objective_has_its_views(self) -> "RunConfig":
        views, objective = list(self.data.views), self.objective
        if objective.pairing is not None and len(views) == 1:
            raise ValueError(f"objective.{'regularizers' if objective.spans else 'name'} needs pairs of views, but data.views are {views}: choose "
                             "next_token or semantic_tube without regularizers, or prepare several data.views")
        if objective.spans == "views" and (len(views) == 1 or objective.layout != "joint"):
            raise ValueError("objective.form: views needs two views in one text: several data.views and objective.layout=joint")
        return self

    @model_validator(mode="after")
    def _evaluations_have_checkpoints(self) -> "RunConfig":
        if self.evaluation.every % self.checkpoint.every:
            raise ValueError(f"evaluation.every ({self.evaluation.every}) must be a multiple of checkpoint.every ({self.checkpoint.every})")
        if self.evaluation.every and not self.evaluation.tasks:
            raise ValueError("evaluation.every is set, but evaluation.tasks is empty")
        return self

    @model_validator(mode="after")
    def _can_measure_gradients(self) -> "RunConfig":
        if self.monitor.gradients_every and self.model.lora:
            raise ValueError("monitor.gradients_every looks at the gradients of the whole model, which model.lora leaves out: leave out "
                             "one of the two")
        if self.monitor.gradients_every and self.train.compile and self.deepspeed.get("zero_optimization", {}).get("stage", 3) == 3:
            raise ValueError("monitor.gradients_every cannot look into layers that train.compile has compiled under ZeRO stage 3: "
                             "leave out one of the two, or set deepspeed.zero_optimization.stage to 1 or 2")
        return self

    def make_layout(self, specials: Specials, views: int, *, validating: bool = False) -> Layout:
        """What a record of `views` views looks like in this run; `validating` as of ObjectiveConfig.make_layout."""
        return self.objective.make_layout(specials, views, self.data.lm_views, self.data.train_end_token, validating=validating)

    @property
    def run_dir(self) -> Path:
        """Where everything of the run is written."""
        return Path(self.output_dir) / self.name

    @property
    def predictor_tokens(self) -> int:
        """k; 0 without pairs."""
        return self.objective.pairing.predictor_tokens if self.objective.pairing else 0

    _resting: list[str] = PrivateAttr(default_factory=list)

    @property
    def resting_keys(self) -> list[str]:
        """Keys of `objective` that were set, but do not act with next_token."""
        return self._resting


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and check the configuration of a run. Raises UserError naming the key."""
    of_the_shape = [override for override in overrides if override.startswith("model.shape.")]
    values = load_yaml(path, [override for override in overrides if override not in of_the_shape])
    shape = values.get("model", {}).get("shape") if isinstance(values.get("model"), dict) else None
    if isinstance(shape, str):
        values["model"]["shape"] = _read_shape(Path(path).parent / Path(shape).expanduser())
    apply_overrides(values, of_the_shape)
    resting = _take_out_resting(values.get("objective"))
    config = validate(RunConfig, values)
    for number, task in enumerate(config.evaluation.tasks):
        check_task(config, task, f"evaluation.tasks.{number}")
    config._resting = resting
    return config


def check_task(config: RunConfig, task: TaskConfig, where: str) -> None:
    """Raise UserError, with the dotted key below `where`, if the task or its finetuning could only fail on checkpoints of this run."""
    try:
        task.check_views(config.data.views)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if task.finetune is None:
        return
    try:
        train = finetuning_config(config, task, config.data, "export", config.output_dir, "finetuning").train
    except UserError as error:
        raise UserError(f"{where}.{_key_of_task(str(error))}") from None
    if train.global_batch_rows % train.micro_batch_rows:
        raise UserError(f"{where}.finetune: global_batch_rows ({train.global_batch_rows}) must be a multiple of micro_batch_rows "
                        f"({train.micro_batch_rows}), which finetuning takes from train unless it sets them")


def _key_of_task(mistake: str) -> str:
    """Turn a mistake in the configuration of a finetuning, as KEY: MESSAGE, into one that names the key of the task."""
    mistake = mistake.removeprefix("configuration: ")
    section = re.split(r"\W", mistake, maxsplit=1)[0]
    key = {"train": "finetune", "objective": "finetune_objective", "model": "finetune_lora"}.get(section)
    return f"{key}{mistake.removeprefix(section)}" if key else f"finetune: {mistake}"


def finetuning_config(config: RunConfig, task: TaskConfig, data: DataConfig, export: str, output_dir: str, name: str) -> RunConfig:
    """Return the configuration of the run that finetunes `export` on `data`: that of the pretraining run but for what the task sets.

    Raises UserError if it cannot be.
    """
    assert task.finetune is not None
    train = config.train.model_dump(exclude_none=True)
    if any(budget in task.finetune for budget in BUDGETS):
        train = {key: value for key, value in train.items() if key not in BUDGETS}
    values = yaml.safe_load(dump_config(config))
    values |= {
        "name": name,
        "output_dir": output_dir,
        "data": data.model_dump(mode="json", exclude_none=True) | {"lm_views": "last"},
        "model": {"init_from": export, "attention": config.model.attention, "lora": task.finetune_lora and task.finetune_lora.model_dump()},
        "objective": task.finetune_objective or {"name": "next_token"},
        "train": train | task.finetune,
        "checkpoint": {"every": sys.maxsize, "keep": 1},
        "evaluation": {},
        "monitor": {"log_every": config.monitor.log_every, "tensorboard": False},
    }
    return validate(RunConfig, values)


def _take_out_resting(objective: Any) -> list[str]:
    """With next_token, the keys of other objectives rest, so that the twin of a run is that one override; return them."""
    if not isinstance(objective, dict) or objective.get("name") != "next_token":
        return []
    configs = objective_configs()
    others = {key for config in configs.values() for key in config.model_fields} - set(configs["next_token"].model_fields)
    resting = [key for key in objective if key in others]
    for key in resting:
        del objective[key]
    return resting


def _read_shape(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model.shape: cannot read {path}, which is relative to the configuration: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"model.shape: {path} is not valid YAML: {' '.join(str(error).split())}") from None


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back; unset and resting options stay out."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
