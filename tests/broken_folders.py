"""500 broken folders and files, the same in every run: incomplete copies, bad edits, malicious files.

Each case starts from an intact input (a model, an adapter, heads, prompts, settings of a run), breaks one thing in it, and names
the command that reads it. Files with code create an empty file called `MARKER` if the code is run.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from folders import write_model
from heads import heads_for
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from headstart.formats import describe_target, save
from headstart.target.loading import load_model
from headstart.target.target import Target
from headstart.target.tokenizer_loading import load_tokenizer

MARKER = "code-was-run"
DEEP = 100_000  # lists inside one another
METHOD = "medusa"

Random = random.Random


@dataclass(frozen=True)
class Intact:
    """The inputs that the cases start from.

    model, adapter, heads: folders.
    scratch: folder for markers and outputs.
    """

    model: Path
    adapter: Path
    heads: Path
    scratch: Path


@dataclass(frozen=True)
class Case:
    """A broken folder or file.

    what: what is broken, and how.
    arguments: of the command that reads it.
    inputs: folder or file that must not change.
    folder: of a model, for comparison with transformers where the command succeeds, else None.
    """

    what: str
    arguments: tuple[object, ...]
    inputs: Path
    folder: Path | None = None


def intact_inputs(home: Path) -> Intact:
    """A model of two layers with its tokenizer, an adapter and heads for it."""
    model = write_model(home / "model", context=64)
    lora = get_peft_model(load_model(model), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(home / "adapter")
    config = json.loads((home / "adapter" / "adapter_config.json").read_text())
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(model)}))
    target = Target(load_model(model))
    save(home / "heads", heads_for(target, METHOD, num_heads=2), describe_target(target.model, load_tokenizer(model)), {})
    (home / "heads" / "plan.json").write_text(json.dumps(PLAN))
    (home / "scratch").mkdir()
    return Intact(model, home / "adapter", home / "heads", home / "scratch")


PLAN = {
    "format": "headstart-plan",
    "version": 1,
    "calibration": {"temperatures": [0.0], "warmth": [[1.0, 1.0]], "ranks": [[[0.5, 0.25], [0.25, 0.125]]]},
    "trees": {"0": {"2": {"paths": [[0], [0, 0]], "tau": 1.5}}},
}


def cases(start: Intact, home: Path, count: int = 500, seed: int = 0) -> Iterator[Case]:
    """The broken folders, made one at a time under `home`."""
    kinds = [makers for makers, share in KINDS for _ in range(share)]
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        folder = home / f"case-{number}"
        folder.mkdir()
        yield kinds[number % len(kinds)](rng, start, folder)


# -- faults of values, JSON files and any file -------------------------------------------------------------------

VALUES: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: "abc", lambda: "", lambda: -1, lambda: 0, lambda: 7, lambda: 3.7, lambda: 10**30, lambda: -(10**18),
    lambda: float("nan"), lambda: float("inf"), lambda: [], lambda: {}, lambda: [1, 2], lambda: {"a": 1}, lambda: True,
    lambda: [None], lambda: [[]], lambda: "float7", lambda: "x" * 5000, lambda: "\ud800", lambda: _nested(70),
)  # fmt: skip


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def _paths(content: Any, start: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into JSON content, as keys and indices; of long lists the first three entries."""
    paths = [start] if start else []
    if isinstance(content, dict):
        for key in list(content)[:60]:
            paths += _paths(content[key], (*start, key))
    elif isinstance(content, list):
        for index in range(min(3, len(content))):
            paths += _paths(content[index], (*start, index))
    return paths


def _one_value(rng: Random, content: Any) -> tuple[str, str]:
    """What was changed, and the JSON of the content with one value replaced or missing."""
    content = copy.deepcopy(content)
    *parents, last = rng.choice(_paths(content))
    holder = content
    for key in parents:
        holder = holder[key]
    name = ".".join(map(str, (*parents, last)))
    if isinstance(holder, dict) and rng.random() < 0.15:
        del holder[last]
        return f"{name} is missing", json.dumps(content)
    holder[last] = rng.choice(VALUES)()
    return f"{name} is {str(holder[last])[:40].encode('ascii', 'replace').decode()}", json.dumps(content)


def _whole_file(rng: Random, text: bytes) -> tuple[str, bytes]:
    """What was changed, and the changed content of a file."""
    kinds: dict[str, Callable[[], bytes]] = {
        "is cut": lambda: text[: rng.randrange(len(text))],
        "is empty": lambda: b"",
        "is a list": lambda: b"[1, 2]",
        "is null": lambda: b"null",
        "is a text": lambda: b'"abc"',
        "has a byte order mark": lambda: b"\xef\xbb\xbf" + text,
        "is no UTF-8": lambda: text[:9] + b"\xff\xfe" + text[9:],
        "is UTF-16": lambda: text.decode("latin-1").encode("utf-16"),
        "is nested deeply": lambda: b"[" * DEEP + b"]" * DEEP,
        "holds a deep value": lambda: b'{"a": ' * DEEP + b"1" + b"}" * DEEP,
        "holds zeros": lambda: bytes(len(text)),
        "has a number of 5000 digits": lambda: b'{"a": ' + b"9" * 5000 + b"}",
        "has a key twice": lambda: text.rstrip()[:-1] + b', "model_type": 3}',
    }
    name = rng.choice([*kinds])
    return name, kinds[name]()


def _break_json(rng: Random, file: Path) -> str:
    if rng.random() < 0.75:
        what, text = _one_value(rng, json.loads(file.read_text()))
        file.write_text(text)
    else:
        what, content = _whole_file(rng, file.read_bytes())
        file.write_bytes(content)
    return f"{file.name}: {what}"


def _copied(source: Path, folder: Path) -> Path:
    return shutil.copytree(source, folder / source.name)


# -- models -----------------------------------------------------------------------------------------------------------------


def _generate(folder: Path, *more: object) -> tuple[object, ...]:
    return ("generate", "the cat and the sea", "--model", folder, "--max-tokens", 4, "--no-exact", "--json", *more)


def _config(rng: Random, start: Intact, folder: Path) -> Case:
    model = _copied(start.model, folder)
    what = _break_json(rng, model / "config.json")
    command = rng.choice([_generate(model, "--drafter", "lookup"), _generate(model), ("inspect", model, "--json")])
    return Case(what, command, model, model)


def _generation_config(rng: Random, start: Intact, folder: Path) -> Case:
    model = _copied(start.model, folder)
    return Case(_break_json(rng, model / "generation_config.json"), _generate(model), model, model)


def _tokenizer(rng: Random, start: Intact, folder: Path) -> Case:
    model = _copied(start.model, folder)
    what = _break_json(rng, model / rng.choice(["tokenizer.json", "tokenizer_config.json"]))
    return Case(what, _generate(model), model)


TEMPLATES = (
    "{{ 1 // 0 }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ messages[0].nothing.at.all }}",
    "{{ range(10**9) }}",
    "{{ 'a' + 1 }}",
    "{% for m in messages %}",
    "{{ undefined_function() }}",
    "{{ raise_exception('no') }}",
    "",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ messages | tojson(indent='a') }}",
    "\x00\ud7ff",
)


def _template(rng: Random, start: Intact, folder: Path) -> Case:
    model, number = _copied(start.model, folder), rng.randrange(len(TEMPLATES))
    text = TEMPLATES[number].replace("MARKER", str(start.scratch / MARKER))
    for file in model.glob("chat_template*"):
        file.unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": text}))
    return Case(f"chat template {number}", _generate(model), model)


def _foreign_code(rng: Random, start: Intact, folder: Path) -> Case:
    """Python files and pickles that create the marker when they are run."""
    model, marker = _copied(start.model, folder), start.scratch / MARKER
    program = f"open({str(marker)!r}, 'w').close()\nclass A: pass\n"
    (model / "own.py").write_text(program)
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    names = {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.A"}
    kind = rng.choice(["config", "model", "tokenizer", "pickle", "kernel", "adapter"])
    if kind == "config":
        (model / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "own"}))
    elif kind == "model":
        (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.A"}}))
    elif kind == "tokenizer":
        auto_map = {"auto_map": {"AutoTokenizer": ["own.A", "own.A"]}, "tokenizer_class": "A"}
        (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | auto_map))
    elif kind == "pickle":
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(str(marker))))
    elif kind == "kernel":
        (model / "config.json").write_text(json.dumps(config | {"attn_implementation": "nobody/kernel"}))
    else:
        adapter = _copied(start.adapter, folder)
        adapter_config = json.loads((adapter / "adapter_config.json").read_text())
        adapter_config |= {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "own"}
        (adapter / "adapter_config.json").write_text(json.dumps(adapter_config))
        (adapter / "own.py").write_text(program)
        return Case("code by adapter", _generate(adapter), folder)
    return Case(f"code by {kind}", _generate(model), model, model if kind == "model" else None)


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def _break_tensors(rng: Random, file: Path) -> str:
    """Tensors that are missing, malformed or too many, or a file that is cut."""
    if rng.random() < 0.4:
        what, content = _whole_file(rng, file.read_bytes()) if rng.random() < 0.3 else ("is cut", _cut(rng, file.read_bytes()))
        file.write_bytes(content)
        return f"{file.name} {what}"
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    changes: Mapping[str, Callable[[], Any]] = {
        "is missing": lambda: tensors.pop(name),
        "is wider": lambda: tensors.update({name: torch.cat([tensor, tensor], -1).contiguous()}),
        "is flat": lambda: tensors.update({name: tensor.flatten().clone()}),
        "is empty": lambda: tensors.update({name: tensor[:0].clone()}),
        "is nan": lambda: tensors.update({name: torch.full_like(tensor, float("nan"))}),
        "is infinite": lambda: tensors.update({name: torch.full_like(tensor, float("inf"))}),
        "is integers": lambda: tensors.update({name: tensor.to(torch.int32)}),
        "is in float16": lambda: tensors.update({name: tensor.to(torch.float16)}),
        "has another name": lambda: tensors.update({name + ".x": tensors.pop(name)}),
        "is a layer too many": lambda: tensors.update(
            {one.replace("layers.1.", "layers.2."): tensors[one].clone() for one in list(tensors) if "layers.1." in one}
        ),
        "is alone": lambda: [tensors.pop(one) for one in list(tensors) if one != name],
    }
    what = rng.choice([*changes])
    changes[what]()
    save_file(tensors, file, metadata=metadata)
    return f"{file.name}: {name} {what}"


def _cut(rng: Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def _weights(rng: Random, start: Intact, folder: Path) -> Case:
    model = _copied(start.model, folder)
    return Case(_break_tensors(rng, model / "model.safetensors"), _generate(model), model, model)


def _adapter(rng: Random, start: Intact, folder: Path) -> Case:
    adapter = _copied(start.adapter, folder)
    if rng.random() < 0.3:
        what = _break_tensors(rng, adapter / "adapter_model.safetensors")
    elif rng.random() < 0.1:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(adapter)}))
        what = "an adapter of itself"
    else:
        what = _break_json(rng, adapter / "adapter_config.json")
    return Case(what, _generate(adapter), adapter)


# -- heads ------------------------------------------------------------------------------------------------------------------


def _heads(rng: Random, start: Intact, folder: Path) -> Case:
    heads = _copied(start.heads, folder)
    file = heads / rng.choice(["config.json", "model.safetensors", "plan.json"])
    what = _break_tensors(rng, file) if file.suffix == ".safetensors" else _break_json(rng, file)
    use = _generate(start.model, "--drafter", heads)
    commands: Sequence[tuple[object, ...]] = [
        use,
        ("inspect", heads, "--json"),
        (*use, "--planner", "tree:2"),
        ("import", heads, "--target", start.model, "--out", start.scratch / folder.name),
    ]
    return Case(what, rng.choice(commands), heads)


# -- files ------------------------------------------------------------------------------------------------------------------

PROMPTS: tuple[dict[str, Any], ...] = (
    {"prompt": "the cat", "reference": "and the sea"},
    {"instruction": "say", "input": "cat", "output": "sea"},
    {"instruction": "say", "instances": [{"input": "cat"}]},
    {"turns": ["the cat", "the sea"]},
)
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the sea"}]}
TEXTS: tuple[dict[str, Any], ...] = (
    CHAT,
    {"text": "once upon a time there was a cat"},
    {"tokens": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1], "settings": {"temperature": 0.7, "seed": 3}, "target": {"name": "a"}},
)


def _jsonl(rng: Random, start: Intact, folder: Path) -> Case:
    command, index = rng.choice(["distill", "bench", "train"]), rng.randrange(3)
    lines = [json.dumps(rng.choice({"distill": (*PROMPTS, CHAT), "bench": PROMPTS, "train": TEXTS}[command])) for _ in range(3)]
    if rng.random() < 0.75:
        what, lines[index] = _one_value(rng, json.loads(lines[index]))
        content = "\n".join(lines).encode()
    else:
        what, content = _whole_file(rng, "\n".join(lines).encode())
    file = folder / rng.choice(["data.jsonl"] * 8 + ["data.jsonl.gz", "data.txt"])
    file.write_bytes(content)
    out = start.scratch / folder.name
    quick = ("--max-tokens", 2, "--limit", 2)
    learn = ("--data", file, "--steps", 1, "--out", out, "--held-out", 0, "--set", "num_heads=1")
    arguments: Mapping[str, tuple[object, ...]] = {
        "distill": ("distill", file, "--model", start.model, "--out", out, *quick),
        "bench": ("bench", "--prompts", file, "--model", start.model, "--repeat", 1, "--run", "lookup", *quick),
        "train": ("train", METHOD, "--target", start.model, *learn),
    }
    return Case(f"{file.name}: {what}", arguments[command], file)


def _run_config(rng: Random, start: Intact, folder: Path) -> Case:
    (folder / "data.jsonl").write_text('{"text": "the cat and the sea"}\n' * 3)
    settings: dict[str, Any] = {
        "method": METHOD,
        "settings": {"num_heads": 1},
        "target": str(start.model),
        "data": [str(folder / "data.jsonl")],
        "out": str(start.scratch / folder.name),
        "steps": 1,
        "rows": 2,
        "length": 16,
        "held_out": 0,
        "loss": {"soft": 1},
        "betas": [0.9, 0.99],
        "joint": None,
        "seed": 0,
    }
    file = folder / "run.yaml"
    if rng.random() < 0.75:
        what, text = _one_value(rng, settings)
        content = text.encode()
    elif rng.random() < 0.3:
        what, content = "wants to run", f"a: !!python/object/apply:os.system ['touch {start.scratch / MARKER}']\n".encode()
    else:
        what, content = _whole_file(rng, json.dumps(settings).encode())
    file.write_bytes(content)
    return Case(f"run.yaml: {what}", ("train", "--config", file), folder)


Maker = Callable[[Random, Intact, Path], Case]
KINDS: Sequence[tuple[Maker, int]] = (
    (_config, 12), (_generation_config, 4), (_tokenizer, 7), (_template, 3), (_foreign_code, 2), (_weights, 6), (_adapter, 4),
    (_heads, 6), (_jsonl, 4), (_run_config, 2),
)  # fmt: skip
