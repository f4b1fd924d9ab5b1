"""The sections of a run's configuration that describe the model, its training, its checkpoints and what is monitored."""

from typing import Any, Literal

from pydantic import Field, model_validator

from data_prep.config_file import LocalPath, Section

DEFAULT_DECAY_FRACTION = 0.2

Family = Literal["llama", "gemma2", "olmo2", "openelm"]


class LoraConfig(Section):
    """Low-rank adapters of every linear map of the transformer layers (Hu et al., arXiv 2106.09685).

    Besides them only the predictor tokens are trained. Needs the extra `lora`. Exports hold the merged weights.
    """

    rank: int = Field(gt=0)
    alpha: float = Field(gt=0)
    """Numerator of the scale of an adapter's output, alpha / rank."""


class ModelConfig(Section):
    """The model to train."""

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


BUDGETS = ("steps", "tokens", "records", "epochs")
"""Keys of `train`, of which a run has exactly one."""


class TrainConfig(Section):
    """Length, batches and optimizer of the training."""

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
    """Decay of the learning rate after the warm-up, over the consumed fraction of the budget."""
    warmup_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the budget in which the rate rises linearly to learning_rate."""
    decay_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the budget at the end in which warmup_stable_decay falls; default 0.2."""
    final_rate: float = Field(default=0.1, ge=0, le=1)
    """The rate at the end, as a share of learning_rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """On matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW beta coefficients."""
    gradient_clipping: float = Field(default=1.0, gt=0)
    """Largest global L2 norm of the gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward and backward passes; master weights and optimizer state are always fp32."""
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
            raise ValueError(
                f"the budget is exactly one of steps, tokens, records and epochs, not {' and '.join(budgets) or 'none'}; unset one "
                "with train.KEY=null"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}: both must be at least 0 and below 1")
        if (
            self.schedule == "warmup_stable_decay"
            and self.warmup_fraction + (self.decay_fraction or DEFAULT_DECAY_FRACTION) > 1
        ):
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


class MonitorConfig(Section):
    """Logging, validation and monitoring."""

    log_every: int = Field(default=10, gt=0)
    """Steps between progress lines, metrics and embedding diagnostics."""
    validate_every: int = Field(default=100, gt=0)
    """Steps between validations; the last step is always validated. Without a validation split there are none."""
    validation_records: int = Field(default=1000, gt=1)
    """Records of a validation: spread evenly over the validation split, always the same."""
    gradients_every: int = Field(default=0, ge=0)
    """Steps between measurements of the gradient of each loss term: its norm, and its cosine with that of the next-token loss; 0: none.
    One takes as long as a step for each term; under ZeRO stage 3 all steps take longer, since layers are then not gathered whole."""
    hang_seconds: float = Field(default=600.0, ge=10)
    """A run of which no rank has moved for so long, after its first step, ends, and says which rank is missing."""
    tensorboard: bool = True
    """Whether to write TensorBoard files beside metrics.jsonl."""
