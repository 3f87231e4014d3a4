"""Lanes: one engine for each pair of drafter and acceptance rule."""

import pytest
from serving import embedded_service, embedded_target, running

from headstart.serve.lanes import Sizes, name_of, open_lanes
from headstart.speculation.cost import CostModel, DraftCost

COST = CostModel((1, 8, 64), (0.01, 0.012, 0.04), draft=DraftCost(0.001, (1, 8), (0.001, 0.0012)))


def test_a_drafters_name_is_never_a_path(tmp_path):
    (tmp_path / "heads").mkdir()
    assert name_of(str(tmp_path / "heads")) == "heads"
    assert name_of(f"model:{tmp_path / 'heads'}") == "heads"
    assert name_of("someone/their-heads") == "their-heads"
    assert name_of("lookup") == "lookup"


def test_two_drafters_of_one_name_are_refused(tmp_path):
    folders = [tmp_path / side / "heads" for side in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="two drafters have the name 'heads'"):
        open_lanes(embedded_target(), [str(folder) for folder in folders], ["coupled"], Sizes())


def test_lanes_share_the_memory_equally():
    lanes = open_lanes(embedded_target(), ["lookup", None], ["coupled", "rejection"], Sizes(max_rows=2, memory=2**24, prefixes=0))
    assert [(lane.drafter, lane.accept) for lane in lanes] == [
        ("lookup", "coupled"), ("lookup", "rejection"), ("none", "coupled"), ("none", "rejection"),
    ]  # fmt: skip
    assert all(2**22 - lane.engine.slot_bytes < lane.engine.memory <= 2**22 for lane in lanes)


def test_clients_choose_the_rule_and_lanes_run_at_the_same_time():
    with (
        running(embedded_service(("lookup",), ("coupled", "typical:0.09,0.3"), Sizes(max_rows=2))) as server,
        server.http() as http,
    ):
        body = {"prompt": "Once upon a time", "max_tokens": 30, "temperature": 0, "return_token_ids": True}
        exact = http.post("/v1/completions", json=body).json()
        lossy = http.post("/v1/completions", json=body | {"accept": "typical:0.09,0.3", "temperature": 1.0})
        assert lossy.status_code == 200
        assert exact["choices"][0]["token_ids"] == list(server.plain().generate("Once upon a time", max_tokens=30)[0].token_ids)
        assert [lane.engine.stats.tokens > 0 for lane in server.service.lanes] == [True, True]


def test_the_time_of_a_round_is_limited_for_prompts_and_trees_and_the_text_stays(monkeypatch):
    for module in ("headstart.serve.lanes", "headstart.engine.planning"):
        monkeypatch.setattr(f"{module}.cost_of", lambda target, drafter: COST)
    lanes = open_lanes(embedded_target(), ["mtp"], ["coupled"], Sizes(longest=3 * COST.plain()))
    engine = lanes[0].engine
    assert engine.pace.seconds == engine.planner.longest == 3 * COST.plain()
    with pytest.raises(ValueError, match=r"rounds may take .* ms, but one token of plain decoding takes"):
        open_lanes(embedded_target(), ["mtp"], ["coupled"], Sizes(longest=COST.plain() / 2))
