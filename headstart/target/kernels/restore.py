"""Putting packed and fused modules back as they were, with the same bits.

A `StandIn` remembers the module that it replaced without holding the weight of a linear. While something else holds that linear or
its weight (a tied embedding, an optimiser), the same object is put back; otherwise an equal one is made from the packed weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

_LINEARS: weakref.WeakKeyDictionary[nn.Module, ReplacedLinear] = weakref.WeakKeyDictionary()
_WEIGHTS: Any = WeakIdKeyDictionary()  # Parameter -> _ReplacedWeight; linears that are tied share one


class StandIn(nn.Module):
    """A module that took the place of another in a model."""

    def original(self) -> nn.Module:
        """The module that it replaced, as it was; itself where nothing is remembered."""
        return self


class ReplacedLinear:
    """Everything of a linear but its weight, which may be freed: enough to make it again from the packed weight."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = weakref.ref(linear)
        self._kind = type(linear)
        self._attributes = {name: value for name, value in vars(linear).items() if name != "_parameters"}
        self._parameters: dict[str, nn.Parameter | None] = {**linear._parameters, "weight": None}
        weight = linear.weight
        assert isinstance(weight, nn.Parameter), "only linears with a plain weight are replaced"
        self._weight = _WEIGHTS.setdefault(weight, _ReplacedWeight(weight))

    def original(self, unpack: Callable[[], Tensor]) -> nn.Module:
        """The linear itself where it still exists, otherwise an equal one. unpack: returns the weight in the stored shape."""
        linear = self._linear()
        if linear is not None:
            _LINEARS.pop(linear, None)
        else:
            linear = self._kind.__new__(self._kind)
            vars(linear).update(self._attributes)
            linear._parameters = {**self._parameters, "weight": self._weight.original(unpack)}
            self._linear = weakref.ref(linear)
        return linear


class _ReplacedWeight:
    """Everything of a weight but its numbers, which may be freed."""

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = TensorWeakRef(weight)
        self._requires_grad, self._grad = weight.requires_grad, weight.grad
        self._attributes = dict(vars(weight))

    def original(self, unpack: Callable[[], Tensor]) -> Tensor:
        """The weight itself where it still exists, otherwise an equal one."""
        weight: Tensor | None = self._weight()
        if weight is not None:
            _WEIGHTS.pop(weight, None)
        else:
            with torch.inference_mode(False):  # the new weight must be trainable
                weight = nn.Parameter(unpack().clone(memory_format=torch.contiguous_format), self._requires_grad)
            weight.grad = self._grad
            vars(weight).update(self._attributes)
            self._weight = TensorWeakRef(weight)
        return weight


def remember(linear: nn.Module) -> ReplacedLinear:
    """The record from which a linear can be put back; the same one for a linear that is in several places of a model."""
    return _LINEARS.setdefault(linear, ReplacedLinear(linear))


def restore(model: nn.Module) -> int:
    """Put back every module that was packed or fused, in place; returns how many.

    Weights, names, their order, tied weights and memory are as before.
    """
    count = 0
    for name, child in list(model._modules.items()):
        if isinstance(child, StandIn) and (original := child.original()) is not child:
            setattr(model, name, original)
            child, count = original, count + 1
        if child is not None:
            count += restore(child)
    return count
