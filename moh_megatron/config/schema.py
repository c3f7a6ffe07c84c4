"""Declares every configuration key: its type, default and meaning. Imports no torch.

A key is written ``section.key``, in YAML and on the command line. Types check single values; ``validate.py`` checks
rules between keys. ``docs/configuration.md`` is generated from these docstrings. Values that the MoH paper does not
give are marked *(ours)*.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

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
    """The run folder and the seed."""

    dir: PathText
    """The run folder, which holds configuration, metrics, TensorBoard files and checkpoints."""
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 1234
    """The seed of weight initialisation, data order and text samples."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class RopeScaling:
    """Scales RoPE's frequencies down, so that a model works on a longer context than it was first trained on."""

    type: Literal["llama3", "linear"]
    """llama3 (LLaMA 3.1) divides the frequency of long waves by factor, keeps that of short ones, and interpolates in
    between. linear divides all frequencies by factor."""
    factor: Annotated[Float, Field(ge=1)]
    """The divisor of the scaled frequencies."""
    low_freq_factor: PositiveFloat = 1.0
    """Waves longer than original_max_position_embeddings divided by this value are scaled in full (llama3 only)."""
    high_freq_factor: PositiveFloat = 4.0
    """Waves shorter than original_max_position_embeddings divided by this value are not scaled (llama3 only)."""
    original_max_position_embeddings: PositiveInt = 8192
    """The context length the model was first trained on (llama3 only)."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class ModelConfig:
    """A LLaMA-like decoder with RMSNorm, RoPE, SwiGLU, grouped-query attention and no biases. Names are those of
    Megatron-core."""

    num_layers: Annotated[Int, Field(gt=0, le=10_000)]
    """The number of transformer layers."""
    hidden_size: PositiveInt
    """The size of the hidden states: how many numbers stand for a token between the layers. num_attention_heads divides
    it, unless kv_channels is set."""
    ffn_hidden_size: PositiveInt
    """The inner size of each MLP; about 8/3 of hidden_size is usual. SwiGLU has a gate and an up projection of this
    size."""
    num_attention_heads: PositiveInt
    """The number of query heads in each layer."""
    vocab_size: PositiveInt
    """The number of rows of the embedding. A tokenizer may have fewer entries; a trained one gets exactly this many."""
    vocab_padding: NonNegativeInt = 0
    """How many of these rows, the last ones, are no tokens; their logits are minus infinity. Conversion adds padding
    where parallel.tensor does not divide the vocabulary, and export removes it."""
    num_query_groups: PositiveInt | None = None
    """The number of key/value heads; null means one for each query head (multi-head attention)."""
    kv_channels: PositiveInt | None = None
    """The size of one head; null means hidden_size / num_attention_heads."""
    max_position_embeddings: PositiveInt | None = None
    """The longest context that the exported model declares; null means train.sequence_length."""
    rotary_base: PositiveFloat = 10000.0
    """The base of RoPE's frequencies (theta in other code)."""
    rope_scaling: Annotated[RopeScaling | None, "mapping, below, or null"] = None
    """How RoPE's frequencies are scaled for a longer context; null means not at all."""
    norm_epsilon: PositiveFloat = 1e-5
    """The epsilon that every RMSNorm adds to the mean square."""
    tie_word_embeddings: Bool = False
    """Whether the output layer shares the weight of the embedding."""
    init_method_std: PositiveFloat = 0.02
    """The standard deviation of the initial weights *(ours)*."""
    scaled_residual_init: Bool = True
    """Whether the deviation of the two projections that write to the residual stream is divided by
    sqrt(2 num_layers) *(ours)*."""

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
    """false gives the dense twin: weights of the same shapes, no router, and every head with gate 1."""
    shared_heads: HeadSet = None
    """Required unless moh.enabled is false. The heads that every token uses: their number (moh.shared_placement says
    which), or a list of heads for each layer. The paper does not state the number of its from-scratch runs."""
    shared_placement: Literal["first", "spread", "calibrated"] = "first"
    """Which heads are shared if moh.shared_heads is a number. first: the first heads of each layer, as in the paper.
    spread: the same number in each KV group, which balances every tensor-parallel size. calibrated, for
    continue-tuning: the heads whose removal from a layer of the dense model raises its loss on training text most."""
    active_heads: HeadBudget = None
    """Required unless moh.enabled is false. The number of heads a token uses, shared ones included: one number, a list
    with one for each layer, or a percentage of model.num_attention_heads."""
    activation_schedule_steps: NonNegativeInt = 0
    """The number of steps in which the heads a token uses decrease evenly from all to active_heads; 0 means
    active_heads from the start *(ours)*."""
    calibration_sequences: PositiveInt = 4
    """The number of training sequences that shared_placement: calibrated measures on. It takes one pass over them for
    every head *(ours)*."""
    routing_groups: Literal[1, "kv"] = 1
    """Where heads compete. 1: a token chooses among all heads of a layer, as in the paper. kv: it chooses equally many
    heads in each KV group; attention kernels for grouped-query attention then compute the chosen heads alone, and every
    rank does the same work *(ours; arXiv 2606.20945)*."""
    gate_softmax: Literal["layer", "group"] = "layer"
    """The heads that the learned router's gates share their weight among, with routing_groups: kv. layer: all chosen
    heads of the layer, as without groups. group: those of one KV group; with one routed head a group its gate is then
    constant, and the task does not train the router *(ours)*."""
    router: Literal["learned", "query_norm"] = "learned"
    """learned: eq. 5-6. query_norm: no parameters, by the norm of each head's query (for continue-tuning)."""
    gating: Literal["normalized", "paper"] = "normalized"
    """normalized: the gates of the official code, each 1 at uniform logits. paper: eq. 5-6 as printed."""
    balancing: Literal["loss", "bias"] = "loss"
    """loss: the balance loss of eq. 7-8. bias: no loss, but a bias on each routed head's score, which is used for
    selection only and moves by bias_update_rate against the head's load after every step (arXiv 2408.15664)."""
    balance_loss: Literal["scaled", "paper"] = "scaled"
    """scaled: n_routed * sum P f, as in the official code. paper: sum P f, eq. 7. Both are averaged over layers."""
    balance_coefficient: NonNegativeFloat = 0.01
    """The weight of the balance loss, beta of eq. 8; it has no effect with balancing: bias."""
    bias_update_rate: PositiveFloat = 0.001
    """How far a step moves a bias, in units of the score: a logit, or a query norm over its deviation *(ours)*."""
    z_loss_coefficient: NonNegativeFloat = 0.0
    """The weight of the z-loss, the mean squared logsumexp of a token's routing logits (arXiv 2202.08906, eq. 5),
    averaged over layers; for the learned router only *(ours)*."""
    straight_through: Literal["chosen", "all"] = "chosen"
    """Which gates of the query_norm router get the straight-through gradient (eq. 9-10). chosen: those of the heads a
    token uses; a skipped head has no output, so its gate gets no gradient from the task. all: those of every head, and
    every head is then computed."""
    router_init_std: PositiveFloat | None = None
    """The standard deviation of the routers' initial weights *(ours)*; null means model.init_method_std."""
    freeze_router: Bool = False
    """Whether the weights of the learned router stay as they are *(ours)*."""
    backend: Literal["auto", "dense", "slots", "gathered", "cpu", "triton"] = "auto"
    """How attention is computed. dense computes every head and zeroes the inactive ones. slots, with routing_groups:
    kv, gives the chosen heads alone to PyTorch's own attention, on any device. gathered (PyTorch, any device), cpu
    (C++, one thread) and triton (CUDA) skip inactive heads, too. auto uses the fastest one measured for a layer's
    share of active heads, the length and the device; on a GPU, and with several threads (one rank on a machine of
    several cores), that is slots with routing_groups: kv, else dense, because the others were not measured there."""
    head_layout: Literal["interleaved", "contiguous"] = "interleaved"
    """How KV groups are placed on tensor-parallel ranks. interleaved gives each rank its share of the shared heads;
    contiguous keeps the order of the heads."""

    @property
    def balance_weight(self) -> float:
        """The weight of the balance loss: beta, or 0 if biases balance."""
        return self.balance_coefficient if self.balancing == "loss" else 0.0

    @property
    def fixed_backend(self) -> str | None:
        """The backend that is used for every shape and device; None if ``auto`` chooses."""
        if not self.enabled or self.straight_through == "all":
            return "dense"
        return None if self.backend == "auto" else self.backend


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class ParallelConfig:
    """How the model is distributed. The data-parallel size is the number of ranks over parallel.tensor."""

    tensor: PositiveInt = 1
    """The tensor-parallel size: the number of ranks that share each layer's heads, MLP and vocabulary."""
    sequence: Bool = False
    """Megatron's sequence parallelism: the tensor-parallel ranks also shard the activations outside attention and
    MLP."""
    zero_stage: Annotated[Int, Field(ge=0, le=3)] = 1
    """What ZeRO partitions over the data-parallel ranks: 0 nothing, 1 the optimizer state, 2 also gradients, 3 also
    parameters."""
    offload_optimizer: Bool = False
    """Whether the optimizer state is kept and the weights are updated in host memory (ZeRO-Offload); stages 1 to 3."""
    pipeline: PositiveInt = 1
    """The pipeline-parallel size; only 1 is supported."""
    context: PositiveInt = 1
    """The context-parallel size; only 1 is supported."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class TokenizerConfig:
    """The tokenizer: an existing one, one that grows from it, or one trained on data.inputs."""

    path: str | None = None
    """A tokenizer.json, a SentencePiece .model, or a folder that holds one. With null, moh-prepare trains one of
    model.vocab_size entries on data.inputs."""
    grow_to: PositiveInt | None = None
    """Adds pieces learned on data.inputs to the BPE of tokenizer.path, up to this number of entries; every old id
    stays."""
    algorithm: Literal["sentencepiece_bpe", "sentencepiece_unigram", "byte_level_bpe"] = "sentencepiece_bpe"
    """What is trained: SentencePiece's BPE or Unigram with byte fallback, or a byte-level BPE as GPT-2's."""
    user_symbols: tuple[str, ...] = ()
    """Texts that a trained tokenizer always encodes as one token."""
    character_coverage: PositiveFraction = 0.9995
    """The share of the training characters that get a piece of their own in SentencePiece; others are encoded as
    bytes *(ours)*."""
    sample_bytes: PositiveInt = 1_000_000_000
    """The bytes of text a tokenizer is trained on, sampled evenly from data.inputs."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class SourceConfig:
    """One of several corpora, which are prepared separately and mixed in training."""

    name: SourceName
    """The name of the source, of letters, digits, '_', '.' and '-'."""
    weight: NonNegativeFloat
    """The source's share of the training sequences, relative to the weights of the others."""
    inputs: tuple[str, ...] = ()
    """The files to prepare, as in data.inputs."""
    dir: PathText | None = None
    """The folder of the source's prepared dataset; null means <data.dir>/<name>."""
    text_key: str | None = None
    """The field of a record that holds the text; null means data.text_key."""
    template: TextTemplate = None
    """Several fields as one text; null means data.template."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class WeightChange:
    """Other weights of the sources from a given step on."""

    step: PositiveInt
    """The step from which the weights apply."""
    weights: dict[SourceName, NonNegativeFloat]
    """The new weights of the sources that change."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class DataConfig:
    """The corpus and how it is prepared."""

    dir: PathText | None = None
    """The folder of the prepared dataset; null means <run.dir>/data."""
    inputs: tuple[str, ...] = ()
    """What moh-prepare reads: .jsonl (or .json with one record a line) and .txt (plain, .gz, .zst), .parquet,
    save_to_disk folders, folders of such files, globs, and hf:REPOSITORY[@REVISION][:SUBSET[:SPLIT]] for the Hugging
    Face hub."""
    text_key: str = "text"
    """The field of a record that holds the text."""
    sources: Annotated[tuple[SourceConfig, ...], "list of sources, below"] = ()
    """Several corpora in place of data.inputs. Each is prepared separately; training mixes them by their weights."""
    weight_changes: Annotated[tuple[WeightChange, ...], "list of changes, below"] = ()
    """Other weights of the sources from given steps on. A change of a later step may be added when a run is resumed."""
    template: TextTemplate = None
    """Several fields as one text, such as "{title}\\n\\n{body}"; null means text_key alone."""
    text_unit: Literal["file", "paragraph", "line"] = "file"
    """What makes one document of a .txt file; paragraphs end at a blank line."""
    shard: ShardText = None
    """i/n, from 1/n to n/n, prepares only this share of the parts. moh-prepare without it prepares the remaining parts
    and assembles the dataset."""
    workers: PositiveInt | None = None
    """The number of cores to encode on; null means all that this process may use."""
    max_document_bytes: Annotated[Int, Field(ge=16)] = 4_000_000
    """Longer documents are encoded in chunks of at most 1 MiB, and stored as one document."""
    max_record_bytes: PositiveInt = 32_000_000
    """A longer line of a .jsonl (.json) file is rejected, because it would have to be held in memory."""
    max_reject_fraction: Fraction = 0.001
    """The largest share of the records that may be rejected; if more are, there is no dataset."""
    normalization: Literal["none", "nfc", "nfkc"] = "none"
    """The Unicode normalisation of every text."""
    drop_shorter: PositiveInt | None = None
    """Documents of fewer characters are left out; null means none are."""
    drop_longer: PositiveInt | None = None
    """Documents of more characters are left out; null means none are."""
    deduplicate: Bool = False
    """Whether only the first of several documents with the same text is kept."""
    validation_fraction: Fraction = 0.01
    """The share of the documents held out for validation, chosen by a hash of their text; 0 means none, and no
    validation loss."""
    ngram_baselines: Bool = False
    """Whether unigram and bigram cross-entropies of the validation tokens are measured, to compare a model with."""
    document_mask: Bool = False
    """Whether attention stays inside each of the documents that share a sequence, in training and validation, with
    positions that restart at each; false means that attention crosses their borders."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class OptimizerConfig:
    """AdamW with a schedule: linear warm-up, then the chosen shape down to min_learning_rate."""

    learning_rate: PositiveFloat
    """The highest learning rate, reached at the end of the warm-up."""
    min_learning_rate: NonNegativeFloat = 0.0
    """The learning rate at the end of the schedule; it has no effect with schedule: constant."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """The shape of the schedule after the warm-up. wsd (warm-up, stable, decay) stays at learning_rate and decays
    linearly over the last decay_fraction of the steps."""
    warmup_steps: NonNegativeInt = 0
    """The number of steps of the linear warm-up."""
    warmup_learning_rate: NonNegativeFloat = 0.0
    """The learning rate at which the warm-up starts."""
    decay_fraction: PositiveFraction = 0.1
    """The share of all steps in which wsd decays."""
    adam_beta1: Fraction = 0.9
    """Adam's decay rate of the mean of the gradients."""
    adam_beta2: Fraction = 0.95
    """Adam's decay rate of the mean of the squared gradients."""
    adam_epsilon: PositiveFloat = 1e-8
    """The epsilon that Adam adds to the denominator of its update."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's weight decay. It applies to matrices, not to the weights of norms."""
    gradient_clipping: NonNegativeFloat = 1.0
    """The largest global gradient norm; 0 turns clipping off."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class TrainConfig:
    """The length of a run, its batches, validation, and what happens when a step fails."""

    sequence_length: PositiveInt
    """The number of tokens of a training sequence."""
    total_tokens: PositiveInt
    """The number of tokens to train on; it is rounded up to whole steps."""
    global_batch_size: PositiveInt
    """The number of sequences of a step, over all data-parallel ranks and accumulation steps."""
    micro_batch_size: PositiveInt = 1
    """The number of sequences a rank processes at once."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """The precision of weights and activations. With bf16, ZeRO keeps fp32 master weights."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes to save memory: nothing, core attention (selective) or each layer (full)."""
    resume: Literal["auto", "never"] = "auto"
    """auto resumes from the newest complete checkpoint of the run folder, if there is one. never starts anew, and is
    refused if the run folder already holds checkpoints."""
    init_from: PathText | None = None
    """A checkpoint (or a folder of them) whose weights start this run, with a fresh optimizer and data position."""
    eval_interval: NonNegativeInt = 1000
    """The number of steps between validations; 0 means only at the end."""
    eval_samples: PositiveInt | None = 1024
    """The number of validation sequences; null means all there are."""
    max_seconds: PositiveFloat | None = None
    """After the step in which a rank has run this long, the run saves and stops with exit code 75; null means no
    limit."""
    timeout_seconds: PositiveFloat = 600.0
    """How long a micro-batch may take, and how long a rank may send no heartbeat, before the others end."""
    max_bad_steps: NonNegativeInt = 10
    """The number of consecutive steps that may be skipped, because a loss or gradient is not finite or a loss is a
    spike; one more ends the run."""
    spike_zscore: PositiveFloat | None = 6.0
    """A loss is a spike if it is this many standard deviations above the mean of the last spike_window losses; null
    means none is."""
    spike_window: Annotated[Int, Field(ge=2)] = 100
    """The number of recent losses that a loss is compared with to find spikes."""
    skip_spikes: Bool = False
    """Whether steps with a spike are skipped besides being reported. This costs one reduction and one synchronisation
    with the device in each step."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        return -(-self.total_tokens // self.tokens_per_step)


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class DistillationConfig:
    """Training on the distribution of a frozen dense model besides the text; it is not in the paper's recipe."""

    teacher: PathText | None = None
    """A checkpoint of the dense model, or a folder of them; null means no distillation. Every data-parallel rank holds
    its full weights, sharded by tensor parallelism only, in train.precision *(ours)*."""
    weight: PositiveFloat = 1.0
    """The weight of the added loss, KL(teacher || model) of each next token in nats *(ours)*."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class CheckpointConfig:
    """When checkpoints are saved and which are kept."""

    interval: NonNegativeInt = 1000
    """The number of steps between saves; 0 means only at the end and when a signal stops the run."""
    async_: Annotated[Bool, Field(alias="async")] = True
    """true copies the state to host memory and writes it while training continues; false waits until it is written."""
    keep_last: PositiveInt | None = None
    """How many of the newest checkpoints are kept; null means all."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps divisible by this number are kept besides those of keep_last; null means no others are."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class MonitorConfig:
    """What a run records about itself, and which alarms it raises. Alarms go to the log and to TensorBoard."""

    log_interval: PositiveInt = 10
    """The number of steps between transfers of the metrics from the device; metrics.jsonl still has a line for each
    step."""
    tensorboard: Bool = True
    """Whether event files for TensorBoard are written to run.dir."""
    image_interval: NonNegativeInt = 100
    """The number of steps between heat maps and histograms of head load, which are drawn at a logging interval; 0 means
    none."""
    head_scalars: Bool = False
    """Whether each head of each layer also has a curve of its load: as many as there are heads in the model."""
    peak_tflops: PositiveFloat | None = None
    """The peak performance of one device, for MFU; null uses the known value of common GPUs in bf16, else MFU is left
    out."""
    wandb_project: str | None = None
    """A project of Weights & Biases to log to as well; this needs its package."""
    prometheus: PathText | None = None
    """A file that holds the newest scalars in Prometheus' text format; null means none."""
    alarm_steps: PositiveInt = 50
    """The number of steps whose means the alarms about heads, entropy and balance judge. Fewer say little: routers that
    have not learned yet choose unevenly, and so does chance in a few tokens."""
    alarm_dead_heads: PositiveFraction | None = 0.1
    """Warns of routed heads with less than this share of an even load; null means never."""
    alarm_entropy: PositiveFraction | None = 0.05
    """Warns if the entropy of a layer's routing is below this share of a uniform choice's; null means never."""
    alarm_balance: PositiveFloat | None = 0.5
    """Warns if the balance loss differs from that of an even load by more than this share of the distance to a load
    where every token uses the same heads; null means never."""
    alarm_mfu_drop: PositiveFraction | Literal["auto"] | None = "auto"
    """Warns if the speed of the last intervals, and so MFU, is lower than usual by this share, until half of the drop
    is made up for; auto means 0.3 on GPUs and never on a CPU, whose speed depends on what else runs; null means
    never."""
    alarm_slow_rank: PositiveFloat | Literal["auto"] | None = "auto"
    """Warns if data loading and forward pass of a rank take this many times those of the median rank; auto means 1.5
    on GPUs and never on a CPU; null means never."""
    profile: Bool = False
    """Whether a torch profiler trace of a few steps of rank 0 is written to <run.dir>/profile; --profile does the
    same."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class EvaluateConfig:
    """Tasks that are evaluated while a model trains, on a checkpoint, by another process on the first node."""

    suite: PathText | None = None
    """A file of tasks as in configs/eval; null means no tasks."""
    interval: NonNegativeInt = 0
    """The number of steps between evaluations, at which a checkpoint is saved; 0 means none. An evaluation that is due
    while another runs is left out."""
    limit: PositiveInt | None = 100
    """The number of questions of each task; null means all."""
    device: str = "cpu"
    """The device of the evaluation: cpu, cuda (or cuda:N) or auto; cpu leaves the GPUs to the training."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class GenerateConfig:
    """How text is generated."""

    load: PathText | None = None
    """An exported folder or a checkpoint; null means <run.dir>/hf, else the newest checkpoint of the run."""
    prompts: tuple[str, ...] = ("",)
    """The texts to continue; an empty text starts from the end-of-document token."""
    max_new_tokens: PositiveInt = 64
    """The largest number of tokens to generate for each prompt."""
    temperature: NonNegativeFloat = 0.8
    """The divisor of the logits before sampling; 0 chooses the most likely token."""
    top_k: PositiveInt | None = 50
    """Tokens are drawn from this many of the most likely ones; null means from all."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class Config:
    """The complete configuration of a run. ``load.py`` reads it, ``validate.py`` checks the rules between keys."""

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
    """Keys of DeepSpeed's own configuration, added to those derived from the other sections. They may tune DeepSpeed
    (zero_optimization: reduce_bucket_size, overlap_comm, ...) but not contradict the other sections."""
