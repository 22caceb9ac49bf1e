"""What the report measures: sections, each of one or more `blockffn` commands that print JSON, for two sizes.

    >>> from blockffn.eval.report.sections import sections
    >>> [section.name for section in sections("quick", Subject("m.gguf", None, "t.py", 1024, "parts"))][:3]
    ['ops', 'step', 'contexts-0.1b']

A command that this version of `blockffn` does not have is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SIZES = ("quick", "full")
QUICK_TYPES = "Q8_0,Q6_K,Q4_K_M,Q4_0,IQ4_NL"


@dataclass(frozen=True)
class Subject:
    """The model under test: expert layout, the same weights in the dense layout (or None), a text, its context.

    folder: where commands put files of their own. unquantized: the model in F16 or F32, where there is such a file.
    """

    model: str
    dense: str | None
    text: str
    n_ctx: int
    folder: str
    unquantized: str | None = None


@dataclass(frozen=True)
class Section:
    """Commands whose JSON is shown together. words: label -> arguments of `blockffn`."""

    name: str
    title: str
    about: str
    words: dict[str, list[str]] = field(default_factory=dict)


def sections(size: str, subject: Subject) -> list[Section]:
    """Return the sections of a report in order. size: "quick" (small shapes, few rounds) or "full"."""
    quick = size == "quick"
    shapes = ["0.1b"] if quick else ["1.2b", "deco-1.2b"]
    found = [_ops(quick), _step(quick, shapes[0], subject), *(_contexts(quick, shape) for shape in shapes)]
    found += [_speculation(quick, shapes[0], subject)]
    found += [_types(quick, subject.unquantized, subject)] if subject.unquantized else []
    found += [_dial(quick, subject)]
    return [*found, _peers(quick, subject), _load(quick, subject)]


def _ops(quick: bool) -> Section:
    if quick:
        kinds, rounds = [("1.2B", "q4_0")], ["--tokens", "1,4,8,32", "--reps", "9"]
    else:
        kinds = [(shape, kind) for shape in ("1.2B", "DECO-1.2B") for kind in ("q4_0", "q8_0", "f16")]
        rounds = ["--tokens", "1,4,8,32,128,512", "--reps", "5"]
    words = {
        f"{shape} {kind}": ["bench", "ops", "--no-files", "--shapes", shape, "--types", kind, *rounds]
        for shape, kind in kinds
    }
    about = (
        "The FFN of one layer: the union operation beside stock llama.cpp's dense products and its mul_mat_id, each in "
        "the buffer type that suits it best. Milliseconds per layer, medians."
    )
    return Section("ops", "The operation alone", about, words)


def _step(quick: bool, shape: str, subject: Subject) -> Section:
    words = ["bench", "--ops", "--shape", shape, "--plot", f"{subject.folder}/step", "--json"]
    words += ["--past", "128,3072", "--verify", "8", "--rounds", "1"] if quick else []
    about = (
        "What each kind of node takes in a step, ours beside the stock graph of the same weights. Barriers are what "
        "threads wait for each other; outside is the rest of the step: building the graph, copying logits, Python."
    )
    return Section("step", f"Where a step goes: {shape}", about, {"step": words})


def _contexts(quick: bool, shape: str) -> Section:
    lengths = (128, 1024, 3072)
    rounds = ["--rounds", "1" if quick else "3"]
    words = {
        f"after {past} tokens": [
            *("bench", "--shape", shape, "--past", str(past), "--verify", "4,8", *rounds, "--json"),
            *("--prefill", "512" if past == lengths[0] else "0"),
        ]
        for past in lengths
    }
    about = (
        "Whole models of random weights in a published shape, whose routing is planted: the same weights in the expert "
        "layout (union) and in the dense layout, which stock llama.cpp runs in its best buffers. Decoding is one token "
        "at a time; verifying n is n tokens at once with logits for each, a step of speculative decoding."
    )
    return Section(f"contexts-{shape}", f"Whole models over context lengths: {shape}", about, words)


def _speculation(quick: bool, shape: str, subject: Subject) -> Section:
    common = ["--verify", "4", "--prefill", "0", "--rounds", "1" if quick else "3", "--json"]
    plans = ["--plans", "chain 3,auto" if quick else "chain 3,tree 8,auto"]
    rates = ["--acceptance", "0.6,0.9"]
    dense = ["--dense", subject.dense] if subject.dense else []
    trained = ["bench", "-m", subject.model, *dense, "-f", subject.text, "--draft", "ngram", *common]
    words = {f"scripted drafts, {shape}": ["bench", "--shape", shape, *rates, *plans, *common], "n-grams": trained}
    about = (
        "Speculative decoding. A scripted drafter's first guesses are right with a given probability: at no cost, and "
        "beside a draft head of random weights that takes its time. N-grams draft for the model under test on its text."
    )
    return Section("speculation", "Speculation", about, words)


def _types(quick: bool, model: str, subject: Subject) -> Section:
    window = min(512, subject.n_ctx)
    words = ["eval", "types", model, "-f", subject.text, "-c", str(window), "--json"]
    words += ["-n", str(4 * window), "--rounds", "2", "--types", QUICK_TYPES] if quick else []
    about = "Quantized types: size, quality against the unquantized weights, speed."
    return Section("types", "Types", about, {"types": words})


def _dial(quick: bool, subject: Subject) -> Section:
    window = min(512, subject.n_ctx)
    words = ["eval", "dial", "-m", subject.model, "-f", subject.text, "-c", str(window), "--json"]
    words += ["-n", str(4 * window), "--rounds", "2", "--thresholds", "0.05,0.1,0.2,0.4"] if quick else []
    about = (
        "Router threshold and union budget: what leaving out experts with small scores costs in quality (perplexity, "
        "KL divergence from the same model) and gives in speed. The union is in experts per layer."
    )
    return Section("dial", "The dial", about, {"dial": words})


def _peers(quick: bool, subject: Subject) -> Section:
    words = ["bench", "peers", "-m", subject.model, "-f", subject.text, "--json"]
    words += ["--prompts", "2", "--tokens", "48", "--rounds", "1"] if quick else []
    about = "Other ways to run the same model on the same prompts, those that are present."
    return Section("peers", "Peers", about, {"peers": words})


def _load(quick: bool, subject: Subject) -> Section:
    models = ["-m", subject.model, *(["-m", subject.dense] if subject.dense else [])]
    words = ["bench", "load", *models, "--rounds", "3" if quick else "9", "--json"]
    about = (
        "From the start of the process to the first token, with the file in the page cache, and the memory then held."
    )
    return Section("load", "Load time and memory", about, {"load": words})
