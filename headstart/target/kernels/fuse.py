"""Fused replacements for small modules of a transformers model: gated MLPs and RMS norms, on the CPU.

A gated MLP becomes three packed products that include activation and gate. This also removes a dependence between rows: torch's
fp32 activations round differently at the end of a tensor than inside it. An RMSNorm becomes one operation. Outputs are compared
before a module is replaced, whatever its class; a module that agrees with no candidate stays as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headstart.target.kernels.compiled import DTYPES, CompiledPack, compiled_mlp, compiled_norm
from headstart.target.kernels.library import library
from headstart.target.kernels.linear import TOLERANCE, Pack, PackedLinear, is_packable, pack_for, weight_and_bias
from headstart.target.kernels.onednn import OneDnnPack
from headstart.target.kernels.restore import StandIn

LINEARS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = (("swish", ""), ("gelu", "tanh"), ("gelu", "none"))  # as oneDNN names them: operation, variant
COMPILED = dict(zip(ACTIVATIONS, ("swish", "gelu_tanh", "gelu"), strict=True))  # as the compiled kernels name them
RMS_NORM_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}  # of a value of size one: a rounding or two


class GatedMLP(StandIn):
    """A gated MLP in one or three operations: down(activation(gate(x)) * up(x))."""

    def __init__(self, mlp: nn.Module, activation: tuple[str, str]) -> None:
        """mlp: the module to replace, with packable linears gate_proj, up_proj and down_proj.

        activation: one of `ACTIVATIONS`.
        """
        super().__init__()
        gate, up, down = (weight_and_bias(getattr(mlp, name)) for name in LINEARS)
        if library() is not None:
            both: Pack = CompiledPack([gate[0], up[0]], [gate[1], up[1]], COMPILED[activation])
            self.gate_proj, self.up_proj = PackedLinear(both, 0), PackedLinear(both, 1)
            self.down_proj = PackedLinear(CompiledPack([down[0]], [down[1]]))
        else:
            self.gate_proj, self.up_proj, self.down_proj = (
                PackedLinear(OneDnnPack([weight], [bias])) for weight, bias in (gate, up, down)
            )
        self.activation = activation
        self._replaced = [mlp]  # in a list, because a module that is an attribute becomes a child

    def use(self, activation: tuple[str, str]) -> None:
        """Choose another activation, one of `ACTIVATIONS`."""
        self.activation = activation
        if isinstance(self.gate_proj.pack, CompiledPack):
            self.gate_proj.pack.use(COMPILED[activation])

    def take_its_linears(self) -> None:
        """Replace the linears of the replaced MLP by the packed ones, so that their plain weights can be freed."""
        (mlp,) = self._replaced
        for name, packed in self.named_children():
            assert isinstance(packed, PackedLinear)
            packed.stands_for(getattr(mlp, name))
            setattr(mlp, name, packed)

    def original(self) -> nn.Module:
        """The MLP that was replaced; its linears are packed ones, which have originals of their own."""
        return self._replaced[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]"""
        gate, up, down = self.gate_proj.pack, self.up_proj.pack, self.down_proj.pack
        if isinstance(gate, OneDnnPack):
            assert isinstance(up, OneDnnPack)
            return down(up.times(x, gate(x, *self.activation)))
        assert isinstance(down, CompiledPack)
        return compiled_mlp(gate, down, x)


class RMSNorm(StandIn):
    """An RMS norm in one operation: x / rms(x) * weight."""

    def __init__(self, weight: Tensor, eps: float, norm: nn.Module) -> None:
        """weight: [hidden] the factor itself; Gemma stores it less one. eps: as in the norm. norm: the module to replace."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.shape = list(weight.shape)
        self._compiled = self.weight.float() if library() is not None and weight.dtype in DTYPES else None
        self.eps = eps
        self._replaced = [norm]  # in a list, because a module that is an attribute becomes a child

    def original(self) -> nn.Module:
        """The norm that was replaced."""
        return self._replaced[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]"""
        if self._compiled is not None and x.dtype is self.weight.dtype and not (x.requires_grad and torch.is_grad_enabled()):
            return compiled_norm(x, self._compiled, self.eps)
        y: Tensor = torch._fused_rms_norm(x, self.shape, self.weight, self.eps)[0]
        return y


def fuse(model: nn.Module) -> int:
    """Replace gated MLPs and RMS norms by fused modules with the same output, in place; returns how many were replaced.

    `restore` puts them back.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _fused_mlp(child) or _fused_norm(child)
            if fused is not None:
                setattr(parent, name, fused)
                count += 1
    return count


def _fused_mlp(module: nn.Module) -> GatedMLP | None:
    names = {name for name, _ in module.named_children()}
    if names != {"gate_proj", "up_proj", "down_proj", "act_fn"} or not all(
        is_packable(getattr(module, name)) for name in names - {"act_fn"}
    ):
        return None
    gate, up, down = (weight_and_bias(getattr(module, name))[0] for name in LINEARS)
    is_plain = gate.shape == up.shape == down.shape[::-1] and gate.dtype == up.dtype == down.dtype
    if not is_plain or pack_for(gate.dtype) is None:
        return None
    fused = GatedMLP(module, ACTIVATIONS[0])
    for activation in ACTIVATIONS:
        fused.use(activation)
        if _agree(module, fused, gate.shape[1], gate.dtype, TOLERANCE[gate.dtype]):
            fused.take_its_linears()
            return fused
    return None


def _fused_norm(module: nn.Module) -> RMSNorm | None:
    parameters = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if set(parameters) != {"weight"} or not isinstance(eps, float) or isinstance(module, nn.LayerNorm | RMSNorm):
        return None
    weight = parameters["weight"]
    if weight.ndim != 1 or weight.device.type != "cpu" or weight.dtype not in RMS_NORM_TOLERANCE or list(module.buffers()):
        return None
    for factor in (weight, 1 + weight):  # Llama and Gemma
        fused = RMSNorm(factor, eps, module)
        tolerance = RMS_NORM_TOLERANCE[weight.dtype] * float(factor.detach().abs().max())
        if _agree(module, fused, weight.shape[0], weight.dtype, tolerance, absolute=True):
            return fused
    return None


def _agree(
    plain: Callable[[Tensor], Tensor],
    fused: Callable[[Tensor], Tensor],
    width: int,
    dtype: torch.dtype,
    tolerance: float,
    absolute: bool = False,
) -> bool:
    """Whether both give the same output for small, medium and large random inputs.

    tolerance: largest difference allowed, relative to the largest value, or 4 times as much absolutely if `absolute`.
    """
    generator = torch.Generator().manual_seed(width)
    for scale in (1e-2, 1.0, 30.0):
        x = (scale * torch.randn(1, 3, width, generator=generator)).to(dtype)
        try:
            with torch.inference_mode():
                expected, actual = plain(x).float(), fused(x).float()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        if expected.shape != actual.shape:
            return False
        limit = tolerance * (4.0 if absolute else float(expected.abs().max()))
        if not float((expected - actual).abs().max()) <= limit:  # written so that nan fails
            return False
    return True
