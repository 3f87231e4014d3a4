"""Who may import whom (docs/concepts.md, "The folders"): reads every import of the package and fails on a breach."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "headstart"
# A folder imports folders that stand before it, never one behind it.
FOLDERS = ("text", "speculation", "target", "drafters", "formats", "engine", "distill", "training", "bench", "serve", "cli")
PARTS = "headstart.drafters.parts"
NO_METHOD = {"headstart.drafters", "headstart.drafters.registry"}
JUDGES = {"headstart.engine.engine", "headstart.engine.scheduler", "headstart.speculation.rules", "headstart.speculation.verify"}
SURFACES = ("cli", "serve", "bench")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
METHODS = {
    name.rpartition(".")[2]
    for name in MODULES
    if name.startswith("headstart.drafters.") and not name.startswith(PARTS) and name not in NO_METHOD
}


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


def folder(module: str) -> str | None:
    """The folder of the package that a module is in, None for the package itself and for other packages."""
    first, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    return name if first == "headstart" and name in FOLDERS else None


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def breach(importer: str, imported: str) -> str | None:
    """The rule that this import breaks, or None."""
    own, other = folder(importer), folder(imported)
    if importer == "headstart.__main__" or own is None:
        return None
    if own == "speculation" and is_in(imported, "transformers"):
        return "1: the mathematics of a round knows no transformers"
    if other in SURFACES and other != own and own != "cli":
        return "4: nobody imports cli, serve, bench"
    if other is not None and FOLDERS.index(other) > FOLDERS.index(own):
        return f"{own} stands before {other} and does not import it"
    if "training" in (own, other) and {"engine", "distill"} & {own, other}:
        return "4: engine and training do not import each other"
    if own == "drafters" and is_sibling(importer, imported):
        return "2: drafters share what is in parts, nothing else"
    if importer in JUDGES and imported in MODULES and other == "drafters" and imported != "headstart.drafters":
        return "3: a new drafter is one file; engine and verify know none by name"
    if is_in(imported, "headstart.target.kernels") and own != "target":
        return "5: kernels are chosen in one place, the target"
    return None


def is_sibling(importer: str, imported: str) -> bool:
    """Another method's module; `headstart.drafters` itself, the protocol, is none."""
    if not imported.startswith("headstart.drafters.") or imported not in MODULES or is_in(imported, PARTS) or imported in NO_METHOD:
        return False
    return not is_in(importer, imported) and importer not in NO_METHOD


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_folder_may(module):
    path = MODULES[module]
    actual = imports(path.read_text(), module, path.name == "__init__.py")
    assert [(imported, rule) for imported in actual if (rule := breach(module, imported))] == []


def test_every_folder_has_its_place():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert folders <= set(FOLDERS)


def test_engine_and_verify_contain_no_methods_name():
    for module in JUDGES & MODULES.keys():
        assert METHODS & set(re.findall(r"\w+", MODULES[module].read_text().lower())) == set()


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("headstart.speculation.verify", "transformers.cache_utils"),
        ("headstart.speculation.planner", "headstart.drafters"),
        ("headstart.speculation.tree", "headstart.target.target"),
        ("headstart.text.tokenizer", "headstart.target.loading"),
        ("headstart.target.target", "headstart.drafters"),
        ("headstart.drafters.medusa", "headstart.engine.engine"),
        ("headstart.drafters.medusa", "headstart.drafters.hydra"),
        ("headstart.drafters", "headstart.training.train"),
        ("headstart.engine.engine", "headstart.drafters.lookup"),
        ("headstart.engine.engine", "headstart.training.train"),
        ("headstart.training.train", "headstart.engine.engine"),
        ("headstart.training.loop", "headstart.engine.llm"),
        ("headstart.engine.engine", "headstart.serve.app"),
        ("headstart.serve", "headstart.cli"),
        ("headstart.distill.distill", "headstart.bench.runner"),
        ("headstart.drafters.parts.heads", "headstart.target.kernels.linear"),
    ],
)
def test_each_rule_notices_its_breach(importer, imported):
    assert breach(importer, imported) is not None


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("headstart.drafters.medusa", "headstart.drafters.Drafter"),
        ("headstart.drafters.medusa", "headstart.drafters.parts.grow"),
        ("headstart.cli.bench", "headstart.bench.runner"),
        ("headstart.serve.app", "headstart.serve.metrics"),
        ("headstart.target.target", "headstart.target.kernels"),
        ("headstart.engine.engine", "headstart.drafters.Drafter"),
        ("headstart.bench.runner", "headstart.engine.engine"),
    ],
)
def test_what_is_allowed_passes(importer, imported):
    assert breach(importer, imported) is None


def test_imports_are_found_in_every_form():
    source = "import a.b\nfrom . import parts\nfrom ..speculation.tree import Forest\ndef late():\n    from c import d\n"
    assert set(imports(source, "headstart.drafters.medusa")) == {
        "a.b", "c", "c.d", "headstart.drafters", "headstart.drafters.parts", "headstart.speculation.tree",
        "headstart.speculation.tree.Forest",
    }  # fmt: skip
    assert "headstart.tree" in set(imports("from .tree import Forest", "headstart", is_package=True))
