"""`import`: heads that others have published, brought into the native format."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli.settings import Json, quieten, waiting

if TYPE_CHECKING:
    from headstart.checkpoint.published import Published


_COUNTED = ("heads", "layers", "modules")


def bring(
    source: Annotated[
        str, typer.Argument(help="Folder or file of Medusa or Hydra heads, or of a model with heads inside.", metavar="SOURCE")
    ],
    out: Annotated[str, typer.Option(help="Folder to write the heads to.")],
    target: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the model they draft for.", show_default="the source, if a model is in it"),
    ] = None,
    json: Json = False,
) -> None:
    """Bring heads that others have published into headstart's format.

    Knows Medusa heads of their authors, TGI and vLLM, Medusa heads inside a whole model, Hydra and Hydra++, and the MTP
    modules of DeepSeek-V3, GLM, MiMo, Qwen and Mellum inside a whole model. Nothing in the files is run. What is
    missing, extra or misshaped is named, and nothing is written.

    Example: headstart import ./medusa-vicuna-7b-v1.3 --target lmsys/vicuna-7b-v1.3 --out ./heads
    """
    quieten()
    with waiting(f"reading {source}"):
        found = imported(source, target, out)
    if json:
        print(json_format.dumps(found))
    else:
        _print(found)


def imported(source: str, target: str | None, out: str) -> dict[str, Any]:
    """Convert and save; what was found. Raises ValueError where there is nothing to bring in, or it does not fit."""
    from headstart.checkpoint import facts_of, published_in, save
    from headstart.pretrained import load_model
    from headstart.text import load_tokenizer

    published = published_in(source)
    place = _target(published, source, target)
    model = load_model(place, "auto", "cpu")
    facts = facts_of(model, load_tokenizer(place))
    heads = published.read(facts, model.config)
    training = {"imported_from": Path(source).name, "format": published.layout, "made_for": published.base or "not said"}
    save(out, heads, facts, training)
    return {
        "found": published.layout,
        "method": published.method,
        **{word: published.settings[f"num_{word}"] for word in _COUNTED if f"num_{word}" in published.settings},
        "hidden": published.hidden,
        "vocab": published.vocab or facts.vocab,
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
        for line in value if isinstance(value, list) else [value]:
            table.add_row(
                name.removesuffix("s") if isinstance(value, list) else name, f"{line:,}" if isinstance(line, int) else line
            )
    Console(highlight=False, markup=False).print(table)
