"""A fake device, for machines without a GPU: tensors that report another device and keep their content in ordinary memory.

The device is called `meta`, the one device besides the CPU that every build of torch has. Every operation runs on the CPU. As on a
GPU, an operation on tensors of two devices fails, and host synchronisations are recorded. Kernels, streams and speeds are not
imitated.
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

DEVICE = torch.device("meta")
aten = torch.ops.aten
SYNCHRONISING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount}
INDEXING = {aten.index, aten.index_put_, aten.index_put}  # synchronise where an index is a mask


class DeviceTensor(Tensor):
    """A tensor on the fake device. inner: its content, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        wrapper = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        wrapper.inner = inner
        return wrapper

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of `fake_device`")


class FakeDevice(TorchDispatchMode):
    """Runs operations on the content and refuses those that mix devices. waits: operations that made the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func._can_decompose():  # in inference mode a composite operation arrives undecomposed
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        on_host = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
        kind = func.overloadpacket
        to_device = torch.device(kwargs["device"]) == DEVICE if kwargs.get("device") is not None else bool(on_device)
        if kind in (aten._to_copy, aten.copy_):
            is_async = kwargs.pop("non_blocking", False) or len(args) > 2
            if to_device != bool(on_device) or (on_device and on_host):
                self._wait(f"{'up' if to_device else 'down'}: {kind}", is_waited=not (is_async and to_device))
        else:
            shapes = [tuple(tensor.shape) for tensor in on_host if tensor.dim()]
            assert not (on_device and shapes), f"{func} gets tensors of the device and tensors of the host with shapes {shapes}"
            is_masked = kind in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
            self._wait(str(kind), is_waited=bool(on_device) and (kind in SYNCHRONISING or is_masked))
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        wrapped = {id(tensor.inner): tensor for tensor in on_device}
        with torch.inference_mode(False):  # a wrapper has no version that a view of it could share
            out = func(*(tree_map(_inner, args)), **tree_map(_inner, kwargs))
            if not to_device:
                return out
            return tree_map(lambda x: wrapped[id(x)] if id(x) in wrapped else DeviceTensor(x) if isinstance(x, Tensor) else x, out)

    def _wait(self, what: str, is_waited: bool) -> None:
        if is_waited:
            self.waits.append(what)


class Construction(TorchFunctionMode):
    """Makes `torch.tensor(data, device=...)` on the host, then copies it: torch's own copy is not visible to a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.tensor or kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        return func(*args, **kwargs).to(device)


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, DeviceTensor) else leaf


@contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """Provides the device within the block."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), Construction(), FakeDevice() as device:
        yield device


def send(model: nn.Module) -> nn.Module:
    """Move a model to the fake device, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(DeviceTensor(parameter.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else DeviceTensor(buffer)
    return model
