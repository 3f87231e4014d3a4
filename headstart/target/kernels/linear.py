"""Linears of a transformers model, packed once into the layout that the compiled kernels, or else oneDNN, multiply fastest.

Handles `nn.Linear`, GPT-2's `Conv1D`, and siblings that read the same input. For inference: an input that requires gradients is
multiplied by the unpacked weight, slowly and correctly. This module must not import attention or KV caches.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from headstart.target.kernels.compiled import DTYPES, CompiledPack
from headstart.target.kernels.library import library
from headstart.target.kernels.onednn import OneDnnPack
from headstart.target.kernels.restore import ReplacedLinear, StandIn, remember

# Names of siblings that models usually call with the same tensor. One call multiplies all of them: a call
# takes 5 to 20 microseconds, whatever its size. A family that gets different tensors is slower and stays correct.
FAMILIES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the largest output; a wrong kernel differs by as much as that


Pack = OneDnnPack | CompiledPack


class PackedLinear(StandIn):
    """The replacement of one linear, multiplied by a pack. It keeps no plain weight; `weight` unpacks it.

    Attributes:
    pack, member: the pack, and which of its members this is.
    replaced: what is needed to put the linear back, from `remember`; None where nothing was replaced.
    is_transposed: whether the replaced linear stores its weight as [in, out], as GPT-2's does.
    """

    def __init__(self, pack: Pack, member: int = 0) -> None:
        super().__init__()
        self.pack = pack
        self.member = member
        self.replaced: ReplacedLinear | None = None
        self.is_transposed = False
        self.out_features = pack.sizes[member]
        self.in_features = pack.num_in

    @property
    def is_gated(self) -> bool:
        """Whether the pack multiplies a gate and a value at once, so that one of them alone is multiplied unpacked, slowly."""
        return isinstance(self.pack, CompiledPack) and self.pack.activation != ""

    @property
    def weight(self) -> Tensor:
        """[out, in], unpacked into a new tensor."""
        return self.pack.dense(self.member)

    @property
    def bias(self) -> Tensor | None:
        """[out] or None."""
        return None if self.pack.bias is None else self.pack.bias.split(self.pack.sizes)[self.member]

    def stands_for(self, linear: nn.Module) -> None:
        """Remember the linear that this one replaces, for `original`."""
        self.replaced, self.is_transposed = remember(linear), isinstance(linear, Conv1D)

    def original(self) -> nn.Module:
        """The replaced linear, with the same bits; this module itself where nothing is remembered."""
        if self.replaced is None:
            return self
        return self.replaced.original(lambda: self.weight.T if self.is_transposed else self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if (x.requires_grad and torch.is_grad_enabled()) or self.is_gated:
            return F.linear(x, self.weight, self.bias)
        return self.pack(x)


class Shared:
    """One multiplication for several linears that are called, one after the other, with the same tensor object.

    The first member that is called multiplies for all; each other member then takes its part, once. A call with another tensor, or
    a second call of the same member, multiplies again: sharing saves time and cannot change results.
    """

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self._input: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def part(self, x: Tensor, member: int) -> Tensor:
        """The output of one member: [..., in] -> [..., out]."""
        if x is not self._input or self._parts[member] is None:
            self._input, self._parts = x, list(self.pack(x).split(self.pack.sizes, dim=-1))
        part, self._parts[member] = self._parts[member], None
        if all(other is None for other in self._parts):
            self._input = None  # all parts are taken: keep no tensor alive
        assert part is not None, "a part that was taken must be computed again"
        return part


class SharedLinear(PackedLinear):
    """A packed linear whose product is shared with the siblings that read the same input."""

    def __init__(self, shared: Shared, member: int) -> None:
        super().__init__(shared.pack, member)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if x.requires_grad and torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        return self.shared.part(x, self.member)


def pack_for(dtype: torch.dtype) -> type[Pack] | None:
    """The best packed linears for a dtype that this processor has, and that multiply correctly; None where there are none."""
    if library() is not None and dtype in DTYPES:
        return CompiledPack
    if dtype not in TOLERANCE:
        return None
    try:
        linear = nn.Linear(64, 32, dtype=dtype)
        packed = PackedLinear(OneDnnPack([linear.weight], [linear.bias]))
        return OneDnnPack if torch.equal(packed.weight, linear.weight) and _agree(linear, packed) else None
    except (AttributeError, NotImplementedError, RuntimeError):
        return None


def prepack(model: nn.Module) -> int:
    """Replace every packable linear of the model, in place; returns how many were replaced. `restore` puts them back.

    The plain weight is freed unless something else holds it, as the embedding holds that of a tied LM head. A linear that is
    subclassed, hooked or not on the CPU, or whose packed replacement gives another output, stays as it is.
    """
    count = 0
    for parent in list(model.modules()):
        for names in list(_families(parent)):
            linears = [getattr(parent, name) for name in names]
            packed = _pack_alike(linears)
            for name, replacement in zip(names, packed, strict=False):
                setattr(parent, name, replacement)
            count += len(packed)
    return count


def is_all_compiled(model: nn.Module) -> bool:
    """Whether the compiled kernels multiply by every matrix of a model but its embeddings."""
    others = (nn.Embedding, PackedLinear)
    return all(
        parameter.ndim < 2 for module in model.modules() if not isinstance(module, others) for parameter in module.parameters(False)
    ) and all(isinstance(module.pack, CompiledPack) for module in model.modules() if isinstance(module, PackedLinear))


def quantise(model: nn.Module) -> int:
    """Round the weights of all linears to int8, in place and for good; returns how many packs were rounded.

    Raises ValueError where the model is not in bf16, or not all its linears are compiled ones.
    """
    packs = {id(module.pack): module.pack for module in model.modules() if isinstance(module, PackedLinear)}
    lib = library()
    if lib is None or lib.level == "avx512":
        reason = "needs the compiled kernels and a processor with AVX-512 and bf16"
    elif not packs or not is_all_compiled(model):
        reason = "is not possible where a model has matrices outside its linears, such as experts, or linears that are not plain"
    elif any(pack.dtype != torch.bfloat16 for pack in packs.values()):
        reason = "is for models in bfloat16; give dtype='bfloat16' too"
    else:
        for pack in packs.values():
            assert isinstance(pack, CompiledPack), "all are compiled"
            pack.quantise()
        return len(packs)
    raise ValueError(f"weights='int8' {reason}")


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all packed weights of a model, each pack counted once."""
    packs = {id(module.pack): module.pack for module in model.modules() if isinstance(module, PackedLinear)}
    return sum(pack.nbytes for pack in packs.values())


def weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] or None of an `nn.Linear` or of GPT-2's transposed `Conv1D`."""
    assert isinstance(linear, nn.Linear | Conv1D), f"{type(linear).__name__} is not a linear"
    return (linear.weight.T if isinstance(linear, Conv1D) else linear.weight), linear.bias


def _families(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    """The names of a module's packable linears, in families that may share an input; the others one by one."""
    linears = {name: child for name, child in parent.named_children() if is_packable(child)}
    for family in FAMILIES:
        if all(name in linears for name in family) and all(_same_input(linears[a], linears[b]) for a, b in pairwise(family)):
            yield family
            for name in family:
                del linears[name]
    yield from ((name,) for name in linears)


def is_packable(module: nn.Module) -> bool:
    """Whether this is a linear that can be packed: not subclassed, not hooked, not quantised, not empty, on the CPU."""
    if type(module) not in (nn.Linear, Conv1D):  # a subclass (LoRA, quantised) computes something else
        return False
    weight = weight_and_bias(module)[0]
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    if type(weight.data) is not Tensor:  # quantised: a tensor subclass
        return False
    return weight.device.type == "cpu" and weight.dtype in TOLERANCE and weight.numel() > 0 and not hooked


def _same_input(one: nn.Module, other: nn.Module) -> bool:
    a, b = weight_and_bias(one)[0], weight_and_bias(other)[0]
    return a.shape[1] == b.shape[1] and a.dtype == b.dtype


def _pack_alike(linears: Sequence[nn.Module]) -> list[PackedLinear]:
    """The replacements of linears that read the same input; an empty list where they cannot be packed or give another output."""
    weights, biases = zip(*map(weight_and_bias, linears), strict=True)
    kind = pack_for(weights[0].dtype)
    if kind is None:
        return []
    pack = kind(weights, biases)
    shared = Shared(pack)
    packed: list[PackedLinear] = [PackedLinear(pack)]
    if len(linears) > 1:
        packed = [SharedLinear(shared, member) for member in range(len(linears))]
    if not all(map(_agree, linears, packed)):
        return []
    for replacement, linear in zip(packed, linears, strict=True):
        replacement.stands_for(linear)
    return packed


def _agree(plain: nn.Module, packed: PackedLinear) -> bool:
    generator = torch.Generator().manual_seed(packed.in_features)
    with torch.inference_mode():
        x = torch.randn(3, packed.in_features, generator=generator).to(packed.pack.dtype)
        expected, actual = plain(x).float(), packed(x).float()
    return bool((expected - actual).abs().max() <= TOLERANCE[x.dtype] * expected.abs().max())
