"""What drafters made of whole decoder layers have in common: the target's own kind of layer, its voice, and memories.

A method's own file says what its layers read and in which order they run. This file refuses to know any method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from headstart.drafters.parts.decoder import Memory, block_of, slot_bytes
from headstart.drafters.parts.heads import Heads
from headstart.drafters.parts.losses import OutputHead

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from headstart.target.cache import Seating
    from headstart.target.target import Target


class Layered(Heads):
    """Heads with decoder layers, which speak through the target's own head and may learn with its trunk from the start.

    Their `config` has `block`: the configuration of one layer, None for the target's own kind.
    """

    joins_pretraining = True
    min_gain = 0.5  # a level costs a whole layer and the way to the vocabulary (docs/log.md)

    @classmethod
    def resolve_config(cls, config: Any, target: PreTrainedConfig) -> Any:
        return config if config.block else config.model_copy(update={"block": block_of(target)})

    @property
    def decoders(self) -> Sequence[Any]:
        """In the order of what is remembered of them."""
        raise NotImplementedError

    @property
    def state_width(self) -> int:
        """What each decoder made of the last token."""
        return self.hidden * len(self.decoders)

    @property
    def slot_bytes(self) -> int:
        """Keys and values of all decoders, in the precision that they have now."""
        return sum(map(slot_bytes, self.decoders))

    def init_from_target(self) -> Self:
        """Nothing of the target's is copied: it is all shared."""
        return self

    def output_head(self, depth: int) -> OutputHead:
        return OutputHead(self.embed_head.logits, self.embed_head.parameters)

    def attach(self, target: Target, seating: Seating) -> None:
        super().attach(target, seating)
        self.memories = [Memory(decoder, seating, target.device, target.dtype) for decoder in self.decoders]

    def free(self, seat: int) -> None:
        for memory in self.memories:
            memory.free(seat)
