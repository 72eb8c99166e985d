"""Everything that can be set, with its default and what it may be: a misspelt key, a wrong type or a value out of range
is an error before any work. What does not go together is in checks.py."""

from __future__ import annotations

from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints
from pydantic.dataclasses import dataclass

SECTION = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # model.name=7 is a name

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]  # beyond it libraries fail in ways of their own
FromZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # what torch takes
Threads = Annotated[int, Field(ge=1, le=1024)]  # more than the system has, and the process dies without a word
Share = Annotated[float, Field(ge=0, le=1)]
HeldOut = Annotated[float, Field(ge=0, le=0.9)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, StringConstraints(min_length=1)]
# Names a folder.
Name = Annotated[str, StringConstraints(pattern=r"^[^/\\.][^/\\]{0,99}$")]

Template = Literal["raw", "hh", "alpaca", "tldr", "chat"]
DifferenceForm = Literal["paper", "antisymmetric", "residual"]
Negative = Literal["clip", "abs", "flip", "floor", "error"]
Kernel = Literal["auto", "gathered", "contiguous", "varlen"]
Stage = Literal["sft", "rm", "diffmodel", "score", "align", "eval", "report", "inspect"]
Judge = Literal["gold", "reward", "diff"]


@dataclass(config=SECTION)
class ToyConfig:
    """The toy world (rdo/data/toy.py): how much data, and how noisy its labels are."""

    seed: int = 0
    pairs: Count = 12288  # labelled pairs for training
    test_pairs: Count = 1024
    demonstrations: Count = 20480  # texts the base policy is trained on
    candidate_queries: FromZero = 640  # of the training records, how many carry `candidates` responses instead of two
    candidates: Annotated[int, Field(ge=2, le=100)] = 6
    temperature: Positive = 1.0  # of the Bradley-Terry labels on the true reward
    flip_share: Share = 0.0  # share of labels turned round after they are drawn


@dataclass(config=SECTION)
class DatasetConfig:
    name: Name = "toy"
    source: Literal["toy", "file", "hub"] = "toy"
    path: Text | list[Text] | None = None  # source=file: a file, a glob such as 'data/*.parquet', or a list of either
    format: Text = "auto"  # auto, or one of data.readers.FORMATS
    on_invalid: Literal["error", "skip"] = "error"  # skip: leave bad rows out, count and list them in invalid.jsonl
    max_invalid_share: Share = 0.01  # on_invalid=skip: fail above this share of the rows
    hub_name: Text | None = None  # source=hub
    hub_config: Text | None = None
    hub_revision: Text | None = None
    hub_split: Text | None = None  # the hub's split to read, where it is not called train
    hub_test_split: Text | None = None  # and the one that becomes test
    workers: Threads | None = None  # processes that tokenize; null: one a core
    template: Template = "raw"
    # The day that a chat template takes for today where it writes a date (Llama 3.1's does), the same for every run.
    template_date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$")] = "2024-07-26"
    max_length: Annotated[int, Field(ge=3)] = 512  # tokens of query + one response, end of sequence included
    # Of what is too long. cut: the query loses old turns, then text from the left, and a record that would keep fewer
    # than min_prompt_tokens of its text beside whole responses is not trained on; drop: nor is any that is cut.
    too_long: Literal["cut", "drop"] = "cut"
    min_prompt_tokens: Count = 8
    max_truncated_share: Share = 0.25  # fail above this share of records that had to be cut or left out
    validation_share: HeldOut = 0.05  # of the queries
    test_share: HeldOut = 0.10
    split_seed: int = 0
    max_records: Count | None = None  # use only the first ones of each split, for trying out
    toy: ToyConfig = field(default_factory=ToyConfig)


@dataclass(config=SECTION)
class LoraConfig:
    """LoRA (models/lora.py). It has no dropout, which would put noise into every log-ratio."""

    rank: Count | None = None  # null: all weights are trained; RDO's KTO runs used 8 (its section A.1.1)
    alpha: Positive = 16.0  # what an adapter adds is scaled by alpha / rank
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])  # or names, such as [q_proj,v_proj]
    merge: bool = False  # save the whole model with the adapter in it, instead of the adapter


@dataclass(config=SECTION)
class ModelConfig:
    """Where the policy comes from: `path` (local or hub), or else a Llama built from scratch."""

    name: Name = "toy"
    path: Text | None = None
    revision: Text | None = None
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    tokenizer: Literal["toy", "byte_pair", "path"] = "toy"  # with `path` set the model's own
    vocabulary_size: Annotated[int, Field(ge=258)] = 8192  # of a byte_pair tokenizer
    hidden_size: Count = 64
    intermediate_size: Count = 128
    layers: Count = 2
    heads: Count = 4
    key_value_heads: Count | None = None  # fewer than heads: grouped queries
    max_positions: Count = 512
    lora: LoraConfig = field(default_factory=LoraConfig)
    # Texts around query, first and second response in the difference model's input (RDO section 3.1).
    difference_template: Annotated[list[str], Field(min_length=3, max_length=3)] = field(
        default_factory=lambda: ["Query: ", "; Response 1: ", "; Response 2: "]
    )


@dataclass(config=SECTION)
class TrainingConfig:
    """One training run. Learning rates are those at the top of the schedule."""

    learning_rate: Positive = 1e-5
    batch_size: Count = 64  # records an optimizer step, over all processes and accumulation steps
    epochs: Count = 1
    max_steps: Count | None = None  # stop early; the schedule ends there
    warmup_share: Share = 0.03
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NotNegative = 0.0
    max_gradient_norm: Positive | None = 1.0
    min_responses: Count = 1  # train on the records with at least so many responses
    max_records: Count | None = None  # train on so many of them at most
    validate_every_steps: Count | None = None  # and at the end: loss and accuracy on the validation split; null: never
    validation_records: Count = 512  # on so many records of it at most
    keep_best: Literal["validation/loss", "validation/accuracy"] | None = None  # by what; null: the last weights
    patience: Count | None = None  # stop after so many validations without a better one


@dataclass(config=SECTION)
class SftConfig(TrainingConfig):
    enabled: bool = True  # false: model.path is the base policy as it is
    responses: Literal["chosen", "all"] = "chosen"  # which of a record to imitate (demonstrations: theirs)


@dataclass(config=SECTION)
class ScorerConfig(TrainingConfig):
    """The pointwise reward model, section rm."""

    head_learning_rate: Positive | None = None  # null: as the backbone
    path: Text | None = None  # use this finished scorer instead of training one
    backbone: Text | None = None  # put the head on this model (decoder or encoder) instead of the base policy


@dataclass(config=SECTION)
class DifferenceConfig(ScorerConfig):
    """The difference model, section diffmodel."""

    form: DifferenceForm = "paper"
    beta0: NotNegative = 0.0  # weight of the duplication regulariser f(y, y)^2
    beta1: NotNegative = 0.0  # weight of the reverse regulariser (f(a, b) + f(b, a))^2


@dataclass(config=SECTION)
class RcConfig:
    """Reward difference coefficients: w = R^alpha."""

    name: Literal["none", "reward", "diff", "gold"] = "none"  # gold: of the toy world
    alpha: Share = 0.5
    negative: Negative = "clip"  # what R < 0 becomes
    epsilon: Positive = 1e-3  # of negative=floor
    scale: Literal["none", "mean"] = "none"  # mean: divide by the mean weight over the training set
    min_effective_share: Annotated[float, Field(gt=0, le=1)] = 0.05  # effective sample size over pairs: fail below
    order: Literal["forward", "antisymmetric"] = "forward"  # which f of the difference model is R
    ablation: Literal["none", "shuffle", "filter"] = "none"  # of the toy study


@dataclass(config=SECTION)
class EvalConfig:
    subject: Literal["policy", "base", "reward", "diff"] = "policy"  # reward, diff: a scorer
    split: Literal["test", "validation"] = "test"  # validation: to choose settings by, such as beta0
    prompts: Count = 256  # of the split; 300 in the paper
    decoding: Literal["greedy", "sample"] = "sample"
    temperature: Positive = 1.0
    max_new_tokens: Count = 128
    stop: list[Text] = field(default_factory=list)  # texts that end a response, too, and are no part of it
    batch_size: Count = 64
    judges: list[Judge] = field(default_factory=lambda: ["gold", "reward", "diff"])
    samples: FromZero = 8  # of a policy, handed to the report


@dataclass(config=SECTION)
class InspectConfig:
    """Stage inspect."""

    records: Count = 10000  # of each split, how many are examined, evenly spaced


@dataclass(config=SECTION)
class EngineConfig:
    # torch: one process; the others: DeepSpeed, any number of processes
    name: Literal["torch", "zero1", "zero2", "zero3", "zero3_offload"] = "torch"
    # Of a training step; auto: the best that the device has.
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    layout: Literal["auto", "tree", "padded"] = "auto"
    attention: Kernel = "auto"  # of a tree; varlen: on a GPU
    gradient_checkpointing: bool = False  # less memory for about a third more time: layers run again going backward
    tokens_per_micro_batch: Count | None = None  # null: by free memory and the model's size (sequences/budget.py)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Threads | None = None  # of a CPU; null: one a core
    checkpoint_every_steps: Count = 200
    checkpoint_every_minutes: Positive = 10.0
    keep_checkpoints: Count = 2
    records_per_shard: Count = 1024  # of scores and references: at most so many are done again after an interruption


@dataclass(config=SECTION)
class TrackerConfig:
    name: Literal["none", "wandb"] = "none"  # a JSON-lines file of all metrics is written always
    project: Text = "rdo"
    group: Text | None = None  # null: the name of run_dir, so that the points of a sweep are in one


@dataclass(config=SECTION)
class StageConfig:
    name: Stage = "eval"


@dataclass(config=SECTION)
class ReportConfig:
    title: Text = "Reward Difference Optimization"
    folder: Text = "report"  # in run_dir


@dataclass(config=SECTION)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    loss: dict[str, Any] = field(default_factory=dict)
    rc: RcConfig = field(default_factory=RcConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rm: ScorerConfig = field(default_factory=ScorerConfig)
    diffmodel: DifferenceConfig = field(default_factory=DifferenceConfig)
    align: TrainingConfig = field(default_factory=TrainingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    run_dir: Text = "runs/toy"
    metric: Text | None = None  # what a stage returns to a sweep (`stage_metric`); null: of eval, its main number
    seed: Seed = 0
    row: Text = "none"  # the file of conf/row that was chosen, which names what was made in the report
    rows: Text = "none"  # those that stage=pipeline compares
    build_inputs: bool = True  # false: a missing input is an error that names the command that makes it


def register() -> None:
    """Gives hydra every setting with its default, to merge conf/ into. Those of a loss are its function's parameters,
    which `choose_loss` checks."""
    from hydra.core.config_store import ConfigStore  # which launch/gpu_check.py does without
    from omegaconf import OmegaConf

    node = OmegaConf.create(asdict(Config()))
    OmegaConf.set_struct(node.loss, False)
    ConfigStore.instance().store(name="schema", node=node)
