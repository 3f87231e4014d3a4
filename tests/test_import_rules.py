"""Who may import whom (docs/concepts.md, "The rooms"): reads every import of the package and fails on a breach."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "headstart"
MATHEMATICS = {f"headstart.{room}" for room in ("tree", "chances", "sampling", "verify", "planner", "scheduler")}
SHARED = ("", ".grow", ".heads", ".layered", ".layers", ".plain", ".recurrent")
SHARED_DRAFTER_PARTS = {f"headstart.drafters{part}" for part in SHARED}
JUDGES = {"headstart.engine", "headstart.verify"}
ENGINE, TRAINERS = "headstart.engine", ("headstart.train", "headstart.training")
SURFACES = ("headstart.cli", "headstart.serve", "headstart.bench")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
METHODS = [name.split(".")[2] for name in MODULES if name.startswith("headstart.drafters.") and name not in SHARED_DRAFTER_PARTS]


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Every module that `source` names in an import, at whatever depth; `from a import b` names a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module, is_package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    package = parts[: len(parts) - node.level + is_package]
    return ".".join([*package, *(node.module.split(".") if node.module else [])])


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def breach(importer: str, imported: str) -> str | None:
    """The rule that this import breaks, or None."""
    if importer in MATHEMATICS and any(
        is_in(imported, room) for room in ("transformers", "headstart.drafters", "headstart.target")
    ):
        return "1: the mathematics of a round knows no transformers, no drafter, no target"
    if is_in(importer, "headstart.drafters") and any(
        is_in(imported, f"headstart.{room}") for room in ("engine", "scheduler", "verify", "train", "training")
    ):
        return "2: a drafter proposes; it knows no engine, scheduler, verifier or trainer"
    if importer.startswith("headstart.drafters.") and is_sibling(importer, imported):
        return "2: drafters share grow, heads, layered, layers, plain and recurrent, nothing else"
    if importer in JUDGES and imported.startswith("headstart.drafters.") and imported in MODULES:
        return "3: a new drafter is one file; engine and verify know none by name"
    if ENGINE in (importer, imported) and any(is_in(importer, room) or is_in(imported, room) for room in TRAINERS):
        return "4: engine and train do not import each other"
    if any(is_in(imported, room) and not may_enter(importer, room) for room in SURFACES):
        return "4: nobody imports cli, serve, bench"
    if is_in(imported, "headstart.kernels") and not is_in(importer, "headstart.kernels"):
        return None if importer == "headstart.target" else "5: kernels are chosen in one place, the target"
    return None


def is_sibling(importer: str, imported: str) -> bool:
    """Another drafter's module; a name inside the package, as `from headstart.drafters import Drafter`, is none."""
    if not imported.startswith("headstart.drafters.") or is_in(imported, importer):
        return False
    method = ".".join(imported.split(".")[:3])
    return method in MODULES and method not in SHARED_DRAFTER_PARTS and not is_in(importer, method)


def may_enter(importer: str, room: str) -> bool:
    return is_in(importer, room) or is_in(importer, "headstart.cli") or importer == "headstart.__main__"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_room_may(module):
    path = MODULES[module]
    found = imports(path.read_text(), module, path.name == "__init__.py")
    assert [(imported, rule) for imported in found if (rule := breach(module, imported))] == []


def test_engine_and_verify_contain_no_methods_name():
    # "model" is also an everyday word; the import rule above still covers drafters/model.py
    methods = {method for method in METHODS if method != "model"}
    for room in JUDGES & MODULES.keys():
        assert methods & set(re.findall(r"\w+", MODULES[room].read_text().lower())) == set()


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("headstart.verify", "transformers.cache_utils"),
        ("headstart.planner", "headstart.drafters"),
        ("headstart.scheduler", "headstart.target"),
        ("headstart.drafters.medusa", "headstart.verify"),
        ("headstart.drafters", "headstart.train"),
        ("headstart.engine", "headstart.train"),
        ("headstart.train", "headstart.engine"),
        ("headstart.training.loop", "headstart.engine"),
        ("headstart.engine", "headstart.serve.app"),
        ("headstart.serve", "headstart.cli"),
        ("headstart.attention", "headstart.kernels.graphs"),
    ],
)
def test_each_rule_notices_its_breach(importer, imported):
    assert breach(importer, imported) is not None


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("headstart.drafters.medusa", "headstart.drafters.Drafter"),
        ("headstart.drafters.medusa", "headstart.drafters.grow.grow"),
        ("headstart.cli", "headstart.bench.runner"),
        ("headstart.serve.app", "headstart.serve.metrics"),
        ("headstart.target", "headstart.kernels"),
        ("headstart.engine", "headstart.drafters.Drafter"),
    ],
)
def test_what_is_allowed_passes(importer, imported):
    assert breach(importer, imported) is None


def test_imports_are_found_in_every_form():
    source = "import a.b\nfrom . import layers\nfrom ..tree import Forest\ndef late():\n    from c import d\n"
    assert set(imports(source, "headstart.drafters.medusa")) == {
        "a.b", "c", "c.d", "headstart.drafters", "headstart.drafters.layers", "headstart.tree", "headstart.tree.Forest",
    }  # fmt: skip
    assert "headstart.tree" in set(imports("from .tree import Forest", "headstart", is_package=True))
