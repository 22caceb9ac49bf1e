"""``blockffn ablate ARM.toml ...``: train each arm with each seed, then one table and one plot of all.

blockffn ablate examples/ablation/*.toml --seeds 1,2 --jobs 2 --out build/runs/ablation

An arm is a training file; `extends` in it names the file that all share. Runs are `blockffn train` processes; what is
complete is not trained again and what was stopped goes on, so that the same command ends an interrupted table.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockffn.errors import BlockffnError
from blockffn.whole_file import write_text

DRAWS = 10_000  # of the validation documents, for the interval of a paired comparison
FIGURES = "figures.json"  # in the folder of a run that is complete
TABLE, RESULTS, FRONTIER = "table.md", "results.json", "frontier.png"
# column: figure, a share shown in per cent
COLUMNS = {
    "loss": ("validation", False),
    "TLS": ("tls", True),
    "CLS_8": ("cls_8", True),
    "CLS_32": ("cls_32", True),
    "live TLS": ("live_tls", True),
    "live CLS_8": ("live_cls_8", True),
    "live CLS_32": ("live_cls_32", True),
    "lowest layer": ("lowest_tls", True),
    "dead": ("dead_share", True),
    "always on": ("always_on_share", True),
    "fewest sets": ("fewest_sets", False),
}


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    config: Path
    seed: int
    folder: Path

    @property
    def arm(self) -> str:
        """The name of the training file."""
        return self.config.stem

    def words(self) -> list[str]:
        """The command that trains it."""
        settings = [f"run.seed={self.seed}", f'run.out="{self.folder}"']
        train = [sys.executable, "-m", "blockffn", "train", str(self.config), "--json"]
        return [*train, *(word for setting in settings for word in ("--set", setting))]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``blockffn ablate``."""
    parser.add_argument("arms", nargs="+", type=Path, metavar="ARM.toml", help="training files to compare")
    parser.add_argument("--seeds", default="1", help="comma-separated (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; [run] threads is what each takes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, the table and the plot")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, not as a table")


def run(args: argparse.Namespace) -> int:
    """Train what is missing, write table and plot; 0 when all runs are complete."""
    runs = plan(args.arms, _seeds(args.seeds), args.out)
    if args.jobs < 1:
        raise BlockffnError(f"--jobs: expected 1 or more, found {args.jobs}")
    complete = train([one for one in runs if not (one.folder / FIGURES).is_file()], args.jobs)
    if not complete:
        print("stopped; the same command goes on from there")
        return 0
    rows = [
        {"arm": one.arm, "seed": one.seed, **json.loads((one.folder / FIGURES).read_text(encoding="utf-8"))}
        for one in runs
    ]
    shown = table(rows)
    write_text(args.out / RESULTS, json.dumps(rows, indent=1) + "\n")
    write_text(args.out / TABLE, shown + "\n")
    plot(rows, args.out / FRONTIER)
    print(json.dumps(rows) if args.json else shown)
    return 0


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as err:
        raise BlockffnError(f"--seeds: expected whole numbers with commas between, found {text!r}") from err


def plan(arms: Sequence[Path], seeds: Sequence[int], out: Path) -> list[Run]:
    """Return the runs in the order of the table. Raises BlockffnError for a file that cannot be trained."""
    from blockffn.training.config import read_config

    names = [arm.stem for arm in arms]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BlockffnError(f"{', '.join(sorted(twice))}: two arms of one name; rename a file")
    found = []
    for arm in arms:
        config = asdict(read_config(arm))
        for seed in seeds:
            one = Run(arm, seed, out / f"{arm.stem}-{seed}")
            config["run"] = {}  # where and how, not what
            _check_unchanged(one.folder / "arm.json", config)
            found.append(one)
    return found


def _check_unchanged(path: Path, config: dict[str, Any]) -> None:
    """Write what the run trains, or compare with what was written."""
    text = json.dumps(config, indent=1) + "\n"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise BlockffnError(
            f"{path.parent}: was begun with another training file; remove the folder, or use another --out"
        )


def train(runs: Sequence[Run], jobs: int) -> bool:
    """Run the missing trainings, `jobs` at once; False when Ctrl-C ended one early, after it saved.

    Raises BlockffnError with the message of a run that failed, once the others have saved.
    """
    waiting = list(runs)
    going: dict[subprocess.Popen[str], Run] = {}
    ended = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no run outlives the table
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                one = waiting.pop(0)
                print(
                    f"{one.arm}, seed {one.seed}: {len(runs) - len(waiting)} of {len(runs)}",
                    file=sys.stderr,
                    flush=True,
                )
                log = (one.folder / "output.log").open("w", encoding="utf-8")
                with log:
                    going[subprocess.Popen(one.words(), stdout=log, stderr=subprocess.STDOUT, text=True)] = one
            time.sleep(0.2)
            for process in [process for process in going if process.poll() is not None]:
                if not _finish(process, going.pop(process)):
                    return False
    except KeyboardInterrupt:
        return False
    finally:
        for process in going:
            process.send_signal(signal.SIGTERM)  # it saves and ends
        for process in going:
            process.wait()
        signal.signal(signal.SIGTERM, ended)
    return True


def _finish(process: subprocess.Popen[str], one: Run) -> bool:
    """Keep the figures of a run that ended; False when it was stopped."""
    lines = (one.folder / "output.log").read_text(encoding="utf-8").splitlines() or ["no message"]
    if process.returncode:
        raise BlockffnError(f"{one.arm}, seed {one.seed}: exit code {process.returncode}: {lines[-1]}")
    if not lines[-1].startswith("{"):
        return False
    write_text(one.folder / FIGURES, json.dumps(_with_extremes(json.loads(lines[-1])), indent=1) + "\n")
    return True


def _with_extremes(figures: dict[str, Any]) -> dict[str, Any]:
    """Add the lowest TLS and the fewest active sets of a layer."""
    if "tls" in figures:
        figures |= {"lowest_tls": min(figures["tls"]), "fewest_sets": min(figures["sets"])}
    return figures


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the figures as Markdown: a line per arm, means over the seeds with half the range behind a +-.

    The last column divides by the loss of the first arm, with the interval of `paired_ratio`.
    """
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    names = [name for name, (key, _) in COLUMNS.items() if any(key in row for row in rows)]
    first = next(iter(arms))
    lines = [f"| arm | {' | '.join(names)} | loss / {first} (95 %) |", f"|---|{'---|' * (len(names) + 1)}"]
    for arm, found in arms.items():
        cells = [_cell(found, *COLUMNS[name]) for name in names]
        cells.append("1" if arm == first else _ratio_cell(found, arms[first]))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio_cell(rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> str:
    """`paired_ratio` of the means over the seeds; a dash where the runs did not see the same documents."""
    documents = [row.get("document_tokens") for row in (*rows, *base)]
    if documents[0] is None or any(found != documents[0] for found in documents):
        return "-"
    nats, base_nats = (np.mean([row["document_nats"] for row in some], axis=0) for some in (rows, base))
    ratio, low, high = paired_ratio(nats, base_nats)
    return f"{ratio:.3f} ({low:.3f} to {high:.3f})"


def paired_ratio(nats: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return how many times `base` the loss of `nats` is, and the 95 % bootstrap interval over documents.

    nats, base [documents]: losses of the same documents, each summed over its tokens. Both are drawn together.
    """
    drawn = np.random.default_rng(0).integers(nats.size, size=(DRAWS, nats.size))
    low, high = np.quantile(nats[drawn].sum(axis=1) / base[drawn].sum(axis=1), (0.025, 0.975))
    return float(nats.sum() / base.sum()), float(low), float(high)


def _cell(rows: Sequence[dict[str, Any]], key: str, percent: bool) -> str:
    values = [100 * mean(row[key]) if percent else mean(row[key]) for row in rows if key in row]
    if not values:
        return "-"
    digits = 1 if percent else 0 if key == "fewest_sets" else 3
    spread = f" +- {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def mean(value: Any) -> float:
    """A figure, or the mean of a figure per layer."""
    return float(np.mean(value))


def plot(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Draw loss over live CLS_8, a point per run; runs with more than 5 % of the experts dead are hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    known = [row for row in rows if "live_cls_8" in row]
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in known)):
        for row in (row for row in known if row["arm"] == arm):
            x, y, color = 100 * row["live_cls_8"], row["validation"], f"C{number % 10}"
            alive = row["dead_share"] <= 0.05
            axes.scatter(x, y, color=color if alive else "none", edgecolors=color)
            axes.annotate(arm, (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set(xlabel="live CLS_8, %", ylabel="validation loss, nats per token")
    axes.set_title("hollow: more than 5 % of the experts are dead", fontsize=9)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=100)
    pyplot.close(figure)
