"""Pictures of evaluations, each as PNG and SVG; the same figures give the same files.

>>> heat_map(profile, "build/model-experts")          # doctest: +SKIP
['build/model-experts.png', 'build/model-experts.svg']
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    from blockffn.eval.quality.advisor import Advice
    from blockffn.eval.quality.sparsity import Profile

KINDS = ("png", "svg")


def heat_map(profile: Profile, stem: str | Path) -> list[str]:
    """Draw how often each expert is active: layers down, experts across, dead ones in grey."""
    import numpy as np

    plt = pyplot()
    layers, experts = profile.usage.shape
    figure, axes = plt.subplots(figsize=(max(5.0, experts / 8), max(2.5, layers / 5 + 1.5)))
    colours = plt.get_cmap("viridis").copy()
    colours.set_bad("0.8")
    image = axes.imshow(np.ma.masked_equal(profile.usage, 0.0), aspect="auto", cmap=colours, vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, label="share of tokens")
    axes.set(xlabel="expert", ylabel="layer", title=f"active experts, {profile.sparsity.n_tokens} tokens (grey: never)")
    return save(figure, stem)


def union_curve(profile: Profile, stem: str | Path) -> list[str]:
    """Draw how many experts a batch of n neighbouring tokens needs, as a mean and for every layer."""
    figure, axes = pyplot().subplots(figsize=(6, 4))
    sizes = list(profile.union)
    for layer in range(len(profile.usage)):
        axes.plot(sizes, [profile.layer_union[n][layer] for n in sizes], color="0.8", linewidth=0.8)
    axes.plot(sizes, list(profile.union.values()), marker="o", label="mean over layers")
    one = profile.union[1] / profile.sparsity.n_experts
    independent = [profile.sparsity.n_experts * (1 - (1 - one) ** n) for n in sizes]
    axes.plot(sizes, independent, "--", color="0.4", label="if tokens chose independently")
    axes.axhline(profile.sparsity.n_experts, color="0.6", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens in a batch", ylabel="experts needed", xticks=sizes, xticklabels=sizes)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, stem)


def advice(found: Advice, stem: str | Path) -> list[str]:
    """Draw the cost of a step over its tokens, and the best speedup over the acceptance, at both context lengths."""
    from blockffn.eval.quality.advisor import gain

    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4))
    rates = [i / 50 for i in range(50)]
    for context in found.contexts:
        sizes, label = list(context.step_ms), f"after {context.past} tokens"
        left.plot(sizes, [context.cost(n) for n in sizes], marker="o", label=label)
        chains = range(max(sizes))
        costs = [context.cost(1 + chain) for chain in chains]
        speeds = [max(gain(chain, rate) / costs[chain] for chain in chains) for rate in rates]
        right.plot(rates, speeds, label=label)
    left.plot([1, max(sizes)], [1, max(sizes)], "--", color="0.6", label="one by one")
    left.set(xlabel="tokens in a step", ylabel="plain steps", title="cost of a step")
    right.set(xlabel="acceptance of a drafted token", ylabel="times plain decoding", title="best chain, free drafts")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return save(figure, stem)


def pyplot() -> Any:
    """Return matplotlib.pyplot, drawing to files with text as text and reproducible names inside SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "blockffn", "svg.fonttype": "none"})
    return plt


def save(figure: Any, stem: str | Path) -> list[str]:
    """Write a figure as STEM.png and STEM.svg and return both names."""
    target = Path(stem)
    if not target.parent.is_dir():
        raise BlockffnError(f"{target}: the folder {target.parent} does not exist; create it")
    written = []
    figure.tight_layout()
    for kind in KINDS:
        path = target.with_name(f"{target.name}.{kind}")
        figure.savefig(path, dpi=120, metadata={"Date": None} if kind == "svg" else {"Software": None})
        written.append(str(path))
    pyplot().close(figure)
    return written
