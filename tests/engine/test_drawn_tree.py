"""The trees of rounds, as they are handed to pages that draw them."""

import pytest
from heads import heads_for
from scripted import asks
from tiny import VOCAB, tiny

from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams


@pytest.mark.parametrize("kind", ["mtp", "medusa"])
def test_a_tree_has_the_kept_path_that_was_emitted_behind_its_root(kind):
    target = tiny()
    first, second = asks(VOCAB, [6, 9], [30, 30], SamplingParams(temperature=0.5))
    engine = Engine(target, heads_for(target, kind), max_rows=2)
    drawn = engine.add(first.prompt, first.params, draws_trees=True)
    engine.add(second.prompt, second.params)
    text, num_trees = list(first.prompt), 0
    for event in engine.run():
        if event.request is not drawn:
            assert event.tree is None
            continue
        tree = event.tree
        assert tree.root == text[-1]
        path = [token for token, kept in zip(tree.tokens, tree.kept, strict=True) if kept]
        assert list(event.tokens[: len(path)]) == path[: len(event.tokens)]
        parent = -1
        for index, kept in enumerate(tree.kept):
            assert tree.parents[index] < index
            assert 0 <= tree.chances[index] <= (1 if tree.parents[index] < 0 else tree.chances[tree.parents[index]] + 1e-6)
            if kept:
                assert tree.parents[index] == parent
                parent = index
        text += event.tokens
        num_trees += bool(tree.tokens)
    assert num_trees > 3
