"""Which layers of a target published heads read: outputs of layers, counted from 0, whatever their configuration means by a number.

Two conventions are in use. speculators and vLLM name layers by what they read: number k is the input of layer k, so the output of
layer k - 1. SGLang, SpecForge and ModelOpt name outputs. Files with no numbers mean the outputs of layers 1, N // 2 - 1 and N - 4
of N, in every engine. Numbers outside speculators' files do not tell their convention, unless they are those three in one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headstart.formats.published.layer_config import section

IDS = "eagle_aux_hidden_state_layer_ids"
_ADVICE = "say which layers' outputs they read, counted from 0, with --taps"


def told(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The numbers that a configuration gives; None for none. Raises ValueError where it gives different ones, or no numbers."""
    places = (config, section(config, "eagle_config"), section(config, "transformer_layer_config"))
    found = [place[IDS] for place in places if place.get(IDS)]
    if not found:
        return None
    if any(each != found[0] for each in found):
        raise ValueError(f"their config.json says {IDS} = {found[0]} and {found[1]}; remove the wrong one")
    if not isinstance(found[0], list) or not all(isinstance(number, int) for number in found[0]):
        raise ValueError(f"their config.json says {IDS} = {found[0]!r}, which should be a list of whole numbers")
    return tuple(found[0])


def taps_of(numbers: Sequence[int] | None, count: int, num_layers: int, are_inputs: bool) -> tuple[int, ...]:
    """Outputs of layers that are meant. count: how many the heads have room for; are_inputs: whether a number is known to stand for
    the input of its layer. Raises ValueError where that cannot be told."""
    if numbers is None:
        return _usual(count, num_layers)
    if len(numbers) == count + 1 and numbers[-1] in (num_layers - 1, num_layers):
        numbers = numbers[:-1]  # the last layer's, which only training needs
    if len(numbers) != count:
        raise ValueError(f"their config.json names {len(numbers)} layers, {list(numbers)}, but fc.weight reads {count}; {_ADVICE}")
    if not are_inputs:
        return _either(numbers, num_layers)
    taps = tuple(number - 1 for number in numbers)
    for number, tap in zip(numbers, taps, strict=True):
        if not 0 <= tap < num_layers - 1:
            raise ValueError(
                f"their config.json names layer {number} for its input, which must be the output of a layer before the last of the "
                f"target's {num_layers}; {_ADVICE}"
            )
    return taps


def checked(taps: Sequence[int], count: int, num_layers: int) -> tuple[int, ...]:
    """Those that a person names. Raises ValueError where heads have no room for them, or a target does not have them."""
    if len(taps) != count:
        raise ValueError(f"--taps names {len(taps)} layers, {_list(taps)}, but fc.weight reads {count}")
    if wrong := [tap for tap in taps if not 0 <= tap < num_layers]:
        raise ValueError(f"--taps names layer {wrong[0]}, but the target's {num_layers} are counted from 0 to {num_layers - 1}")
    if len({*taps}) < count:
        raise ValueError(f"--taps names a layer twice: {_list(taps)}")
    return tuple(taps)


def _either(numbers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The usual layers, if they are meant."""
    inputs = tuple(number - 1 for number in numbers)
    if _three(num_layers) not in (tuple(numbers), inputs):
        raise ValueError(
            f"their config.json names the layers {list(numbers)}, which may be inputs or outputs; {_ADVICE}: {_list(numbers)} if "
            f"they are outputs, {_list(inputs)} if they are inputs"
        )
    return _usual(len(numbers), num_layers)


def _usual(count: int, num_layers: int) -> tuple[int, ...]:
    if count != 3:
        raise ValueError(f"fc.weight reads {count} layers of the target, and their config.json does not say which; {_ADVICE}")
    low, middle, high = _three(num_layers)
    if not low < middle < high:
        raise ValueError(
            f"the usual layers in a target of {num_layers}, {low}, {middle} and {high}, do not follow one another; {_ADVICE}"
        )
    return low, middle, high


def _three(num_layers: int) -> tuple[int, int, int]:
    return 1, num_layers // 2 - 1, num_layers - 4


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
