"""Simulated machines, drafters and texts, on which the automatic choice of the draft is compared with fixed plans.

    text = Simulation(MACHINES["union"], Single(0.8, cost=0.1, seed=0), seed=0)
    text.choose(trees=())        # seconds of the automatic choice: over those of the best fixed plan, of plain decoding

`UNSEEN` machines were kept out of tuning: no constant of the policy was chosen with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from blockffn.speculative import Draft, ScriptedDrafter
from blockffn.speculative.draft import Step
from blockffn.speculative.policy import PLAIN, Plan, Policy
from blockffn.speculative.scripted import CHILDREN

TOKENS = 2000
PERIOD = 200  # tokens after which two rates take turns
TREES = (8, 16, 31)
LEVELS = 3  # of a tree whose drafting costs time: one evaluation of the head for each
CHAINS = tuple(map(Plan, (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)))


@dataclass(frozen=True)
class Machine:
    """What a step takes, in any unit: by its number of tokens, more after a change of size and later in the text."""

    cost: Callable[[int], float]
    change: float = 0.05  # of the first step of another size
    attention: float = 0.0  # what each token of a step costs more at the end of the text
    noise: float = 0.03

    def seconds(self, n: int, before: int, place: float) -> float:
        """Return the time of a step of `n` tokens after one of `before` tokens, at `place` (0 to 1) of the text."""
        return self.cost(n) + (self.change if n != before else 0.0) + self.attention * n * place


def measured(points: dict[int, float]) -> Callable[[int], float]:
    table = [float(np.interp(n, list(points), list(points.values()))) for n in range(40)]
    return lambda n: table[n]


LARGE = {1: 1.0, 2: 1.43, 3: 1.67, 4: 2.05, 5: 2.6, 6: 3.2, 7: 3.5, 9: 4.4, 13: 6.0, 17: 7.6, 32: 15.0}
SMALL = {1: 1.0, 2: 1.25, 3: 1.52, 4: 1.75, 5: 2.04, 6: 2.38, 7: 2.75, 9: 3.3, 11: 3.83, 13: 4.6, 17: 5.6, 32: 10.0}
STEEPER = {1: 1.0, 2: 1.43, 3: 1.94, 4: 2.4, 5: 2.7, 6: 3.0, 7: 3.4, 9: 4.85, 13: 5.8, 17: 7.9, 32: 17.0}
# 2-core Zen 4, portable profile, 1.2B shape. Measured: 1, 4 and 8 tokens after 128 others (47.6, 100.6 and 112.1
# tokens/s), 1 and 4 after 2,048 (20.4 and 27.5): 1.25 plain steps for each token. The other sizes follow a Xeon's.
ZEN4 = {1: 1.0, 2: 1.38, 3: 1.58, 4: 1.9, 5: 2.35, 6: 2.83, 7: 3.08, 8: 3.4, 13: 5.0, 17: 6.4, 32: 12.0}
TILES = {1: 1.0, 2: 1.38, 3: 1.6, 4: 1.9, 5: 2.95, 6: 3.1, 7: 3.25, 8: 3.4, 9: 4.3, 12: 4.9, 13: 5.6, 17: 7.2, 32: 12.0}
MACHINES = {
    "flat": Machine(lambda n: 1 + 0.02 * (n - 1)),  # verification nearly free
    "union": Machine(lambda n: 1 + 0.25 * (n - 1)),
    "steep": Machine(lambda n: 1 + 0.6 * (n - 1)),
    "linear": Machine(lambda n: 1.0 * n),  # nothing to gain
    "stairs": Machine(lambda n: 1 + 0.08 * (n - 1) + (0.4 if n > 4 else 0.0)),
    "bumpy": Machine(
        measured({1: 1.13, 2: 1.35, 3: 1.65, 5: 1.95, 6: 2.1, 7: 2.4, 9: 2.95, 13: 3.6, 17: 4.4, 32: 6.4})
    ),
    "1.2b": Machine(measured(LARGE), 0.03, 1.1, 0.07),  # this and the next: the models of docs/speculative.md
    "tiny": Machine(measured(SMALL), 0.6, 0.5, 0.1),
    "long": Machine(measured(STEEPER), 0.48, 1.8, 0.1),  # as a small model whose attention is slow
    "zen4": Machine(measured(ZEN4), 0.05, 1.25, 0.05),
    "tiles": Machine(measured(TILES), 0.05, 1.25, 0.05),  # the same with a step of time where a tile of tokens ends
}
UNSEEN = {
    "bent": Machine(lambda n: 1 + 0.1 * (n - 1) + 0.02 * (n - 1) ** 2, 0.1, 0.3, 0.06),
    "halls": Machine(
        measured({1: 1.0, 2: 1.6, 3: 1.65, 4: 1.7, 5: 2.2, 8: 2.4, 9: 3.4, 16: 4.0, 17: 5.0, 32: 7.0}), 0.2, 0.2, 0.08
    ),
}


class Guesses:
    """Which guess is right at every place of a text; two rates take turns."""

    def __init__(self, p: float | tuple[float, float], seed: int, tokens: int) -> None:
        rates = p if isinstance(p, tuple) else (p, p)
        text, n_vocab = range(tokens + 100), 2 * tokens + 200
        drafters = [ScriptedDrafter(text, rate, n_vocab, seed, CHILDREN, by_place=True) for rate in rates]
        self.drafter = drafters[0]
        self.right = [drafters[at // PERIOD % 2].right[at] for at in range(tokens + 100)]
        self.run = [0] * (tokens + 101)  # how many first guesses in a row are right
        for at in range(tokens + 99, -1, -1):
            self.run[at] = self.run[at + 1] + 1 if self.right[at] == 0 else 0
        self._chains: dict[tuple[int, str], Draft] = {}
        self._trees: dict[int, tuple[dict[tuple[int, int], int], int, Draft]] = {}

    def chain(self, at: int, n: int, source: str) -> tuple[Draft, int]:
        """Return a chain of `n` tokens and how many of them are right."""
        draft = self._chains.get((n, source))
        if draft is None:
            draft = self._chains[n, source] = Draft(np.zeros(n, np.int32), np.arange(-1, n - 1), True, source)
        return draft, min(n, self.run[at])

    def tree(self, at: int, n: int, levels: int, source: str) -> tuple[Draft, int]:
        """Return the tree of the `n` likeliest nodes and how many are right, of the first `levels` levels."""
        if n not in self._trees:
            parents, ranks, depths = self.drafter.shape(n)
            kept = [node for node in range(n) if depths[node] < levels]  # parents first: a prefix-closed set
            place = {node: i for i, node in enumerate(kept)} | {-1: -1}
            above = np.array([place[parents[node]] for node in kept], dtype=np.int32)
            children = {(place[parents[node]], ranks[node]): i for i, node in enumerate(kept)}
            draft = Draft(np.zeros(len(kept), np.int32), above, False, source)
            self._trees[n] = children, int(draft.depth().max()), draft
        children, depth, draft = self._trees[n]
        node, accepted = -1, 0
        while accepted < depth and (child := children.get((node, self.right[at + accepted]))) is not None:
            node, accepted = child, accepted + 1
        return draft, accepted


NONE = Draft(np.empty(0, np.int32), np.empty(0, np.int32), True)
Drafted = tuple[Draft, int, float]  # the draft, how many of its nodes are right, seconds of drafting


class Drafter(Protocol):
    """Drafts at a place of the text."""

    def draft(self, at: int, plan: Plan) -> Drafted: ...


class Single:
    """One source. A chain costs `cost` for each token, a tree for each level; LEVELS levels at most where it costs."""

    def __init__(self, p: float | tuple[float, float], cost: float, seed: int, tokens: int = TOKENS) -> None:
        self.guesses, self.cost = Guesses(p, seed, tokens), cost

    def draft(self, at: int, plan: Plan) -> Drafted:
        if not plan.tree:
            return *self.guesses.chain(at, plan.nodes, "single"), self.cost * plan.nodes
        draft, right = self.guesses.tree(at, plan.nodes, LEVELS if self.cost else plan.nodes, "single")
        return draft, right, self.cost * draft.levels


class Silent:
    """Costs `cost` whenever it is asked, and gives something at a `share` of the places only."""

    def __init__(self, p: float, cost: float, share: float, seed: int, tokens: int = TOKENS) -> None:
        self.guesses, self.cost = Guesses(p, seed, tokens), cost
        self.gives = np.random.default_rng(seed + 7).random(tokens + 100) < share

    def draft(self, at: int, plan: Plan) -> Drafted:
        if not self.gives[at]:
            return NONE, 0, self.cost
        return *self.guesses.chain(at, plan.nodes, "silent"), self.cost


class Mixture:
    """A free look-up that answers in stretches of the text, and a model of at most 8 tokens that answers elsewhere."""

    def __init__(
        self, look_up: float, model: float, cost: float, share: float, seed: int, tokens: int = TOKENS
    ) -> None:
        self.look_up, self.model = Guesses(look_up, seed, TOKENS), Guesses(model, seed + 50, TOKENS)
        self.cost, random, self.found = cost, np.random.default_rng(seed + 9), list[bool]()
        while len(self.found) < TOKENS + 100:
            self.found += [bool(random.random() < share)] * int(1 + random.geometric(1 / 30))

    def draft(self, at: int, plan: Plan) -> Drafted:
        if self.found[at]:
            return *self.look_up.chain(at, plan.nodes, "look-up"), 0.0
        n = min(plan.nodes, 8)
        return *self.model.chain(at, n, "model"), self.cost * n


class Simulation:
    """A drafter on a machine; the policy sees times as noisy as real ones.

    `parts`: generations of so many tokens, one after another, each from the start of the context.
    """

    def __init__(self, machine: Machine, drafter: Drafter, seed: int, tokens: int = TOKENS, parts: int = 1) -> None:
        self.machine, self.drafter, self.seed, self.tokens, self.parts = machine, drafter, seed, tokens, parts

    def seconds(self, policy: Policy | Plan) -> float:
        """Return the seconds per token of a policy or of a fixed plan, noise left out."""
        random = np.random.default_rng(self.seed)
        most = self.tokens * self.parts + 20
        noise = (np.exp(self.machine.noise * random.standard_normal(most)) + (random.random(most) < 0.02)).tolist()
        seconds, produced = 0.0, 0
        for part in range(self.parts):
            first, before = produced, 0
            if isinstance(policy, Policy):
                policy.begin()
            while produced < self.tokens * (part + 1):
                plan = policy.plan() if isinstance(policy, Policy) else policy
                draft, right, drafting = self.drafter.draft(produced, plan) if plan.nodes else (NONE, 0, 0.0)
                size = 1 + len(draft)
                verifying = self.machine.seconds(size, before, (produced - first) / TOKENS)
                before = size
                if isinstance(policy, Policy):
                    policy.learn(step(plan, draft, right, drafting, verifying * noise.pop()))
                seconds += verifying + drafting
                produced += 1 + right
        return seconds / produced

    def choose(self, trees: Sequence[int]) -> tuple[float, float]:
        """Return the seconds of the automatic choice over those of the best fixed plan, and over plain decoding's."""
        found, plain = self.seconds(Policy(16, tuple(trees))), self.seconds(PLAIN)
        best = min(plain, *(self.seconds(plan) for plan in (*CHAINS, *(Plan(size, True) for size in trees))))
        return found / best, found / plain


def step(plan: Plan, draft: Draft, right: int, drafting: float, verifying: float) -> Step:
    """Return a closed step whose first `right` levels were accepted."""
    return Step(
        plan,
        plan.nodes,
        draft,
        0,
        list(range(right)),
        1 + right,
        True,
        draft_seconds=drafting,
        verify_seconds=verifying,
    )
