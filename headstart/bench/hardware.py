"""Forecasts for machines that one does not have, from their datasheets: bytes per second, FLOP per second, and overheads.

A forecast is what the figures allow at most: no program reaches all of them. Wherever one is printed it is called a forecast.

The figures of the presets, and where they are from:
- A100 80GB SXM: NVIDIA A100 Tensor Core GPU datasheet: 2,039 GB/s; 19.5 TFLOPS FP32, 312 BF16 and FP16, 624 TOPS INT8.
- L40: NVIDIA L40 datasheet: 864 GB/s; 90.5 TFLOPS FP32, 181.05 BF16 and FP16, 362 TOPS INT8.
- H100 SXM: NVIDIA H100 Tensor Core GPU datasheet: 3.35 TB/s; 67 TFLOPS FP32, 1,979 BF16 and FP16 and 3,958 TOPS INT8 with
  sparsity, half of that without.
- H200: NVIDIA H200 Tensor Core GPU datasheet: 4.8 TB/s, the rest as the H100.
- overheads of these: NVIDIA Technical Blog, "Getting Started with CUDA Graphs" (2019): a kernel of 2.9 us takes 3.4 us in a graph,
  and a launch that the host waits for takes 6 us longer than one that it does not wait for.
- desktop CPU: AMD Ryzen 9 9950X product page: two channels of DDR5-5600 (of 8 bytes: 89.6 GB/s), 16 cores of 4.3 GHz base clock.
  FLOP/s follow from Zen 5's two 512-bit units per core, 64 FLOP per cycle in FP32; VDPBF16PS does twice as many, VPDPBUSD four
  times. 5 us per operation is an assumption.
- Groq LPU: TechPowerUp, "Groq LPU AI Inference Chip is Rivaling Major Players" (2024): 80 TB/s, 188 TFLOPS FP16 (BF16 is taken to
  be the same), 750 TOPS INT8, 230 MB per chip, Llama 2 7B at 750 tokens/s. The chips of a row work one after the other, so that a
  pass has one chip's bandwidth. 3.6 us per operation makes the forecast that speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headstart.bench.model_shape import BYTES, DraftShape, ModelShape
from headstart.formats.description import first_error
from headstart.speculation.cost import CostModel, DraftCost
from headstart.text.jsonl import read_object

OPERATIONS = (
    10  # kernels per layer: two norms, queries with keys and values, angles, attention (2), output, gate and up, product, down
)
LM_HEAD_OPERATIONS = 4  # final norm, LM head, the largest logits, their tokens
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)  # nodes of a forecast

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Hardware(BaseModel):
    """A machine, by its datasheet.

    name: for people.
    bytes_per_second: of its memory.
    flops_per_second: by dtype (`float32`, `bfloat16`, ...), without sparsity; a multiplication and an addition are two.
    memory_bytes: that weights may take; None: not limited.
    launch_seconds: overhead of each forward and each level of drafting.
    kernel_seconds: overhead of each operation within them.
    source: where the figures are from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    bytes_per_second: Positive
    flops_per_second: Mapping[str, Positive]
    memory_bytes: Positive | None = None
    launch_seconds: Seconds = 0.0
    kernel_seconds: Seconds = 0.0
    source: str

    def forward_seconds(self, shape: ModelShape, nodes: int, rows: int = 1, context: int = 0) -> float:
        """Forecast of a target forward.

        nodes: tokens that are scored, over all rows.
        rows: texts that they belong to, each as many.
        context: tokens in the KV cache, over all rows; each row reads its own once.
        Raises ValueError for a dtype that the machine has no figure for, and for a model larger than its memory.
        """
        self._check(shape)
        moved = (shape.weights_read(nodes) + context * shape.cache_values) * BYTES[shape.dtype]
        flops = nodes * (2 * shape.weights_used + 4 * shape.attention_values * context / rows)
        return self._seconds(moved, flops, shape.dtype, shape.layers * OPERATIONS + LM_HEAD_OPERATIONS)

    def level_seconds(self, shape: DraftShape, nodes: int) -> float:
        """Forecast of one level of drafting. nodes: that are expanded, over all rows."""
        moved, flops = shape.parameters * BYTES[shape.dtype], 2 * nodes * shape.parameters
        return self._seconds(moved, flops, shape.dtype, shape.layers * OPERATIONS + LM_HEAD_OPERATIONS)

    def _seconds(self, moved: float, flops: float, dtype: str, operations: int) -> float:
        busy = max(moved / self.bytes_per_second, flops / self.flops_per_second[dtype])
        return busy + self.launch_seconds + operations * self.kernel_seconds

    def _check(self, shape: ModelShape) -> None:
        if shape.dtype not in self.flops_per_second:
            figures = ", ".join(self.flops_per_second)
            raise ValueError(f"dtype is {shape.dtype}; {self.name} has figures for {figures}, so choose one of these with --dtype")
        if self.memory_bytes is not None and shape.bytes > self.memory_bytes:
            raise ValueError(
                f"the model's weights take {shape.bytes / 1e9:.1f} GB, and {self.name} has {self.memory_bytes / 1e9:.1f} GB; "
                "a forecast is for one machine that holds the model"
            )


def forecast(hardware: Hardware, shape: ModelShape, draft: DraftShape | None, sizes: Sequence[int] = SIZES) -> CostModel:
    """The cost of rounds that a machine's figures allow. Raises as `forward_seconds`.

    draft: a level of the drafter; None: without drafting.
    sizes: nodes, ascending.
    """
    seconds = tuple(hardware.forward_seconds(shape, nodes) for nodes in sizes)
    drafting = None
    if draft is not None:
        levels = tuple(hardware.level_seconds(draft, nodes) for nodes in sizes)
        drafting = DraftCost(first=levels[0], widths=tuple(sizes), seconds=levels)
    context_seconds = shape.cache_values * BYTES[shape.dtype] / hardware.bytes_per_second
    return CostModel(tuple(sizes), seconds, context_seconds=context_seconds, draft=drafting)


def read_hardware(spec: str) -> Hardware:
    """A preset, or the machine that a JSON file describes: the fields of `Hardware`, and no others.

    Raises ValueError for a name that is no preset and no file, and for content that is no machine.
    """
    if spec in PRESETS:
        return PRESETS[spec]
    path = Path(spec)
    if not path.is_file():
        raise ValueError(f"hardware {spec!r} is neither a JSON file nor a preset ({', '.join(PRESETS)})")
    try:
        return Hardware.model_validate(read_object(path))
    except ValidationError as error:
        raise ValueError(f"{first_error(error, path)}; the keys are {', '.join(Hardware.model_fields)}") from None


_NVIDIA = {"launch_seconds": 6e-6, "kernel_seconds": 0.5e-6}
_HOPPER = {"float32": 67e12, "bfloat16": 989.5e12, "float16": 989.5e12, "int8": 1979e12}

PRESETS = {
    "a100": Hardware(
        name="NVIDIA A100 80GB SXM",
        bytes_per_second=2.039e12,
        flops_per_second={"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12, "int8": 624e12},
        memory_bytes=80e9,
        source="NVIDIA A100 Tensor Core GPU datasheet",
        **_NVIDIA,
    ),
    "l40": Hardware(
        name="NVIDIA L40",
        bytes_per_second=864e9,
        flops_per_second={"float32": 90.5e12, "bfloat16": 181.05e12, "float16": 181.05e12, "int8": 362e12},
        memory_bytes=48e9,
        source="NVIDIA L40 datasheet",
        **_NVIDIA,
    ),
    "h100": Hardware(
        name="NVIDIA H100 SXM",
        bytes_per_second=3.35e12,
        flops_per_second=_HOPPER,
        memory_bytes=80e9,
        source="NVIDIA H100 Tensor Core GPU datasheet",
        **_NVIDIA,
    ),
    "h200": Hardware(
        name="NVIDIA H200",
        bytes_per_second=4.8e12,
        flops_per_second=_HOPPER,
        memory_bytes=141e9,
        source="NVIDIA H200 Tensor Core GPU datasheet",
        **_NVIDIA,
    ),
    "desktop": Hardware(
        name="desktop CPU (AMD Ryzen 9 9950X)",
        bytes_per_second=89.6e9,
        flops_per_second={"float32": 4.4e12, "bfloat16": 8.8e12, "int8": 17.6e12},
        kernel_seconds=5e-6,
        source="AMD Ryzen 9 9950X product page; Zen 5: two 512-bit units per core; overhead assumed",
    ),
    "lpu": Hardware(
        name="Groq LPU, 576 chips",
        bytes_per_second=80e12,
        flops_per_second={"bfloat16": 188e12, "float16": 188e12, "int8": 750e12},
        memory_bytes=576 * 230e6,
        kernel_seconds=3.6e-6,
        source="TechPowerUp, Groq LPU AI Inference Chip is Rivaling Major Players, 2024",
    ),
}
