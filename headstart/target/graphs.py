"""Runs forwards whose rows are tensors on the device, directly or as CUDA graphs: one graph per static shape, captured once.

A graph reads static buffers. A forward copies its inputs into them, padded with dead nodes and rows, replays the graph and copies
what it needs of the results. Nothing in a graph may wait for the host or read what the host knows. This module must not import
models.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from headstart.target.attention import FlatKernel
from headstart.target.cache import KVCache
from headstart.target.flat_mask import FlatMask
from headstart.target.flat_rows import Buffer, FlatRows, bucket, node_bucket
from headstart.target.padded_rows import padded_attention

MAX_NODES = 256  # forwards of more nodes, as of prompts, run directly: the host is not what they wait for
MAX_GRAPHS = 64
MIN_CONTEXT = 256  # slots; contexts are bounded by powers of two from here on
WARM_UPS = 2  # runs before a capture: the first ones compile kernels and allocate workspaces

Work = Callable[[Mapping[str, Tensor], FlatMask], tuple[Tensor, ...]]


class Graph(Protocol):
    """Records the operations of a function of no arguments, and repeats them on the same memory."""

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Record. Returns the tensors in which `replay` leaves the results. Raises RuntimeError where that is not possible."""
        ...

    def replay(self) -> None:
        """Repeat the operations."""
        ...


class CudaGraph:
    """A CUDA graph. pool: memory that all graphs of a runner share, because one runs at a time."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self._graph.replay()


def cuda_graphs() -> Callable[[], Graph]:
    """Makes CUDA graphs that share one pool of memory. Raises ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("CUDA graphs need a GPU, and torch finds none; leave graphs off on a CPU")
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


class _Captured:
    """One graph, its static buffers and its results."""

    def __init__(self, graph: Graph, buffers: Mapping[str, Buffer], inputs: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.inputs = {name: _filled(buffer, inputs[name]) for name, buffer in buffers.items()}
        self._fillings = {name: tensor.clone() for name, tensor in self.inputs.items()}
        self.outputs: tuple[Tensor, ...] = ()

    def load(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy the inputs of a forward into the first entries of the buffers, and the fillings into the rest."""
        for name, static in self.inputs.items():
            if static.shape != inputs[name].shape:
                static.copy_(self._fillings[name])
            static[tuple(slice(0, size) for size in inputs[name].shape)].copy_(inputs[name])


class FlatRunner:
    """Runs forwards over `FlatRows`: of a target, and of the decoders of its drafter.

    kernel: computes the attention of all rows.
    new_graph: makes a graph; None: forwards run directly. A model whose weights are replaced by other tensors needs `clear`.
    reads_all_slots: whether the kernel reads the cache in place, so that a graph serves every context; else one graph per power
        of two of the context.

    Attributes:
    num_captured, num_replayed: graphs captured and replayed so far.
    """

    def __init__(
        self, kernel: FlatKernel = padded_attention, new_graph: Callable[[], Graph] | None = None, reads_all_slots: bool = False
    ) -> None:
        self.kernel = kernel
        self.num_captured = self.num_replayed = 0
        self._new_graph = new_graph
        self._reads_all_slots = reads_all_slots
        self._graphs: OrderedDict[Hashable, _Captured | None] = OrderedDict()  # None: cannot be captured
        self._has_warned = False

    @property
    def captures(self) -> bool:
        """Whether forwards are captured as graphs."""
        return self._new_graph is not None

    def run(
        self, owner: Hashable, cache: KVCache, rows: FlatRows, inputs: Mapping[str, Tensor], work: Work, sizes: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """The results of `work(inputs, mask of the rows)`.

        owner: tells works apart that have the same shapes.
        cache: the KV cache that `work` reads and writes.
        inputs: by name, [nodes, ...], or [n] indices of nodes.
        sizes: how many entries of each result are wanted: a graph's results have more.
        """
        num_nodes = len(next(iter(inputs.values())))
        if self._new_graph is None or num_nodes > MAX_NODES:
            return work(inputs, rows.flat_mask())
        context = rows.sink if self._reads_all_slots else max(MIN_CONTEXT, bucket(rows.context))
        static = rows.bucketed(min(context, rows.sink))
        sized = {
            name: Buffer((static.num_nodes if len(tensor) == num_nodes else node_bucket(len(tensor)), *tensor.shape[1:]))
            for name, tensor in inputs.items()
        }
        buffers = {**static.buffers, **sized}
        assert len(buffers) == len(static.buffers) + len(sized), "an input has the name of a tensor of the rows"
        shapes = tuple((name, buffer.shape) for name, buffer in buffers.items())
        key = (owner, weakref.ref(cache), static.rows.context, shapes)
        given = {**rows.tensors(), **inputs}
        captured = self._get(key, buffers, given, lambda tensors: work(tensors, static.rows.with_tensors(tensors).flat_mask()))
        if captured is None:
            return work(inputs, rows.flat_mask())
        captured.load(given)
        captured.graph.replay()
        self.num_replayed += 1
        return tuple(out[:size].clone() for out, size in zip(captured.outputs, sizes, strict=True))

    def clear(self) -> None:
        """Drop all graphs. Shapes that could not be captured are tried again."""
        self._graphs.clear()

    def _get(
        self,
        key: Hashable,
        buffers: Mapping[str, Buffer],
        given: Mapping[str, Tensor],
        work: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    ) -> _Captured | None:
        """The graph of a key, captured now if there is none; None where it cannot be captured."""
        if key not in self._graphs:
            self._make_room()
            self._graphs[key] = self._capture(buffers, given, work)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _capture(
        self,
        buffers: Mapping[str, Buffer],
        given: Mapping[str, Tensor],
        work: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    ) -> _Captured | None:
        assert self._new_graph is not None, "graphs are off"
        captured = _Captured(self._new_graph(), buffers, given)
        captured.load(given)
        try:
            captured.outputs = captured.graph.capture(lambda: work(captured.inputs))
        except RuntimeError as error:
            if not self._has_warned:
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(f"a forward cannot be captured as a graph and runs directly: {reason}", stacklevel=2)
                self._has_warned = True
            return None
        self.num_captured += 1
        return captured

    def _make_room(self) -> None:
        """Drop the graphs of caches that are gone, and the one that was not used for longest where there are too many."""
        for key in [key for key in self._graphs if isinstance(key, tuple) and key[1]() is None]:
            del self._graphs[key]
        while len(self._graphs) >= MAX_GRAPHS:
            self._graphs.popitem(last=False)


def _filled(buffer: Buffer, like: Tensor) -> Tensor:
    """A static buffer in the dtype and on the device of a tensor, with its filling."""
    if not isinstance(buffer.filling, tuple):
        return like.new_full(buffer.shape, buffer.filling)
    return torch.stack([like.new_full(buffer.shape[1:], value) for value in buffer.filling])
