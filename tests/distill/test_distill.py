"""Distillation: the lines do not depend on batching, drafter or interruptions, and errors are one sentence."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from typer.testing import CliRunner

import headstart
from headstart.cli import app
from headstart.distill.distill import distill
from headstart.distill.endpoint import EndpointTeacher
from headstart.distill.teacher import EngineTeacher, Settings
from headstart.speculation.noise import gumbel, mix, noise_key
from headstart.target.loading import load_model
from headstart.target.tokenizer_loading import load_tokenizer
from headstart.text.conversations import read_examples
from headstart.text.prompts import ChatPrompt, read_prompts

SETTINGS = Settings(temperature=0.8, max_tokens=40, seed=7)
STOPS = tuple(range(0, 320, 8))  # a random model hardly ever ends by itself


def chat(*contents: str) -> tuple[dict[str, str], ...]:
    roles = ["user", "assistant"] * len(contents)
    return tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))


WORDS = ("the cat", "the sea was blue", "a fish", "give me a song and a fish", "Once upon a time", "take it", "so")
PROMPTS = [ChatPrompt(f"p:{n}", n, chat(word, "so", "and then", "so", word)) for n, word in enumerate(WORDS)]


def new_llm(folder, **settings) -> headstart.LLM:
    llm = headstart.load(folder, **settings)
    llm.stop_ids = STOPS
    return llm


@pytest.fixture(scope="module")
def llm(model_folder) -> headstart.LLM:
    return new_llm(model_folder, drafter="lookup", max_rows=3)


@pytest.fixture(scope="module")
def teacher(llm) -> EngineTeacher:
    return EngineTeacher(llm)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_id(path) -> dict[str, dict]:
    lines = read(path)
    lines_by_id = {line["id"]: line for line in lines}
    assert len(lines_by_id) == len(lines), "a conversation was answered twice"
    return lines_by_id


# -- the answers --


def test_an_answer_is_what_the_model_generates_with_that_seed(llm, teacher, tmp_path):
    distill(teacher, PROMPTS, SETTINGS, tmp_path / "out.jsonl")
    for prompt in PROMPTS:
        line, seed = by_id(tmp_path / "out.jsonl")[prompt.id], mix(7, prompt.index)
        [alone] = llm.generate([prompt.messages[:1]], temperature=0.8, max_tokens=40, seed=seed)
        assert line["settings"]["seed"] == seed
        answer = [token for token, is_answer in zip(line["tokens"], line["loss_mask"], strict=True) if is_answer]
        assert answer == list(alone.token_ids)
        assert line["messages"] == [prompt.messages[0], {"role": "assistant", "content": alone.text}]
        assert line["finish_reason"] == alone.finish_reason


@pytest.mark.parametrize("mode", ["continue", "chat"])
def test_every_token_of_the_loss_mask_follows_from_the_tokens_before_it_and_the_noise_at_its_index(
    model_folder, teacher, tmp_path, mode
):
    distill(teacher, PROMPTS[:3], Settings(temperature=0.8, max_tokens=40, seed=7, mode=mode), tmp_path / "out.jsonl")
    model = load_model(model_folder)
    for line in read(tmp_path / "out.jsonl"):
        with torch.no_grad():
            logits = model(torch.tensor([line["tokens"]]), use_cache=False).logits[0]
        for index in (index for index, is_answer in enumerate(line["loss_mask"]) if is_answer):
            noise = gumbel(torch.tensor([noise_key(line["settings"]["seed"], index)]), torch.arange(320))
            assert int((logits[index - 1] + 0.8 * noise).argmax()) == line["tokens"][index]


def test_chat_mode_samples_every_reply_of_a_conversation(llm, teacher, tmp_path):
    distill(teacher, PROMPTS, Settings(temperature=0.8, max_tokens=60, seed=1, mode="chat"), tmp_path / "out.jsonl")
    lines = read(tmp_path / "out.jsonl")
    assert any(len(line["messages"]) == 6 for line in lines)
    for line in lines:
        prompt = next(one for one in PROMPTS if one.id == line["id"])
        assert line["messages"][::2] == list(prompt.messages[::2])[: len(line["messages"]) // 2]
        replies: list[list[int]] = []
        for token, now, before in zip(line["tokens"], line["loss_mask"], [0, *line["loss_mask"]], strict=False):
            replies += [[]] if now and not before else []
            if now:
                replies[-1].append(token)
        texts = [llm.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in replies]
        assert texts == [message["content"] for message in line["messages"][1::2]]
        assert line["finish_reason"] == "stop" or len(line["messages"]) < 6 or len(replies[-1]) == 60


def test_neither_batching_nor_drafter_changes_a_line(model_folder, teacher, tmp_path):
    settings = Settings(temperature=0.8, max_tokens=40, seed=7, mode="chat")
    distill(teacher, PROMPTS, settings, tmp_path / "many.jsonl")
    distill(EngineTeacher(new_llm(model_folder, drafter=None, max_rows=1)), PROMPTS[::-1], settings, tmp_path / "one.jsonl")
    assert by_id(tmp_path / "many.jsonl") == by_id(tmp_path / "one.jsonl")


def test_a_text_is_continued_without_a_chat_template(llm, teacher, tmp_path):
    distill(teacher, [ChatPrompt("t:1", 0, text="the sea was")], SETTINGS, tmp_path / "out.jsonl")
    [line] = read(tmp_path / "out.jsonl")
    prompt = llm.tokenizer.encode("the sea was")
    assert line["tokens"][: len(prompt)] == prompt
    assert line["loss_mask"] == [0] * len(prompt) + [1] * (len(line["tokens"]) - len(prompt))
    assert "messages" not in line


def test_the_beginning_of_a_long_text_can_be_the_prompt(llm, teacher, tmp_path):
    text = "the cat and the sea " * 90
    distill(teacher, [ChatPrompt("t:1", 0, text=text)], Settings(beginning=6, max_tokens=9), tmp_path / "out.jsonl")
    [line] = read(tmp_path / "out.jsonl")
    assert line["tokens"][:6] == llm.tokenizer.encode(text)[:6]
    assert line["loss_mask"] == [0] * 6 + [1] * (len(line["tokens"]) - 6)


def test_a_conversation_cut_at_max_tokens_is_dropped_on_request_and_not_tried_again(teacher, tmp_path):
    settings = Settings(temperature=0.8, max_tokens=3, drop_cut=True)
    progress = distill(teacher, PROMPTS, settings, tmp_path / "out.jsonl")
    cut = [line for line in read(tmp_path / "out.jsonl") if line["finish_reason"] == "length"]
    assert 0 < progress.num_dropped == len(cut)
    assert all(line["tokens"] == line["loss_mask"] == [] for line in cut)
    again = distill(teacher, PROMPTS, settings, tmp_path / "out.jsonl")
    assert (again.num_found, again.num_answered, again.num_dropped) == (len(PROMPTS), 0, 0)
    kept = distill(teacher, PROMPTS, Settings(temperature=0.8, max_tokens=3), tmp_path / "kept.jsonl")
    assert (kept.num_cut, kept.num_dropped) == (len(cut), 0)


def test_a_prompt_without_room_is_skipped_and_counted(teacher, tmp_path):
    long = [ChatPrompt(f"p:{n}", n, chat("the cat and the sea " * 90)) for n in range(8)]  # more than run at once
    progress = distill(teacher, [*long, ChatPrompt("p:8", 8, chat("so"))], SETTINGS, tmp_path / "out.jsonl")
    assert progress.skipped == {"there is no room for an answer in the context of 256 tokens": 8}
    assert [line["id"] for line in read(tmp_path / "out.jsonl")] == ["p:8"]


def test_a_conversation_longer_than_the_context_keeps_its_first_replies_and_is_counted(teacher, tmp_path):
    long = [ChatPrompt(f"p:{n}", n, chat("so", "a", "the cat and the sea " * 90)) for n in range(4)]
    progress = distill(teacher, long, Settings(temperature=0.8, max_tokens=60, mode="chat"), tmp_path / "out.jsonl")
    ended = [line for line in read(tmp_path / "out.jsonl") if line["finish_reason"] == "stop"]
    assert progress.shortened.total() == len(ended) > 0
    assert all(len(line["messages"]) == 2 and line["loss_mask"][-1] for line in ended)


def test_distilled_lines_can_be_read_for_training(llm, teacher, tmp_path):
    distill(teacher, PROMPTS, SETTINGS, tmp_path / "out.jsonl")
    examples, report = read_examples([tmp_path / "out.jsonl"], llm.tokenizer, teacher.info["digest"])
    assert [list(example.tokens) for example in examples] == [line["tokens"] for line in read(tmp_path / "out.jsonl")]
    assert {(example.temperature, example.seed) for example in examples} == {(0.8, mix(7, n)) for n in range(len(PROMPTS))}
    assert report.num_foreign == 0


def test_another_rule_than_coupled_is_refused(model_folder):
    with pytest.raises(ValueError, match="by the rule 'coupled' only"):
        EngineTeacher(headstart.load(model_folder, accept="rejection"))


@pytest.mark.parametrize(
    "wrong", [{"mode": "both"}, {"temperature": -1.0}, {"max_tokens": 0}, {"top_p": 2.0}, {"seed": 2**65}, {"beginning": 0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


# -- interruptions --


class Killed(Exception):
    pass


def kill_after(count: int):
    def on_progress(progress) -> None:
        if progress.num_answered == count:
            raise Killed

    return on_progress


@pytest.mark.parametrize("torn", [b"", b'{"id": "p:9", "tok', b'{"id": "p:9"}'])
def test_a_killed_run_ends_with_the_lines_of_an_uninterrupted_one(teacher, llm, tmp_path, torn):
    distill(teacher, PROMPTS, SETTINGS, tmp_path / "uninterrupted.jsonl")
    for count in (1, 3):
        with pytest.raises(Killed):
            distill(teacher, PROMPTS, SETTINGS, tmp_path / "out.jsonl", kill_after(count))
        assert llm.engine.scheduler.is_idle
        with (tmp_path / "out.jsonl").open("ab") as file:
            file.write(torn)
    progress = distill(teacher, PROMPTS, SETTINGS, tmp_path / "out.jsonl")
    assert (progress.num_found, progress.num_answered) == (4, 3)
    assert by_id(tmp_path / "out.jsonl") == by_id(tmp_path / "uninterrupted.jsonl")


DYING = """
import os, sys, headstart
sys.path[:0] = [sys.argv[3], sys.argv[3] + "/distill"]
from test_distill import *
def on_progress(progress):
    if progress.num_answered == 2:
        os._exit(9)
distill(EngineTeacher(new_llm(sys.argv[1], drafter="lookup", max_rows=3)), PROMPTS, SETTINGS, sys.argv[2], on_progress)
"""


@pytest.mark.slow
def test_a_process_that_dies_leaves_whole_lines(model_folder, teacher, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = [sys.executable, "-c", DYING, model_folder, out, os.path.dirname(os.path.dirname(__file__))]
    assert subprocess.run(list(map(str, arguments)), env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 9
    assert len(read(out)) == 2
    distill(teacher, PROMPTS, SETTINGS, out)
    distill(teacher, PROMPTS, SETTINGS, tmp_path / "uninterrupted.jsonl")
    assert by_id(out) == by_id(tmp_path / "uninterrupted.jsonl")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"temperature": 0.9}, "temperature 0.8, and now it is 0.9"),
        ({"seed": 8}, "base_seed 7, and now it is 8"),
        ({"mode": "chat"}, "mode 'continue', and now it is 'chat'"),
        ({"max_tokens": 9}, "max_tokens 40, and now it is 9"),
        ({"top_p": 0.9}, "top_p None, and now it is 0.9"),
    ],
)
def test_a_file_is_not_continued_with_other_settings(teacher, tmp_path, other, words):
    distill(teacher, PROMPTS[:1], SETTINGS, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=words):
        distill(teacher, PROMPTS, Settings(**{"temperature": 0.8, "max_tokens": 40, "seed": 7} | other), tmp_path / "out.jsonl")


def test_a_file_is_not_continued_by_another_target_or_with_other_prompts(teacher, draft_folder, tmp_path):
    distill(teacher, PROMPTS[:1], SETTINGS, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"line 1 of .* was answered with digest"):
        distill(EngineTeacher(new_llm(draft_folder)), PROMPTS, SETTINGS, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="answers another prompt than p:0 is now"):
        distill(teacher, [ChatPrompt("p:0", 0, chat("the sea"))], SETTINGS, tmp_path / "out.jsonl")


def test_a_file_of_other_content_is_not_changed(teacher, tmp_path):
    (tmp_path / "out.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is no distilled conversation"):
        distill(teacher, PROMPTS, SETTINGS, tmp_path / "out.jsonl")
    (tmp_path / "notes.txt").write_text("a text without an end of line")
    with pytest.raises(ValueError, match=r"line 1 of .* is no distilled conversation"):
        distill(teacher, PROMPTS, SETTINGS, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "a text without an end of line"
    with pytest.raises(ValueError, match=r"write plain \.jsonl"):
        distill(teacher, PROMPTS, SETTINGS, tmp_path / "out.jsonl.gz")


# -- prompts --


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": chat("a", "b", "c")}, chat("a", "b", "c")),
        ({"turns": ["a", "c"]}, (*chat("a"), *chat("c"))),
        ({"prompt": "a"}, chat("a")),
        ({"instruction": "Sort", "input": "3 1 2", "output": "1 2 3"}, chat("Sort\n\n3 1 2")),
        ({"question": "a", "text": "b"}, chat("a")),
    ],
)
def test_prompts_are_read_from_all_known_fields(tmp_path, record, messages):
    (tmp_path / "in.jsonl").write_text("\n" + json.dumps(record) + "\n")
    assert read_prompts(tmp_path / "in.jsonl") == [ChatPrompt("in.jsonl:2", 1, messages)]


def test_a_text_file_holds_one_prompt_per_line(tmp_path):
    (tmp_path / "in.txt").write_text("the cat\n\nthe sea\n")
    assert [one.messages for one in read_prompts(tmp_path / "in.txt")] == [chat("the cat"), chat("the sea")]
    assert [one.text for one in read_prompts(tmp_path / "in.txt", is_chat=False)] == ["the cat", "the sea"]
    assert len(read_prompts(tmp_path / "in.txt", limit=1)) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no prompt"),
        ('{"story": 1}\n', "line 1 of .* has no prompt"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "line 1 of .* has no prompt"),
        ('{"messages": [{"role": "user"}]}\n', "line 1 of .*has no 'content'"),
        ("[]\n", "must be a JSON object"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path, content, words):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_prompts(tmp_path / "in.jsonl")


def test_conversations_need_a_chat_template(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"turns": ["a", "b"]}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* has no chat template"):
        read_prompts(tmp_path / "in.jsonl", is_chat=False)


def test_unanswered_turns_may_start_with_the_system_message_and_end_with_the_user():
    system, first, reply, second = {"role": "system", "content": "s"}, *chat("a", "b", "c")
    assert ChatPrompt("x", 0, (system, first, reply, second)).unanswered_turns() == [[system, first], [second]]
    assert ChatPrompt("x", 0, (first, reply)).unanswered_turns() == [[first]]


# -- an endpoint --


@contextmanager
def served(*replies: object):
    """An endpoint that first gives these replies, (status, body), and then repeats the last message of each request."""
    asked, waiting = [], list(replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(sent | {"path": self.path, "key": self.headers["Authorization"]})
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": sent["messages"][-1]["content"]},
            }
            completion = {"id": "1", "object": "chat.completion", "created": 1, "model": sent["model"], "choices": [choice]}
            status, body = waiting.pop(0) if waiting else (200, completion)
            data = json.dumps(body if body is not None else completion).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def choice(content: str, finish_reason: str) -> dict:
    message = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [message]}


def test_the_answers_of_an_endpoint_are_encoded_by_the_tokenizer(model_folder, tmp_path):
    tokenizer = load_tokenizer(model_folder)
    with served() as (url, asked):
        teacher = EndpointTeacher(url, "sea", tokenizer, "secret", rows=3)
        progress = distill(teacher, PROMPTS, Settings(seed=7, mode="chat", top_p=0.9, top_k=5), tmp_path / "out.jsonl")
        teacher.client.close()
    assert progress.num_answered == len(PROMPTS)
    for line in read(tmp_path / "out.jsonl"):
        assert [m["content"] for m in line["messages"][::2]] == [m["content"] for m in line["messages"][1::2]]
        assert tokenizer.apply_chat_template(line["messages"], return_dict=False) == line["tokens"]
        assert (line["settings"]["seed"], line["target"]) == (None, {"name": "sea", "digest": None, "endpoint": url})
    assert {(one["path"], one["key"], one["model"]) for one in asked} == {("/v1/chat/completions", "Bearer secret", "sea")}
    assert {(one["temperature"], one["top_p"], one["top_k"], one["max_tokens"]) for one in asked} == {(0.7, 0.9, 5, 512)}
    assert {one["seed"] for one in asked} == {mix(7, n) % 2**31 for n in range(len(PROMPTS))}


def test_a_reply_cut_by_an_endpoint_has_no_end_of_turn(model_folder, tmp_path):
    tokenizer = load_tokenizer(model_folder)
    with served((200, choice("the sea was", "length"))) as (url, _):
        teacher = EndpointTeacher(url, "sea", tokenizer)
        progress = distill(teacher, PROMPTS[:1], SETTINGS, tmp_path / "out.jsonl")
        teacher.client.close()
    [line] = read(tmp_path / "out.jsonl")
    assert (progress.num_cut, line["finish_reason"]) == (1, "length")
    answer = [token for token, is_answer in zip(line["tokens"], line["loss_mask"], strict=True) if is_answer]
    assert answer == tokenizer.encode("the sea was")
    assert line["loss_mask"][-1] == 1


def test_a_failing_request_is_repeated_and_a_wrong_model_name_is_one_sentence(model_folder, tmp_path):
    with served((500, {"error": {"message": "busy"}}), (200, None), (404, {"error": {"message": "no such model"}})) as (url, asked):
        teacher = EndpointTeacher(url, "sea", load_tokenizer(model_folder), rows=1)
        with pytest.raises(ValueError, match=r"does not answer: .*no such model"):
            distill(teacher, PROMPTS, SETTINGS, tmp_path / "out.jsonl")
        assert (len(asked), len(read(tmp_path / "out.jsonl"))) == (3, 1)
        assert distill(teacher, PROMPTS, SETTINGS, tmp_path / "out.jsonl").num_answered == len(PROMPTS) - 1
        teacher.client.close()


def test_a_prompt_that_exceeds_the_servers_context_is_skipped_and_the_others_are_answered(model_folder, tmp_path):
    words = "This model's maximum context length is 512 tokens. However, you requested 900 tokens."
    with served((200, None), (400, {"error": {"message": words}})) as (url, _):
        teacher = EndpointTeacher(url, "sea", load_tokenizer(model_folder), rows=1)
        progress = distill(teacher, PROMPTS[:3], SETTINGS, tmp_path / "out.jsonl")
        teacher.client.close()
    assert (progress.num_answered, progress.skipped) == (2, {"with max_tokens=40 it exceeds the endpoint's context": 1})


def test_a_conversation_that_outgrows_the_servers_context_keeps_its_answers(model_folder, tmp_path):
    with served((200, None), (400, {"error": {"message": "longer than the model's context length"}})) as (url, _):
        teacher = EndpointTeacher(url, "sea", load_tokenizer(model_folder))
        progress = distill(teacher, PROMPTS[:1], Settings(mode="chat"), tmp_path / "out.jsonl")
        teacher.client.close()
    assert (progress.num_answered, progress.shortened.total()) == (1, 1)
    assert [message["role"] for message in read(tmp_path / "out.jsonl")[0]["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])  # of vLLM and of SGLang
def test_answers_whose_reasoning_is_cut_out_are_refused(model_folder, tmp_path, name):
    answer = choice("the sea", "stop")
    answer["choices"][0]["message"][name] = "let me think"
    with served((200, answer)) as (url, _):
        teacher = EndpointTeacher(url, "sea", load_tokenizer(model_folder))
        with pytest.raises(ValueError, match=r"splits answers into reasoning and content.*start its server without"):
            distill(teacher, PROMPTS[:1], SETTINGS, tmp_path / "out.jsonl")
        teacher.client.close()


def test_an_endpoint_that_cannot_be_reached_is_one_sentence(model_folder, tmp_path):
    teacher = EndpointTeacher("http://127.0.0.1:9/v1", "sea", load_tokenizer(model_folder))
    teacher.client = teacher.client.with_options(max_retries=0)
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/v1 cannot be reached .*; start its server, or correct the URL"):
        distill(teacher, PROMPTS, SETTINGS, tmp_path / "out.jsonl")


def test_a_text_cannot_be_sent_to_a_chat_endpoint(model_folder, tmp_path):
    teacher = EndpointTeacher("http://127.0.0.1:9/v1", "sea", load_tokenizer(model_folder))
    progress = distill(teacher, [ChatPrompt("t:1", 0, text="the sea")], SETTINGS, tmp_path / "out.jsonl")
    assert progress.skipped.total() == 1


# -- the command --


def run(*arguments: object):
    return CliRunner().invoke(app, ["distill", *map(str, arguments)])


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"messages": one.messages}) + "\n" for one in PROMPTS))
    return tmp_path / "in.jsonl"


def test_the_command_writes_answers_and_prints_a_summary(model_folder, prompts, tmp_path):
    base = (prompts, "--model", model_folder, "--max-tokens", 8, "--rows", 2, "--out", tmp_path / "out.jsonl")
    first = run(*base, "--limit", 3, "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["num_answered"] == 3
    again = run(*base)
    assert "4 conversations" in again.stdout
    assert "3 were there already" in again.stdout
    assert sorted(by_id(tmp_path / "out.jsonl")) == [f"in.jsonl:{n}" for n in range(1, 8)]


def test_the_command_is_exact_by_default(model_folder, prompts, tmp_path):
    base = (prompts, "--model", model_folder, "--max-tokens", 30, "--seed", 5, "--out")
    assert run(*base, tmp_path / "one.jsonl", "--rows", 1, "--drafter", "none").exit_code == 0
    many = run(*base, tmp_path / "many.jsonl", "--rows", 7)
    assert "up to near ties" not in many.stderr
    assert by_id(tmp_path / "one.jsonl") == by_id(tmp_path / "many.jsonl")
    wide = run(*base, tmp_path / "wide.jsonl", "--dtype", "float64", "--limit", 1)
    assert "up to near ties, not to the bit: it is for CPU in bfloat16 or float32" in wide.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--temperature", -1), "temperature is -1.0"),
        (("--limit", 0), "limit is 0"),
        (("--rows", 0), "max_rows is 0"),
        (("--mode", "sing"), "sing"),
        (("--endpoint", "http://127.0.0.1:9/v1"), "--endpoint needs --endpoint-model"),
        (("--endpoint-model", "sea"), "are for an --endpoint"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--endpoint-model", "s", "--api-key-env", "NOT_SET_AT_ALL"), "is not set"),
        (("--accept", "rejection"), "by the rule 'coupled' only"),
    ],
)
def test_a_bad_setting_is_one_sentence(model_folder, prompts, tmp_path, more, words):
    result = run(prompts, "--model", model_folder, "--out", tmp_path / "out.jsonl", *more)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_a_missing_prompt_file_is_refused(model_folder, tmp_path):
    result = run(tmp_path / "none.jsonl", "--model", model_folder, "--out", tmp_path / "out.jsonl")
    assert (result.exit_code, "there is no file" in result.stderr) == (2, True)


def test_an_interrupted_command_prints_how_to_continue(model_folder, prompts, tmp_path, monkeypatch):
    base = (prompts, "--model", model_folder, "--max-tokens", 8, "--rows", 2, "--out", tmp_path / "out.jsonl")
    rounds, engine_step = iter(range(12)), headstart.Engine.step

    def step(engine):
        if next(rounds, None) is None:
            raise KeyboardInterrupt
        return engine_step(engine)

    with monkeypatch.context() as patched:
        patched.setattr(headstart.Engine, "step", step)
        result = run(*base)
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr
    some = len(read(tmp_path / "out.jsonl"))
    assert 0 < some < len(PROMPTS)
    assert f"{some} were there already" in run(*base).stdout
