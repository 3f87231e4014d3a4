"""A model that targets hold: its attention is replaced only while a target runs it, and the last release undoes everything.

This module must not import forests or KV caches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from headstart.target import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HELD_MODELS: WeakKeyDictionary[nn.Module, HeldModel] = WeakKeyDictionary()


class HeldModel:
    """The state that targets share of one model: who holds it, its own attention, and which modules were training. Use `hold`."""

    def __init__(self) -> None:
        self._holders: WeakSet[Any] = WeakSet()
        self._attentions: list[tuple[Any, str]] = []
        self._training: set[str] = set()
        self._lock = threading.RLock()

    @classmethod
    def hold(cls, model: PreTrainedModel, holder: object) -> HeldModel:
        """Put a model in evaluation mode for a holder, and return the `HeldModel` that all its holders share.

        Raises ValueError where the model does not allow another attention function.
        """
        held = _HELD_MODELS.setdefault(model, cls())
        with held._lock:
            held._switch_back()
            held._attentions = _attentions(model)
        held._training |= {name for name, module in model.named_modules() if module.training}
        held._holders.add(holder)
        model.eval()
        return held

    def release(self, model: PreTrainedModel, holder: object, restore: Callable[[nn.Module], object]) -> None:
        """Remove a holder. For the last one, call `restore` on the model and put modules back in training mode that were in it.

        restore: puts back the modules that were packed or fused.
        """
        self._holders.discard(holder)
        if self._holders:
            return
        restore(model)
        for name, module in model.named_modules():
            module.training |= name in self._training
        self._training = set()

    def __contains__(self, holder: object) -> bool:
        """Whether this holder has not released the model."""
        return holder in self._holders

    @contextmanager
    def attending(self) -> Iterator[None]:
        """A context in which the model runs with this package's attention; one thread at a time.

        The attention is switched back in two nested `finally`, because an interruption may come at the first statement of one.
        """
        with self._lock:
            self._attentions = [(config, _own_attention(config, name)) for config, name in self._attentions]
            try:
                try:
                    for config, _ in self._attentions:
                        config._attn_implementation_internal = attention.NAME
                    yield
                finally:
                    self._switch_back()
            finally:
                self._switch_back()

    def _switch_back(self) -> None:
        for config, name in self._attentions:
            config._attn_implementation_internal = name


def _own_attention(config: Any, before: str) -> str:
    """The attention that the model's owner chose; `before` where an interruption left this package's in place."""
    current: str = config._attn_implementation_internal
    return before if current == attention.NAME else current


def _attentions(model: PreTrainedModel) -> list[tuple[Any, str]]:
    """(configuration, name of its attention) for the model and its parts, where the attention can be replaced."""
    attention.register()
    before = [(config, config._attn_implementation_internal) for config in _configs(model)]
    try:
        model.set_attn_implementation(attention.NAME)
        return [(config, name) for config, name in before if config._attn_implementation_internal == attention.NAME]
    except AttributeError as error:
        raise ValueError(str(error)) from None
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every configuration in a model, once."""
    configs: dict[int, Any] = {}
    remaining = [getattr(module, "config", None) for module in model.modules()]
    while remaining:
        config = remaining.pop()
        if hasattr(config, "_attn_implementation_internal") and id(config) not in configs:
            configs[id(config)] = config
            remaining.extend(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return list(configs.values())
