"""A forest merged on the device, where the host does not know how many drafts each row has, is the forest merged on the host."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import make_rows

from headstart.speculation.device_forest import merge_on_device
from headstart.speculation.params import SamplingParams
from headstart.speculation.rules import RULES
from headstart.speculation.tree import ROOT, Drafts, merge
from headstart.speculation.verify import asked_nodes, verify

VOCAB = 4
PARAMS = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=0.7, top_p=0.8), SamplingParams()]
STEMS = st.lists(st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3), st.booleans()), min_size=2, max_size=4)
NODES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, VOCAB - 1)), max_size=24)


def drafts_of(nodes: list[tuple[int, int, int]], ends_at_root: list[bool]) -> Drafts:
    """Random trees of the rows that end at their root. nodes: how far back the parent is, row, token."""
    parents, rows, tokens, depths = [], [], [], []
    for back, row, token in nodes:
        if row >= len(ends_at_root) or not ends_at_root[row]:
            continue
        before = [node for node, other in enumerate(rows) if other == row]
        parent = before[-back] if 0 < back <= len(before) else ROOT
        if token not in {tokens[node] for node in before if parents[node] == parent}:
            parents.append(parent)
            rows.append(row)
            tokens.append(token)
            depths.append(1 if parent == ROOT else depths[parent] + 1)
    return Drafts.of(tokens, parents, rows, depths, [0.5] * len(tokens)).by_row(len(ends_at_root))


@given(STEMS, NODES, st.integers(0, 30), st.integers(0, 99))
def test_a_forest_merged_on_the_device_is_the_forest_merged_on_the_host(rows, nodes, num_nodes, seed):
    stems, ends_at_root = [stem for stem, _ in rows], [is_asked for _, is_asked in rows]
    starts = list(range(3, 3 + len(rows)))
    drafts = drafts_of(nodes, ends_at_root)
    on_host = merge(stems, starts, ends_at_root, drafts, num_nodes)
    on_device = merge_on_device(stems, starts, ends_at_root, drafts, num_nodes)
    assert on_device.counts is None
    for name in ("tokens", "positions", "asked", "lineage"):
        assert torch.equal(getattr(on_device, name), getattr(on_host, name)), name
    for name in ("stems", "ends_at_root", "num_dead", "num_asked", "num_rows"):
        assert getattr(on_device, name) == getattr(on_host, name), name
    if not any(ends_at_root):
        return
    new, old = asked_nodes(on_device), asked_nodes(on_host)
    for name in ("rows", "roots", "drafts", "parents", "levels"):
        assert torch.equal(getattr(new, name), getattr(old, name)), name
    logits = torch.randn(len(on_host.asked), VOCAB, generator=torch.Generator().manual_seed(seed))
    sampled = make_rows(PARAMS[: len(rows)], range(len(rows)), VOCAB, root_positions=starts)
    for rule in (RULES["coupled"], RULES["typical"]):
        assert vars(verify(on_device, logits, sampled, rule)) == vars(verify(on_host, logits, sampled, rule))
    assert verify(on_device, logits, sampled, RULES["coupled"]).counts == on_host.counts
