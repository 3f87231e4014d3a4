"""The metrics are there under their names, and count what happened."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import embedded_service, running

from headstart.serve.lanes import Sizes

DASHBOARD = Path(__file__).parents[2] / "dashboards" / "headstart.json"
VLLM = [
    "spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds", "num_requests_running",
    "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens", "generation_tokens", "request_success", "prefix_cache_queries",
    "prefix_cache_hits", "num_preemptions",
]  # fmt: skip
TEXT = "Once upon a time there was a little girl, and she had a dog. The dog was big and brown. They liked to run in the park."
OURS = ["forest_drafts", "forest_drafts_last", "speculation_on", "spec_decode_acceptance_length"]


@pytest.fixture(scope="module")
def counted():
    """The samples of a server that has answered, and its stats."""
    with running(embedded_service(("mtp",), sizes=Sizes(max_rows=2), with_vllm_metrics=True)) as server:
        with server.http() as http:
            body = {"prompt": TEXT, "max_tokens": 50, "temperature": 0}
            bodies = [http.post("/v1/completions", json=body | {"ignore_eos": True}).json() for _ in range(3)]
            text = http.get("/metrics").text
        yield text, server.engine.stats, [body["usage"] for body in bodies]


def samples(text):
    families = text_string_to_metric_families(text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def total(text, name):
    return sum(value for (sample, _), value in samples(text).items() if sample == name)


@pytest.mark.parametrize("prefix", ["headstart", "vllm"])
def test_vllms_names_are_there_under_both_prefixes(counted, prefix):
    names = {family.name for family in text_string_to_metric_families(counted[0])}
    assert {f"{prefix}:{name}" for name in VLLM} <= names


def test_our_own_metrics_are_there(counted):
    names = {family.name for family in text_string_to_metric_families(counted[0])}
    assert {f"headstart:{name}" for name in OURS} <= names


def test_the_counters_are_those_of_the_engine(counted):
    text, stats, usages = counted
    assert total(text, "headstart:generation_tokens_total") == stats.tokens == 150
    assert total(text, "headstart:prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert total(text, "headstart:spec_decode_num_draft_tokens_total") == stats.drafts
    assert total(text, "headstart:spec_decode_num_accepted_tokens_total") == sum(stats.held)
    assert total(text, "headstart:spec_decode_num_accepted_tokens_per_pos_total") == sum(stats.held)
    assert total(text, "headstart:spec_decode_num_drafts_total") == (stats.tried[0] if stats.tried else 0)
    assert total(text, "headstart:time_to_first_token_seconds_count") == 3
    assert total(text, "headstart:e2e_request_latency_seconds_count") == 3
    assert total(text, "headstart:forest_drafts_sum") == stats.drafts
    assert samples(text)["headstart:request_success_total", (("finished_reason", "length"), ("model_name", "embedded"))] == 3


def test_hits_of_the_prefix_cache_are_counted(counted):
    text, _, usages = counted
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] == 0
    assert cached[1] > 0
    assert total(text, "headstart:prefix_cache_hits_total") == sum(cached)
    assert total(text, "headstart:prefix_cache_queries_total") == total(text, "headstart:prompt_tokens_total")


def test_without_the_option_vllms_names_are_not_there(server):
    from headstart.serve.metrics import Metrics

    assert b"vllm:" not in Metrics("name", server.service.lanes).text()


def test_the_dashboard_shows_metrics_that_exist(counted):
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    names = {sample for sample, _ in samples(counted[0])}
    for query in queries:
        for name in re.findall(r"headstart:\w+", query):
            assert name in names, f"{name} of {query} is no metric"
    assert len(queries) > 10
