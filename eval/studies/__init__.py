"""Experiments behind single claims of docs/speculative.md: the choice of the draft, exact mode, the loop's own time."""
