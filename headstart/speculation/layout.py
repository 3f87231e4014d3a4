"""The layout of a forest: which place each stem and each draft has in the flat list of nodes, computed on the host.

Must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """The nodes of a forest without its dead ones. Drafts' tokens and positions are not known on the host: 0 stands for them.

    tokens, positions: per node.
    asked: indices of the asked nodes.
    draft_nodes: per draft, its index among the nodes.
    root_positions: per draft, the position of its row's root.
    """

    tokens: list[int]
    positions: list[int]
    asked: list[int]
    draft_nodes: list[int]
    root_positions: list[int]

    @classmethod
    def of(
        cls, stems: Sequence[Sequence[int]], starts: Sequence[int], ends_at_root: Sequence[bool], counts: Sequence[int]
    ) -> Layout:
        """The layout of rows with these stems, as in `tree.merge`. counts: number of drafts of each row."""
        layout = cls([], [], [], [], [])
        for stem, start, is_asked, count in zip(stems, starts, ends_at_root, counts, strict=True):
            assert stem, "a stem is empty"
            assert is_asked or not count, "a row has drafts but its stem does not end at its root"
            end = len(layout.tokens) + len(stem)
            layout.tokens.extend([*stem, *[0] * count])
            layout.positions.extend([*range(start, start + len(stem)), *[0] * count])
            layout.draft_nodes.extend(range(end, end + count))
            layout.root_positions.extend([start + len(stem) - 1] * count)
            if is_asked:
                layout.asked.extend(range(end - 1, end + count))
        return layout
