"""Which layers of a target (taps) published heads read: as outputs of layers, counted from 0, whatever their configuration counts.

Two conventions are in use. In speculators and vLLM, number k means the input of layer k, which is the output of layer k - 1. In
SGLang, SpecForge and ModelOpt, number k means the output of layer k. Files without numbers mean the outputs of layers 1, N // 2 - 1
and N - 4 of N, in every engine. Only files of speculators and exports of ours record their convention; numbers in others are
accepted if they are these three layers in one of the two conventions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from headstart.formats.published.layer_config import section

IDS = "eagle_aux_hidden_state_layer_ids"
Convention = Literal["inputs", "outputs"]
_ADVICE = "say which layers' outputs they read, counted from 0, with --taps"


def layer_numbers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The layer numbers that a configuration gives; None for none.

    Raises ValueError where it gives different ones in two places, or something else than whole numbers.
    """
    sections = (config, section(config, "eagle_config"), section(config, "transformer_layer_config"))
    values = [each[IDS] for each in sections if each.get(IDS)]
    if not values:
        return None
    if any(each != values[0] for each in values):
        raise ValueError(f"their config.json says {IDS} = {values[0]} and {values[1]}; remove the wrong one")
    if not isinstance(values[0], list) or not all(isinstance(number, int) for number in values[0]):
        raise ValueError(f"their config.json says {IDS} = {values[0]!r}, which should be a list of whole numbers")
    return tuple(values[0])


def taps_of(numbers: Sequence[int] | None, count: int, num_layers: int, convention: Convention | None) -> tuple[int, ...]:
    """The layers whose outputs the heads read.

    numbers: as their configuration gives them; None: it gives none.
    count: number of layers that the columns of `fc.weight` hold.
    num_layers: of the target.
    convention: whether number k is known to mean the input or the output of layer k; None: it is not known.
    Raises ValueError where the layers cannot be determined.
    """
    if numbers is None:
        return _usual(count, num_layers)
    if len(numbers) == count + 1 and numbers[-1] in (num_layers - 1, num_layers):
        numbers = numbers[:-1]  # the last layer, which only training reads
    if len(numbers) != count:
        raise ValueError(f"their config.json names {len(numbers)} layers, {list(numbers)}, but fc.weight reads {count}; {_ADVICE}")
    if convention is None:
        return _inputs_or_outputs(numbers, num_layers)
    if convention == "outputs":
        return checked(numbers, count, num_layers)
    taps = tuple(number - 1 for number in numbers)
    for number, tap in zip(numbers, taps, strict=True):
        if not 0 <= tap < num_layers - 1:
            raise ValueError(
                f"their config.json names layer {number} for its input, which must be the output of a layer before the last of the "
                f"target's {num_layers}; {_ADVICE}"
            )
    return taps


def checked(taps: Sequence[int], count: int, num_layers: int) -> tuple[int, ...]:
    """The layers that a person names with --taps.

    count, num_layers: as of `taps_of`.
    Raises ValueError where the heads read another number of layers, the target lacks one, or one is named twice.
    """
    if len(taps) != count:
        raise ValueError(f"--taps names {len(taps)} layers, {_list(taps)}, but fc.weight reads {count}")
    if wrong := [tap for tap in taps if not 0 <= tap < num_layers]:
        raise ValueError(f"--taps names layer {wrong[0]}, but the target's {num_layers} are counted from 0 to {num_layers - 1}")
    if len({*taps}) < count:
        raise ValueError(f"--taps names a layer twice: {_list(taps)}")
    return tuple(taps)


def _inputs_or_outputs(numbers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The usual layers, if the numbers are these in one of the two conventions; else ValueError."""
    inputs = tuple(number - 1 for number in numbers)
    if published_taps(num_layers) not in (tuple(numbers), inputs):
        raise ValueError(
            f"their config.json names the layers {list(numbers)}, which may be inputs or outputs; {_ADVICE}: {_list(numbers)} if "
            f"they are outputs, {_list(inputs)} if they are inputs"
        )
    return _usual(len(numbers), num_layers)


def _usual(count: int, num_layers: int) -> tuple[int, ...]:
    """The three layers that files without numbers mean."""
    if count != 3:
        raise ValueError(f"fc.weight reads {count} layers of the target, and their config.json does not say which; {_ADVICE}")
    low, middle, high = published_taps(num_layers)
    if not low < middle < high:
        raise ValueError(
            f"the usual layers in a target of {num_layers}, {low}, {middle} and {high}, do not follow one another; {_ADVICE}"
        )
    return low, middle, high


def published_taps(num_layers: int) -> tuple[int, int, int]:
    """The three layers, as outputs counted from 0, that files without numbers mean, and that engines tap by themselves."""
    return 1, num_layers // 2 - 1, num_layers - 4


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
