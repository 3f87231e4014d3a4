"""The same request has the same tokens: alone, under load, preempted, with and without drafts, with and without a kept prefix."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import embedded_service, running

from headstart.serve.lanes import Sizes

STORY = "Once upon a time there was a little girl who had a red ball. She liked to play with the ball in the park."
PROMPTS = [
    STORY,
    f"{STORY} One day",
    "The cat sat",
    f"{STORY} One day her dog",
    "Tom and Lily",
    "A big bear",
    f"{STORY} The",
    "Ben",
]
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.95, "seed": 11},
    {"temperature": 1.0, "seed": 12, "repetition_penalty": 1.1},
]
CASES = [(prompt, SETTINGS[number % 3] | {"max_tokens": 48}) for number, prompt in enumerate(PROMPTS)]


def ids(server, prompt, settings, **extra):
    body = {"prompt": prompt, "return_token_ids": True, **settings, **extra}
    with server.http() as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def expected(server):
    """What plain decoding answers to each case, alone."""
    llm = server.plain()
    assert llm.engine.target.is_exact
    return [list(llm.generate(prompt, **settings)[0].token_ids) for prompt, settings in CASES]


def all_ids(server, **extra):
    with ThreadPoolExecutor(len(CASES)) as pool:
        return list(pool.map(lambda case: ids(server, *case, **extra), CASES))


def test_alone_and_under_load_with_any_drafter(server, expected):
    assert [ids(server, *case) for case in CASES] == expected
    for drafter in ("mtp", "lookup", "none"):
        assert all_ids(server, drafter=drafter) == expected


def test_with_a_kept_prefix(server, expected):
    with server.http() as http:
        cached = [
            http.post("/v1/completions", json={"prompt": prompt, **settings}).json()["usage"]["prompt_tokens_details"][
                "cached_tokens"
            ]
            for prompt, settings in (CASES[0], CASES[3])
        ]
    assert all(cached)
    assert [ids(server, *CASES[number]) for number in (0, 3)] == [expected[0], expected[3]]


@pytest.mark.parametrize("drafter", ["mtp", None])
def test_where_memory_is_so_small_that_requests_are_preempted(server, expected, drafter):
    slot = server.engine.slot_bytes if drafter else server.service.lanes[0].engine.target.slot_bytes
    headroom = server.engine.scheduler.headroom
    sizes = Sizes(max_rows=6, memory=slot * (3 * headroom + 260), prefixes=2, ahead=4)
    with running(embedded_service((drafter,), sizes=sizes)) as small:
        assert all_ids(small) == expected
        assert all_ids(small) == expected
        text = small.service.metrics.text().decode()
        preemptions = next(line for line in text.splitlines() if line.startswith("headstart:num_preemptions_total"))
        assert float(preemptions.split()[-1]) > 0


def test_in_chunks_and_with_other_chunks_beside_it(expected):
    with running(embedded_service(("lookup",), sizes=Sizes(max_rows=3, chunk=7, prefixes=0))) as server:
        assert all_ids(server) == expected
