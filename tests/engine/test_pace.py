"""A limit for the time of rounds: how many prompt tokens fit beside requests that decode."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import asks, decode
from tiny import VOCAB, tiny

from headstart.engine.engine import Engine
from headstart.engine.pace import LEAST, Pace
from headstart.speculation.cost import CostModel
from headstart.speculation.params import SamplingParams

COST = CostModel((1, 8, 64), (1.0, 1.2, 4.0), context_seconds=0.001, row_seconds=0.05, host_seconds=0.1, host_node_seconds=0.002)


@given(st.floats(1.2, 20), st.integers(1, 16), st.integers(0, 1000))
def test_the_largest_forest_that_fits_is_found(seconds, rows, context):
    most = Pace(COST, seconds).most_nodes(rows, context)
    time_of = lambda nodes: COST.forward(nodes, rows, context) + COST.host(nodes, rows)  # noqa: E731
    assert most == rows or time_of(most) <= seconds
    assert most == 128 or time_of(most + 1) > seconds


def test_a_limit_that_plain_decoding_exceeds_is_refused():
    with pytest.raises(ValueError, match=r"rounds may take 500 ms, but one token of plain decoding takes 1.1e\+03 ms here"):
        Pace(COST, 0.5)


def test_a_long_prompt_is_scored_in_small_parts_while_others_decode_and_the_text_stays():
    target = tiny()
    requests = asks(VOCAB, [4, 100], [60, 5], SamplingParams(temperature=0.7))
    plain, _ = decode(target, requests)
    engine = Engine(target, max_rows=2, pace=Pace(COST, 1.0 + 1.1))
    first = engine.add(requests[0].prompt, requests[0].params)
    engine.step()
    second = engine.add(requests[1].prompt, requests[1].params)
    engine.step()
    assert LEAST <= second.rounds[0].nodes < 40
    list(engine.run())
    assert [first.output, second.output] == plain


def test_without_others_a_prompt_gets_the_whole_chunk():
    engine = Engine(tiny(), max_rows=2, chunk=64, pace=Pace(COST, 1.2))
    request = engine.add([1] * 100, SamplingParams(max_tokens=2))
    engine.step()
    assert request.rounds[0].nodes == 64
