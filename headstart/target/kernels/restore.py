"""How a module that was packed or fused is put back as it was, bit for bit.

A stand-in remembers what it replaced without holding its weight: while something else holds the linear or its weight (an
embedding that is tied to it, an optimizer), that very object comes back; otherwise an equal one is made of the packed weight.
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
    """A module that took the place of another."""

    def original(self) -> nn.Module:
        """What it replaced, as it was; itself where nothing is remembered."""
        return self


class ReplacedLinear:
    """A linear whose weight may be freed: all that is needed to make it again, except for the weight."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = weakref.ref(linear)
        self._kind = type(linear)
        self._attributes = {name: value for name, value in vars(linear).items() if name != "_parameters"}
        self._parameters: dict[str, nn.Parameter | None] = {**linear._parameters, "weight": None}
        weight = linear.weight
        assert isinstance(weight, nn.Parameter), "only plain linears are replaced"
        self._weight = _WEIGHTS.setdefault(weight, _ReplacedWeight(weight))

    def original(self, unpack: Callable[[], Tensor]) -> nn.Module:
        """The linear itself where it still exists, otherwise an equal one. unpack: makes the weight, of the stored shape."""
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
    """A weight that may be freed."""

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = TensorWeakRef(weight)
        self._requires_grad, self._grad = weight.requires_grad, weight.grad
        self._attributes = dict(vars(weight))

    def original(self, unpack: Callable[[], Tensor]) -> Tensor:
        weight: Tensor | None = self._weight()
        if weight is not None:
            _WEIGHTS.pop(weight, None)
        else:
            with torch.inference_mode(False):  # a weight that is made here must be able to learn
                weight = nn.Parameter(unpack().clone(memory_format=torch.contiguous_format), self._requires_grad)
            weight.grad = self._grad
            vars(weight).update(self._attributes)
            self._weight = TensorWeakRef(weight)
        return weight


def remember(linear: nn.Module) -> ReplacedLinear:
    """What is needed to make a linear again; one record for each linear, however many places it has in a model."""
    return _LINEARS.setdefault(linear, ReplacedLinear(linear))


def restore(model: nn.Module) -> int:
    """Put every module back that was packed or fused, in place; returns how many.

    Weights, names, their order and what is tied are as before; memory is what it was before, too.
    """
    count = 0
    for name, child in list(model._modules.items()):
        if isinstance(child, StandIn) and (original := child.original()) is not child:
            setattr(model, name, original)
            child, count = original, count + 1
        if child is not None:
            count += restore(child)
    return count
