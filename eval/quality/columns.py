"""Columns that the tables of several variants of a model share (`eval dial`, `eval types`): quality, then speed."""

from __future__ import annotations

# key, head, format
COLUMNS = (
    ("perplexity", "perplexity", "{:.4f}"),
    ("kld_mean", "KL mean", "{:.5f}"),
    ("kld_99", "KL 99 %", "{:.4f}"),
    ("top1", "same top-1", "{:.2%}"),
    ("decode_tokens_per_second", "decode t/s", "{:.1f}"),
    ("verify8_tokens_per_second", "verify 8 t/s", "{:.1f}"),
)
