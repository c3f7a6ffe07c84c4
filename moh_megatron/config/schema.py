"""Every configuration value of the project: typed, frozen, validated. No torch here.

A key is written ``section.key``, in YAML and on the command line alike. Rules that involve one section stand here;
rules across sections stand in ``validate.py``. Values the MoH paper does not give are marked *(ours)*.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from moh_megatron.config.schema_monitor import EvaluateConfig, MonitorConfig
from moh_megatron.config.types import (
    Bool,
    Float,
    Fraction,
    HeadBudget,
    HeadSet,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    ShardText,
    SourceName,
    TextTemplate,
)

_FORBID_UNKNOWN = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class RunConfig:
    """Where a run lives and what makes it reproducible."""

    dir: PathText
    """Run folder: configuration, metrics, TensorBoard files, checkpoints."""
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 1234
    """Seed of initialisation, data order and text samples."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class RopeScaling:
    """RoPE's frequencies slowed down, so that a model reaches beyond the context it was first trained on."""

    type: Literal["llama3", "linear"]
    """llama3: long waves by factor, short ones not at all, those between in part (LLaMA 3.1); linear: all of them."""
    factor: Annotated[Float, Field(ge=1)]
    low_freq_factor: PositiveFloat = 1.0
    """Waves longer than original_max_position_embeddings over this are slowed down in full; llama3 only."""
    high_freq_factor: PositiveFloat = 4.0
    """Waves shorter than original_max_position_embeddings over this are left alone; llama3 only."""
    original_max_position_embeddings: PositiveInt = 8192
    """The context the model was first trained on; llama3 only."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class ModelConfig:
    """A LLaMA-like decoder: RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases. Names as in Megatron-core."""

    num_layers: Annotated[Int, Field(gt=0, le=10_000)]
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    vocab_size: PositiveInt
    """Rows of the embedding. The tokenizer may have fewer entries; a trained one gets exactly this many."""
    vocab_padding: NonNegativeInt = 0
    """How many of these rows, the last ones, are no tokens: conversion adds them where parallel.tensor would not divide
    the vocabulary, and drops them on export. Their logits are minus infinity."""
    num_query_groups: PositiveInt | None = None
    """Key/value heads; null means one per query head (multi-head attention)."""
    kv_channels: PositiveInt | None = None
    """Size of one head; null means hidden_size / num_attention_heads."""
    max_position_embeddings: PositiveInt | None = None
    """Longest context the exported model announces; null means train.sequence_length."""
    rotary_base: PositiveFloat = 10000.0
    rope_scaling: Annotated[RopeScaling | None, "mapping, below, or null"] = None
    """null leaves RoPE's frequencies as rotary_base gives them."""
    norm_epsilon: PositiveFloat = 1e-5
    tie_word_embeddings: Bool = False
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of every weight's initialisation *(ours)*."""
    scaled_residual_init: Bool = True
    """Divide the deviation of the two projections that write to the residual stream by sqrt(2 num_layers) *(ours)*."""

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def tokens(self) -> int:
        """Rows of the embedding that are tokens."""
        return self.vocab_size - self.vocab_padding

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class MoHConfig:
    """Mixture-of-Head attention (arXiv 2410.11842)."""

    enabled: Bool = True
    """false gives the dense twin: the same weights' shapes, no router, every head at gate 1."""
    shared_heads: HeadSet = None
    """Heads every token uses: how many (moh.shared_placement says which), or a list of heads for each layer. The
    paper's from-scratch runs do not state theirs."""
    shared_placement: Literal["first", "spread", "calibrated"] = "first"
    """Which heads are shared where moh.shared_heads is a number: the first ones of each layer, as in the paper; the
    same number in each KV group, which balances every tensor-parallel size; or, in continue-tuning, those of each layer
    whose removal from the dense model raises its loss on training text most."""
    active_heads: HeadBudget = None
    """All heads a token uses, the shared ones included: one number, a list with one for each layer, or a percentage
    of model.num_attention_heads."""
    activation_schedule_steps: NonNegativeInt = 0
    """Steps in which the heads a token uses go down evenly from all of them to active_heads; 0: active_heads from the
    start *(ours)*."""
    calibration_sequences: PositiveInt = 4
    """How many training sequences shared_placement: calibrated measures on; it takes a pass over them for every head
    *(ours)*."""
    router: Literal["learned", "query_norm"] = "learned"
    """learned: eq. 5-6; query_norm: parameter-free, by the norm of each head's query (continue-tuning)."""
    gating: Literal["normalized", "paper"] = "normalized"
    """normalized: the official code's gates, 1 each at uniform logits; paper: eq. 5-6 as printed."""
    balancing: Literal["loss", "bias"] = "loss"
    """loss: the balance loss of eq. 7-8; bias: no loss, but a bias on each routed head's score, added for selection
    only and moved by bias_update_rate against the head's load after every step (arXiv 2408.15664)."""
    balance_loss: Literal["scaled", "paper"] = "scaled"
    """scaled: the official code's, n_routed * sum P f; paper: eq. 7, sum P f. Both are averaged over layers."""
    balance_coefficient: NonNegativeFloat = 0.01
    """beta of eq. 8; not used with balancing: bias."""
    bias_update_rate: PositiveFloat = 0.001
    """How far a step moves a bias, in units of the score: a logit, or a query norm over its deviation *(ours)*."""
    z_loss_coefficient: NonNegativeFloat = 0.0
    """Weight of the z-loss, the mean squared logsumexp of a token's routing logits (arXiv 2202.08906, eq. 5), averaged
    over layers; learned router only *(ours)*."""
    straight_through: Literal["chosen", "all"] = "chosen"
    """The gradient of the query_norm router's gates (eq. 9-10). chosen: of the heads a token uses; a skipped head has
    no output, so its gate has no gradient from the task. all: of every head; every head is then computed."""
    router_init_std: PositiveFloat | None = None
    """Deviation of the routers' initialisation *(ours)*; null means model.init_method_std."""
    freeze_router: Bool = False
    """Keep the learned router's weights as they are *(ours)*."""
    backend: Literal["auto", "dense", "gathered", "cpu", "triton"] = "auto"
    """How attention is computed: dense computes every head and drops the rest; gathered (PyTorch, any device), cpu
    (C++, one thread) and triton (CUDA) skip what is not active; auto takes the fastest that was measured for a
    layer's share of active heads, the length and the device: on a GPU, and with several threads (one rank on a machine
    of several cores), dense until someone has measured there."""
    head_layout: Literal["interleaved", "contiguous"] = "interleaved"
    """How KV groups are placed on tensor-parallel ranks: interleaved gives each its share of shared heads."""

    @property
    def balance_weight(self) -> float:
        """What the balance loss counts: beta, or nothing where biases balance."""
        return self.balance_coefficient if self.balancing == "loss" else 0.0

    @property
    def fixed_backend(self) -> str | None:
        """What computes attention whatever the shape and the device; None where auto chooses."""
        if not self.enabled or self.straight_through == "all":
            return "dense"
        return None if self.backend == "auto" else self.backend


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class ParallelConfig:
    """How the model is spread. Data parallelism is what remains of the world size."""

    tensor: PositiveInt = 1
    sequence: Bool = False
    """Megatron's sequence parallelism: shards the activations outside attention and MLP over the tensor ranks."""
    zero_stage: Annotated[Int, Field(ge=0, le=3)] = 1
    """What data-parallel ranks share out instead of each holding all of it: 0 nothing, 1 optimizer state, 2 also
    gradients, 3 also parameters."""
    offload_optimizer: Bool = False
    """Keep the optimizer state in host memory and update the weights there (ZeRO-Offload); stages 1 to 3."""
    pipeline: PositiveInt = 1
    context: PositiveInt = 1


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class TokenizerConfig:
    path: str | None = None
    """A tokenizer.json, a SentencePiece .model, or a folder that holds one; null: prepare_data trains one on
    data.inputs, of model.vocab_size entries."""
    grow_to: PositiveInt | None = None
    """Give the BPE of tokenizer.path pieces learned on data.inputs, so many entries in all; every old id stays."""
    algorithm: Literal["sentencepiece_bpe", "sentencepiece_unigram", "byte_level_bpe"] = "sentencepiece_bpe"
    """What is trained: SentencePiece's BPE or Unigram with byte fallback, or a BPE over bytes as GPT-2's."""
    user_symbols: tuple[str, ...] = ()
    """Texts that a trained tokenizer takes as one token wherever they stand."""
    character_coverage: PositiveFraction = 0.9995
    """Share of the training characters that get a piece of their own, with SentencePiece; the rest are encoded as
    bytes *(ours)*."""
    sample_bytes: PositiveInt = 1_000_000_000
    """Bytes of text a tokenizer is trained on, taken evenly from the whole of data.inputs."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class SourceConfig:
    """One of several corpora that are prepared apart and mixed in training."""

    name: SourceName
    weight: NonNegativeFloat
    """Of the sequences, relative to the others' weights."""
    inputs: tuple[str, ...] = ()
    """As data.inputs."""
    dir: PathText | None = None
    """Folder of its prepared dataset; null means <data.dir>/<name>."""
    text_key: str | None = None
    """null: data.text_key."""
    template: TextTemplate = None
    """null: data.template."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class WeightChange:
    """Other weights from a step on."""

    step: PositiveInt
    weights: dict[SourceName, NonNegativeFloat]
    """Of the sources that change."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class DataConfig:
    dir: PathText | None = None
    """Folder of the prepared dataset; null means <run.dir>/data."""
    inputs: tuple[str, ...] = ()
    """What prepare_data reads: .jsonl (or .json, one record a line too) and .txt (plain, .gz, .zst), .parquet,
    save_to_disk folders, folders of such files, globs, and hf:REPOSITORY[@REVISION][:SUBSET[:SPLIT]] for the Hugging
    Face hub."""
    text_key: str = "text"
    """The field of a record that holds the text."""
    sources: Annotated[tuple[SourceConfig, ...], "list of sources, below"] = ()
    """Several corpora in place of data.inputs: each is prepared apart, and training mixes them by their weights."""
    weight_changes: Annotated[tuple[WeightChange, ...], "list of changes, below"] = ()
    """Other weights of the sources from given steps on; one that lies ahead may be added when a run is resumed."""
    template: TextTemplate = None
    """Several fields as one text, such as "{title}\\n\\n{body}"; null: text_key alone."""
    text_unit: Literal["file", "paragraph", "line"] = "file"
    """What makes one document of a .txt file; paragraphs end at a blank line."""
    shard: ShardText = None
    """i/n, from 1/n to n/n: prepare only this share of the parts; prepare_data without it does what is left and puts
    the dataset together."""
    workers: PositiveInt | None = None
    """Cores to encode on; null: all this process may use."""
    max_document_bytes: Annotated[Int, Field(ge=16)] = 4_000_000
    """Longer documents are encoded in pieces of at most 1 MiB, and stored as one document."""
    max_record_bytes: PositiveInt = 32_000_000
    """A longer line of a .jsonl (.json) file is rejected: it would have to be held in memory."""
    max_reject_fraction: Fraction = 0.001
    """Largest share of the records that may be rejected; above it there is no dataset."""
    normalization: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode normalisation of every text."""
    drop_shorter: PositiveInt | None = None
    """Leave out documents of fewer characters."""
    drop_longer: PositiveInt | None = None
    """Leave out documents of more characters."""
    deduplicate: Bool = False
    """Keep only the first of the documents with the same text."""
    validation_fraction: Fraction = 0.01
    """Share of the documents held out, chosen by a hash of their text; 0: none, and no validation loss."""
    ngram_baselines: Bool = False
    """Measure unigram and bigram cross-entropies of the validation tokens, to compare a model with."""
    document_mask: Bool = False
    """Keep attention inside each of the documents that share a sequence, in training and validation, with positions
    that restart at each; false: attention crosses their borders."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class OptimizerConfig:
    """AdamW with a schedule: linear warm-up, then the chosen shape down to min_learning_rate."""

    learning_rate: PositiveFloat
    min_learning_rate: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """wsd: warm-up, stable, then a linear decay over the last decay_fraction of the steps."""
    warmup_steps: NonNegativeInt = 0
    warmup_learning_rate: NonNegativeFloat = 0.0
    """Where the warm-up starts."""
    decay_fraction: PositiveFraction = 0.1
    """Share of all steps in which wsd decays."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices; norms are spared."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class TrainConfig:
    sequence_length: PositiveInt
    total_tokens: PositiveInt
    """Tokens to train on; rounded up to whole steps."""
    global_batch_size: PositiveInt
    """Sequences a step, over all data-parallel ranks and accumulation steps."""
    micro_batch_size: PositiveInt = 1
    """Sequences a rank works on at once."""
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: selective repeats core attention in the backward pass, full repeats whole layers."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest complete checkpoint of the run folder, if there is one; never: start anew, refused
    where the run folder already holds checkpoints."""
    init_from: PathText | None = None
    """A checkpoint (or a folder of them) whose weights start this run, with a fresh optimizer and data position."""
    eval_interval: NonNegativeInt = 1000
    """Steps between validations; 0: only at the end."""
    eval_samples: PositiveInt | None = 1024
    """Validation sequences; null: all there are."""
    max_seconds: PositiveFloat | None = None
    """Save and stop with exit code 75 after the step in which a rank has run so long; null: no limit."""
    timeout_seconds: PositiveFloat = 600.0
    """How long a micro-batch may take, and how long a rank may give no sign of life, before the others end."""
    max_bad_steps: NonNegativeInt = 10
    """How many steps in a row may be skipped, for a loss or gradient that is not finite, or a spike; one more ends the
    run."""
    spike_zscore: PositiveFloat | None = 6.0
    """Standard deviations above the mean of the last spike_window losses that make a loss a spike; null: none is."""
    spike_window: Annotated[Int, Field(ge=2)] = 100
    skip_spikes: Bool = False
    """Skip the steps of spikes, and not only report them; costs one reduction and wait for the device a step."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        return -(-self.total_tokens // self.tokens_per_step)


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class DistillationConfig:
    """Learn from the distribution of a frozen dense model as well as from the text; not in the paper's recipe."""

    teacher: PathText | None = None
    """A checkpoint of the dense model, or a folder of them; null: no distillation. Every data-parallel rank holds its
    weights whole, cut by tensor parallelism only, in train.precision *(ours)*."""
    weight: PositiveFloat = 1.0
    """Of the loss it adds: KL(teacher || model) of each next token, nats *(ours)*."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class CheckpointConfig:
    interval: NonNegativeInt = 1000
    """Steps between saves; 0: only at the end and when stopped by a signal."""
    async_: Annotated[Bool, Field(alias="async")] = True
    """Copy the state to host memory and write it behind the training's back; false: wait until it is written."""
    keep_last: PositiveInt | None = None
    """How many of the newest checkpoints to keep; null: all."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps divisible by this are kept besides those of keep_last; null: no others are."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class GenerateConfig:
    load: PathText | None = None
    """An exported folder or a checkpoint; null means <run.dir>/hf, else the newest checkpoint of the run."""
    prompts: tuple[str, ...] = ("",)
    max_new_tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 0.8
    """0 is greedy."""
    top_k: PositiveInt | None = 50


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class Config:
    """One run, whole. ``load.py`` makes it, ``validate.py`` checks it across sections."""

    run: RunConfig
    model: ModelConfig
    moh: MoHConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    distillation: DistillationConfig = Field(default_factory=DistillationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    generate: GenerateConfig = Field(default_factory=GenerateConfig)
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Keys of DeepSpeed's own configuration, added to what is derived from the other sections. They may tune
    (zero_optimization: reduce_bucket_size, overlap_comm, ...) but not contradict it."""
