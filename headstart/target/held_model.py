"""What targets do to a model that they hold, and how it is undone.

A held model attends as it came, so that its own `generate` works, except while a target runs it. When the last target lets it
go, the modules that were packed or fused for it are put back. This file knows models. It refuses to know forests and caches.
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

_HELD: WeakKeyDictionary[nn.Module, HeldModel] = WeakKeyDictionary()


class HeldModel:
    """One model and its holders. Use `hold`."""

    def __init__(self) -> None:
        self._holders: WeakSet[Any] = WeakSet()
        self._attentions: list[tuple[Any, str]] = []
        self._training: set[str] = set()
        self._lock = threading.RLock()

    @classmethod
    def hold(cls, model: PreTrainedModel, holder: object) -> HeldModel:
        """Put a model in evaluation mode for a holder. One `HeldModel` for all holders of a model.

        Raises ValueError where the model does not let its attention be chosen.
        """
        held = _HELD.setdefault(model, cls())
        with held._lock:
            held._switch_back()
            held._attentions = _attentions(model)
        held._training |= {name for name, module in model.named_modules() if module.training}
        held._holders.add(holder)
        model.eval()
        return held

    def release(self, model: PreTrainedModel, holder: object, restore: Callable[[nn.Module], object]) -> None:
        """Let go. For the last holder, `restore` puts back what was packed or fused, and modules that were training train again."""
        self._holders.discard(holder)
        if self._holders:
            return
        restore(model)
        for name, module in model.named_modules():
            module.training |= name in self._training
        self._training = set()

    def __contains__(self, holder: object) -> bool:
        return holder in self._holders

    @contextmanager
    def attending(self) -> Iterator[None]:
        """The model attends with this package's function; nobody else's forward of a target gets in between.

        The way back is written twice: an interruption may come at its first statement.
        """
        with self._lock:
            self._attentions = [(config, _chosen(config, name)) for config, name in self._attentions]
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


def _chosen(config: Any, before: str) -> str:
    """The attention that the model's owner chose; `before` where an interruption left this package's."""
    chosen: str = config._attn_implementation_internal
    return before if chosen == attention.NAME else chosen


def _attentions(model: PreTrainedModel) -> list[tuple[Any, str]]:
    """The attention that each configuration names, the model's own and those of its parts, where it can be chosen."""
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
    found: dict[int, Any] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "_attn_implementation_internal") and id(config) not in found:
            found[id(config)] = config
            waiting.extend(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return list(found.values())
