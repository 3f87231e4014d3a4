"""A small OpenAI-compatible server in a thread, with the habits of vLLM: streams, usage in chunks, /v1/models and /metrics."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = [" the", " sea", " was", " blue", " and", " a", " fish", " sang"]


@dataclass
class Served:
    """How a server answers, and what it was asked.

    words: of its answers, one token each.
    rounds: tokens of each chunk after the first, which has one.
    pause: seconds before each chunk.
    failures: (status, message) of the first requests; status 0: that one is answered.
    metrics: whose counters it publishes: "vllm", "sglang", or "" for none.
    models: that it lists; empty: it lists none, and knows every name.
    streams: whether it streams; counts: whether it gives usage; counts_chunks: whether each chunk may have it.
    histogram: whether it adds the rounds of each answer.
    breaks: number of streams that break after a chunk.
    context: characters of a prompt that it takes.
    others: tokens that it counts for others with each answer.
    most: requests that ran at once.
    """

    words: list[str] = field(default_factory=lambda: WORDS)
    rounds: tuple[int, ...] = (3, 1, 3)
    pause: float = 0.0
    failures: list[tuple[int, str]] = field(default_factory=list)
    metrics: str = "vllm"
    models: tuple[str, ...] = ("sea",)
    streams: bool = True
    counts: bool = True
    counts_chunks: bool = True
    histogram: bool = False
    breaks: int = 0
    context: int = 1000
    others: int = 0
    asked: list[dict] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=lambda: {"tokens": 0, "drafts": 0, "kept": 0, "first": 0, "second": 0})
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: int = 0
    most: int = 0

    def chunks(self, sent: dict) -> Iterator[dict]:
        """The chunks of an answer."""
        is_chat = "messages" in sent
        options = sent["stream_options"]
        prompt = 7
        count, rounds = 0, (1, *self.rounds)
        for index, num in enumerate(rounds):
            time.sleep(self.pause)
            text = "".join(self.words[(count + i) % len(self.words)] for i in range(num))
            count += num
            reason = "length" if index == len(rounds) - 1 else None
            body = {"delta": {"content": text}} if is_chat else {"text": text}
            chunk = {"choices": [{"index": 0, "finish_reason": reason, **body}]}
            if self.counts and options.get("continuous_usage_stats") and self.counts_chunks:
                chunk["usage"] = usage(prompt, count)
            yield chunk
        with self.lock:
            self.totals["tokens"] += count + self.others
            self.totals["drafts"] += len(self.rounds)
            self.totals["kept"] += sum(num - 1 for num in self.rounds)
            self.totals["first"] += sum(num > 1 for num in self.rounds)
            self.totals["second"] += sum(num > 2 for num in self.rounds)
        if self.counts and options.get("include_usage"):
            last = {"choices": [], "usage": usage(prompt, count)}
            if self.histogram:
                histogram = [sum(num == kept + 1 for num in self.rounds) for kept in range(3)]
                last["metrics"] = {"speculative_decoding": {"acceptance_histogram": histogram}}
            yield last

    def page(self) -> str:
        """What /metrics gives."""
        totals, label = self.totals, 'model_name="sea"'
        if self.metrics == "sglang":
            return (
                f"# TYPE x counter\nsglang:generation_tokens_total{{{label}}} {totals['tokens']}\n"
                f"sglang:spec_verify_calls_total{{{label}}} {totals['drafts']}\nsglang:spec_accept_length{{{label}}} 9.5\n"
            )
        lines = [f"vllm:generation_tokens_total{{{label}}} {totals['tokens']}"]
        if self.rounds and max(self.rounds) > 1:
            lines += [
                f"vllm:spec_decode_num_drafts_total{{{label}}} {totals['drafts']}",
                f"vllm:spec_decode_num_draft_tokens_total{{{label}}} {2 * totals['drafts']}",
                f"vllm:spec_decode_num_accepted_tokens_total{{{label}}} {totals['kept']}",
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="0"}} {totals["first"]}',
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="1"}} {totals["second"]}',
                f"vllm:spec_decode_num_accepted_tokens_created{{{label}}} 1.7e+09",
            ]
        return "# HELP\n" + "\n".join(lines) + "\n"


def usage(prompt: int, count: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


class _Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models" and self.served.models:
            models = [{"id": name, "object": "model", "created": 1, "owned_by": "x"} for name in self.served.models]
            self._send(200, json.dumps({"object": "list", "data": models}))
        elif self.path == "/metrics" and self.served.metrics:
            self._send(200, self.served.page(), "text/plain")
        else:
            self._send(404, json.dumps({"detail": "Not Found"}))

    def do_POST(self) -> None:
        served = self.served
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with served.lock:
            served.asked.append(sent | {"path": self.path, "key": self.headers["Authorization"]})
            failure = served.failures.pop(0) if served.failures else None
            served.running += 1
            served.most = max(served.most, served.running)
        try:
            self._answer(served, sent, failure)
        finally:
            with served.lock:
                served.running -= 1

    def _answer(self, served: Served, sent: dict, failure: tuple[int, str] | None) -> None:
        prompt = "".join(message["content"] for message in sent.get("messages", [])) or sent.get("prompt", "")
        if failure is not None and failure[0]:
            return self._error(*failure)
        if sent["model"] not in served.models and served.models:
            return self._error(404, f"The model `{sent['model']}` does not exist.")
        if len(prompt) > served.context:
            return self._error(400, f"This model's maximum context length is {served.context} tokens.")
        if not served.counts_chunks and "continuous_usage_stats" in sent["stream_options"]:
            return self._error(400, "Unknown parameter: 'stream_options.continuous_usage_stats'.")
        if not served.streams:
            return self._send(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": "no stream"}}]}))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        common = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": sent["model"]}
        for chunk in served.chunks(sent):
            self.wfile.write(f"data: {json.dumps(common | chunk)}\n\n".encode())
            self.wfile.flush()
            if served.breaks > 0:
                served.breaks -= 1
                self.wfile.write(b'data: {"error": {"message": "engine died", "code": 500}}\n\n')
                return None
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _error(self, status: int, message: str) -> None:
        self._send(status, json.dumps({"error": {"message": message, "type": "x", "code": status}}))

    def _send(self, status: int, body: str, kind: str = "application/json") -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def serving(served: Served) -> Iterator[str]:
    """The URL of a server that answers so, with its /v1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
