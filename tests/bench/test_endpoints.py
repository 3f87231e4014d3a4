"""Measurements of servers: figures by the server's own count, comparisons, and errors that lose nothing."""

import csv
import io
import json
from types import SimpleNamespace

import pytest
from command_line import answer, run
from served import Served, serving

from headstart.bench.endpoints import client, counters
from headstart.bench.endpoints.client import Arrivals, Endpoint, EndpointTask, Reply, request_settings
from headstart.bench.endpoints.measure import EndpointSetup, measure, samples_of
from headstart.speculation.noise import mix
from headstart.speculation.params import SamplingParams

TASK = EndpointTask(messages=({"role": "user", "content": "the cat"},), prompt="the cat")
PLAIN = {"rounds": (1,) * 7}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(client, "PAUSE", 0.0)
    monkeypatch.setattr(counters, "_SETTLED", 0.0)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "three.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the cat", "the sea", "a fish")))
    return path


def bench(url, prompts, *more):
    return answer("bench", "--endpoint", url, "--prompts", prompts, "--repeat", 1, "--max-tokens", 8, *more)


def refused(*arguments):
    result = run("bench", *arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


# -- figures --


def test_tau_and_acceptance_are_the_differences_of_vllms_counters(prompts):
    served = Served()
    served.totals |= {"drafts": 1000, "kept": 3}  # before this measurement
    with serving(served) as url:
        [row] = bench(url, prompts)["runs"]
    assert row["tau"] == pytest.approx(1 + 4 / 3)  # rounds of 3, 1 and 3 tokens
    assert row["acceptance"] == pytest.approx([2 / 3, 2 / 3])
    assert (row["tokens"], row["lengths"]) == (3 * 8, [3, 0, 6])


def test_tau_of_sglang_is_tokens_per_verification(prompts):
    with serving(Served(metrics="sglang")) as url:
        result = bench(url, prompts)
    assert result["runs"][0]["tau"] == pytest.approx(8 / 3)
    assert any("SGLang's counters" in note for note in result["notes"])


def test_sglangs_gauge_counts_where_it_has_no_counter():
    speculation = counters.speculation_between({}, counters.parse_counters('sglang:spec_accept_length{tp_rank="0"} 2.5\n'))
    assert (speculation.tau, speculation.acceptance) == (2.5, ())


def test_labels_are_summed_and_positions_are_kept_apart():
    page = 'a_total{engine="0"} 1\na_total{engine="1"} 2.5\nb{position="1",x="}"} 4\n# a comment\nno number\n'
    assert counters.parse_counters(page) == {"a_total": 3.5, "b/1": 4.0}


def test_figures_of_single_answers_are_preferred_and_give_an_interval(prompts):
    with serving(Served(histogram=True, metrics="")) as url:
        result = bench(url, prompts)
    [row] = result["runs"]
    assert (row["tau"], row["acceptance"]) == (pytest.approx(7 / 3), pytest.approx([2 / 3, 2 / 3]))
    assert row["tau_interval"] == pytest.approx([7 / 3, 7 / 3])  # all answers have the same rounds


def test_a_server_without_figures_of_speculation_can_be_measured(prompts):
    with serving(Served(metrics="")) as url:
        result = bench(url, prompts)
    assert result["runs"][0]["tau"] is None
    assert any("publishes no speculation" in note for note in result["notes"])


def test_tokens_generated_for_others_are_noticed():
    served = Served()
    with serving(served) as url:
        endpoint = Endpoint(url)
        before = counters.read_counters(url)
        endpoint.reply(TASK, SamplingParams())
        assert counters.generated(before, counters.read_counters(url)) == 8
        setup = EndpointSetup((TASK,), SamplingParams())
        assert measure(setup, [endpoint], 2).others == {endpoint.name: 0}
        served.others = 5
        assert measure(setup, [endpoint], 2).others == {endpoint.name: 10}


def chunk(text, count=None, has_choices=True):
    choices = [SimpleNamespace(delta=SimpleNamespace(content=text, model_extra={}))] if has_choices else []
    usage = None if count is None else SimpleNamespace(completion_tokens=count)
    return SimpleNamespace(choices=choices, usage=usage, model_extra={})


def test_bursts_are_the_tokens_of_chunks_and_the_time_since_the_tokens_before():
    arrivals = Arrivals(began=10.0)
    for now, one in ((11, chunk("", 0)), (12, chunk("a", 1)), (15, chunk("bcd", 4)), (16, chunk("", 4)), (20, chunk("e", 5))):
        arrivals.note(one, now)
    arrivals.note(chunk("", 5, has_choices=False), 21)
    reply = arrivals.reply("url", 22.0, 1)
    assert (reply.text, reply.num_tokens, reply.bursts) == ("abcde", 5, ((3, 3), (1, 5)))
    assert (reply.began, reply.first, reply.ended) == (10, 12, 22)


def test_without_counts_of_chunks_the_answer_is_one_burst():
    arrivals = Arrivals(began=10.0)
    for now, text in ((12, "a"), (15, "bcd"), (18, "e")):
        arrivals.note(chunk(text), now)
    arrivals.note(chunk("", 7, has_choices=False), 21)
    assert arrivals.reply("url", 22.0, 1).bursts == ((6, 6.0),)


def test_tokens_are_counted_by_usage_where_chunks_hold_several(prompts):
    served = Served(counts_chunks=False)  # refuses to count chunks, as OpenAI's own server does
    with serving(served) as url:
        result = bench(url, prompts, "--save", prompts.parent / "all.jsonl")
    lines = [json.loads(line) for line in (prompts.parent / "all.jsonl").read_text().splitlines()]
    assert [line["num_tokens"] for line in lines] == [8, 8, 8]
    assert all([tokens for tokens, _ in line["bursts"]] == [7] for line in lines)
    assert result["runs"][0]["lengths"] == []
    assert any("the mean time of its answer" in note for note in result["notes"])
    assert ["continuous_usage_stats" in one["stream_options"] for one in served.asked] == [True, *[False] * 4]


# -- comparisons --


def test_two_servers_give_a_speed_up_and_compare_their_texts(prompts):
    with serving(Served()) as fast, serving(Served(**PLAIN)) as slow:
        result = bench(fast, prompts, "--against", slow, "--concurrency", "1,3")
        base, row = result["runs"]
    assert [row["run"] for row in result["runs"]] == [url.split("/")[2] for url in (slow, fast)]
    assert (base["speed_up"], base["tau"], base["identical"]) == (1, None, "yes")
    assert row["interval"][0] <= row["speed_up"] <= row["interval"][1]
    assert row["speed_up"] == pytest.approx(row["tokens_per_second"] / base["tokens_per_second"])
    assert row["identical"] == "yes"
    assert [(load["run"], load["rows"]) for load in result["concurrency"]] == [
        (one["run"], rows) for rows in (1, 3) for one in result["runs"]
    ]


def test_differences_of_texts_are_named_at_temperature_0_only(prompts):
    with serving(Served()) as one, serving(Served(words=[" the", " ship"])) as other:
        greedy = bench(one, prompts, "--against", other)
        assert greedy["runs"][1]["identical"] == "3 differ"
        assert greedy["runs"][1]["splits"][0] == "prompt 1, character 6: 'ea was blue ', not 'hip the ship'"
        assert bench(one, prompts, "--against", other, "--temperature", 0.7)["runs"][1]["identical"] == "n/a"


def test_as_many_requests_run_at_once_as_are_asked_for(prompts):
    served = Served(pause=0.01)
    with serving(served) as url:
        bench(url, prompts, "--rows", 3)
    assert served.most == 3


def test_more_requests_at_once_than_prompts_repeat_them_with_other_seeds(prompts):
    served = Served(pause=0.01)
    with serving(served) as url:
        [load] = bench(url, prompts, "--concurrency", "5")["concurrency"]
    assert (load["rows"], served.most) == (5, 5)
    assert {one["seed"] for one in served.asked[-5:]} == {mix(0, task) % 2**31 for task in range(5)}


def test_the_time_of_answers_that_run_together_is_shared():
    def reply(began, first, ended):
        return Reply("", 1, began, first, ended, (), True)

    one, two = samples_of("x", [(0, reply(10, 11, 14)), (1, reply(12, 13, 20))])
    assert (one.seconds, one.prompt_seconds) == (2 + 2 / 2, 1)
    assert (two.seconds, two.prompt_seconds) == (2 / 2 + 6, 1 / 2)
    assert two.first_token_seconds == 1


def test_tables_csv_and_markdown_have_the_same_runs(prompts):
    with serving(Served()) as url, serving(Served(**PLAIN)) as other:
        base = ("bench", "--endpoint", url, "--against", other, "--prompts", prompts, "--prompts", "edits", "--limit", 2)
        base = (*base, "--repeat", 1, "--max-tokens", 8)
        shown = run(*base, "--by-kind", "--concurrency", "2")
        for words in (
            "speed-up",
            "acceptance rate",
            "P50 / P90 / P99",
            "by prompt set",
            "throughput by",
            "vLLM's counters",
            "client:",
        ):
            assert words in shown.stdout
        lines = list(csv.DictReader(io.StringIO(run(*base, "--format", "csv").stdout)))
        assert [line["prompts"] for line in lines] == ["all", "three", "edits"] * 2
        assert lines[3]["tau"] == str(1 + 4 / 3)
        assert "| edits (2) |" in run(*base, "--format", "markdown").stdout


# -- what is sent --


def test_prompts_are_messages_and_beginnings_are_continued(prompts):
    served = Served()
    with serving(served) as url:
        bench(url, prompts)
        bench(url, "stories", "--limit", 1)
        bench(url, prompts, "--raw", "--limit", 1)
        bench(url, "stories", "--chat", "--limit", 1)
    paths = [one["path"] for one in served.asked]
    assert paths == [f"/v1/{path}" for path in (*["chat/completions"] * 4, *["completions"] * 4, *["chat/completions"] * 2)]
    assert served.asked[0]["messages"] == [{"role": "user", "content": "the cat"}]
    assert served.asked[6]["prompt"] == "the cat"


def test_later_messages_of_a_conversation_follow_the_servers_own_answers(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"turns": ["the cat", "and the sea"]}) + "\n")
    served = Served()
    with serving(served) as url:
        assert bench(url, path)["settings"]["num_prompts"] == 2
    assert [message["content"] for message in served.asked[-1]["messages"]] == [
        "the cat", " the sea was blue and a fish sang", "and the sea",
    ]  # fmt: skip


def test_only_settings_that_are_set_are_sent():
    plain = request_settings(SamplingParams(max_tokens=8), True)
    assert plain.keys() == {"stream", "stream_options", "temperature", "max_tokens", "seed"}
    params = SamplingParams(top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=1, stop=("x",), ignore_eos=True)
    more = request_settings(params, False)
    assert more["extra_body"] == {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True}
    assert (more["top_p"], more["presence_penalty"], more["stop"]) == (0.9, 1, ["x"])
    assert more["stream_options"] == {"include_usage": True}


def test_the_key_comes_from_the_environment(prompts, monkeypatch):
    monkeypatch.setenv("SEA_KEY", "secret")
    served = Served()
    with serving(served) as url:
        bench(url, prompts, "--api-key-env", "SEA_KEY")
    assert {one["key"] for one in served.asked} == {"Bearer secret"}


# -- errors --


def test_a_server_that_cannot_be_reached_is_one_sentence(prompts):
    words = refused("--endpoint", "http://127.0.0.1:9/v1", "--prompts", prompts)
    assert "http://127.0.0.1:9/v1 cannot be reached" in words
    assert words.count("headstart:") == 1


@pytest.mark.parametrize(
    ("served", "more", "words"),
    [
        (Served(), ("--endpoint-model", "lake"), "has no model 'lake'; name one of its models: 'sea'"),
        (Served(models=("sea", "lake")), (), "is not told which model to use; name one of its models: 'sea', 'lake'"),
        (Served(models=()), (), "does not list its models (HTTP 404); its URL mostly ends in /v1"),
        (Served(streams=False), (), "does not stream its answers"),
        (Served(counts=False), (), "gives no usage at the end of a stream"),
        (Served(failures=[(401, "who are you")]), (), "does not answer: HTTP 401, who are you"),
        (Served(failures=[(503, "busy")] * 4), (), "does not answer: HTTP 503, busy"),
        (Served(context=3), (), "every prompt"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_be_measured_is_one_sentence(prompts, served, more, words):
    with serving(served) as url:
        assert words in refused("--endpoint", url, "--prompts", prompts, *more)


def test_a_server_that_lists_no_models_is_believed(prompts):
    with serving(Served(models=())) as url:
        assert bench(url, prompts, "--endpoint-model", "sea")["endpoints"][0]["model"] == "sea"


def test_requests_that_were_refused_for_a_while_are_sent_again(prompts):
    served = Served(failures=[(0, ""), (429, "too many"), (0, ""), (500, "oops"), (503, "busy")])
    with serving(served) as url:
        result = bench(url, prompts)
    assert result["num_samples"] == 3
    assert any("3 requests were refused or broke" in note for note in result["notes"])


def test_a_stream_that_breaks_is_sent_again():
    served = Served()
    with serving(served) as url:
        endpoint = Endpoint(url)
        served.breaks = 1
        reply = endpoint.reply(TASK, SamplingParams())
    assert (reply.num_attempts, reply.num_tokens) == (2, 8)


def test_a_failure_in_the_middle_loses_nothing(prompts, tmp_path):
    failures = [(0, "")] * 3 + [(500, "engine died")] * 9  # the warm-up and two prompts are answered
    files = ("--out", tmp_path / "out.json", "--save", tmp_path / "all.jsonl")
    with serving(Served(failures=failures)) as url:
        result = run("bench", "--endpoint", url, "--prompts", prompts, "--repeat", 2, *files)
    assert result.exit_code == 2
    words = " ".join(result.stderr.split())
    assert "HTTP 500" in words
    assert "the 2 answers before that are in the results" in words
    assert "tokens/s" in result.stdout
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "out.json").read_text())["runs"][0]["tokens"] == 16


@pytest.mark.parametrize(
    "words",
    [
        "This model's maximum context length is 1024 tokens.",  # vLLM, for a prompt
        "max_tokens=2000 cannot be greater than max_model_len=1024.",  # vLLM, for the answer
        "The input (2000 tokens) is longer than the model's context length (1024 tokens).",  # SGLang
    ],
)
def test_a_lack_of_room_is_known_by_each_engines_words(prompts, words):
    with serving(Served(failures=[(400, words)] * 4)) as url:
        assert "exceeds the context of an endpoint" in refused("--endpoint", url, "--prompts", prompts, "--repeat", 1)


def test_prompts_that_exceed_the_context_are_left_out_for_all_servers(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("short", "x" * 60)))
    with serving(Served(context=50)) as narrow, serving(Served()) as wide:
        result = bench(narrow, path, "--against", wide)
    assert result["settings"]["num_skipped"] == 1
    assert [row["tokens"] for row in result["runs"]] == [8, 8]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--endpoint-model", "x"), "--endpoint-model is for an --endpoint"),
        (("--against", "http://x/v1"), "--against is for an --endpoint"),
        (("--endpoint", "http://x/v1", "--against", "https://x/"), "are both x; give two servers"),
        (("--endpoint", "http://x/v1", "--against-model", "y"), "--against-model is for a server --against"),
        (("--endpoint", "http://x/v1", "--model", "m"), "--model is for a model in this process"),
        (("--endpoint", "http://x/v1", "--run", "lookup"), "--run is for drafters in this process"),
        (("--endpoint", "http://x/v1", "--accept", "typical"), "--accept is for a model in this process"),
        (("--endpoint", "http://x/v1", "--html", "x.html"), "--html compares with plain decoding in this process"),
        (("--endpoint", "http://x/v1", "--api-key-env", "NOT_SET_AT_ALL"), "NOT_SET_AT_ALL, which is not set"),
        (("--endpoint", "http://x/v1", "--repeat", "0"), "repeat is 0"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(more, words):
    assert words in refused(*more)
