"""A device that is not there, for machines without a GPU: tensors that say they are elsewhere and are kept in ordinary memory.

It is called `meta`, the one foreign device that every build of torch knows how to enter. Every operation runs on the processor, but
as on a GPU tensors of two devices must not meet, and what makes the host wait for the device is written down. Kernels, streams
and speeds are not imitated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

AWAY = torch.device("meta")
aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount}
MASKED = {aten.index, aten.index_put_, aten.index_put}  # wait where an index is a mask


class Elsewhere(Tensor):
    """A tensor of the device that is not there. inner: its content."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=AWAY
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of `pretending`")


class Pretence(TorchDispatchMode):
    """Runs operations on the content, refuses those that mix devices. waits: what made the host wait, and copied how."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func._can_decompose():  # in inference mode an operation made of others arrives whole
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        away = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
        here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)]
        kind = func.overloadpacket
        goes_away = torch.device(kwargs["device"]) == AWAY if kwargs.get("device") is not None else bool(away)
        if kind in (aten._to_copy, aten.copy_):
            is_async = kwargs.pop("non_blocking", False) or len(args) > 2
            if goes_away != bool(away) or (away and here):
                self._wait(f"{'up' if goes_away else 'down'}: {kind}", is_waited=not (is_async and goes_away))
        else:
            strangers = [tuple(tensor.shape) for tensor in here if tensor.dim()]
            assert not (away and strangers), f"{func} is given tensors of the device and {strangers} of the host"
            is_masked = kind in MASKED and any(x is not None and x.dtype == torch.bool for x in args[1])
            self._wait(str(kind), is_waited=bool(away) and (kind in WAITING or is_masked))
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        wrapped = {id(tensor.inner): tensor for tensor in away}
        with torch.inference_mode(False):  # a wrapper has no version that a view of it could share
            out = func(*(tree_map(_inner, args)), **tree_map(_inner, kwargs))
            if not goes_away:
                return out
            return tree_map(lambda x: wrapped[id(x)] if id(x) in wrapped else Elsewhere(x) if isinstance(x, Tensor) else x, out)

    def _wait(self, what: str, is_waited: bool) -> None:
        if is_waited:
            self.waits.append(what)


class Construction(TorchFunctionMode):
    """`torch.tensor(data, device=...)` copies below what a dispatch mode sees: made here first, then sent, and waited for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.tensor or kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        return func(*args, **kwargs).to(device)


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Elsewhere) else leaf


@contextmanager
def pretending() -> Iterator[Pretence]:
    """While it lasts, the device is there."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), Construction(), Pretence() as pretence:
        yield pretence


def send(model: nn.Module) -> nn.Module:
    """Move a model there, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(Elsewhere(parameter.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else Elsewhere(buffer)
    return model
