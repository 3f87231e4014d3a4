"""One attention call for all rows of a forward, padded to the longest: for devices where a call costs more than the padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.target.row_mask import RowMask, Window


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Index tables for all rows of a forward, padded to the longest row; made once per forward.

    node_slots: [nodes] the slot of each node.
    slots: [rows, context] the slots of each row; padding repeats the last one.
    nodes: [rows, most_nodes] the nodes of each row; padding repeats the last one.
    rows, columns: [nodes] the index of each node in `nodes`.
    row_masks: one per row.
    """

    node_slots: Tensor
    slots: Tensor
    nodes: Tensor
    rows: Tensor
    columns: Tensor
    row_masks: Sequence[RowMask]
    _masks: dict[tuple[Window, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, row_masks: Sequence[RowMask]) -> PaddedRows:
        """The tables for these rows, at least one."""
        device = row_masks[0].positions.device
        context, most_nodes = max(row_mask.context for row_mask in row_masks), max(row_mask.nodes for row_mask in row_masks)
        node_slots = [
            slot
            for row_mask in row_masks
            for slot in range(row_mask.start + row_mask.context - row_mask.nodes, row_mask.start + row_mask.context)
        ]
        slots = [[row_mask.start + min(slot, row_mask.context - 1) for slot in range(context)] for row_mask in row_masks]
        nodes = [
            [min(node, row_mask.last - 1) for node in range(row_mask.first, row_mask.first + most_nodes)] for row_mask in row_masks
        ]
        indices = [(row, column) for row, row_mask in enumerate(row_masks) for column in range(row_mask.nodes)]
        rows, columns = torch.tensor(indices).T.to(device, non_blocking=True)
        tables = [torch.tensor(table).to(device, non_blocking=True) for table in (node_slots, slots, nodes)]
        return cls(tables[0], tables[1], tables[2], rows, columns, row_masks)

    def mask(self, window: Window, dtype: torch.dtype) -> Tensor:
        """Additive attention mask [rows, 1, most_nodes, context], made once per forward.

        Padding attends to its row's whole context: its output is not read, and a softmax over nothing would be nan.
        """
        if (window, dtype) not in self._masks:
            visible = self.slots.new_zeros(*self.nodes.shape, self.slots.shape[1], dtype=torch.bool)
            for row, row_mask in enumerate(self.row_masks):
                visible[row, : row_mask.nodes, : row_mask.context] = row_mask.visible(window)
                visible[row, row_mask.nodes :, : row_mask.context] = True
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            self._masks[window, dtype] = mask[:, None]
        return self._masks[window, dtype]


def attend_padded(
    padded: PaddedRows,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    window: Window,
    scaling: float,
) -> Tensor:
    """Write the keys and values of all rows into the KV cache, and attend with one call. Without soft caps and sinks.

    query: [heads, nodes, dim]; key: [kv_heads, nodes, dim]; value: [kv_heads, nodes, value_dim]. Dead
        nodes are the last ones.
    keys, values: [kv_heads, slots, dim] the layer's part of the KV cache.
    Returns [heads, nodes, value_dim], zeros for dead nodes.
    """
    num_nodes = len(padded.node_slots)
    keys.index_copy_(1, padded.node_slots, key[:, :num_nodes])
    values.index_copy_(1, padded.node_slots, value[:, :num_nodes])
    heads, groups, (rows, most_nodes) = query.shape[0], query.shape[0] // key.shape[0], padded.nodes.shape
    row_queries = query[:, padded.nodes].transpose(0, 1).reshape(rows, key.shape[0], groups * most_nodes, -1)
    mask = padded.mask(window, query.dtype).repeat(1, 1, groups, 1)
    row_keys, row_values = (store[:, padded.slots].transpose(0, 1) for store in (keys, values))
    out = F.scaled_dot_product_attention(row_queries, row_keys, row_values, attn_mask=mask, scale=scaling)
    out = out.reshape(rows, heads, most_nodes, -1)[padded.rows, :, padded.columns]
    return F.pad(out, (0, 0, 0, 0, 0, query.shape[1] - num_nodes)).transpose(0, 1)
