"""Layers of published drafters, one token after another, in plain operations on vectors: what the formulas say, slowly.

Nothing here knows transformers or headstart. A layer's past is a list of keys and values, which grows by one pair per token.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Get = Callable[[str], Tensor | None]  # a tensor by its name inside a layer, None where there is none
Past = list[tuple[Tensor, Tensor]]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def frequencies(size: int, theta: float) -> list[float]:
    return [theta ** (-2 * place / size) for place in range(size // 2)]


def llama3(frequency: float, factor: float, low: float, high: float, before: int) -> float:
    """Slow turns are slowed down by the factor, fast ones stay, those between are blended."""
    wavelength = 2 * math.pi / frequency
    if wavelength < before / high:
        return frequency
    if wavelength > before / low:
        return frequency / factor
    blend = (before / wavelength - low) / (high - low)
    return (1 - blend) * frequency / factor + blend * frequency


def turned(x: Tensor, position: int, turns: Sequence[float]) -> Tensor:
    """One head's [size], whose two halves are the coordinates of points that turn with the position."""
    half = len(turns)
    angles = torch.tensor([position * turn for turn in turns], dtype=x.dtype)
    a, b = x[:half], x[half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])


class Layer:
    """heads, kv_heads: of queries, and of keys and values; size: of one; turns: of each pair of coordinates, per position."""

    def __init__(self, get: Get, heads: int, kv_heads: int, size: int, turns: Sequence[float], eps: float) -> None:
        self.get, self.heads, self.kv_heads, self.size, self.turns, self.eps = get, heads, kv_heads, size, turns, eps

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        assert weight is not None
        return weight @ x if bias is None else weight @ x + bias

    def normed(self, name: str, x: Tensor) -> Tensor:
        weight = self.get(f"{name}.weight")
        return x if weight is None else norm(x, weight, self.eps)

    def attend(self, x: Tensor, position: int, past: Past) -> Tensor:
        """Every query looks at all tokens so far, and at its own."""
        queries, keys, values = (self.linear(f"self_attn.{name}_proj", x).view(-1, self.size) for name in "qkv")
        queries, keys = (
            torch.stack([turned(self.normed(f"self_attn.{name}_norm", one), position, self.turns) for one in several])
            for name, several in (("q", queries), ("k", keys))
        )
        past.append((keys, values))
        mixed = []
        for head in range(self.heads):
            shared = head * self.kv_heads // self.heads
            weights = torch.stack([queries[head] @ key[shared] / self.size**0.5 for key, _ in past]).softmax(0)
            mixed.append(sum(weight * value[shared] for weight, (_, value) in zip(weights, past, strict=True)))
        return self.linear("self_attn.o_proj", torch.cat(mixed))

    def mlp(self, x: Tensor) -> Tensor:
        gate = self.linear("mlp.gate_proj", x)
        return self.linear("mlp.down_proj", gate * gate.sigmoid() * self.linear("mlp.up_proj", x))

    def finish(self, residual: Tensor, x: Tensor, position: int, past: Past) -> Tensor:
        """The attention's part on top of the residual, then the MLP's on top of that."""
        h = residual + self.attend(x, position, past)
        return h + self.mlp(self.normed("post_attention_layernorm", h))


def unrolled(
    step: Callable[[Tensor, Tensor, int, list[Past]], Tensor], states: Tensor, embedded: Tensor, steps: int
) -> list[list[Tensor]]:
    """[steps][length - steps] outputs behind every position of one text: the true states up to there, then the outputs themselves.

    step: (state, embedding of the next token, position, pasts of the layers) -> output. states, embedded: [length, width].
    """
    found: list[list[Tensor]] = [[] for _ in range(steps)]
    for anchor in range(len(states) - steps):
        pasts: list[Past] = [[], [], []]
        for position in range(anchor):
            step(states[position], embedded[position + 1], position, pasts)
        out = states[anchor]
        for more in range(steps):
            out = step(out, embedded[anchor + more + 1], anchor + more, pasts)
            found[more].append(out)
    return found


def assert_same(found: Sequence[Tensor], wanted: Iterable[Sequence[Sequence[Tensor]]]) -> None:
    """To 1e-5 of the largest number, for norms and angles are float32 in transformers whatever the rest is.

    found: [steps][rows, length, vocab]; wanted: [rows][steps][places] of [vocab].
    """
    for row, steps in enumerate(wanted):
        assert len(steps) == len(found)
        for step, places in enumerate(steps):
            right = torch.stack(list(places))
            assert (found[step][row, : len(places)] - right).abs().max() < 1e-5 * right.abs().max(), f"row {row}, step {step}"
