"""A frozen target whose layers are divided among the processes of a machine (FSDP2), each gathered while it runs.

Embedding, final norm and LM head stay whole on every process, because heads use them outside the target's forward. The module must
not import what is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from headstart.target.loading import keep_digest

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def switch_on_fsdp(accelerator: Accelerator) -> None:
    """Let FSDP2, where the launcher asked for it, work on CPUs too, and compute in mixed precision by autocast.

    accelerate knows FSDP2 on devices only, although torch's works on CPUs. Its own mixed precision casts weights but not the
    features that heads read. Raises ValueError for FSDP1.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        state.fsdp_plugin, state.distributed_type = FullyShardedDataParallelPlugin(), DistributedType.FSDP
    if state.distributed_type != DistributedType.FSDP:
        return
    if not state.is_fsdp2:
        raise ValueError("this is FSDP1, and heads are trained with FSDP2; write fsdp_version: 2 into accelerate's configuration")
    state.fsdp_plugin.mixed_precision_policy = None


def switch_on_deepspeed(accelerator: Accelerator, clip: float | None, precision: str) -> None:
    """Tell DeepSpeed, where the launcher asked for it, what accelerate does elsewhere.

    clip: greatest norm of the gradient; None: not clipped. precision: mixed precision of the run.
    Raises ValueError for mixed precision, and for ZeRO-3: it takes weights away between the parts of a loss, each of which is
    differentiated inside the forward.
    """
    if not uses_deepspeed(accelerator):
        return
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        raise ValueError(
            "heads cannot be trained at DeepSpeed's zero_stage 3; set it to 2, where the target's layers are divided all the same"
        )
    if precision != "no":
        raise ValueError(f"with DeepSpeed heads are trained in float32, not with precision={precision}; leave it out, or use FSDP2")
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else transformers would divide the target by a mechanism that needs an engine of its own
    plugin.deepspeed_config |= {"gradient_clipping": clip or 0.0, "train_micro_batch_size_per_gpu": 1}


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether the processes were started with DeepSpeed."""
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the target's layers are divided among processes: where the launcher asked for FSDP2 or DeepSpeed."""
    return bool(accelerator.state.is_fsdp2 or uses_deepspeed(accelerator))


def load_sharded(load: Callable[[str], PreTrainedModel], accelerator: Accelerator) -> PreTrainedModel:
    """A frozen model of which each process keeps its share.

    The processes of a machine load one after another, so the machine's memory holds one whole model at a time.

    load: device -> the whole model.
    Raises ValueError for a quantised model.
    """
    mesh, model = _mesh_of_machine(accelerator), None
    for turn in range(mesh.size()):
        if turn == mesh.get_local_rank():
            model = load("cpu")
            keep_digest(model)
            shard_layers(model, mesh)
            model.to(accelerator.device)
        accelerator.wait_for_everyone()
    assert model is not None, "every process has its turn"
    return model


def shard_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Divide the layers of a model among the processes of a mesh; its forward gathers them one by one and gives the same bits."""
    from torch.distributed.fsdp import fully_shard

    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("a quantised target cannot be divided among processes; start them without FSDP2 and ZeRO-3")
    model.eval().requires_grad_(False)
    inside = {id(weight) for block in blocks(model) for weight in block.parameters()}
    whole: set[nn.Parameter] = {weight for weight in model.parameters() if id(weight) not in inside}
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the entries of its outermost lists of modules."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def whole(value: Tensor) -> Tensor:
    """A tensor that may be divided among processes, gathered."""
    gathered: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered


def _mesh_of_machine(accelerator: Accelerator) -> DeviceMesh:
    """The processes of this machine: weights are gathered within it, never over the network."""
    from torch.distributed.device_mesh import init_device_mesh

    here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    shape = (accelerator.num_processes // here, here)
    return init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("machine", "process"))["process"]
