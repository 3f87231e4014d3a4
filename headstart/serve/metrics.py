"""Metrics for Prometheus: vLLM's names under our prefix, and under vLLM's own where that is wanted. Must not import FastAPI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from headstart.serve.jobs import Job
from headstart.serve.lanes import Lane

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.0, 10.0)  # seconds: between tokens
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # of requests
_NODES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_REASONS = ("stop", "length", "abort", "error")
MOST_DEPTHS = 32  # deeper drafts are counted with this depth


class Metrics:
    """The metrics of a server. Written by the engine thread, read by any.

    model: the served name, a label of every metric.
    lanes: the engines.
    with_vllm: whether every metric that vLLM has too is there under vLLM's name as well.
    """

    def __init__(self, model: str, lanes: Sequence[Lane], with_vllm: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._sets = [MetricSet(self.registry, prefix, model) for prefix in ("headstart", *(["vllm"] if with_vllm else []))]
        self._own = OwnMetrics(self.registry, model, lanes)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def watch(self, running: Callable[[], float], waiting: Callable[[], float], usage: Callable[[], float]) -> None:
        """Read these whenever the metrics are read: requests that run and that wait, and the part of the KV cache in use."""
        for metrics in self._sets:
            metrics.running.set_function(running)
            metrics.waiting.set_function(waiting)
            metrics.usage.set_function(usage)

    def seated(self, job: Job) -> None:
        """A job has got its first row."""
        assert job.request is not None, "the job is in an engine"
        assert job.seated is not None, "the job has a row"
        job.num_cached = job.request.num_copied
        for metrics in self._sets:
            metrics.queue_time.observe(job.seated - job.arrived)
            metrics.prompt_tokens.inc(len(job.prompt))
            metrics.prefix_queries.inc(len(job.prompt))
            metrics.prefix_hits.inc(job.num_cached)

    def spoke(self, job: Job, num_tokens: int, now: float) -> None:
        """A job has new tokens."""
        before, job.spoke = job.spoke, now
        job.num_tokens += num_tokens
        for metrics in self._sets:
            metrics.generation_tokens.inc(num_tokens)
            if before is None:
                metrics.first_token.observe(now - job.arrived)
            else:
                metrics.inter_token.observe(now - before)

    def ended(self, job: Job, reason: str, now: float) -> None:
        """A job has ended."""
        for metrics in self._sets:
            metrics.success[reason].inc()
            metrics.preemptions.inc(job.request.num_preempted if job.request is not None else 0)
            if reason in ("stop", "length"):
                metrics.end_to_end.observe(now - job.arrived)
                if job.num_tokens > 1 and job.seated is not None:
                    metrics.per_token.observe((now - job.seated) / job.num_tokens)

    def round(self, lane: Lane) -> None:
        """A round of a lane is over."""
        before, now = lane.stats, lane.engine.stats
        if now is before:  # it failed
            return
        lane.stats = now
        num_drafts = now.drafts - before.drafts
        self._own.round(lane, num_drafts, now.row_rounds - before.row_rounds, now.tau)
        if not num_drafts:
            return
        held = [after - earlier for after, earlier in zip_longest(now.held, before.held, fillvalue=0)]
        for metrics in self._sets:
            metrics.drafts.inc(now.tried[0] - (before.tried[0] if before.tried else 0))
            metrics.draft_tokens.inc(num_drafts)
            metrics.accepted_tokens.inc(sum(held))
            for depth, count in enumerate(held):
                metrics.accepted_at(depth).inc(count)


class MetricSet:
    """The metrics that vLLM has too, under one prefix."""

    def __init__(self, registry: CollectorRegistry, prefix: str, model: str) -> None:
        labels = ["model_name"]

        def counter(name: str, text: str) -> Counter:
            return Counter(f"{prefix}:{name}", text, labels, registry=registry).labels(model)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"{prefix}:{name}", text, labels, registry=registry).labels(model)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"{prefix}:{name}", text, labels, registry=registry, buckets=buckets).labels(model)

        self.running = gauge("num_requests_running", "Requests that have a row.")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for a row.")
        self.usage = gauge("kv_cache_usage_perc", "Part of the KV cache that is in use, 1 for all; kept prefixes are counted.")
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens that were looked up among kept texts.")
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens whose keys and values were copied from a kept text.")
        self.preemptions = counter("num_preemptions", "How often a request lost its slots to another.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Tokens of answers.")
        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token.", _LONG)
        self.inter_token = histogram("inter_token_latency_seconds", "Between two events of an answer, each of some tokens.", _SHORT)
        self.per_token = histogram("request_time_per_output_token_seconds", "A request's average time per token.", _SHORT)
        self.end_to_end = histogram("e2e_request_latency_seconds", "From the request to its end.", _LONG)
        self.queue_time = histogram("request_queue_time_seconds", "From the request to its first round.", _LONG)
        self.drafts = counter("spec_decode_num_drafts", "Rows of rounds in which drafts were verified.")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Drafts that were verified.")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Drafts that were accepted.")
        success = Counter(f"{prefix}:request_success", "Requests that ended.", [*labels, "finished_reason"], registry=registry)
        self.success = {reason: success.labels(model, reason) for reason in _REASONS}
        accepted = Counter(
            f"{prefix}:spec_decode_num_accepted_tokens_per_pos",
            "Accepted drafts, by depth.",
            [*labels, "position"],
            registry=registry,
        )
        self._accepted = [accepted.labels(model, str(depth)) for depth in range(MOST_DEPTHS)]

    def accepted_at(self, depth: int) -> Counter:
        """The counter of accepted drafts of a depth, from 0."""
        return self._accepted[min(depth, MOST_DEPTHS - 1)]


class OwnMetrics:
    """The metrics that only this server has: what the planner decides, by lane."""

    def __init__(self, registry: CollectorRegistry, model: str, lanes: Sequence[Lane]) -> None:
        labels = ["model_name", "drafter", "accept"]
        on = Gauge("headstart:speculation_on", "Whether the last decoding round had drafts.", labels, registry=registry)
        forest = Histogram("headstart:forest_drafts", "Drafts of a decoding round.", labels, registry=registry, buckets=_NODES)
        last = Gauge("headstart:forest_drafts_last", "Drafts of the last decoding round.", labels, registry=registry)
        tau = Gauge(
            "headstart:spec_decode_acceptance_length", "Tokens per row and round since the start.", labels, registry=registry
        )
        names = {lane: (model, lane.drafter, lane.accept) for lane in lanes}
        self._of_lanes = {lane: (on.labels(*n), forest.labels(*n), last.labels(*n), tau.labels(*n)) for lane, n in names.items()}

    def round(self, lane: Lane, num_drafts: int, num_rows: int, acceptance_length: float) -> None:
        """Note a round. num_rows: those that emitted something; rounds without any only read prompts."""
        if num_rows:
            on, forest, last, tau = self._of_lanes[lane]
            on.set(num_drafts > 0)
            forest.observe(num_drafts)
            last.set(num_drafts)
            tau.set(acceptance_length)
