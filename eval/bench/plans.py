"""Names of plans, one way everywhere: "plain", "auto", "chain 4", "tree 8".

    >>> parse_plan("tree 8"), plan_name(Plan(8, True)), plan_name(Plan(4)), plan_name(Plan())
    (Plan(nodes=8, tree=True), 'tree 8', 'chain 4', 'plain')

The number counts drafted tokens, for chains and trees alike. The root, the last verified token, is evaluated with every
draft and not counted: a chain of 4 is verified in a batch of 5 tokens, a tree of 8 in a batch of 9. The authors of
EAGLE-2 count the root, and so does `TreeShape.size`: their tree of 32 is "tree 31" here.
"""

from __future__ import annotations

from blockffn.errors import BlockffnError
from blockffn.speculative.policy import Plan


def parse_plan(words: str) -> Plan | None:
    """Return the plan of "plain", "chain 4" or "tree 8"; None for "auto". Errors: BlockffnError for anything else."""
    kind, _, size = words.partition(" ")
    if words in ("plain", "auto"):
        return Plan() if words == "plain" else None
    if kind in ("chain", "tree") and size.isdigit() and 0 < int(size) < 32:
        return Plan(int(size), kind == "tree")
    raise BlockffnError(f"plan: expected auto, chain N or tree N with N from 1 to 31, found {words!r}")


def plan_name(plan: Plan) -> str:
    """Return the name of a plan in tables."""
    return f"{'tree' if plan.tree else 'chain'} {plan.nodes}" if plan.nodes else "plain"


def named(*names: str) -> dict[str, Plan]:
    """Return fixed plans by their names."""
    return {name: plan for name in names if (plan := parse_plan(name)) is not None}


def plan_names(words: str) -> list[str]:
    """Return the plans of an argument, "chain 4,tree:8": "auto" for none. Errors: BlockffnError, for "plain" too."""
    plans = [" ".join(part.replace(":", " ").split()) for part in words.split(",") if part.strip()]
    if Plan() in map(parse_plan, plans):
        raise BlockffnError("--plans: plain decoding is measured anyway; expected auto, chain N or tree N")
    return plans or ["auto"]
