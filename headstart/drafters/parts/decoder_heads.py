"""What drafters made of whole decoder layers share: layers like the target's, the target's LM head, and KV caches.

Must not import a method.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from headstart.drafters.parts.compiled_level import CompiledLevel
from headstart.drafters.parts.decoder import Memory, block_of, slot_bytes
from headstart.drafters.parts.heads import Heads
from headstart.drafters.parts.losses import OutputHead
from headstart.target.steps import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from headstart.target.cache import Seating
    from headstart.target.target import Target


class DecoderHeads(Heads):
    """Heads made of decoder layers, which use the target's LM head and can be pretrained with the target's trunk.

    Their `config` has `block`: the configuration of one layer; None: a layer like the target's last one.
    """

    joins_pretraining = True
    min_gain = 0.5  # a level costs a decoder layer and the LM head (docs/log.md)

    @classmethod
    def resolve_config(cls, config: Any, target: PreTrainedConfig) -> Any:
        return config if config.block else config.model_copy(update={"block": block_of(target)})

    @property
    def decoders(self) -> Sequence[Any]:
        """The decoders, in the order of their states in `encode` and of `memories`."""
        raise NotImplementedError

    @property
    def state_width(self) -> int:
        """One state per decoder."""
        return self.hidden * len(self.decoders)

    @property
    def slot_bytes(self) -> int:
        """Bytes of all decoders' keys and values per token, in the precision of their weights."""
        return sum(map(slot_bytes, self.decoders))

    def init_from_target(self) -> Self:
        """Returns itself: embedding and LM head are the target's, and the layers keep their random weights."""
        return self

    def output_head(self, depth: int) -> OutputHead:
        return OutputHead(self.embed_head.logits, self.embed_head.parameters)

    @cached_property
    def compiled_level(self) -> CompiledLevel | None:
        """Runs a level in one call; None where some of its modules are not compiled ones."""
        try:
            return self.make_compiled_level()
        except UnsupportedError:
            return None

    def make_compiled_level(self) -> CompiledLevel:
        """Raises UnsupportedError where a level needs its modules one by one."""
        raise UnsupportedError

    def attach(self, target: Target, seating: Seating) -> None:
        super().attach(target, seating)
        vars(self).pop("compiled_level", None)
        self.memories = [Memory(decoder, seating, target.device, target.dtype, target.runner) for decoder in self.decoders]

    def free(self, seat: int) -> None:
        for memory in self.memories:
            memory.free(seat)
