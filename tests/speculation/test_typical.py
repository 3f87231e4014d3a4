"""Typical acceptance against its formula and a naive search for the deepest path; and that every output calls it lossy."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import drafting, forest_of, joint_distribution, make_rows, p_value, rounds
from tiny import tiny
from typer.testing import CliRunner

from headstart.bench import report, runner
from headstart.cli import app
from headstart.engine.engine import Engine
from headstart.speculation.distribution import warp
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import StaticTree
from headstart.speculation.rules import RULES, deepest, parse_rule, typical
from headstart.speculation.tree import ROOT, Drafts
from headstart.speculation.verify import asked_nodes, verify

VOCAB = 4
WARM = SamplingParams(temperature=0.7)
THRESHOLDS = st.floats(0.01, 0.9)


def judged(logits, drafts, params=WARM, rule=RULES["typical"]):
    forest = forest_of(drafts, [[0]])
    rows = make_rows([params], [3], VOCAB)
    return rule.judge(forest, asked_nodes(forest), logits, rows, True)


def siblings(tokens):
    return Drafts.of(tokens, [ROOT] * len(tokens), [0] * len(tokens), [1] * len(tokens), [0.5] * len(tokens))


@given(st.integers(0, 999), st.floats(0.1, 2), THRESHOLDS, THRESHOLDS)
def test_a_draft_is_accepted_by_the_formula(seed, temperature, epsilon, delta):
    logits = 2 * torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(seed))
    distribution = [math.exp(z / temperature) for z in logits[0].tolist()]
    distribution = [mass / sum(distribution) for mass in distribution]
    threshold = min(epsilon, delta * math.exp(sum(p * math.log(p) for p in distribution if p)))
    for token in range(VOCAB):
        decisions = judged(logits, siblings([token]), SamplingParams(temperature=temperature), typical(epsilon, delta))
        assert bool(decisions.ok[0]) == (distribution[token] > threshold)


def test_where_the_entropy_is_high_more_is_accepted():
    """Chances .85 and .05 three times: threshold .09. Four equal ones: exp(-H) is 1/4, times .3 is .075, and .25 passes."""
    sharp = torch.tensor([0.85, 0.05, 0.05, 0.05]).log().expand(2, -1)
    plain = SamplingParams(temperature=1.0)
    assert [bool(judged(sharp, siblings([token]), plain).ok[0]) for token in range(VOCAB)] == [True, False, False, False]
    assert all(bool(judged(torch.zeros(2, VOCAB), siblings([token]), plain).ok[0]) for token in range(VOCAB))


def test_a_token_outside_the_truncated_distribution_is_never_accepted():
    logits = torch.tensor([1.0, 1.0, 0.9, 0.9]).expand(2, -1)
    params = SamplingParams(temperature=1.0, top_k=2)
    assert [bool(judged(logits, siblings([token]), params).ok[0]) for token in range(VOCAB)] == [True, True, False, False]


# -- one path per row -------------------------------------------------------------------------------------------------------


def naive_path(drafts, row, ok, scores):
    """Of all paths of accepted drafts of the row: the deepest, then that of the largest sum, then the first."""
    best = (0, 0.0, 0, ())
    for node in [node for node in range(len(drafts)) if drafts.rows[node] == row]:
        path, ancestor = [], node
        while ancestor != ROOT:
            path, ancestor = [ancestor, *path], int(drafts.parents[ancestor])
        if all(ok[draft] for draft in path):
            best = max(best, (len(path), sum(scores[draft] for draft in path), -node, tuple(path)))
    return list(best[3])


NODES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=20)


@given(NODES, st.integers(0, 999))
def test_the_deepest_alive_path_is_kept_and_of_several_the_most_probable_then_the_first(nodes, seed):
    parents, rows, depths = [], [], []
    for back, row in nodes:
        before = [node for node, other in enumerate(rows) if other == row]
        parents.append(before[-back] if 0 < back <= len(before) else ROOT)
        rows.append(row)
        depths.append(1 if parents[-1] == ROOT else depths[parents[-1]] + 1)
    drafts = Drafts.of(list(range(len(rows))), parents, rows, depths, [0.5] * len(rows)).by_row(3)
    draw = torch.Generator().manual_seed(seed)
    ok = torch.rand(len(rows), generator=draw) < 0.7
    scores = -torch.randint(1, 4, (len(rows),), generator=draw).double()  # small integers: many equal sums, all exact
    forest = forest_of(drafts, [[0]] * 3)
    asked = asked_nodes(forest)
    on_path, last = deepest(forest, asked, ok, scores)
    for row in range(3):
        path = naive_path(drafts, row, ok.tolist(), scores.tolist())
        assert (on_path & (drafts.rows == row)).nonzero().squeeze(-1).tolist() == path
        assert last[row] == (asked.drafts[path[-1]] if path else asked.roots[row])


def test_a_round_emits_the_kept_drafts_and_then_the_targets_own_token():
    """Both children are accepted; only the second has an accepted child."""
    drafts = Drafts.of([0, 1, 2], [ROOT, ROOT, 1], [0] * 3, [1, 1, 2], [0.5] * 3)
    logits = torch.tensor([[1.0, 1.0, -9, -9], [0, 0, 0, 0.0], [-9, -9, 2.0, -9], [0, 0, 0, 0.0]])
    rows = make_rows([WARM], [3], VOCAB, root_positions=[5])
    verdict = verify(forest_of(drafts, [[0]]), logits, rows, RULES["typical"])
    next_token = (logits[3] + 0.7 * rows.noise(3)[0]).argmax().item()  # a node at position 7 decides index 8, three after the root
    assert (verdict.emitted, verdict.kept, verdict.asked) == (((1, 2, next_token),), ((1, 2),), ((0, 2, 3),))


def test_drafters_choose_without_noise():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    rows = make_rows([SamplingParams(temperature=5.0)], [0], VOCAB, noise_rule=RULES["typical"].noise)
    drafts = drafting(logits.expand(VOCAB, VOCAB, -1))(rows, [[0, 0]])
    assert drafts.tokens.tolist() == [0, 1]


# -- the distribution -------------------------------------------------------------------------------------------------------

DRAW = torch.Generator().manual_seed(0)
TARGET = torch.randn(3, 3, 3, generator=DRAW)


def fit(params, rule):
    """The p-value of 2,000 texts of three tokens under the target's joint distribution."""
    texts = []
    for forest in range(8):
        seeds = range(250 * forest, 250 * forest + 250)
        texts += rounds(TARGET, drafting(TARGET), RULES[rule], StaticTree.full(2, 1), [params] * 250, seeds, 3)
    return p_value(texts, joint_distribution(TARGET, params, 3), 3)


def test_typical_changes_the_distribution_and_coupled_does_not():
    params = SamplingParams(temperature=1.0)
    assert fit(params, "coupled") > 1e-3
    assert fit(params, "typical") < 1e-9


def test_the_text_of_a_greedy_row_is_that_of_plain_decoding():
    assert fit(SamplingParams(), "typical") == 1.0
    assert warp(TARGET[0], make_rows([SamplingParams()], [0], 3).sampling).max(-1).values.tolist() == [1.0] * 3


# -- the spec, and the word lossy -------------------------------------------------------------------------------------------


def test_a_spec_sets_the_thresholds():
    logits = torch.tensor([0.85, 0.05, 0.05, 0.05]).log().expand(2, -1)
    plain = SamplingParams(temperature=1.0)
    assert not judged(logits, siblings([1]), plain, parse_rule("typical")).ok[0]
    assert judged(logits, siblings([1]), plain, parse_rule("typical:0.04,0.3")).ok[0]


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("typical:", "both thresholds"),
        ("typical:0.1", "both thresholds"),
        ("typical:0.1,0.2,0.3", "both thresholds"),
        ("typical:a,b", "both thresholds"),
        ("typical:1,0.3", "epsilon"),
        ("typical:0.09,0", "delta"),
        ("typical:nan,0.3", "epsilon"),
        ("coupled:0.1", "coupled, rejection, typical"),
        ("Typical", "coupled, rejection, typical"),
        ("", "coupled, rejection, typical"),
    ],
)
def test_an_invalid_spec_is_refused(spec, word):
    with pytest.raises(ValueError, match=word):
        parse_rule(spec)
    with pytest.raises(ValueError, match=word):
        Engine(None, accept=spec)


@pytest.mark.parametrize(("accept", "is_lossy"), [("coupled", False), ("rejection", False), ("typical:0.2,0.5", True)])
def test_a_report_says_lossy(accept, is_lossy):
    tasks = (runner.Task(tuple(range(2, 10)) * 2),)
    setup = runner.Setup(tiny(), tasks, SamplingParams(max_tokens=6, temperature=1.0), accept=accept)
    rows = report.rows(setup, runner.measure(setup, runner.prepare(setup, ["lookup"])))
    assert ("lossy" in report.labels(setup)) == is_lossy
    assert [row.identical == "lossy" for row in rows if row.run != runner.PLAIN] == [is_lossy]


def test_a_generated_answer_says_lossy(model_folder):
    base = ["generate", "the cat", "--model", str(model_folder), "--max-tokens", "8", "--temperature", "1", "--accept"]
    for accept, is_lossy in (("coupled", False), ("typical", True), ("typical:0.5,0.5", True)):
        assert json.loads(CliRunner().invoke(app, [*base, accept, "--json"]).stdout)["is_lossy"] == is_lossy
    assert "lossy" in CliRunner().invoke(app, [*base, "typical", "--show-drafts"]).stderr
    wrong = CliRunner().invoke(app, [*base, "typical:2,1"])
    assert (wrong.exit_code, "epsilon" in wrong.stderr) == (2, True)
