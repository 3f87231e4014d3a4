"""A graph for machines without a GPU: it records the operations of a function, and repeats these operations on the same tensors.

As in a CUDA graph, no Python runs in a replay, so that what the host knew at the capture stays as it was, and operations that would
make the host wait, or that copy what Python has to the device, refuse to be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
FORBIDDEN = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount, aten.lift_fresh}


class Recorder(TorchDispatchMode):
    """Records operations with the tensors that they read and made. steps: (operation, arguments, keywords, results)."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():  # in inference mode a composite operation arrives undecomposed
            with self:
                return func.decompose(*args, **kwargs)
        if func.overloadpacket in FORBIDDEN:
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        out = func(*args, **kwargs)
        if not func.is_view:
            self.steps.append((func, args, kwargs, out))
        return out


class RecordedGraph:
    """Stands for `CudaGraph`."""

    def __init__(self) -> None:
        self._recorder = Recorder()

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        work()  # the warm-up
        with self._recorder:
            outputs = work()
        for output in outputs:
            output.fill_(-1)  # a capture computes nothing
        return outputs

    def replay(self) -> None:
        for func, args, kwargs, out in self._recorder.steps:
            new = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(value)
