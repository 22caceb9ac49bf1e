"""What a training run is: a TOML file with five tables, read into `TrainConfig` and, for the model, `ModelConfig`.

    >>> from blockffn.training.config import read_config
    >>> config = read_config(Path("examples/tiny-blockffn/train.toml"))
    >>> config.model.n_embd, config.optimizer.kind
    (256, 'muon')

docs/training.md explains every key. A key that nobody knows is an error that names the nearest known one; only keys
with a default in the dataclasses below may be left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockffn.convert.model import MlaConfig, ModelConfig, MoeConfig
from blockffn.errors import BlockffnError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FAMILIES = ("blockffn", "deco", "vanilla")
# What the published layout of each family can hold.
EXPERT_ACTIVATIONS = {
    "blockffn": ("silu", "relu", "gelu", "relu_squared"),
    "deco": ("silu", "relu", "gelu", "relu_squared", "norm_silu", "norm_silu_nomean", "norm_silu_norms"),
}
ROUTER_NORMS = {"blockffn": ("rms", "sum", "none"), "deco": ("none", "rms", "normal")}
BIAS_METHODS = ("base", "rms")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("float32", "bfloat16")
FACTORS = ("locality", "chunk", "entropy", "l1", "bias_rate", "use", "top_k", "load_balance")  # of [objective]
NOT_NEGATIVE = (*FACTORS, "begin", "relax", "relax_factor", "chunk_warmup", "chunk_stable")
TYPE_NAMES = {"tuple[str, ...]": "a list of strings"}


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run goes; these keys do not change what is learned, except seed and precision."""

    out: str  # folder of checkpoint, log and curve, relative to the working directory
    seed: int
    device: str = "cpu"
    precision: str = "float32"
    threads: int = 0  # 0 leaves torch's choice
    log_every: int = 10
    eval_every: int = 100
    eval_sequences: int = 16
    save_every: int = 50
    keep: int = 0  # older checkpoints to keep beside checkpoint.pt
    tensorboard: bool = False  # curves for TensorBoard too, in out/tensorboard
    sample_tokens: int = 0  # tokens of a sample at every evaluation, 0 for none
    sample_prompt: str = "def "
    recompute: bool = False  # activations of a layer anew in the backward pass: less memory, a third more work
    compile: bool = False  # torch.compile; needs a C++ compiler on CPUs


@dataclass(frozen=True)
class CorpusConfig:
    """Text and vocabulary; blockffn.training.corpora says what a source is."""

    vocab_size: int
    sources: tuple[str, ...] = ("stdlib",)
    validation: tuple[str, ...] = ()  # sources that validate; without any, documents of `sources` do
    validation_share: float = 0.12  # of the documents of `sources` are candidates
    json_field: str = "text"  # of .jsonl files
    package_mb: float = 8.0  # of a package so much text at most, in 10^6 characters
    cache: str = "build/corpus"
    tokenizer: str = ""  # an existing tokenizer.model instead of a new one


@dataclass(frozen=True)
class OptimizerConfig:
    """Batch, schedule (warm-up, stable, exponential decay) and optimizer."""

    kind: str
    learning_rate: float
    steps: int
    warmup_steps: int
    decay_steps: int
    sequence_length: int
    batch_sequences: int  # sequences per step
    micro_sequences: int  # sequences per forward pass
    final_ratio: float = 0.02  # learning rate at the end over learning_rate
    weight_decay: float = 0.1
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    init_std: float = 0.02
    router_rate: float = 1.0  # learning rate of the router matrices, as a multiple of learning_rate
    table_rate: float = 1.0  # of embeddings and head
    vector_rate: float = 1.0  # of norms, router factors and biases


@dataclass(frozen=True)
class ObjectiveConfig:
    """Factors of the router's objectives; 0 switches one off."""

    begin: int = 0  # first step of locality and chunk
    relax: int = 0  # from this step on their factors are multiplied by relax_factor; 0: never
    relax_factor: float = 0.25
    locality: float = 0.0
    locality_beta: float = 100.0
    chunk: float = 0.0
    chunk_size: int = 64
    chunk_warmup: int = 0
    chunk_stable: int = 0
    chunk_window: int = 100
    chunk_min_ratio: float = 1.025
    chunk_max_factor: float = 4.0
    entropy: float = 0.0
    entropy_multiplier: float = 1.001
    l1: float = 0.0
    l1_multiplier: float = 1.2
    target_ratio: float = 0.2
    bias_rate: float = 0.0
    use: float = 0.0
    use_low: float = 0.02
    use_high: float = 0.5
    top_k: int = 0  # experts per token by softmax and top-k, in place of ReLU
    load_balance: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """The whole file."""

    run: RunConfig
    corpus: CorpusConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    objective: ObjectiveConfig
    checkpoint: str = ""  # folder of the weights to start from; random ones without


def read_config(path: Path, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> TrainConfig:
    """Read `path`; `overrides` replaces single values, table by table. Raises BlockffnError naming file and key."""
    tables = read_tables(path, overrides)
    check_names(path, "", tables, ("run", "corpus", "model", "optimizer", "objective"))
    run = read_table(path, "run", tables, RunConfig)
    corpus = read_table(path, "corpus", tables, CorpusConfig)
    optimizer = read_table(path, "optimizer", tables, OptimizerConfig)
    objective = read_table(path, "objective", tables, ObjectiveConfig)
    shape = tables.get("model")
    checkpoint = str(shape.get("checkpoint", "")) if isinstance(shape, dict) else ""
    if checkpoint:
        model = _read_checkpoint(path, tables["model"], corpus)
        corpus = replace(corpus, tokenizer=corpus.tokenizer or str(Path(checkpoint) / "tokenizer.model"))
    else:
        model = _read_model(path, tables, corpus)
    config = TrainConfig(run, corpus, model, optimizer, objective, checkpoint)
    _check_values(path, config)
    check_optimizer(path, optimizer, run)
    return config


@dataclass(frozen=True)
class _ModelTable:
    """Table [model]: the shape, in the words of the published configuration files."""

    name: str
    family: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    intermediate_size: int = 0  # width of dense layers
    num_dense_layers: int = 0  # dense layers before the first layer of experts
    num_experts: int = 0
    dim_expert: int = 0
    shared_expert_size: int = 0
    expert_activation: str = "silu"
    router_norm: str = "rms"
    expert_bias: bool = False
    expert_bias_method: str = "base"  # "rms": the bias is a multiple of the root mean square of the router logits
    q_lora_rank: int = 0  # 0: grouped-query attention
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    scale_emb: float = 1.0
    scale_depth: float = 0.0  # 0: residual branches are not scaled
    dim_model_base: int = 0  # 0: logits are not scaled


def _read_checkpoint(path: Path, table: Mapping[str, Any], corpus: CorpusConfig) -> ModelConfig:
    """The shape of the model that the run goes on with; its folder is all that the table may say."""
    from blockffn.convert.checkpoint import open_checkpoint
    from blockffn.convert.families import read_config as read_shape

    if more := [key for key in table if key != "checkpoint"]:
        raise BlockffnError(f"{path}: [model] {more[0]}: the checkpoint says the shape; remove the key, or checkpoint")
    model = read_shape(open_checkpoint(table["checkpoint"]))
    found = (model.n_vocab, model.bos_id, 2 in model.eos_ids)
    if found != (corpus.vocab_size, 1, True):
        raise BlockffnError(
            f"{path}: [model] checkpoint: expected vocab_size = {corpus.vocab_size} with bos 1 and eos 2, found "
            f"{model.n_vocab} with bos {model.bos_id} and eos {', '.join(map(str, model.eos_ids))}; correct vocab_size"
        )
    return model


def _read_model(path: Path, tables: Mapping[str, Any], corpus: CorpusConfig) -> ModelConfig:
    m = read_table(path, "model", tables, _ModelTable)
    check_exportable(path, m)
    head_dim, n_layer = m.hidden_size // m.num_attention_heads, m.num_hidden_layers
    mla = MlaConfig(m.q_lora_rank, m.kv_lora_rank, m.qk_nope_head_dim, m.qk_rope_head_dim, head_dim, 1e-6)
    dense = n_layer if m.family == "vanilla" else m.num_dense_layers
    return ModelConfig(
        name=m.name,
        family=m.family,
        n_vocab=corpus.vocab_size,
        n_embd=m.hidden_size,
        n_layer=n_layer,
        n_head=m.num_attention_heads,
        n_head_kv=m.num_key_value_heads,
        head_dim=head_dim,
        n_ctx_train=m.max_position_embeddings,
        rms_eps=m.rms_norm_eps,
        rope_base=m.rope_theta,
        rope_scaling="none",
        rope_factor=1.0,
        embedding_scale=m.scale_emb,
        residual_scale=m.scale_depth / n_layer**0.5 if m.scale_depth else 1.0,
        logit_scale=m.dim_model_base / m.hidden_size if m.dim_model_base else 1.0,
        tied=m.tie_word_embeddings,
        mla=mla if m.q_lora_rank else None,
        moe=None if m.family == "vanilla" else _moe(m),
        dense_dim=tuple(m.intermediate_size if i < dense else 0 for i in range(n_layer)),
        dense_activation=m.expert_activation if m.family == "blockffn" else "silu",
        bos_id=1,
        eos_ids=(2,),
        pad_id=None,
    )


def _moe(m: _ModelTable) -> MoeConfig:
    """The experts as the converter reads them: an eps, and in BlockFFN a factor, only where the norm has one."""
    deco = m.family == "deco"
    return MoeConfig(
        n_expert=m.num_experts,
        expert_dim=m.dim_expert,
        gated=False,
        activation=m.expert_activation,
        activation_eps=m.rms_norm_eps if m.expert_activation in ("norm_silu", "norm_silu_nomean") else 0.0,
        router_norm=m.router_norm,
        router_norm_eps=m.rms_norm_eps if m.router_norm in ("rms", "normal") else 0.0,
        router_norm_scale=1.0,
        router_scale=1.0,
        router_weight=m.num_experts if deco or m.router_norm == "rms" else 0,
        bias_method=m.expert_bias_method if m.expert_bias else "none",
        shared_dim=m.shared_expert_size,
        shared_gated=m.shared_expert_size > 0,
    )


def read_tables(
    path: Path, overrides: Mapping[str, Mapping[str, Any]] | None, above: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """The tables of a training file, with single values replaced. Raises BlockffnError when it is no TOML file.

    above: the files that extend it.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise BlockffnError(f"{path}: cannot be read ({err.strerror}); give the path of a training file") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise BlockffnError(f"{path}: not a TOML file: {err}") from err
    return _merged(_base(path, tables.pop("extends", None), (*above, path.resolve())), tables, overrides or {})


def _base(path: Path, name: Any, above: tuple[Path, ...]) -> dict[str, Any]:
    """The tables of the file that `path` extends, a path relative to its own folder; none without one."""
    if name is None:
        return {}
    if not isinstance(name, str) or (path.parent / name).resolve() in above:
        raise BlockffnError(f"{path}: extends: expected the path of another training file, found {name!r}")
    return read_tables(path.parent / name, None, above)


def _merged(*files: Mapping[str, Any]) -> dict[str, Any]:
    """Tables in which later files replace single values of earlier ones."""
    tables: dict[str, Any] = {}
    for file in files:
        for table, values in file.items():
            whole = isinstance(values, dict) and isinstance(tables.get(table), dict)
            tables[table] = {**tables[table], **values} if whole else values
    return tables


def _check_values(path: Path, config: TrainConfig) -> None:
    objective = config.objective
    _check_objective(path, objective)
    wanted = [key for key in FACTORS if getattr(objective, key)]
    if wanted and config.model.moe is None:
        raise BlockffnError(
            f"{path}: [objective] {wanted[0]} acts on routers, but family {config.model.family} has none; remove it"
        )
    if objective.bias_rate and config.model.moe is not None and config.model.moe.bias_method == "none":
        raise BlockffnError(f"{path}: [objective] bias_rate needs expert_bias = true in [model]")
    if config.model.moe is not None and objective.top_k > config.model.moe.n_expert:
        raise BlockffnError(
            f"{path}: [objective] top_k: expected at most the {config.model.moe.n_expert} experts, "
            f"found {objective.top_k}"
        )
    if objective.load_balance and not objective.top_k:
        raise BlockffnError(
            f"{path}: [objective] load_balance needs top_k; `use` is what keeps ReLU-routed experts alive"
        )


def _check_objective(path: Path, o: ObjectiveConfig) -> None:
    """Raise BlockffnError for values of [objective] that make no sense."""
    rules = [(key, getattr(o, key) >= 0, "0 or more") for key in NOT_NEGATIVE]
    positive = ("locality_beta", "chunk_size", "chunk_window", "chunk_max_factor")
    rules += [(key, getattr(o, key) > 0, "a positive number") for key in positive]
    rules += [
        (key, getattr(o, key) >= 1, "1 or more") for key in ("entropy_multiplier", "l1_multiplier", "chunk_min_ratio")
    ]
    rules += [
        (key, 0 < getattr(o, key) < 1, "a share between 0 and 1") for key in ("target_ratio", "use_low", "use_high")
    ]
    rules.append(("use_low", o.use_low <= o.use_high, f"at most use_high = {o.use_high}"))
    rules.append(("chunk_warmup", o.chunk_warmup <= o.chunk_stable, f"at most chunk_stable = {o.chunk_stable}"))
    for key, holds, expected in rules:
        if not holds:
            raise BlockffnError(f"{path}: [objective] {key}: expected {expected}, found {getattr(o, key)}")


def check_optimizer(path: Path, o: OptimizerConfig, run: RunConfig) -> None:
    """Raise BlockffnError for values of [optimizer] and [run] that make no sense."""
    choices = (("run", "precision", run.precision, PRECISIONS), ("optimizer", "kind", o.kind, OPTIMIZERS))
    for table, key, found, known in choices:
        if found not in known:
            raise BlockffnError(f"{path}: [{table}] {key}: expected one of {', '.join(known)}, found {found!r}")
    positive = ("learning_rate", "steps", "sequence_length", "batch_sequences", "micro_sequences", "clip", "init_std")
    for key in (*positive, "router_rate", "table_rate", "vector_rate"):
        if getattr(o, key) <= 0:
            raise BlockffnError(f"{path}: [optimizer] {key}: expected a positive number, found {getattr(o, key)}")
    for key in ("log_every", "eval_every", "save_every"):
        if getattr(run, key) <= 0:
            raise BlockffnError(f"{path}: [run] {key}: expected a positive number, found {getattr(run, key)}")
    if o.batch_sequences % o.micro_sequences:
        raise BlockffnError(
            f"{path}: [optimizer] batch_sequences {o.batch_sequences} is no multiple of micro_sequences "
            f"{o.micro_sequences}; every forward pass takes as many sequences"
        )
    if o.warmup_steps + o.decay_steps > o.steps:
        raise BlockffnError(
            f"{path}: [optimizer] warmup_steps {o.warmup_steps} and decay_steps {o.decay_steps} exceed steps {o.steps}"
        )


def check_exportable(path: Path, m: _ModelTable) -> None:
    """Raise BlockffnError, before hours of training, when no published checkpoint layout can hold this model."""
    _check_choice(path, "family", m.family, FAMILIES)
    _check_sizes(path, m)
    if m.family == "vanilla":
        experts = (m.num_experts, m.dim_expert, m.num_dense_layers, m.shared_expert_size, m.expert_bias)
        if any(experts) or m.expert_activation != "silu":
            raise BlockffnError(
                f"{path}: [model] family vanilla: expected no experts, found keys that describe some; remove "
                "num_experts, dim_expert, num_dense_layers, shared_expert_size, expert_*, or choose another family"
            )
        return
    _check_choice(path, "expert_activation", m.expert_activation, EXPERT_ACTIVATIONS[m.family], m.family)
    _check_choice(path, "router_norm", m.router_norm, ROUTER_NORMS[m.family], m.family)
    _check_choice(path, "expert_bias_method", m.expert_bias_method, BIAS_METHODS)
    if m.family == "deco" and (m.q_lora_rank or (m.scale_emb, m.scale_depth, m.dim_model_base) != (1.0, 0, 0)):
        raise BlockffnError(
            f"{path}: [model] family deco: expected plain attention and no scales; remove q_lora_rank, scale_*, dim_*"
        )
    if m.family == "blockffn" and (m.shared_expert_size or m.num_dense_layers or m.expert_bias):
        raise BlockffnError(
            f"{path}: [model] family blockffn: shared expert, dense layers and expert bias need family deco"
        )


def _check_choice(path: Path, key: str, found: str, known: tuple[str, ...], family: str = "") -> None:
    if found not in known:
        of = f" for family {family}" if family else ""
        near = difflib.get_close_matches(found, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BlockffnError(f"{path}: [model] {key}: expected one of {', '.join(known)}{of}, found {found!r}{hint}")


def _check_sizes(path: Path, m: _ModelTable) -> None:
    """Raise BlockffnError for numbers of [model] that are missing, not positive or do not fit together."""
    needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    needed += ["max_position_embeddings", "rope_theta", "rms_norm_eps", "scale_emb"]
    needed += ["intermediate_size"] if m.family == "vanilla" else ["num_experts", "dim_expert"]
    needed += ["intermediate_size"] if m.num_dense_layers else []
    latent = ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"]
    needed += latent if any(getattr(m, key) for key in latent) else []
    for key in needed:
        if getattr(m, key) <= 0:
            found = getattr(m, key) or "none"
            raise BlockffnError(f"{path}: [model] {key}: expected a positive number for this model, found {found}")
    for key in ("num_dense_layers", "shared_expert_size", "scale_depth", "dim_model_base"):
        if getattr(m, key) < 0:
            raise BlockffnError(f"{path}: [model] {key}: expected 0 or more, found {getattr(m, key)}")
    heads, kv_heads = m.num_attention_heads, m.num_key_value_heads
    rules = (
        ("hidden_size", m.hidden_size % heads == 0, f"a multiple of {heads} heads"),
        ("num_key_value_heads", heads % kv_heads == 0, f"a divisor of num_attention_heads = {heads}"),
        ("num_key_value_heads", not m.q_lora_rank or heads == kv_heads, f"{heads}, as latent attention has no groups"),
        ("hidden_size", bool(m.q_lora_rank) or m.hidden_size // heads % 2 == 0, f"an even quotient by {heads} heads"),
        ("qk_rope_head_dim", m.qk_rope_head_dim % 2 == 0, "an even number"),
        ("num_dense_layers", m.num_dense_layers < m.num_hidden_layers, "fewer than num_hidden_layers"),
    )
    for key, holds, expected in rules:
        if not holds:
            raise BlockffnError(f"{path}: [model] {key}: expected {expected}, found {getattr(m, key)}")


def check_names(path: Path, table: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise BlockffnError(f"{path}: {f'[{table}] ' if table else ''}unknown key {key!r}; {hint}")


def read_table(path: Path, table: str, tables: Mapping[str, Any], kind: type[Any]) -> Any:
    values = tables.get(table, {})
    if not isinstance(values, dict):
        raise BlockffnError(f"{path}: {table}: expected a table [{table}], found {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    check_names(path, table, values, tuple(fields))
    for name, f in fields.items():
        if name not in values:
            if f.default is dataclasses.MISSING:
                raise BlockffnError(
                    f"{path}: [{table}] {name}: expected a value, found none; docs/training.md explains it"
                )
            continue
        if not _fits(values[name], str(f.type)):
            expected = TYPE_NAMES.get(str(f.type), f.type)
            raise BlockffnError(f"{path}: [{table}] {name}: expected {expected}, found {values[name]!r}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _fits(value: Any, kind: str) -> bool:
    """Whether a TOML value has the type of a field."""
    if kind == "tuple[str, ...]":
        return isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value)
    expected: Any = {"int": int, "float": (int, float), "str": str, "bool": bool}[kind]
    return isinstance(value, expected) and (not isinstance(value, bool) or kind == "bool")


def parse_value(text: str) -> Any:
    """A TOML value from the command line; what is none is taken as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
