"""Makes drafters and planners from what a user writes: a name, a folder of heads, a hub id.

Third parties register drafters under the entry-point group `headstart.drafters`: a callable that takes the text after the colon of
`--drafter NAME:ARGUMENT` (or an empty string) and the target, and returns a `Drafter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, cast

from headstart.drafters import Drafter
from headstart.drafters.registry import METHODS
from headstart.formats import hub
from headstart.speculation.planner import Auto, CalibratedTree, Planner, parse
from headstart.target.loading import embedded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headstart.drafters.parts.heads import Heads
    from headstart.target.target import Target

EMBEDDED_METHOD = "mtp"  # what "auto" means for the embedded model

Maker = Callable[[str, "Target"], Drafter]


def _lookup(argument: str, target: Target) -> Drafter:
    from headstart.drafters.lookup import Lookup

    if argument:
        raise ValueError(f"drafter lookup takes no argument, but got {argument!r}")
    return Lookup()


def _model(argument: str, target: Target) -> Drafter:
    from headstart.drafters.draft_model import ModelDrafter

    if not argument:
        raise ValueError("drafter model needs the folder or hub id of a smaller model: model:PATH")
    return ModelDrafter.load(argument, target)


_MAKERS: dict[str, Maker] = {"lookup": _lookup, "model": _model}


def heads_in(folder: str | Path, target: Target) -> Heads:
    """The heads in a folder, with what their plan has of them if there is one, on the target's device and in its dtype.

    Raises ValueError where they are damaged or made for another target.
    """
    from headstart.formats import describe_target, load
    from headstart.speculation.heads_plan import load_plan

    heads = load(Path(folder), describe_target(target.model, _tokenizer_of(target)))
    plan = load_plan(Path(folder))
    if plan is not None:
        heads.calibration, heads.costs = plan.calibration, plan.costs
    return heads.to(target.device, target.dtype)


def _tokenizer_of(target: Target) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the target's folder; None for a model that was given as an object or has no tokenizer."""
    from headstart.target.tokenizer_loading import load_tokenizer

    if not Path(target.name).is_dir():
        return None
    try:
        return load_tokenizer(target.name, target.trust_remote_code)
    except ValueError:
        return None


def is_embedded(model: object) -> bool:
    """Whether a model, as `headstart.load` takes it, is the embedded one. A model object is what it was loaded from."""
    source = model if isinstance(model, str | Path | None) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return source is None or Path(source) == embedded("target")


def folder_of(spec: str, model: object) -> Path | None:
    """The folder of the heads that `spec` names for a model; None for a drafter without heads in a folder of their own.

    spec: a folder, an id on the hub, from where the heads are fetched, or, for the embedded model, a method or "auto".
    model: as `headstart.load` takes it.
    """
    if Path(spec).is_dir():
        return Path(spec)
    if spec in METHODS or spec == "auto":
        return _shipped(EMBEDDED_METHOD if spec == "auto" else spec) if is_embedded(model) else None
    return hub.fetched(spec) if hub.is_id(spec) else None


def _shipped(name: str) -> Path | None:
    """The folder of the embedded model's heads of a method; None for a method without such heads."""
    folder = embedded("target").with_name(name)
    return folder if folder.is_dir() else None


def built_in_heads(target: Target, name: str | None = None) -> Heads | None:
    """The heads in the same files as a target's weights; None where there are none.

    name: a method, to get only heads of this method; None: of any.

    Raises ValueError where the heads are incomplete, quantized, or of an unknown kind.
    """
    from headstart.formats import describe_target, inside

    checkpoint = inside(target.name)
    if checkpoint is None or name not in (None, checkpoint.method):
        return None
    return checkpoint.read(describe_target(target.model), target.model.config).to(target.device, target.dtype)


def _heads_of_target(name: str, target: Target) -> Heads:
    """The heads of a method that come with a target. Raises ValueError where there are none."""
    from headstart.formats import modules_lost

    if folder := folder_of(name, target.name):
        return heads_in(folder, target)
    if heads := built_in_heads(target, name):
        return heads
    lost = modules_lost(target.name) if name == "mtp" else None
    who, option = ("the embedded model", "") if is_embedded(target.name) else (target.name, f" --target {target.name}")
    raise ValueError(
        f"{who} comes with no {name} heads, and heads fit one model only; make some for it with `headstart train {name}{option}`, "
        "and name their folder" + (f" ({lost})" if lost else "")
    )


def resolve_planner(
    planner: Planner | CalibratedTree | Auto | None, drafter: str | None, temperature: float, model: object
) -> Planner | Auto | None:
    """The planner with a calibrated tree replaced by the tree measured at the temperature nearest to `temperature`.

    drafter: the `spec` of `make`, or "auto".
    model: as `headstart.load` takes it.

    Raises ValueError for a drafter without measured trees.
    """
    from headstart.speculation.heads_plan import load_plan

    if not isinstance(planner, CalibratedTree):
        return planner
    folder = folder_of(drafter, model) if drafter else None
    plan = load_plan(folder) if folder else None
    if plan is None:
        raise ValueError(
            f"planner tree:{planner.nodes} needs trees that were measured, and drafter {drafter or 'none'!r} has none; measure a "
            "folder of heads with `headstart tune FOLDER --model MODEL`, or name another planner"
        )
    return plan.static_tree(planner.nodes, temperature)


def read_planner(planner: object, drafter: str | Drafter | None, model: object, temperature: float = 0.0) -> Planner | Auto | None:
    """The planner that an argument means; None: the default.

    planner: a planner object, a string as `parse` reads it, or None.
    drafter: the `spec` of `make`, "auto", or a drafter object.
    model: as `headstart.load` takes it.
    temperature: chooses among the trees measured for a `CalibratedTree`.

    Raises ValueError for anything else, for a planner without a drafter, and for a calibrated tree of a drafter without measured
    trees.
    """
    if planner is None:
        return None
    if drafter is None:
        raise ValueError(f"planner is {planner}, but drafter None drafts nothing; leave one of them out")
    if isinstance(planner, str):
        planner = parse(planner)
    if isinstance(planner, CalibratedTree) and not isinstance(drafter, str):
        raise ValueError(
            f"planner tree:{planner.nodes} needs trees that were measured, and a drafter object does not say where its own are; "
            "name the folder of the heads as the drafter, or another planner"
        )
    if not isinstance(planner, CalibratedTree | Auto) and not all(hasattr(planner, name) for name in ("headroom", "plan", "prune")):
        raise ValueError(f"planner is {planner!r}; it must be a planner, a string such as 'chain:5', or None")
    return resolve_planner(cast("Planner | CalibratedTree | Auto", planner), cast("str", drafter), temperature, model)


def split_parts(spec: str) -> list[str]:
    """The parts of `lookup+./heads`; a plus in the name of a method or of a folder that exists separates nothing."""
    words, parts = spec.split("+"), []
    while words:
        ends = range(len(words), 1, -1)
        joined = (end for end in ends if _is_one("+".join(words[:end])))
        end = next(joined, 1)
        parts.append("+".join(words[:end]))
        words = words[end:]
    return parts


def _is_one(spec: str) -> bool:
    return spec in METHODS or Path(spec.removeprefix("model:")).is_dir()


def names() -> Sequence[str]:
    """The names of all drafters, third parties' included, sorted."""
    return sorted({*_MAKERS, *METHODS, *(entry.name for entry in entry_points(group="headstart.drafters"))})


def make(spec: str, target: Target) -> Drafter:
    """The drafter that `spec` names.

    spec: a folder of heads, a method (its heads that come with the target), `NAME` or `NAME:ARGUMENT` of an installed drafter, or
        the `owner/name` of heads on the hub. The first of these that exists counts: a folder hides everything else, and a name
        without a slash is never looked up on the hub. Several with a plus between them are joined into one drafter.

    Raises ValueError for a drafter that is unknown or cannot be loaded.
    """
    if Path(spec).is_dir():
        return heads_in(spec, target)
    if len(parts := split_parts(spec)) > 1:
        if not all(parts):
            raise ValueError(f"drafter {spec!r} has nothing on one side of a plus; join drafters as lookup+./heads")
        from headstart.drafters.fused import Fused

        return Fused([make(part, target) for part in parts])
    if spec in METHODS:
        return _heads_of_target(spec, target)
    name, _, argument = spec.partition(":")
    if name in _MAKERS:
        return _MAKERS[name](argument, target)
    for entry in entry_points(group="headstart.drafters", name=name):
        maker: Maker = entry.load()
        return maker(argument, target)
    if hub.is_id(spec):
        return heads_in(hub.fetched(spec), target)
    if name == "auto":
        raise ValueError(f"drafter {spec!r} is unknown; auto joins drafters by itself; write auto, or auto:NAME,NAME")
    raise ValueError(
        f"drafter {spec!r} is unknown; there are {', '.join(names())}, a folder of heads, heads on the hub as owner/name, and none "
        "for plain decoding"
    )
