"""The typed configuration: a misspelt key, a wrong type or an impossible combination is an error before any work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BENCH_WORKS = ("dpo", "kto", "rrhf", "rm", "difference", "score15", "score30", "reference", "generation")


@dataclass
class ToyConfig:
    """The toy world (rdo/data/toy.py): how much data, and how noisy its labels are."""

    seed: int = 0
    pairs: int = 12288  # labelled pairs for training
    test_pairs: int = 1024
    demonstrations: int = 20480  # texts the base policy is trained on
    candidate_queries: int = 640  # of the training records, how many carry `candidates` responses instead of two
    candidates: int = 6
    temperature: float = 1.0  # of the Bradley-Terry labels on the true reward
    flip_share: float = 0.0  # share of labels turned round after they are drawn


@dataclass
class DatasetConfig:
    name: str = "toy"
    source: str = "toy"  # toy | file | hub
    path: Any = None  # source=file: a file, a glob such as 'data/*.parquet', or a list of either
    format: str = "auto"  # auto, or one of data.formats.READERS
    on_invalid: str = "error"  # error | skip: leave rows out that cannot be used, count and list them in invalid.jsonl
    max_invalid_share: float = 0.01  # on_invalid=skip: fail above this share of the rows
    hub_name: str | None = None  # source=hub
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_split: str | None = None  # the hub's split to read, where it is not called train
    hub_test_split: str | None = None  # and the one that becomes test
    workers: int | None = None  # processes that tokenize; null: one a core
    template: str = "raw"  # raw | hh | alpaca | tldr | chat
    max_length: int = 512  # tokens of query + one response, end of sequence included
    max_truncated_share: float = 0.25  # fail above this share of records that had to be cut
    validation_share: float = 0.05  # of the queries
    test_share: float = 0.10
    split_seed: int = 0
    max_records: int | None = None  # use only the first ones of each split, for trying out
    toy: ToyConfig = field(default_factory=ToyConfig)


@dataclass
class LoraConfig:
    """LoRA (rdo/adapters.py). It has no dropout, which would put noise into every log-ratio."""

    rank: int | None = None  # null: all weights are trained; RDO's KTO runs used 8 (its section A.1.1)
    alpha: float = 16.0  # what an adapter adds is scaled by alpha / rank
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])  # or names, such as [q_proj,v_proj]
    merge: bool = False  # save the whole model with the adapter in it, instead of the adapter


@dataclass
class ModelConfig:
    """Where the policy comes from: `path` (local or hub), or else a Llama built from scratch."""

    name: str = "toy"
    path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "float32"  # float32 | bfloat16 | float16 | float64
    tokenizer: str = "toy"  # toy | byte_pair | path; with `path` set, null means the model's own
    vocabulary_size: int = 8192  # of a byte_pair tokenizer
    hidden_size: int = 64
    intermediate_size: int = 128
    layers: int = 2
    heads: int = 4
    key_value_heads: int | None = None  # fewer than heads: grouped queries
    max_positions: int = 512
    lora: LoraConfig = field(default_factory=LoraConfig)
    # Texts around query, first and second response in the difference model's input (RDO section 3.1).
    difference_template: list[str] = field(default_factory=lambda: ["Query: ", "; Response 1: ", "; Response 2: "])


@dataclass
class TrainingConfig:
    """One training run. Learning rates are those at the top of the schedule."""

    learning_rate: float = 1e-5
    batch_size: int = 64  # records an optimizer step, over all processes and accumulation steps
    epochs: int = 1
    max_steps: int | None = None  # stop early; the schedule ends there
    warmup_share: float = 0.03
    schedule: str = "constant"  # constant | linear | cosine
    weight_decay: float = 0.0
    max_gradient_norm: float | None = 1.0
    min_responses: int = 1  # train on the records with at least so many responses
    max_records: int | None = None  # train on so many of them at most


@dataclass
class SftConfig(TrainingConfig):
    enabled: bool = True  # false: model.path is the base policy as it is
    responses: str = "chosen"  # chosen | all: which responses of a record to imitate (demonstrations: theirs)


@dataclass
class ScorerConfig(TrainingConfig):
    """The pointwise reward model, section rm."""

    head_learning_rate: float | None = None  # null: as the backbone
    path: str | None = None  # use this finished scorer instead of training one
    backbone: str | None = None  # put the head on this model (decoder or encoder) instead of the base policy


@dataclass
class DifferenceConfig(ScorerConfig):
    """The difference model, section diffmodel."""

    form: str = "paper"  # paper | antisymmetric | residual
    beta0: float = 0.0  # weight of the duplication regulariser f(y, y)^2
    beta1: float = 0.0  # weight of the reverse regulariser (f(a, b) + f(b, a))^2


@dataclass
class RcConfig:
    """Reward difference coefficients: w = R^alpha."""

    name: str = "none"  # none | reward | diff | oracle (toy world)
    alpha: float = 0.5
    negative: str = "clip"  # clip | abs | flip | floor | error: what R < 0 becomes
    epsilon: float = 1e-3  # of negative=floor
    scale: str = "none"  # none | mean: divide by the mean weight over the training set
    order: str = "forward"  # forward | antisymmetric: which f of the difference model is R
    control: str = "none"  # none | shuffle | filter: controls of the toy study
    scores: str | None = None  # the finished folder of a stage=score to read R from, instead of making it


@dataclass
class EvalConfig:
    subject: str = "policy"  # policy | base, or a scorer: reward | diff
    split: str = "test"  # test | validation (to choose settings by, such as beta0 and beta1)
    prompts: int = 256  # of the split; 300 in the paper
    decoding: str = "sample"  # greedy | sample
    temperature: float = 1.0
    max_new_tokens: int = 128
    batch_size: int = 64
    judges: list[str] = field(default_factory=lambda: ["oracle", "reward", "diff"])
    samples: int = 8  # of a policy, handed to the report


@dataclass
class InspectConfig:
    """Stage inspect."""

    records: int = 10000  # of each split, how many are examined, evenly spaced


@dataclass
class BenchConfig:
    """Stage bench: what is measured, and against whom."""

    works: list[str] = field(default_factory=lambda: list(BENCH_WORKS))
    # trl: as shipped. trl_best: reference known before, no checkpointing. padded: rows, bucketed. unpadded: one by one
    against: list[str] = field(default_factory=lambda: ["trl", "trl_best", "padded", "unpadded"])
    threads: list[int] = field(default_factory=list)  # of a CPU; none given: one, then all cores
    rounds: int = 3  # that everybody is timed in
    pairs: int = 8  # of a step of DPO; works that cost more take a part of them
    growth: bool = True  # the table of what a step costs when something grows
    epoch_pairs: int = 16  # of an epoch of DPO from files to a saved model, against TRL's Trainer.train(); 0: none


@dataclass
class EngineConfig:
    name: str = "torch"  # torch: one process; zero1 | zero2 | zero3 | zero3_offload: DeepSpeed, any number of processes
    precision: str = "float32"  # of a training step: float32 | bfloat16 | float16 | auto: the best that the device has
    layout: str = "auto"  # auto | forest | flat
    attention: str = "auto"  # of a forest: auto | rectangles | spans | varlen | flex (the last two on a GPU)
    gradient_checkpointing: bool = False  # less memory for about a third more time: layers run again going backward
    tokens_per_micro_batch: int = 16384
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # of a CPU; null: one a core
    products: str = "auto"  # of matrices, on a CPU: torch | onednn | auto: onednn on AMD's, twice as fast there
    checkpoint_every_steps: int = 200
    checkpoint_every_minutes: float = 10.0
    keep_checkpoints: int = 2
    records_per_shard: int = 1024  # of scores and references: at most so many are done again after an interruption


@dataclass
class TrackerConfig:
    name: str = "none"  # none | wandb; a JSON-lines file of all metrics is written always
    project: str = "rdo"
    group: str | None = None  # null: the name of run_dir, so that the points of a sweep are in one


@dataclass
class StageConfig:
    name: str = "pipeline"


@dataclass
class ReportConfig:
    """The rows of the comparison: a name and the overrides that make it, run for every world and seed."""

    title: str = "Reward Difference Optimization"
    folder: str = "report"  # in run_dir
    found: bool = False  # stage=report: report whatever evaluations are finished in run_dir (a sweep), not `rows`
    rows: dict[str, list[str]] = field(default_factory=dict)
    worlds: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass
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
    bench: BenchConfig = field(default_factory=BenchConfig)
    run_dir: str = "runs/toy"
    metric: str | None = None  # what a stage returns to a sweep (rdo/metric.py); null: of eval, its main number
    seed: int = 0
    build_inputs: bool = True  # false: a missing input is an error that names the command that makes it
