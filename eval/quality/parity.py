"""Does a GGUF compute in llama.cpp what the checkpoint computes in torch? `blockffn convert --verify` asks this.

    >>> from blockffn.eval.quality.parity import verify
    >>> report = verify("model.gguf", "checkpoint-folder")      # doctest: +SKIP
    >>> report.passed, report.nmse                              # doctest: +SKIP
    (True, 3.1e-13)

llama.cpp evaluates a text, then continues it greedily; the torch reference (blockffn.training.model) evaluates text
and continuation once, teacher-forced. Greedy texts are equal exactly when every continued token is the reference's own
likeliest one, so that the reference needs no cache and no second pass. llama.cpp's cache is float32 here, and attention
runs without the flash kernel: both round to 11 bits by default, which would hide what conversion and graph do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blockffn.errors import BlockffnError
from blockffn.eval.quality import metrics
from blockffn.gguf_file import read_gguf

if TYPE_CHECKING:
    from blockffn.llama import Llama
    from blockffn.training.model import Output, ReferenceModel

# Largest NMSE of the logits per weight type. F32 leaves only the order of summation. With F16 and BF16 weights
# llama.cpp rounds the activations to the same type (not in the union op on x86), which alone costs trained models an
# NMSE of 3e-6 in BF16 and random ones, which enlarge it, 2e-5 to 5e-5. Q8_0 rounds weights and activations to 8 bits,
# and some experts at their threshold flip; coarser types are not outputs of the converter and have no bound.
BOUNDS = {"F32": 1e-6, "F16": 1e-4, "BF16": 1e-4, "Q8_0": 1e-2}
# Largest share of router choices that may differ: rounding moves logits that lie close to their threshold.
ROUTER_BOUNDS = {"F32": 0.0, "F16": 0.01, "BF16": 0.01, "Q8_0": 0.05}
ORDER = ("F32", "F16", "BF16", "Q8_0")  # from fine to coarse
ROUTER_TIE = 1e-5  # |router logit| below which float32 does not decide whether an expert is active
GREEDY_TIE = 1e-5  # lead of the likeliest token, relative to the rms of the logits, below which greedy is a tie
N_GREEDY = 64
EQUAL, TIE, DIFFERS = 0, 1, 2  # how one choice of the router compares
FLOAT32 = 0  # enum ggml_type, of the key and value cache
SAMPLE_TEXT = """\
def parse_header(line: str) -> tuple[str, int]:
    \"\"\"Return the name and the size that a header line gives.\"\"\"
    name, _, size = line.partition(":")
    if not size.strip().isdigit():
        raise ValueError(f"not a header: {line!r}")
    return name.strip(), int(size)

The wind had turned before dawn, and by noon the harbour was full of small boats waiting for the tide of 1902.
"""


@dataclass(frozen=True)
class ParityReport:
    """The comparison of one GGUF with its source; `failures` is empty when everything is inside the bounds."""

    gguf: str
    source: str
    weight_type: str  # coarsest type among the weight matrices
    n_tokens: int
    nmse: float
    bound: float | None  # largest NMSE that passes; None for types without a stated bound
    given: bool  # `nmse` is that of a reference that was given llama.cpp's choices, see `_given_choices`
    nmse_own: float  # NMSE with the reference's own choices
    max_error: float  # largest absolute difference of two logits
    kl_mean: float  # nats
    kl_max: float
    top1: float  # share of tokens with the same likeliest next token
    router_choices: int  # (layer, token, expert) triples; 0 for a dense model
    router_differences: int  # of them, different although |router logit| >= ROUTER_TIE
    router_ties: int  # different with |router logit| < ROUTER_TIE
    greedy_equal: int  # greedy tokens until the first difference
    greedy_tokens: int
    greedy_tie: bool  # the first difference is a tie of the reference itself

    @property
    def failures(self) -> list[str]:
        """What is outside the bounds, one sentence each. Greedy text has to be equal in F32 only."""
        found = []
        if not np.isfinite(self.nmse) or (self.bound is not None and self.nmse > self.bound):
            found.append(f"NMSE of the logits: expected at most {self.bound:g}, found {self.nmse:.2e}")
        share = ROUTER_BOUNDS.get(self.weight_type, 1.0)
        if self.router_differences > share * self.router_choices:
            found.append(
                f"router: {self.router_differences} of {self.router_choices} choices differ, "
                f"expected at most {share:.0%} of them"
            )
        if self.weight_type == "F32" and self.greedy_equal < self.greedy_tokens and not self.greedy_tie:
            found.append(f"greedy text differs after {self.greedy_equal} of {self.greedy_tokens} tokens")
        return found

    @property
    def passed(self) -> bool:
        """True when nothing is outside the bounds."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain Python values, for JSON."""
        return asdict(self) | {"passed": self.passed, "failures": self.failures}

    def __str__(self) -> str:
        bound = "no bound is stated for this type" if self.bound is None else f"bound {self.bound:g}"
        lines = [
            f"{self.gguf} ({self.weight_type}) against {self.source} in torch float32, {self.n_tokens} tokens",
            f"  logits   NMSE {self.nmse:.2e} ({bound}), largest difference {self.max_error:.2e}"
            + f"; the experts chosen as in llama.cpp, else {self.nmse_own:.2e}" * self.given,
            f"  tokens   top-1 agreement {100 * self.top1:.2f} %, KL divergence mean {self.kl_mean:.2e}, "
            f"largest {self.kl_max:.2e} nats",
            f"  greedy   {self.greedy_equal} of {self.greedy_tokens} tokens equal"
            + (", then a tie of the reference" if self.greedy_tie else ""),
        ]
        if self.router_choices:
            lines.insert(
                3,
                f"  router   {self.router_differences} of {self.router_choices} choices differ, and "
                f"{self.router_ties} where |router logit| < {ROUTER_TIE:g}",
            )
        lines.append(f"  verdict  {'passed' if self.passed else 'FAILED: ' + '; '.join(self.failures)}")
        return "\n".join(lines)


def verify(
    gguf_path: str | PathLike[str],
    src: str | PathLike[str],
    text: str | None = None,
    n_greedy: int = N_GREEDY,
    ffn: str = "union",
    n_threads: int | None = None,
) -> ParityReport:
    """Compare a GGUF in llama.cpp with its checkpoint in torch on `text` (default: a few lines of code and prose).

    ffn: "union" for the sparse op, "dense" for stock ops on every expert.

    Errors: BlockffnError for files that cannot be read, and for a GGUF without a tokenizer or with another vocabulary
    than the checkpoint.
    """
    import blockffn

    with_text = SAMPLE_TEXT if text is None else text
    llm = blockffn.Llama(str(gguf_path), type_k=FLOAT32, type_v=FLOAT32, flash_attn=False, ffn=ffn, n_threads=n_threads)
    try:
        tokens = _fit(llm.tokenize(with_text.encode(), add_bos=True), llm.n_ctx() - n_greedy)
        return compare(llm, _reference(src), tokens, n_greedy, source=str(src))
    finally:
        llm.close()


def _reference(src: str | PathLike[str]) -> ReferenceModel:
    try:
        from blockffn.training.model import ReferenceModel
    except ImportError as error:
        raise BlockffnError(f"the torch reference needs torch: {error}; pip install 'blockffn[train]'") from error
    return ReferenceModel.from_checkpoint(src)


def _fit(tokens: list[int], room: int) -> list[int]:
    if not tokens:
        raise BlockffnError("parity: the text has no token; give a longer text")
    return tokens[: max(1, room)]


def compare(
    llm: Llama, reference: ReferenceModel, tokens: Sequence[int], n_greedy: int = N_GREEDY, source: str = "checkpoint"
) -> ParityReport:
    """Compare a loaded GGUF with a reference model on `tokens` and on the greedy continuation of them."""
    if llm.n_vocab() != reference.config.n_vocab:
        raise BlockffnError(
            f"{llm.model_path}: has {llm.n_vocab()} tokens, expected the {reference.config.n_vocab} of {source}; "
            "this GGUF was made from another checkpoint"
        )
    continued = greedy(llm, tokens, n_greedy)
    text = [*tokens, *continued]
    expected = reference.forward(text)
    wanted, found = expected.logits.numpy(), llm.logits(text)  # [n_tokens, n_vocab]
    kind = weight_type(llm.model_path)
    chosen = llm.active_experts(text) if expected.active.numel() else np.zeros(expected.active.shape, np.bool_)
    router = _compare_router(reference, expected, chosen)
    given = _given_choices(reference, kind, router)
    same = reference.forward(text, chosen).logits.numpy() if given else wanted
    kl = metrics.kl_divergence(found, wanted)
    equal, tie = _compare_greedy(wanted[len(tokens) - 1 :], continued)
    return ParityReport(
        gguf=str(llm.model_path),
        source=source,
        weight_type=kind,
        n_tokens=len(text),
        nmse=metrics.nmse(found, same),
        bound=BOUNDS.get(kind),
        given=given,
        nmse_own=metrics.nmse(found, wanted),
        max_error=float(np.abs(found - wanted).max()),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1=metrics.top1_agreement(found, wanted),
        router_choices=router.size,
        router_differences=int((router == DIFFERS).sum()),
        router_ties=int((router == TIE).sum()),
        greedy_equal=equal,
        greedy_tokens=len(continued),
        greedy_tie=tie,
    )


def greedy(llm: Llama, tokens: Sequence[int], n_predict: int) -> list[int]:
    """Return the `n_predict` tokens that llama.cpp continues with by largest logit, end tokens included."""
    llm.reset()
    return [int(token) for token in itertools.islice(llm.generate(tokens, temp=0.0, repeat_penalty=1.0), n_predict)]


def _compare_router(reference: ReferenceModel, expected: Output, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
    """Return EQUAL, TIE or DIFFERS for every choice, int8 [n_moe_layers, n_tokens, n_experts]."""
    result = np.full(chosen.shape, EQUAL, np.int8)
    if chosen.size:
        differ = chosen != expected.active.numpy()
        decided = _margins(reference, expected.router_logits.numpy()) >= ROUTER_TIE
        result[differ] = TIE
        result[differ & decided] = DIFFERS
    return result


def _given_choices(reference: ReferenceModel, kind: str, router: npt.NDArray[np.int8]) -> bool:
    """Return whether the NMSE is taken from a reference that chooses as llama.cpp did: with an expert bias outside F32.

    Without a bias the score of an expert is zero at its threshold, and a choice that rounding flips changes little.
    With a bias the score jumps there, in that token and through attention in all later ones, so that the distance of
    the logits would say nothing about the weights. The bound on the router's choices counts the flips themselves.
    """
    moe = reference.config.moe
    return kind != "F32" and moe is not None and moe.bias_method != "none" and bool((router != EQUAL).any())


def _margins(reference: ReferenceModel, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return how far every choice is from its threshold: |r|, or the smaller of |r| and |r + bias|."""
    margins = np.abs(logits)  # [n_moe_layers, n_tokens, n_experts]
    for layer, ffn in enumerate(reference.decoder.expert_layers()):
        if ffn.expert_bias is None:
            continue
        bias = ffn.expert_bias.numpy()  # [n_experts]
        if ffn.moe.bias_method == "rms":
            bias = bias * np.sqrt(np.square(logits[layer]).mean(axis=-1, keepdims=True))  # [n_tokens, n_experts]
        margins[layer] = np.minimum(margins[layer], np.abs(logits[layer] + bias))
    return margins


def _compare_greedy(logits: npt.NDArray[np.float32], continued: Sequence[int]) -> tuple[int, bool]:
    """Return how many of the continued tokens are the reference's choice, and whether the first other one is a tie."""
    for i, token in enumerate(continued):
        best = int(logits[i].argmax())
        if token != best:
            lead = float(logits[i, best] - logits[i, token])
            return i, lead <= GREEDY_TIE * float(np.sqrt(np.square(logits[i]).mean()))
    return len(continued), False


def weight_type(gguf_path: str | PathLike[str]) -> str:
    """Return the coarsest type among the weight matrices of a GGUF, for example "F16" (norms and routers stay F32)."""
    kinds = {tensor.type for tensor in read_gguf(str(gguf_path)).tensors}
    other = sorted(kinds - set(ORDER))
    return "+".join(other) if other else max(kinds, key=ORDER.index)
