"""An EAGLE draft head in torch, and its training on a frozen target (EAGLE-1/2, arXiv 2401.15077 and 2406.16858).

    >>> config = read_eagle_config(Path("examples/tiny-blockffn-eagle/train.toml"))
    >>> trainer = EagleTrainer(config)
    >>> trainer.train()
    >>> trainer.export(Path("examples/tiny-blockffn-eagle"))

Row i of the head takes the target's hidden state f_i (after the final norm) and the embedding of token i + 1, and gives
f'_{i+1}, a guess of the next hidden state; the target's own lm_head turns it into a guess of token i + 2. Loss: smooth
L1 between f' and f, plus 0.1 x cross-entropy between the two token distributions; uniform noise on the input features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from blockffn.convert.model import ModelConfig
from blockffn.convert.save import save_tensors, write_json
from blockffn.errors import BlockffnError
from blockffn.training.checkpoint import Run, fingerprint, run_identity
from blockffn.training.config import (
    CorpusConfig,
    OptimizerConfig,
    RunConfig,
    check_names,
    check_optimizer,
    read_table,
    read_tables,
)
from blockffn.training.data import Corpus, Windows, prepare
from blockffn.training.model import DenseFfn, GqaAttention, ReferenceModel, parameter, rms_norm
from blockffn.training.optim import make_optimizers
from blockffn.training.train import open_device, optimizer_step


@dataclass(frozen=True)
class HeadConfig:
    """Table [eagle]: the target and the shape of the head."""

    name: str
    target: str  # checkpoint folder of the frozen model
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    noise: float = 0.1  # features are moved by uniform noise in [-noise, noise]
    token_weight: float = 0.1  # factor of the cross-entropy


@dataclass(frozen=True)
class EagleConfig:
    """The whole training file of a head."""

    run: RunConfig
    corpus: CorpusConfig
    head: HeadConfig
    optimizer: OptimizerConfig


def read_eagle_config(path: Path, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> EagleConfig:
    """Read a training file with a table [eagle]. Raises BlockffnError naming file and key."""
    tables = read_tables(path, overrides)
    check_names(path, "", tables, ("run", "corpus", "eagle", "optimizer"))
    config = EagleConfig(
        read_table(path, "run", tables, RunConfig),
        read_table(path, "corpus", tables, CorpusConfig),
        read_table(path, "eagle", tables, HeadConfig),
        read_table(path, "optimizer", tables, OptimizerConfig),
    )
    check_optimizer(path, config.optimizer, config.run)
    head = config.head
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(head, key) <= 0:
            raise BlockffnError(f"{path}: [eagle] {key}: expected a positive number, found {getattr(head, key)}")
    if head.num_attention_heads % head.num_key_value_heads:
        raise BlockffnError(
            f"{path}: [eagle] num_key_value_heads: expected a divisor of {head.num_attention_heads} heads, "
            f"found {head.num_key_value_heads}"
        )
    return config


class HeadLayer(nn.Module):
    """One Llama-style layer of the head; the first has no norm before its attention."""

    def __init__(self, config: ModelConfig, width: int, first: bool) -> None:
        super().__init__()
        self.eps = config.rms_eps
        self.input_norm = None if first else parameter(config.n_embd)
        self.attention = GqaAttention(config)
        self.post_norm = parameter(config.n_embd)
        self.ffn = DenseFfn(config, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, h] -> [B, T, h]."""
        x = x + self.attention(x if self.input_norm is None else rms_norm(x, self.input_norm, self.eps))
        return x + self.ffn(rms_norm(x, self.post_norm, self.eps))[0]


class EagleHead(nn.Module):
    """x = fc [rmsnorm1(e) | rmsnorm2(f)] + bias, then layers; no final norm, no depth scale."""

    def __init__(self, target: ModelConfig, head: HeadConfig) -> None:
        super().__init__()
        if target.n_embd % head.num_attention_heads:
            raise BlockffnError(
                f"[eagle] num_attention_heads: expected a divisor of the target's hidden size {target.n_embd}, "
                f"found {head.num_attention_heads}"
            )
        self.head, self.target = head, target
        self.config = replace(
            target,
            mla=None,
            n_head=head.num_attention_heads,
            n_head_kv=head.num_key_value_heads,
            head_dim=target.n_embd // head.num_attention_heads,
            dense_activation="silu",
        )
        h = target.n_embd
        self.norm_e, self.norm_f = parameter(h), parameter(h)
        self.fc = parameter(h, 2 * h)
        self.bias = parameter(h)
        self.layers = nn.ModuleList(
            HeadLayer(self.config, head.intermediate_size, i == 0) for i in range(head.num_hidden_layers)
        )

    def forward(self, embedded: Tensor, features: Tensor) -> Tensor:
        """embedded e [B, T, h] of tokens 1..T, features f [B, T, h] of tokens 0..T-1 -> f' [B, T, h] of tokens 1..T."""
        eps = self.config.rms_eps
        both = torch.cat((rms_norm(embedded, self.norm_e, eps), rms_norm(features, self.norm_f, eps)), dim=-1)
        x = functional.linear(both, self.fc, self.bias)  # [B, T, h]
        for layer in self.layers:
            x = layer(x)
        return x

    def published(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names of the published head."""
        names = {"norm_e": "input_norm1.weight", "norm_f": "input_norm2.weight", "fc": "fc.weight", "bias": "fc.bias"}
        inner = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
        for name, value in self.named_parameters():
            if name in names:
                yield names[name], value
                continue
            _, layer, *rest = name.split(".")
            if len(rest) == 1:
                part = inner[rest[0]]
            else:
                part = f"{'self_attn' if rest[0] == 'attention' else 'mlp'}.{rest[1]}_proj"
            yield f"layers.{layer}.{part}.weight", value

    @torch.no_grad()
    def initialise(self, std: float, generator: torch.Generator) -> None:
        """Norms 1, bias 0, matrices normal(0, std)."""
        for name, value in self.named_parameters():
            if name == "bias":
                value.zero_()
            elif value.dim() == 1:
                value.fill_(1.0)
            else:
                value.normal_(0.0, std, generator=generator)


class EagleReference:
    """A head and its target in torch, for parity checks."""

    def __init__(self, head: EagleHead, target: ReferenceModel) -> None:
        self.head, self.target = head, target

    @classmethod
    def from_checkpoint(cls, src: Path, target: ReferenceModel, dtype: torch.dtype = torch.float32) -> EagleReference:
        """Read a head in the published layout. Raises BlockffnError naming a missing key or tensor."""
        from blockffn.convert.checkpoint import open_checkpoint, to_float32

        checkpoint = open_checkpoint(src)
        try:
            shape = {key: checkpoint.config[key] for key in SHAPE_KEYS}
        except KeyError as err:
            raise BlockffnError(f"{src}/config.json: {err.args[0]}: expected a value, found none") from err
        module = EagleHead(target.config, HeadConfig(name="", target="", **shape)).to(dtype)
        with torch.no_grad():
            for name, value in module.published():
                if name not in checkpoint.tensors or checkpoint.tensors[name].shape != tuple(value.shape):
                    raise BlockffnError(
                        f"{src}: tensor {name}: expected shape {list(value.shape)}, found another or none"
                    )
                value.copy_(torch.from_numpy(to_float32(checkpoint.load(name)).copy()))
        return cls(module.requires_grad_(False), target)

    @torch.no_grad()
    def draft_logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [T, h] of tokens 0..T-1, tokens [T + 1] -> logits [T, V]; row i guesses token i + 2, forced."""
        decoder, config = self.target.decoder, self.target.config
        embedded = functional.embedding(tokens[1:], decoder.embed) * config.embedding_scale  # [T, h]
        return decoder.logits(self.head(embedded[None], hidden[None])[0])


SHAPE_KEYS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


class EagleTrainer:
    """Trains a head; the target's weights do not move."""

    def __init__(self, config: EagleConfig, corpus: Corpus | None = None) -> None:
        self.config, run, o = config, config.run, config.optimizer
        self.device = open_device(run)
        reference = ReferenceModel.from_checkpoint(config.head.target)
        tokenizer = config.corpus.tokenizer or str(Path(config.head.target) / "tokenizer.model")
        self.corpus = corpus or prepare(replace(config.corpus, tokenizer=tokenizer))
        found, wanted = config.corpus.vocab_size, reference.config.n_vocab
        if found != wanted:
            raise BlockffnError(f"[corpus] vocab_size: expected {wanted} as the target has, found {found}")
        self.windows = Windows(self.corpus.train, o.sequence_length, run.seed)
        self.head = EagleHead(reference.config, config.head)
        self.head.initialise(o.init_std, torch.Generator().manual_seed(run.seed))
        self.head.to(self.device)
        self.target = reference.decoder.to(self.device)
        self.named = list(self.head.named_parameters())
        self.optimizers = make_optimizers(self.named, o)
        self.random = torch.Generator()  # of the noise; seeded anew in each step, from seed and step alone
        shape = [dataclasses.asdict(config.head), fingerprint(self.target)]
        identity = run_identity(run, o, shape, self.corpus.fingerprint)
        self.run = Run(run, o, identity, self.head, self.optimizers, {})

    def train(self) -> bool:
        """Run to the last step, or until Ctrl-C. Returns whether the run is complete."""
        for _ in self.run.steps():
            self.run.done(self.train_step(), self.evaluate)
        return self.run.complete

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its figures."""
        self.random.manual_seed(self.config.run.seed * 1_000_003 + self.run.step)
        figures = optimizer_step(self.run, self.loss, self.windows, self.named)
        return {name: float(value) for name, value in figures.items()}

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens [B, T + 1] -> smooth L1 + token_weight * cross-entropy over tokens 1..T-1, and the parts."""
        c, tokens = self.config.head, tokens.to(self.device)
        noise = torch.rand(tokens.shape[0], tokens.shape[1] - 2, self.head.config.n_embd, generator=self.random)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16"):
            guess, truth = self._guess(tokens[:, :-1], (2 * noise.to(tokens.device) - 1) * c.noise)
            features = functional.smooth_l1_loss(guess.float(), truth.float())
            wanted = functional.softmax(self.target.logits(truth).float(), dim=-1)  # [B, T-1, V]
            given = functional.log_softmax(self.target.logits(guess).float(), dim=-1)
        distribution = -(wanted * given).sum(dim=-1).mean()
        total = features + c.token_weight * distribution
        parts = {"loss": total, "features": features, "distribution": distribution}
        return total, {name: part.detach() for name, part in parts.items()}

    def _guess(self, tokens: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
        """tokens [B, T] -> the head's f' and the target's f of tokens 1..T-1: [B, T-1, h] each."""
        with torch.no_grad():
            hidden, _ = self.target(tokens)  # [B, T, h]
            embedded = functional.embedding(tokens[:, 1:], self.target.embed) * self.head.config.embedding_scale
        return self.head(embedded, hidden[:, :-1] + noise), hidden[:, 1:]

    @torch.no_grad()
    def evaluate(self, sequences: int = 0) -> dict[str, Any]:
        """Both losses without noise, and how often head and target agree on the next token (``agreement``)."""
        losses, features, agree = [], [], []
        for window in Windows(self.corpus.validation, self.config.optimizer.sequence_length, 0).in_order(sequences):
            guess, truth = self._guess(window[:, :-1].to(self.device), 0.0)
            wanted, given = self.target.logits(truth), self.target.logits(guess)  # [1, T-1, V]
            features.append(functional.smooth_l1_loss(guess, truth).item())
            cross = -(functional.softmax(wanted, dim=-1) * functional.log_softmax(given, dim=-1)).sum(dim=-1)
            losses.append(features[-1] + self.config.head.token_weight * cross.mean().item())
            agree.append((wanted.argmax(dim=-1) == given.argmax(dim=-1)).float().mean().item())
        n = len(losses)
        return {"validation": sum(losses) / n, "features": sum(features) / n, "agreement": sum(agree) / n}

    def export(self, folder: Path) -> None:
        """Write config.json and model.safetensors in the layout of the published head (bfloat16)."""
        c, target = self.config.head, self.head.target
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", {n: p.detach().bfloat16() for n, p in self.head.published()})
        shape = {key: getattr(c, key) for key in SHAPE_KEYS}
        sizes = {"hidden_size": target.n_embd, "head_dim": self.head.config.head_dim, "vocab_size": target.n_vocab}
        write_json(folder / "config.json", {**shape, **sizes, "hidden_act": "silu", "torch_dtype": "bfloat16"})
