"""benchmarks/sequoia_trees.py: its shapes, its replay, and that it runs on the embedded model's measured heads."""

import json
import sys
from pathlib import Path

import pytest
import torch

from headstart.speculation.calibration import expected_tau
from headstart.speculation.planner import StaticTree

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import sequoia_trees

TABLE = [[0.6, 0.2, 0.1], [0.5, 0.2, 0.1]]


def test_a_full_tree_is_the_best_of_all_full_trees_within_its_budget():
    trees = [StaticTree.full(*widths).paths for widths in ((1,), (2,), (3,), (1, 1), (2, 1), (3, 1), (2, 2), (3, 2))]
    best = max((tree for tree in trees if len(tree) <= 6), key=lambda tree: expected_tau(tree, TABLE))
    assert sequoia_trees.full_tree(TABLE, 6) == best


def test_a_tree_deeper_than_the_recorded_ranks_is_not_replayed():
    texts = [torch.tensor([[0, 1], [1, 0], [0, 0], [2, 9]])]
    results = {one.shape: one for one in sequoia_trees.results_of("heads", TABLE, [8], 5, texts)}
    assert results["chain"].replayed == pytest.approx(5 / 3)  # the prompt, root 0 with one kept draft, root 2 with two
    assert results["chain, deep"].replayed is None
    assert results["Sequoia"].expected == pytest.approx(results["Medusa"].expected)


def test_the_embedded_models_heads_gain_from_every_step_from_the_chain_to_sequoia(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--drafter", "hydra", "--sizes", "8,32", "--depth", "6", "--no-replay"])
    sequoia_trees.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    for nodes in (8, 32):
        expected = {one["shape"]: one["expected"] for one in results if one["nodes"] == nodes}
        assert expected["chain"] < expected["full"] <= expected["Sequoia"] + 1e-9
        assert expected["Sequoia by rank"] <= expected["Sequoia"] <= expected["Sequoia, deep"]


def test_heads_without_a_plan_are_refused_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--drafter", str(tmp_path)])
    with pytest.raises(SystemExit):
        sequoia_trees.main()
    assert f"{tmp_path} has no acceptance rates at temperature 0.7" in capsys.readouterr().err
