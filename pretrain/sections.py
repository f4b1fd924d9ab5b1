"""The sections of a run's configuration for the model, training, checkpoints, exports and monitoring."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_prep.utils.config_file import LocalPath, Section
from pretrain.relevant_env import redact

DEFAULT_DECAY_FRACTION = 0.2


class LoraConfig(Section):
    """Low-rank adapters on every linear layer of the transformer (Hu et al., arXiv 2106.09685).

    Only the adapters and the predictor tokens are trained. Needs the extra `lora`. Exports contain the merged weights.
    """

    rank: int = Field(gt=0)
    """Rank of the adapters."""
    alpha: float = Field(gt=0)
    """Numerator of the scale factor of an adapter's output, alpha / rank."""


class ModelConfig(Section):
    """The model to train."""

    family: str | None = None
    """Model family: `openelm`, or the `model_type` of a causal language model of transformers, such as `llama`,
    `gemma2`, `olmo2`, `qwen3`, `mistral`, `smollm3`, `olmo3` or `gemma3_text`. docs/models.md lists all of them."""
    shape: dict[str, Any] | None = None
    """Fields of the family's Hugging Face configuration. Alternatively, the path of a YAML file with these fields,
    relative to the configuration file. The vocabulary and the special tokens come from the corpus."""
    init_from: LocalPath | None = None
    """An export or another local Hugging Face folder to start from, instead of random weights."""
    lora: LoraConfig | None = None
    """Adapters to train, instead of the whole model of init_from."""
    attention: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"
    """Attention implementation. auto: FlexAttention on CUDA; SDPA with the visibility mask on CPU, for heads narrower
    than 16, and for models without FlexAttention; eager for models without SDPA, such as gemma2 with its capped
    scores."""

    @model_validator(mode="after")
    def _check_model_source(self) -> "ModelConfig":
        if self.init_from is None and (self.family is None or self.shape is None):
            raise ValueError("set family and shape (random weights) or init_from (a folder to start from)")
        if self.init_from is not None and (self.family is not None or self.shape is not None):
            raise ValueError("family and shape are given by the folder of init_from: remove them")
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora adapts a trained model: set init_from, or remove lora")
        return self


class AdamWConfig(Section):
    """AdamW for all weights."""

    name: Literal["adamw"] = "adamw"


class MuonConfig(Section):
    """Muon for the hidden matrices, and AdamW for embeddings, output head, norms and biases.

    An update is scaled by 0.2 sqrt(max(m, n)) for a matrix (m, n), so the learning rate and the weight decay of AdamW
    suit both (Liu et al., arXiv 2502.16982).
    """

    name: Literal["muon"]
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Momentum of the gradients of the matrices, with Nesterov's form."""


BUDGETS = ("steps", "tokens", "records", "epochs")
"""Keys of `train` for the budget; a run sets exactly one of them."""
WARMUPS = ("warmup_fraction", "warmup_steps", "warmup_tokens")
"""Keys of `train` for the length of the warm-up; a run sets at most one of them."""
DECAYS = ("decay_fraction", "decay_steps", "decay_tokens")
"""Keys of `train` for the length of the decay; a run sets at most one of them."""


class TrainConfig(Section):
    """Length, batches and optimizer of the training."""

    steps: int | None = Field(default=None, gt=0)
    """Budget in optimizer steps."""
    tokens: int | None = Field(default=None, gt=0)
    """Budget in corpus tokens, without copies, predictor tokens or padding."""
    records: int | None = Field(default=None, gt=0)
    """Budget in records."""
    epochs: int | None = Field(default=None, gt=0)
    """Budget in epochs. Exactly one of steps, tokens, records and epochs must be set."""
    global_batch_rows: int = Field(gt=0)
    """Rows of one optimizer step, over all ranks."""
    micro_batch_rows: int = Field(gt=0)
    """Rows of one forward pass on one rank."""
    optimizer: Annotated[AdamWConfig | MuonConfig, Field(discriminator="name")] = AdamWConfig()
    """Optimizer, chosen by its name: adamw or muon; see below."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "warmup_stable_decay"] = "cosine"
    """Shape of the learning-rate decay after the warm-up, as a function of the consumed fraction of the budget."""
    warmup_fraction: float | None = Field(default=0.02, ge=0, lt=1)
    """First fraction of the budget, in which the learning rate rises linearly to learning_rate."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Length of the warm-up in steps, instead of warmup_fraction; needs a budget in steps."""
    warmup_tokens: int | None = Field(default=None, ge=0)
    """Length of the warm-up in corpus tokens, instead of warmup_fraction; needs a budget in tokens."""
    decay_fraction: float | None = Field(default=None, gt=0, le=1)
    """Last fraction of the budget, in which warmup_stable_decay lowers the learning rate; default 0.2."""
    decay_steps: int | None = Field(default=None, gt=0)
    """Length of the decay in steps, instead of decay_fraction; needs a budget in steps."""
    decay_tokens: int | None = Field(default=None, gt=0)
    """Length of the decay in corpus tokens, instead of decay_fraction; needs a budget in tokens."""
    final_rate: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a fraction of learning_rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of matrices; norms and biases are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW beta coefficients."""
    gradient_clipping: float = Field(default=1.0, gt=0)
    """Global L2 norm to which larger gradients are clipped."""
    z_loss: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Coefficient of the z-loss, the mean of (log Z)^2 over the next-token targets, with Z the sum of the exponentials
    of the logits; null or 0: no z-loss. It keeps log Z close to 0 (Chowdhery et al., arXiv 2204.02311, section 5, with
    1e-4)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward and backward passes; master weights and optimizer state are always fp32."""
    activation_checkpointing: bool = False
    """Whether to keep only the input of each transformer layer and to recompute the layer in the backward pass. Saves
    memory and costs time."""
    compile: bool = False
    """Whether to run torch.compile on the transformer layers. Needs a C++ compiler, and adds compilation
    time whenever the run starts."""
    on_spike: Literal["warn", "skip", "rewind"] = "warn"
    """Reaction to a loss spike, a step with one loss term far above its recent values. warn: print a warning. skip:
    also skip the update of the step. rewind: end the run; the next launch skips the records of the spike's step and of
    the preceding step, and resumes from a checkpoint before both."""
    spike_score: float = Field(default=10.0, gt=0)
    """A loss term is a spike if it exceeds the median of its recent values by more than this many standard deviations,
    estimated by the median absolute deviation. A value is compared with the last 100 values of its term, limited to
    steps with a similar number of tokens or pairs. At least 20 such values are needed."""

    @field_validator("z_loss")
    @classmethod
    def _unset_zero(cls, z_loss: float | None) -> float | None:
        return z_loss or None  # 0 and null are the same setting

    @model_validator(mode="before")
    @classmethod
    def _replace_default_warmup(cls, values: Any) -> Any:
        """Unset the default of warmup_fraction if the warm-up is given in a different unit."""
        if isinstance(values, dict) and any(values.get(key) is not None for key in WARMUPS[1:]):
            return {"warmup_fraction": None} | values
        return values

    @model_validator(mode="after")
    def _check_consistency(self) -> "TrainConfig":
        budgets = [budget for budget in BUDGETS if getattr(self, budget) is not None]
        if not budgets:
            raise ValueError("there is no budget: set one of steps, tokens, records and epochs")
        if len(budgets) > 1:
            raise ValueError(
                "the budget must be exactly one of steps, tokens, records and epochs, not "
                f"{' and '.join(budgets)}; remove all but one"
            )
        self._check_lengths(budgets[0])
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}: both must be at least 0 and below 1")
        return self

    def _check_lengths(self, budget: str) -> None:
        """Raise ValueError if the warm-up or the decay does not fit the schedule or the unit of the budget."""
        for keys in (WARMUPS, DECAYS):
            given = [key for key in keys if getattr(self, key) is not None]
            if len(given) > 1:
                raise ValueError(f"set only one of {' and '.join(given)}; remove the other")
            if given and given[0] != keys[0] and given[0].rpartition("_")[2] != budget:
                raise ValueError(
                    f"{given[0]} needs a budget in {given[0].rpartition('_')[2]}, but train.{budget} is set; "
                    f"use {keys[0]}, or change the budget"
                )
            if given and keys is DECAYS and self.schedule != "warmup_stable_decay":
                raise ValueError(f"{given[0]} has an effect with schedule=warmup_stable_decay only; remove it")
        if self.schedule == "warmup_stable_decay" and self.warmup_share + self.decay_share > 1:
            raise ValueError(
                "the warm-up and the decay together are longer than the budget: lower one of "
                f"{self._length_key(WARMUPS)} and {self._length_key(DECAYS)}"
            )
        if self.warmup_share >= 1:
            raise ValueError(f"{self._length_key(WARMUPS)} must be below the budget, train.{budget}")

    def _length_key(self, keys: tuple[str, ...]) -> str:
        """Return the key that is set; the first one if there is none."""
        return next((key for key in keys if getattr(self, key) is not None), keys[0])

    def _share(self, keys: tuple[str, ...], default: float) -> float:
        key = self._length_key(keys)
        length: float | None = getattr(self, key)
        if length is None:
            return default
        return length if key == keys[0] else length / getattr(self, key.rpartition("_")[2])

    @property
    def warmup_share(self) -> float:
        """Fraction of the budget that the warm-up takes."""
        return self._share(WARMUPS, 0.0)

    @property
    def decay_share(self) -> float:
        """Fraction of the budget that the decay of `warmup_stable_decay` takes."""
        return self._share(DECAYS, DEFAULT_DECAY_FRACTION)

    def without_budget(self) -> dict[str, Any]:
        """Return the changes that remove the budget, for a copy with a different one.

        Lengths of the warm-up and the decay in its unit become fractions.
        """
        changes: dict[str, Any] = {key: None for key in BUDGETS if getattr(self, key) is not None}
        for keys, share in ((WARMUPS, self.warmup_share), (DECAYS, self.decay_share)):
            if (key := self._length_key(keys)) != keys[0]:
                changes |= {key: None, keys[0]: share}
        return changes


class BranchConfig(Section):
    """The checkpoint that a run starts from, with its weights, optimizer state, random states and data position."""

    run: LocalPath
    """Run directory of the run to branch from."""
    step: int = Field(gt=0)
    """Step of the checkpoint."""


class CheckpointConfig(Section):
    """Checkpoint interval and retention, and the use of existing checkpoints when the run starts."""

    every: int = Field(default=500, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(default=3, gt=0)
    """Number of newest checkpoints to keep."""
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints whose step is a multiple of this number are never removed."""
    background: bool = True
    """Whether to write checkpoints on a separate thread, from a copy of the state in host memory, during training."""
    resume: Literal["auto", "must", "never"] = "auto"
    """Use of existing checkpoints. auto: resume from the newest valid one, if any. must: fail if there is none. never:
    fail if there is one."""


class HubConfig(Section):
    """The repository on the Hugging Face hub that receives the exports of a run."""

    repo: str
    """Model repository, as ORG/NAME. It is created if it does not exist."""
    private: bool = True
    """Whether the repository is created as a private one. With true, nothing is pushed to a public repository."""

    @field_validator("repo")
    @classmethod
    def _check_repo(cls, repo: str) -> str:
        from huggingface_hub.utils import HFValidationError, validate_repo_id  # slow to import

        try:
            validate_repo_id(repo)
            valid = repo.count("/") == 1
        except HFValidationError:
            valid = False
        if not valid:
            raise ValueError(
                f"{repo!r} is not the name of a repository: write ORG/NAME, such as my-org/my-model, with letters, "
                "digits and single - _ . between them"
            )
        return repo


class ExportConfig(Section):
    """Exports of checkpoints in the format of Hugging Face."""

    hub: HubConfig | None = None
    """Repository on the Hugging Face hub. Each checkpoint is then exported and pushed in the background."""


class ProfileConfig(Section):
    """The steps to profile."""

    steps: tuple[int, int]
    """First and last step."""

    @field_validator("steps")
    @classmethod
    def _check_order(cls, steps: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= steps[0] <= steps[1]:
            raise ValueError("must be the first and the last step, such as [20, 22]")
        return steps


TRACKERS = ("wandb", "mlflow", "trackio")
"""Loggers that send values to an experiment tracker. Their packages and extras have the same names."""


class WandbConfig(Section):
    """Options of the logger wandb. The API key is read from WANDB_API_KEY or the file that `wandb login` writes."""

    project: str = Field(default="jepa-pretrain", min_length=1)
    """Project that contains the run."""
    entity: str | None = None
    """User or team that owns the project. Default: the variable WANDB_ENTITY, or the default of the account."""
    mode: Literal["online", "offline"] | None = None
    """online: upload during training. offline: write to RUN/wandb only, for `wandb sync`. Default: the variable
    WANDB_MODE, or online."""


class MlflowConfig(Section):
    """Options of the logger mlflow. Tokens and passwords are read from the MLFLOW_TRACKING_ variables only."""

    tracking_uri: str | None = None
    """Address of a server, or sqlite:///FILE. Default: the variable MLFLOW_TRACKING_URI, or the file mlflow.db in
    output_dir."""
    experiment: str = Field(default="jepa-pretrain", min_length=1)
    """Experiment that contains the run."""

    @field_validator("tracking_uri")
    @classmethod
    def _check_secrets(cls, uri: str | None) -> str | None:
        if uri is not None and redact(uri, {}) != uri:
            raise ValueError(
                "must not contain a user name, password or token: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or for a database the variable MLFLOW_TRACKING_URI, in the environment"
            )
        return uri


class TrackioConfig(Section):
    """Options of the logger trackio. The token is read from HF_TOKEN, or from the file that `hf auth login` writes."""

    project: str = Field(default="jepa-pretrain", min_length=1)
    """Project that contains the run."""
    space: str | None = None
    """Space of the Hugging Face Hub that receives the values, such as user/name. Default: a local database, in the
    folder TRACKIO_DIR or the cache of the Hub."""


class MonitorConfig(Section):
    """Logging, validation and monitoring."""

    log_every: int = Field(default=10, gt=0)
    """Steps between progress lines, metrics and embedding diagnostics."""
    validate_every: int = Field(default=100, gt=0)
    """Steps between validations; the last step is always validated. Without a validation split
    there are no validations."""
    validation_records: int = Field(default=1000, gt=1)
    """Number of validation records, spread evenly over the validation split and the same in every validation."""
    gradients_every: int = Field(default=0, ge=0)
    """Steps between gradient measurements; 0: no measurements. A measurement yields the norm of each loss term's
    gradient and its cosine with the gradient of the next-token loss, and takes as long as one step per term. Under ZeRO
    stage 3 all steps become slower, because each module of a layer is then gathered separately."""
    layers_every: int | None = Field(default=None, ge=0)
    """Steps between measurements of the layers; null or 0: no measurements. A measurement yields the norm of each
    layer's gradient before clipping, the root mean square of each layer's output, and the scale of the logits."""
    hang_seconds: float = Field(default=600.0, ge=10)
    """Time after which the run ends if a rank makes no progress, in seconds; applies after the first step. An error
    line names that rank."""
    profile: ProfileConfig | None = None
    """Steps of which every rank writes a trace by PyTorch's profiler, in RUN/profile, for Perfetto or TensorBoard. A
    table of the slowest operators is printed. Profiling slows these steps down."""
    loggers: list[str] = ["tensorboard"]
    """Loggers that record the metrics in addition to metrics.jsonl: names of modules in pretrain/training/loggers. The
    project has tensorboard, wandb, mlflow and trackio; the last three need the extras of their names."""
    wandb: WandbConfig | None = None
    """Options of the logger wandb."""
    mlflow: MlflowConfig | None = None
    """Options of the logger mlflow."""
    trackio: TrackioConfig | None = None
    """Options of the logger trackio."""

    @model_validator(mode="after")
    def _check_tracker_options(self) -> "MonitorConfig":
        for name in TRACKERS:
            if getattr(self, name) is not None and name not in self.loggers:
                raise ValueError(f"monitor.{name} has an effect only if monitor.loggers contains {name}; remove it")
        return self

    @field_validator("layers_every")
    @classmethod
    def _unset_zero(cls, layers_every: int | None) -> int | None:
        return layers_every or None  # 0 and null are the same setting

    @model_validator(mode="before")
    @classmethod
    def _read_tensorboard(cls, values: Any) -> Any:
        """Read `tensorboard: true|false` of earlier versions, unless there is a list of loggers."""
        if isinstance(values, dict) and isinstance(values.get("tensorboard"), bool):
            values = dict(values)
            values.setdefault("loggers", ["tensorboard"] if values["tensorboard"] else [])
            del values["tensorboard"]
        return values
