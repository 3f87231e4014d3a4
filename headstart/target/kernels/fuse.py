"""Small modules of a Hugging Face model, replaced by fewer operations that give the same numbers.

A gated MLP becomes three packed products, activation and gate inside them: also safer, for torch's own fp32 activations round
otherwise at the odd end of a tensor than inside it, so that a row depends on its neighbours. An RMSNorm becomes one operation.
What a module computes is found by trying, never by its name; one that agrees with no candidate stays as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headstart.target.kernels.linear import TOLERANCE, Pack, PackedLinear, can_pack, is_packable, weight_and_bias
from headstart.target.kernels.restore import StandIn

ACTIVATIONS = (("swish", ""), ("gelu", "tanh"), ("gelu", "none"))  # as oneDNN names them: operation, variant
RMS_NORM_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}  # of a value of size one: a rounding or two


class GatedMLP(StandIn):
    """down(activation(gate(x)) * up(x)) in three calls."""

    def __init__(self, mlp: nn.Module, activation: tuple[str, str]) -> None:
        """mlp: has plain linears gate_proj, up_proj and down_proj."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            PackedLinear(Pack([weight], [bias]))
            for weight, bias in (weight_and_bias(getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj"))
        )
        self.activation = activation
        self._replaced = [mlp]  # a list, for a module that is an attribute would be a child

    def take_its_linears(self) -> None:
        """Pack the linears of the MLP that this one replaces, so that their plain weights can be freed."""
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
        gate = self.gate_proj.pack(x, *self.activation)
        return self.down_proj.pack(self.up_proj.pack.times(x, gate))


class RMSNorm(StandIn):
    """x / rms(x) * weight in one operation."""

    def __init__(self, weight: Tensor, eps: float, norm: nn.Module) -> None:
        """weight: [hidden], the factor itself. norm: what is replaced."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.shape = list(weight.shape)
        self.eps = eps
        self._replaced = [norm]  # a list, for a module that is an attribute would be a child

    def original(self) -> nn.Module:
        """The norm that was replaced."""
        return self._replaced[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]"""
        y: Tensor = torch._fused_rms_norm(x, self.shape, self.weight, self.eps)[0]
        return y


def fuse(model: nn.Module) -> int:
    """Replace gated MLPs and RMS norms where a fused module agrees, in place; returns how many were replaced.

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
    weight, _ = weight_and_bias(module.gate_proj)  # type: ignore[arg-type]
    if not can_pack(weight.dtype):
        return None
    fused = GatedMLP(module, ACTIVATIONS[0])
    for fused.activation in ACTIVATIONS:
        if _agree(module, fused, weight.shape[1], weight.dtype, TOLERANCE[weight.dtype]):
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
    """Whether both give the same within `tolerance`, of the largest value or absolutely, on small, middling and large inputs."""
    generator = torch.Generator().manual_seed(width)
    for scale in (1e-2, 1.0, 30.0):
        x = (scale * torch.randn(1, 3, width, generator=generator)).to(dtype)
        try:
            with torch.inference_mode():
                wanted, found = plain(x).float(), fused(x).float()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        if wanted.shape != found.shape:
            return False
        limit = tolerance * (4.0 if absolute else float(wanted.abs().max()))
        if not float((wanted - found).abs().max()) <= limit:
            return False
    return True
