"""Thousands of requests of every kind against a server: right answers, broken bodies, clients that go away, slow readers.

    python benchmarks/serve_soak.py [--model FOLDER] [--drafter lookup] [--requests 10000] [--clients 24]

Starts `headstart serve` as a process of its own, and compares every whole answer with plain decoding in this process. It fails
where an answer differs, a broken request gets anything but its 4xx status, the server answers 5xx, a slot stays in use, memory
grows, or the process does not end with status 0. Prints a line per thousand requests, and a summary as JSON.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import headstart

WORDS = ("Once", "upon", "a", "time", "there", "was", "little", "dog", "who", "found", "ünïcode", "猫", "🦊", "\n", "\t", "{}", '"')
CHANGES: tuple[dict[str, Any], ...] = (
    {"temperature": "hot"},
    {"unknown_field": 1},
    {"max_tokens": -1},
    {"prompt": []},
    {"model": "another"},
    {"n": 10**9},
    {"prompt": "long " * 5000},
    {"logit_bias": {"x": 1}},
)  # that make a body malformed
NUM_ANSWERS = 120  # different valid requests, each of which plain decoding answers once


@dataclass
class Soak:
    """The server's address, what it should answer, and what happened so far."""

    url: str
    model: str
    valid: list[tuple[dict[str, Any], str]]
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def failed(self, sentence: str) -> None:
        self.counts["wrong"] += 1
        if len(self.wrong) < 20:
            self.wrong.append(sentence)

    # -- kinds of requests --

    async def whole(self, client: httpx.AsyncClient) -> None:
        body, expected = self.rng.choice(self.valid)
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code != 200 or answer.json()["choices"][0]["text"] != expected:
            self.failed(f"{answer.status_code} {answer.text[:200]} where {expected!r} was expected of {body}")

    async def streamed(self, client: httpx.AsyncClient, pause: float = 0.0) -> None:
        body, expected = self.rng.choice(self.valid)
        text = ""
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    text += "".join(choice["text"] for choice in event.get("choices", ()))
                if pause:
                    await asyncio.sleep(pause * self.rng.random())
        if text != expected:
            self.failed(f"streamed {text!r} where {expected!r} was expected of {body}")

    async def slow_reader(self, client: httpx.AsyncClient) -> None:
        await self.streamed(client, 0.02)

    async def cancelled(self, client: httpx.AsyncClient) -> None:
        body, _ = self.rng.choice(self.valid)
        is_streamed = self.rng.random() < 0.5
        try:
            limit = httpx.Timeout(10.0, read=0.001 + 0.05 * self.rng.random())
            await client.post("/v1/completions", json=body | {"stream": is_streamed}, timeout=limit)
        except httpx.TimeoutException:
            pass

    async def late(self, client: httpx.AsyncClient) -> None:
        body, expected = self.rng.choice(self.valid)
        answer = await client.post("/v1/completions", json=body | {"timeout": 0.001 + 0.02 * self.rng.random()})
        is_right = answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected
        if not is_right and answer.status_code != 408:
            self.failed(f"{answer.status_code} {answer.text[:200]} of a request with little time")

    async def malformed(self, client: httpx.AsyncClient) -> None:
        body, _ = self.rng.choice(self.valid)
        wrong: list[Any] = [
            *(body | change for change in CHANGES), [], None, 7, "text",
        ]  # fmt: skip
        answer = await client.post("/v1/completions", json=self.rng.choice(wrong))
        if not 400 <= answer.status_code < 500 or "message" not in answer.json()["error"]:
            self.failed(f"{answer.status_code} {answer.text[:200]} of a malformed body")

    async def garbage(self, client: httpx.AsyncClient) -> None:
        size = self.rng.choice([0, 1, 100, 5 * 2**20])
        content = self.rng.randbytes(size)
        try:
            answer = await client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        except httpx.TransportError:  # the server need not read an oversized body to its end
            return
        if not 400 <= answer.status_code < 500:
            self.failed(f"{answer.status_code} {answer.text[:200]} of {size} bytes of garbage")

    KINDS = (("whole", 5), ("streamed", 4), ("slow_reader", 1), ("cancelled", 3), ("late", 1), ("malformed", 2), ("garbage", 1))

    async def one(self, client: httpx.AsyncClient) -> None:
        names, weights = zip(*self.KINDS, strict=True)
        name = self.rng.choices(names, weights)[0]
        try:
            await getattr(self, name)(client)
        except httpx.HTTPError as error:
            self.failed(f"{name}: {type(error).__name__} {error}")
        self.counts[name] += 1


def valid_requests(llm: headstart.LLM, model: str, rng: random.Random) -> list[tuple[dict[str, Any], str]]:
    """Requests, and what plain decoding answers."""
    requests = []
    for number in range(NUM_ANSWERS):
        prompt = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 30))).strip() or "a"
        body = {
            "model": model, "prompt": prompt, "max_tokens": rng.randint(1, 48), "temperature": rng.choice([0, 0.7, 1.0]),
            "top_p": rng.choice([1.0, 0.9]), "seed": number,
        }  # fmt: skip
        if rng.random() < 0.3:
            body["stop"] = rng.choice([["."], [" the", "\n"]])
        settings = {name: value for name, value in body.items() if name not in ("model", "prompt")}
        requests.append((body, llm.generate(prompt, **settings)[0].text))
    return requests


def memory_of(process: subprocess.Popen) -> float:
    """Megabytes that a process has in memory."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


async def run(soak: Soak, process: subprocess.Popen, num_requests: int, num_clients: int) -> list[float]:
    """Send all requests. Returns the server's memory after each thousand."""
    memory, began, left = [], time.monotonic(), iter(range(num_requests))

    async def client_of(_: int) -> None:
        limits = httpx.Limits(keepalive_expiry=2)  # less than the server's, which else may close a connection that is being used
        async with httpx.AsyncClient(base_url=soak.url, timeout=120, limits=limits) as client:
            for number in left:
                await soak.one(client)
                if (number + 1) % 1000 == 0:
                    memory.append(memory_of(process))
                    seconds = time.monotonic() - began
                    print(
                        f"{number + 1} requests in {seconds:.0f} s, {memory[-1]:.0f} MB, {soak.counts['wrong']} wrong", flush=True
                    )

    await asyncio.gather(*map(client_of, range(num_clients)))
    return memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of the target; none: the embedded one")
    parser.add_argument("--drafter", default="lookup")
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    model = ["--model", arguments.model] if arguments.model else []
    command = [sys.executable, "-m", "headstart", "serve", *model, "--drafter", arguments.drafter, "--port", str(arguments.port),
               "--max-rows", "6", "--served-model-name", "soaked"]  # fmt: skip
    rng = random.Random(1)
    with headstart.load(arguments.model, drafter=None) as llm:
        valid = valid_requests(llm, "soaked", rng)
    process = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    print(process.stdout.readline().strip())
    soak = Soak(f"http://127.0.0.1:{arguments.port}", "soaked", valid, rng)
    try:
        memory = asyncio.run(run(soak, process, arguments.requests, arguments.clients))
        time.sleep(1)
        health = httpx.get(f"{soak.url}/health").status_code
        metrics = httpx.get(f"{soak.url}/metrics").text
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    busy = [line for line in metrics.splitlines() if re.match(r"headstart:num_requests_(running|waiting)\b.* [^0]", line)]
    errors = [line for line in metrics.splitlines() if "http" in line and 'status="5' in line]
    growth = memory[-1] - memory[len(memory) // 4] if len(memory) > 3 else 0.0
    result = {
        **soak.counts,
        "memory_mb": memory,
        "growth_mb": growth,
        "health": health,
        "exit_status": status,
        "busy": busy + errors,
    }
    print(json.dumps(result | {"busy": busy, "errors": errors}))
    for sentence in soak.wrong:
        print(sentence, file=sys.stderr)
    is_fine = not soak.wrong and health == 200 and status == 0 and not busy and not errors and growth < 30
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
