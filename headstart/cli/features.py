"""`features`: a target's hidden states, computed once for training heads."""

import json as json_format
from pathlib import Path
from typing import Annotated, Literal

import typer

from headstart.cli import completion as complete
from headstart.cli.options import Json, Trust, quieten


def features(
    *,
    data: Annotated[
        list[Path],
        typer.Argument(help="Texts as for train: JSONL (distilled, messages or text) or plain text.", show_default=False),
    ],
    target: Annotated[
        str | None, typer.Option(help="Folder or hub id of the model.", show_default="embedded", autocompletion=complete.folders)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the features; an unfinished one is continued.", show_default=False)],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method that shall be trained on them; its layers are stored. May be repeated.",
            show_default="the last layer",
            autocompletion=complete.methods,
        ),
    ] = None,
    taps: Annotated[
        list[int] | None, typer.Option(help="Further layer to store, counted from 0; may be repeated.", show_default="none")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="File of held-out texts, if train will name one.", show_default="none")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Maximum tokens of a text.", show_default="512, or what fits")] = None,
    any_target: Annotated[bool, typer.Option("--any-target", help="Also answers that other models gave.")] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"], typer.Option(help="Data type of the target and the features.")
    ] = "auto",
    device: Annotated[Literal["auto", "cpu"], typer.Option(help="Device; auto: accelerate chooses.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's")] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Write a target's hidden states for training heads.

    Runs the target once over the texts. `train --features FOLDER` then loads only its embedding and LM head, so the target need not
    fit beside its trainer. An interrupted run continues where it stopped: run the same command again.

    Example: headstart features answers.jsonl --target ./talk13M --method eagle3 --out ./features
    """
    from headstart.training.config_file import validate
    from headstart.training.run_config import FeaturesConfig
    from headstart.training.write_features import write_features

    quieten()
    keys = {
        "data": data, "held_out": held_out, "out": out, "target": target or _embedded(), "methods": method or (),
        "taps": taps or (), "length": length, "any_target": any_target, "dtype": dtype, "device": device, "threads": threads,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    store = write_features(validate(FeaturesConfig, keys, "features"))
    if json:
        print(json_format.dumps({"out": str(out), "bytes": store.manifest.num_bytes, **store.manifest.model_dump(mode="json")}))


def _embedded() -> str:
    from headstart.target.loading import embedded

    return str(embedded("target"))
