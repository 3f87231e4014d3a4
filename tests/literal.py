"""Decoder layers of published drafters, written from the formulas: one token after another, in operations on vectors.

Must not import transformers or headstart. A layer's past is a list of keys and values, which grows by one pair per token.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Get = Callable[[str], Tensor | None]  # a tensor by its name inside a layer, None where there is none
Past = list[tuple[Tensor, Tensor]]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of a vector."""
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def frequencies(size: int, theta: float) -> list[float]:
    """RoPE frequencies of a head of this size."""
    return [theta ** (-2 * pair / size) for pair in range(size // 2)]


def llama3(frequency: float, factor: float, low: float, high: float, before: int) -> float:
    """A RoPE frequency of type `llama3`: low ones are divided by the factor, high ones stay, those between are blended."""
    wavelength = 2 * math.pi / frequency
    if wavelength < before / high:
        return frequency
    if wavelength > before / low:
        return frequency / factor
    blend = (before / wavelength - low) / (high - low)
    return (1 - blend) * frequency / factor + blend * frequency


def rotated(x: Tensor, position: int, frequencies: Sequence[float]) -> Tensor:
    """RoPE of one head's [size], whose two halves are the coordinates of points that rotate with the position."""
    half = len(frequencies)
    angles = torch.tensor([position * frequency for frequency in frequencies], dtype=x.dtype)
    a, b = x[:half], x[half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])


class Layer:
    """A Llama-like decoder layer.

    get: its weights.
    heads, kv_heads: number of heads of queries, and of keys and values.
    size: of a head.
    frequencies: of RoPE, one per pair of coordinates.
    eps: of the norms.
    """

    def __init__(self, get: Get, heads: int, kv_heads: int, size: int, frequencies: Sequence[float], eps: float) -> None:
        self.get, self.heads, self.kv_heads, self.size, self.eps = get, heads, kv_heads, size, eps
        self.frequencies = frequencies

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        assert weight is not None
        return weight @ x if bias is None else weight @ x + bias

    def normed(self, name: str, x: Tensor) -> Tensor:
        weight = self.get(f"{name}.weight")
        return x if weight is None else norm(x, weight, self.eps)

    def attend(self, x: Tensor, position: int, past: Past) -> Tensor:
        """Attention of one token to all tokens so far and to itself; appends its keys and values to `past`."""
        queries, keys, values = (self.linear(f"self_attn.{name}_proj", x).view(-1, self.size) for name in "qkv")
        queries, keys = (
            torch.stack([rotated(self.normed(f"self_attn.{name}_norm", head), position, self.frequencies) for head in heads])
            for name, heads in (("q", queries), ("k", keys))
        )
        past.append((keys, values))
        mixed = []
        for head in range(self.heads):
            kv_head = head * self.kv_heads // self.heads
            weights = torch.stack([queries[head] @ key[kv_head] / self.size**0.5 for key, _ in past]).softmax(0)
            mixed.append(sum(weight * value[kv_head] for weight, (_, value) in zip(weights, past, strict=True)))
        return self.linear("self_attn.o_proj", torch.cat(mixed))

    def mlp(self, x: Tensor) -> Tensor:
        gate = self.linear("mlp.gate_proj", x)
        return self.linear("mlp.down_proj", gate * gate.sigmoid() * self.linear("mlp.up_proj", x))

    def finish(self, residual: Tensor, x: Tensor, position: int, past: Past) -> Tensor:
        """The residual plus the attention's output, then plus the MLP's."""
        h = residual + self.attend(x, position, past)
        return h + self.mlp(self.normed("post_attention_layernorm", h))


def unrolled(
    step: Callable[[Tensor, Tensor, int, list[Past]], Tensor], states: Tensor, embedded: Tensor, steps: int
) -> list[list[Tensor]]:
    """[steps][length - steps] outputs after every position of one text, from the true states up to there, then from the outputs.

    step: (state, embedding of the next token, position, pasts of the layers) -> output.
    states, embedded: [length, width].
    """
    outputs: list[list[Tensor]] = [[] for _ in range(steps)]
    for anchor in range(len(states) - steps):
        pasts: list[Past] = [[], [], []]
        for position in range(anchor):
            step(states[position], embedded[position + 1], position, pasts)
        out = states[anchor]
        for more in range(steps):
            out = step(out, embedded[anchor + more + 1], anchor + more, pasts)
            outputs[more].append(out)
    return outputs


def assert_same(actual: Sequence[Tensor], expected: Iterable[Sequence[Sequence[Tensor]]]) -> None:
    """Equal to 1e-5 of the largest number: norms and RoPE are float32 in transformers, whatever the precision of the rest.

    actual: [steps][rows, length, vocab].
    expected: [rows][steps][positions] of [vocab].
    """
    for row, steps in enumerate(expected):
        assert len(steps) == len(actual)
        for step, positions in enumerate(steps):
            logits = torch.stack(list(positions))
            gap = (actual[step][row, : len(positions)] - logits).abs().max()
            assert gap < 1e-5 * logits.abs().max(), f"row {row}, step {step}"
