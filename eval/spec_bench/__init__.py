"""Spec-Bench and SPEED-Bench: plain and speculative answers to their questions, one after another, in one run."""
