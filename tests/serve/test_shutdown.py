"""The command: it serves, and a signal ends it without harm to those that are answered."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

BODY = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 0.9, "stream": True}


@pytest.fixture
def served(request):
    """The command as a process of its own, and its address."""
    command = [sys.executable, "-m", "headstart", "serve", "--port", "0", "--drafter", "lookup", *request.param]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )
    line = process.stdout.readline()
    match = re.search(r"http://\S+", line)
    if match is None:
        process.kill()
        pytest.fail(f"{line}{process.stderr.read()}")
    yield process, match[0]
    process.kill()
    process.communicate()


def read(http, url):
    """What a stream of the server ends with: its finish reason, or the code of its error; and its status."""
    try:
        with http.stream("POST", f"{url}/v1/completions", json=BODY) as answer:
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    except httpx.ConnectError:
        return "refused"
    if answer.status_code != 200:
        return json.loads("".join(events))["error"]["code"]
    assert events[-1] == "[DONE]"
    last = json.loads(events[-2])
    return last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"]


def num_answered(http, url):
    lines = http.get(f"{url}/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith(("headstart:num_requests_r", "headstart:num_requests_w"))
    )


def interrupt(process, url, num_clients=6):
    """End the process while clients are answered. Returns what their streams ended with, and that of a client who came later."""
    with httpx.Client(timeout=120) as http, ThreadPoolExecutor(num_clients + 1) as pool:
        answers = [pool.submit(read, http, url) for _ in range(num_clients)]
        while num_answered(http, url) < num_clients and not any(answer.done() for answer in answers):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        answers.append(pool.submit(read, http, url))
        return [answer.result() for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("served", [["--grace", "60"]], indirect=True)
def test_sigterm_lets_those_in_flight_finish_and_takes_no_more(served):
    *ends, late = interrupt(*served)
    assert set(ends) == {"length"}
    assert late in ("shutting_down", "refused")
    assert served[0].wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("served", [["--grace", "0", "--max-rows", "2"]], indirect=True)
def test_sigterm_without_grace_ends_them_with_a_clean_error(served):
    ends = interrupt(*served)
    assert set(ends) <= {"length", "shutting_down", "refused"}
    assert "shutting_down" in ends
    assert served[0].wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("served", [[]], indirect=True)
def test_ctrl_c_ends_an_idle_server_at_once(served):
    served[0].send_signal(signal.SIGINT)
    assert served[0].wait(60) == 0
