"""The configuration as one typed, frozen tree; field docstrings are the help texts.

Built by `config.load` from files, dictionaries and overrides; read by plan, engine and train.
It holds what the user asks, never what is derived from it: `None` means "decide for me", and
whoever decides writes the number and its origin into the run folder. No tensor library here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sixfold.config.names import Names

DType = Literal["fp64", "fp32", "bf16", "fp16"]
Schedule = Literal[
    "gpipe", "1f1b", "interleaved", "breadth-first", "zero-bubble-h1", "zero-bubble-h2", "zero-bubble-v"
]
WideDType = Literal["fp64", "fp32", "bf16"]
Spread = Literal["whole", "group", "all"]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Shared rules: frozen, strict about types and about unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        populate_by_name=True,
    )


class ModelConfig(Section):
    """The reference decoder that `sixfold train` builds, and rules for modules in general."""

    width: Positive = 256
    """Size of the residual stream."""
    num_layers: Positive = 6
    """Number of decoder blocks."""
    num_heads: Positive = 4
    """Query heads; must divide width."""
    num_kv_heads: Positive | None = None
    """Key and value heads; must divide num_heads. Unset: as many as num_heads."""
    ffn_width: Positive | None = None
    """Hidden size of the feed-forward part. Unset: 8/3 of width, rounded up to a multiple of 64."""
    rope_base: Annotated[float, Field(gt=1.0)] = 10_000.0
    """Base of the rotary position frequencies."""
    tie_embeddings: bool = True
    """Use the token embedding as output head too."""
    dropout: Fraction = 0.0
    """Dropout probability on embeddings and on both branches of a block."""
    num_experts: Positive | None = None
    """Feed-forward parts in each block, each of ffn_width, of which every token takes a few. Unset: one that
    all take."""
    expert_choices: Positive | None = None
    """Experts that each token takes. Unset: 2."""
    shared_experts: Positive | None = None
    """Further parts of ffn_width that every token takes besides. Unset: none."""
    expert_capacity: Annotated[float, Field(gt=0.0)] | None = None
    """Tokens of a sample that an expert takes, as a multiple of an equal share; later ones go without it.
    Unset: all."""
    balance: Literal["loss", "bias"] | None = None
    """What keeps experts equally busy: a "loss" on scores of those that were busier in the update before, or
    a "bias" on the choice that moves after each update. Unset: nothing."""
    balance_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Weight of that loss, or how far the bias moves. Unset: 0.01."""
    router_z: Annotated[float, Field(gt=0.0)] | None = None
    """Weight of a loss on the squared log-sum-exp of a router's scores. Unset: none."""
    hf: Path | None = None
    """Folder or config.json of a causal Hugging Face model to train in place of the reference decoder. A
    folder with safetensors files gives the weights too; else they are drawn."""
    weights: Path | None = None
    """Folder of safetensors files, or a checkpoint, to start from. Unset: those of model.hf, if any."""
    lora_rank: Positive | None = None
    """Freeze the model and train adapters of this rank beside its projections. Unset: none."""
    lora_alpha: Annotated[float, Field(gt=0.0)] | None = None
    """Adapters count alpha / rank. Unset: twice the rank."""
    lora_targets: tuple[str, ...] | None = None
    """Ends of the names of projections that get adapters. Unset: q_proj and v_proj."""
    lora_from: Path | None = None
    """Folder of adapters, as peft writes them, to go on with. Unset: fresh ones."""
    batch_stats: Literal["micro"] | None = None
    """"micro" accepts batch statistics (BatchNorm) taken over each micro-batch. Unset: refused where
    a batch is cut over ranks or micro-batches."""


class DataConfig(Section):
    """The text that `sixfold train` learns from, and how it becomes tokens."""

    path: Path | None = None
    """Folder of text files, a .jsonl or .parquet file, or a corpus that `sixfold data build` made. Unset:
    the source files of this Python's standard library."""
    sources: tuple[str, ...] | None = None
    """Several of these in place of path, each blended in by its weight."""
    weights: tuple[Annotated[float, Field(gt=0.0)], ...] | None = None
    """Part of the samples that come from each source, in their order. Unset: as many as each has."""
    include: tuple[str, ...] = ("*.py",)
    """File name patterns taken from a folder, at any depth."""
    text_field: str = "text"
    """Key or column that holds the text in .jsonl and .parquet files."""
    max_mb: Annotated[float, Field(gt=0.0)] | None = None
    """Upper bound on the text used of each source, in MB (1e6 bytes). Unset: all of it."""
    tokenizer: str | None = None
    """"bpe" trains one on the text, "bytes" has one entry for each byte; else a tokenizer.json of Hugging
    Face, or the folder that holds it. Unset: the one that comes with model.hf, if any, else bpe."""
    vocab_size: Annotated[int, Field(ge=257, le=65_536)] | None = None
    """Entries of the byte-level BPE vocabulary, the 256 bytes and the document mark included. Unset:
    4096."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens per sample."""
    documents: Literal["joined", "separate"] = "joined"
    """Documents share samples. "separate": a token attends to its own document alone, and nothing is
    predicted from another one."""
    held_out_documents: Positive = 60
    """Documents of each source kept aside for evaluation, chosen by a hash of their names."""
    cache: Path | None = None
    """Folder of prepared corpora. Unset: ~/.cache/sixfold."""


class BatchConfig(Section):
    """The global batch of one update; what follows from it is derived and printed."""

    global_: Annotated[Positive | None, Field(alias="global")] = None
    """Samples per update over all ranks."""
    tokens: Positive | None = None
    """Tokens per update over all ranks, in place of `global`; a multiple of data.sequence_length."""
    micro: Positive | None = None
    """Samples per forward pass on one rank. Unset: the rank's whole share at once."""


class LayoutConfig(Section):
    """How many ranks along each axis, and what its blocks do for memory and speed."""

    data: Positive | None = None
    """Data-parallel ranks. Unset: all ranks that the other axes leave."""
    zero: Annotated[int, Field(ge=0, le=3)] | None = None
    """Residency preset of model state, 0 to 3. Unset: 0."""
    shard: Positive | None = None
    """Replicas (ranks along data and context) per hybrid group that a residency cuts over. Unset: all."""
    parameters: Spread | None = None
    """Working parameters between their uses: "whole", cut over the "group" of layout.shard ranks, or over
    "all" replicas (ranks along data and context). Unset: as layout.zero says."""
    gradients: Spread | None = None
    """Accumulated gradients, in the same words; whole, or cut like the optimizer's state."""
    reduce: Literal["each", "last"] | None = None
    """When gradients cross ranks: after each micro-batch, or once after the last, held whole until then.
    Unset: each where gradients are cut, last where they are whole."""
    optimizer: Spread | None = None
    """Master weights and optimizer state, in the same words."""
    blocks: tuple[str, ...] | None = None
    """Name patterns ("encoder.layer.*") of the modules that are gathered, recomputed and compiled one at a
    time. Unset: the repeated blocks, found by structure."""
    prefetch_mb: Annotated[float, Field(ge=0.0)] | None = None
    """Working parameters gathered ahead of their use, MB (1e6 bytes). Unset: always the next unit."""
    tensor: Positive = 1
    """Ranks along the tensor axis: layers, heads and the vocabulary are cut."""
    tensor_rules: tuple[str, ...] | None = None
    """How modules are cut over it, in place of what is found: "pattern = style" ("layers.*.fc1 = colwise"; *
    stands for one part of a name), one of the styles in docs/axes/tensor.md. Unset: the model's own plan, or
    else what its structure allows."""
    sequence_parallel: bool = False
    """Between blocks, and in their norms, each rank of the tensor axis keeps its part of the sequence."""
    pipe: Positive = 1
    """Ranks along the pipe axis: the model is cut into stages, in order."""
    schedule: Schedule | None = None
    """Order of forwards and backwards in a pipeline (`docs/schedules.md`). Unset: 1f1b."""
    virtual_stages: Positive | None = None
    """Stages on each rank of a pipeline. Unset: as many as the schedule has, else 1."""
    balance: tuple[Positive, ...] | None = None
    """Blocks (layers, or children of a Sequential) of each stage. Unset: cut by cost."""
    cost: Literal["estimated", "measured"] | None = None
    """What stages are cut by: costs "estimated" from shapes, or "measured" by rank 0, which runs every part
    on a batch of the real shape. Unset: estimated."""
    context: Positive = 1
    """Ranks along the context axis: each sequence is cut over them (`docs/axes/context.md`)."""
    expert: Positive = 1
    """Groups that the data and context ranks are dealt out to, each with other experts of every layer."""
    loss_chunk: NonNegative | None = None
    """Tokens whose scores exist at once, forward and backward; 0: those of a micro-batch. Unset: the same up
    to 256 MiB of scores, beyond that as many as fit into 64 MiB."""
    recompute: Literal["full", "selective"] | None = None
    """What backward computes again in each repeated block, to keep less from forward: "full" everything,
    "selective" all but matrix products with weights and fused attention. Unset: nothing."""
    compile: str | None = None
    """Backend of `torch.compile` for each repeated block, for example "inductor". Unset: not compiled."""
    transport: Literal["host", "network"] | None = None
    """How ranks of one host exchange: "host" through memory that they share, refused where that cannot
    be, "network" through a process group. Unset: shared memory where it is possible, between CPUs."""


class PrecisionConfig(Section):
    """The number types of training."""

    compute: DType | None = None
    """Type of forward and backward. Unset: the model's own; for `sixfold train`, bf16 where its products are
    faster by a tenth than those of fp32, measured once before ranks start, else fp32."""
    storage: DType | None = None
    """Type in which the model is shown whole and written. Unset: fp32, or fp64 under fp64."""
    grad: DType | None = None
    """Type in which gradients accumulate. Unset: fp32, or fp64 under fp64."""
    reduce: DType | None = None
    """Type in which gradients cross ranks. Unset: the type of grad."""
    master: WideDType | None = None
    """Type of the weights the optimizer updates. Unset: fp32, or fp64 under fp64."""
    loss_scale: Annotated[float, Field(gt=0.0)] | None = None
    """Fixed factor on the loss under fp16, taken off the gradients again. Unset: found while training."""
    initial_scale: Annotated[float, Field(ge=1.0)] | None = None
    """Where the loss scale that is found while training starts. Unset: 65536."""
    growth_steps: Positive | None = None
    """Finite updates in a row after which that loss scale is doubled. Unset: 2000."""


class OptimizerConfig(Section):
    """The optimizer, when it is named here and not handed over from Python."""

    name: Annotated[str, Names("optimizer", ("adamw", "sgd", "adagrad", "muon"))] = "adamw"
    """Which torch optimizer; "muon" is for the matrices of repeated blocks, with adamw for the rest. A plugin
    is called with the parameters, lr, and those of betas, eps, momentum and weight_decay that are set;
    "torch.optim:RAdam" is one."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] | None = None
    """Decay rates of adamw's two moments, beside muon too. Unset: 0.9 and 0.999."""
    eps: Annotated[float, Field(gt=0.0)] | None = None
    """Added to the denominator of adamw, beside muon too, and adagrad. Unset: torch's own."""
    momentum: Fraction | None = None
    """Momentum of sgd and muon. Unset: 0, and 0.95."""
    weight_decay: Annotated[float, Field(ge=0.0)] | None = None
    """Weight decay of every parameter. Unset: torch's own for this optimizer."""
    clip_norm: Annotated[float, Field(gt=0.0)] | None = None
    """Upper bound on the global gradient norm. Unset: no clipping."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay rate of a moving average of the weights, kept beside them. Unset: none is kept."""


class LRScheduleConfig(Section):
    """The learning rate over the run, as a factor on the peak."""

    name: Annotated[str, Names("schedule", ("constant", "linear", "cosine"))] = "constant"
    """Shape after the warm-up; all but constant end at train.steps. A plugin is called with the part of the
    rest that is done, 0 to 1, and returns the factor, 1 to 0."""
    warmup_steps: NonNegative = 0
    """Updates over which the rate rises linearly from zero."""
    final_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Where all but constant end, as a part of the peak."""


class TrainConfig(Section):
    """The run."""

    steps: Positive | None = None
    """Updates in the run."""
    minutes: Annotated[float, Field(gt=0.0)] | None = None
    """Time for the updates, in place of `steps`; given at a resume, for those to come. A rehearsal makes it a
    number of steps, which timed updates correct as they come. A resumed run keeps the last number."""
    eval_every: Positive | None = None
    """Updates between evaluations on the held-out part. Unset: only at the end."""
    prompt: str = "def "
    """Start of the sample completion."""
    sample_tokens: NonNegative = 64
    """Tokens in the sample completion; 0 for none."""
    folder: Path = Path("runs")
    """Where run folders are made."""
    loss: Annotated[str, Names("loss")] | None = None
    """A loss in place of cross-entropy: a function of scores [rows, vocabulary] and targets [rows] that
    returns their summed loss. Unset: cross-entropy."""
    callbacks: tuple[Annotated[str, Names("callback")], ...] = ()
    """Habits of your own around updates, called on every rank before the run saves."""


class CheckpointConfig(Section):
    """When the state is saved."""

    every: Positive | None = None
    """Updates between saves. Unset: only at the end and when interrupted."""
    keep_last: Positive = 2
    """Newest complete checkpoints kept in the run folder."""
    keep_every: Positive | None = None
    """Besides, checkpoints after a multiple of so many updates are kept for good. Unset: none."""
    asynchronous: bool = False
    """Copy the state to host memory and train on while it is written."""
    when_busy: Literal["wait", "refuse"] = "wait"
    """What a save does while an earlier one is still being written."""


class MonitorConfig(Section):
    """What is measured while the run goes."""

    every: Positive = 1
    """Updates between records of metrics."""
    sinks: tuple[Annotated[str, Names("sink", ("tensorboard", "wandb", "prometheus"))], ...] = ()
    """Where records of metrics go besides metrics.jsonl. One that fails is left out."""
    peak_tflops: Annotated[float, Field(gt=0.0)] | None = None
    """What one rank could do in 1e12 operations a second, for the utilisation figure. Unset: measured
    at the start by a matrix product."""


class LaunchConfig(Section):
    """How ranks are started on this machine."""

    ranks: Positive | None = None
    """Ranks on this machine. Unset: one per core, or per GPU."""
    threads: Positive | None = None
    """Compute threads per rank. Unset: the cores divided by the ranks."""
    timeout_s: Annotated[float, Field(gt=0.0)] = 300.0
    """How long a rank waits for the others in one exchange before the hang is told and the run ended."""
    start_timeout_s: Annotated[float, Field(gt=0.0)] = 900.0
    """The same until the first update is done: meeting, sharing weights, compiling."""
    save_timeout_s: Annotated[float, Field(gt=0.0)] = 1800.0
    """The same while checkpoints are written or read."""


class Config(Section):
    """What the user asks."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Root of every random stream."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    layout: LayoutConfig = LayoutConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: LRScheduleConfig = LRScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    launch: LaunchConfig = LaunchConfig()
