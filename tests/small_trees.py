"""Small trees: one behind each of two texts with a target's scores of it, and random ones."""

from hypothesis import strategies as st

from headstart.speculation.tree import ROOT, Drafts, merge
from headstart.target.cache import Seating

STEMS = [[5, 17, 3, 44, 90, 12, 8, 61, 7, 30, 2], [11, 4, 4, 70]]
TREE = [(13, ROOT), (14, ROOT), (15, 0), (16, 0), (17, 1), (18, 2)]  # token, parent; the same behind each stem
PATHS = [[], [13], [14], [13, 15], [13, 16], [14, 17], [13, 15, 18]]  # tokens behind the stem, of the root and of each node


def forest_of(stems, num_nodes=0):
    """The tree behind each stem; dead nodes fill the forest up to `num_nodes`."""
    size = len(TREE)
    parents = [parent if parent == ROOT else parent + row * size for row in range(len(stems)) for _, parent in TREE]
    rows = [row for row in range(len(stems)) for _ in TREE]
    depths = [len(path) for path in PATHS[1:]] * len(stems)
    drafts = Drafts.of([token for token, _ in TREE] * len(stems), parents, rows, depths, [0.5] * len(rows))
    return merge(stems, [0] * len(stems), [True] * len(stems), drafts, num_nodes)


def fresh_cache(target, stems):
    """An empty KV cache with a seat for each stem, and the seats."""
    seating = Seating(len(stems), 40 * len(stems))
    return target.new_cache(seating), [seating.take(40) for _ in stems]


def score(target, stems, taps=(), num_nodes=0):
    """The target's scores of `forest_of(stems)`, stems included in the one forward."""
    cache, seats = fresh_cache(target, stems)
    return target.score(forest_of(stems, num_nodes), cache, seats, taps)


NODES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.sampled_from([0.25, 0.5, 0.75, 1.0])), min_size=1, max_size=10)


def drafts_of(nodes: list[tuple[int, int, float]]) -> Drafts:
    """Random trees of three rows; a chance is that of the parent times a share, so many are equal."""
    parents, rows, depths, chances = [], [], [], []
    for back, row, share in nodes:
        before = [node for node, other in enumerate(rows) if other == row]
        parent = before[-back] if 0 < back <= len(before) else ROOT
        parents.append(parent)
        rows.append(row)
        depths.append(1 if parent == ROOT else depths[parent] + 1)
        chances.append(share * (1 if parent == ROOT else chances[parent]))
    return Drafts.of(range(len(nodes)), parents, rows, depths, chances)
