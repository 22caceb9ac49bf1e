"""/metrics: vLLM's names for speculation, llama-server's for the rest, and the experts that steps read.

Figures of an answer are counted when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from blockffn.server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def text(service: Service) -> bytes:
    """Return the page of metrics."""
    registry = CollectorRegistry()
    registry.register(_Collector(service))
    return generate_latest(registry)


class _Collector:
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        totals, engine = self._service.totals, self._service.engine.statistics()
        sums = totals.sums
        counters = {
            "vllm:spec_decode_num_drafts": ("Drafts verified.", sums["steps"] - sums["plain_steps"]),
            "vllm:spec_decode_num_draft_tokens": ("Tokens drafted.", sums["drafted"]),
            "vllm:spec_decode_num_accepted_tokens": ("Drafted tokens accepted.", sums["accepted"]),
            "llamacpp:prompt_tokens": ("Prompt tokens evaluated.", sums["prompt_n"]),
            "llamacpp:prompt_seconds": ("Time of prompts in seconds.", sums["prompt_ms"] / 1e3),
            "llamacpp:tokens_predicted": ("Tokens generated.", sums["predicted_n"]),
            "llamacpp:tokens_predicted_seconds": ("Time of generation in seconds.", sums["predicted_ms"] / 1e3),
            "llamacpp:n_decode": ("Evaluations of the model.", engine["steps"]),
            "blockffn:prompt_tokens_reused": ("Prompt tokens found in the cache.", sums["reused_n"]),
            "blockffn:preemptions": ("Texts that gave way for lack of cache.", engine["preemptions"]),
            "blockffn:answers": ("Answers that ended.", totals.answers),
            "blockffn:answers_cancelled": ("Answers whose client went away or whose time was over.", totals.cancelled),
            "blockffn:requests_refused": ("Requests refused because the queue was full.", totals.refused),
        }
        for name, (help_text, value) in counters.items():
            yield CounterMetricFamily(name, help_text, value=value)
        positions = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by position.", labels=["position"]
        )
        for position, count in enumerate(sums["accepted_by_position"]):
            positions.add_metric([str(position)], count)
        yield positions
        yield from self._gauges(engine, sums)

    def _gauges(self, engine: dict[str, Any], sums: dict[str, Any]) -> Iterator[Metric]:
        sizes = [size / max(evaluations, 1) for size, evaluations in self._service.union_by_layer()]
        mean = sum(sizes) / len(sizes) if sizes else math.nan
        gauges = {
            "llamacpp:prompt_tokens_seconds": ("Prompt tokens per second.", _rate(sums["prompt_n"], sums["prompt_ms"])),
            "llamacpp:predicted_tokens_seconds": (
                "Tokens per second.",
                _rate(sums["predicted_n"], sums["predicted_ms"]),
            ),
            "llamacpp:requests_processing": ("Answers that are generated.", engine["running"]),
            "llamacpp:requests_deferred": ("Answers that wait.", engine["waiting"]),
            "llamacpp:kv_cache_tokens": ("Tokens in the cache.", engine["cached"]),
            "llamacpp:kv_cache_usage_ratio": ("Share of the cache in use.", engine["cached"] / engine["n_ctx"]),
            "blockffn:union_size": ("Experts read per layer and evaluation, mean.", mean),
            "blockffn:experts_read_ratio": (
                "Share of the experts read per evaluation.",
                mean / (self._service.llm.n_experts or 1),
            ),
        }
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(name, help_text, value=value)
        layers = GaugeMetricFamily("blockffn:union_size_by_layer", "Experts read per evaluation.", labels=["layer"])
        for layer, size in enumerate(sizes):
            layers.add_metric([str(layer)], size)
        yield layers


def _rate(n: float, ms: float) -> float:
    return 1e3 * n / ms if ms else 0.0
