"""`import`: heads that others have published, brought into the native format."""

import json as json_format
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.options import Json, Trust, quieten, waiting

if TYPE_CHECKING:
    from headstart.formats.published.base import Published


_SAID = {"heads": "num_heads", "layers": "num_layers", "modules": "num_modules", "taps": "taps", "draft_vocab": "draft_vocab"}


def bring(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder, file or hub id of Medusa, Hydra or EAGLE heads, or of a model with heads inside.", metavar="SOURCE"
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder to write the heads to.")],
    target: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the model they draft for.", show_default="the source, if a model is in it"),
    ] = None,
    taps: Annotated[
        str | None,
        typer.Option(
            help="Layers of the target whose outputs EAGLE-3 heads read, from 0, as 1,15,28.",
            show_default="as their config.json says",
        ),
    ] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Bring heads that others have published into headstart's format.

    Knows Medusa heads of their authors, TGI and vLLM, Medusa heads inside a whole model, Hydra and Hydra++, EAGLE and EAGLE-2,
    EAGLE-3 of its authors, SpecForge and speculators, and the MTP modules of DeepSeek-V3, GLM, MiMo, Qwen and Mellum inside a
    whole model. Nothing in the files is run. What is missing, extra or misshaped is named, and nothing is written.

    Example: headstart import ./medusa-vicuna-7b-v1.3 --target lmsys/vicuna-7b-v1.3 --out ./heads
    """
    quieten()
    with waiting(f"reading {source}"):
        found = imported(source, target, out, _layers(taps), trust_remote_code)
    if json:
        print(json_format.dumps(found))
    else:
        _print(found)


def _layers(taps: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in taps.split(",")) if taps is not None else ()
    except ValueError:
        raise ValueError(f"--taps is {taps!r}; write the numbers of layers, as 1,15,28") from None


def imported(
    source: str, target: str | None, out: str, taps: Sequence[int] = (), trust_remote_code: bool = False
) -> dict[str, Any]:
    """Convert and save; what was found. taps: layers of the target that a person names, see `Published.suited`. Raises ValueError
    where there is nothing to bring in, or it does not fit."""
    from headstart.formats import describe_target, hub, published_in, save
    from headstart.target.embed_head import EmbedHead
    from headstart.target.loading import load_model
    from headstart.target.tokenizer_loading import load_tokenizer

    is_on_hub = hub.is_id(source)
    published = published_in(hub.fetched_of_others(source) if is_on_hub else source)
    place = _target(published, source, target)
    model = load_model(place, "auto", "cpu", trust_remote_code)
    target_info = describe_target(model, load_tokenizer(place, trust_remote_code))
    published = published.suited(target_info, partial(EmbedHead, model), taps)
    heads = published.read(target_info, model.config)
    training = {
        "imported_from": source if is_on_hub else Path(source).name,
        "format": published.layout,
        "made_for": published.base or "not said",
    }
    save(out, heads, target_info, training)
    return {
        "found": published.layout,
        "method": published.method,
        **{word: published.settings[name] for word, name in _SAID.items() if published.settings.get(name) is not None},
        "hidden": published.hidden,
        "vocab": published.vocab or target_info.vocab,
        "parameters": published.parameters,
        "target": place,
        "out": out,
        "notes": [*published.notes, *_doubts(published, source, place)],
        "use": f"headstart generate --model {place} --drafter {out}",
    }


def _target(published: "Published", source: str, target: str | None) -> str:
    if target is not None:
        return target
    if published.has_trunk:
        return source
    known = f", such as --target {published.base}" if published.base else ""
    raise ValueError(f"the heads in {source} draft for a model that is not with them; name it with --target{known}")


def _doubts(published: "Published", source: str, place: str) -> list[str]:
    """Why few drafts may be accepted; the text is right in any case."""
    if published.has_trunk:
        same = Path(source).resolve() == Path(place).resolve()
        trained = f"these heads were trained together with the model in {source}, which is their target"
        return [trained if same else f"{trained}; on {place} they may guess worse"]
    if published.base and Path(published.base).name != Path(place).name:
        return [f"they name {published.base} as their model; whether {place} is the same, `headstart inspect --probe` measures"]
    return []


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in found.items():
        is_several = isinstance(value, list | tuple)
        for line in value if is_several else [value]:
            word = name.removesuffix("s") if is_several else name.replace("_", " ")
            table.add_row(word, f"{line:,}" if isinstance(line, int) else line)
    Console(highlight=False, markup=False).print(table)
