"""The pages name files, classes and functions that exist, and their links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
PACKAGE = HOME / "headstart"
PAGES = [HOME / "README.md", HOME / "CONTRIBUTING.md", *sorted((HOME / "docs").glob("*.md"))]
CONCEPTS = HOME / "docs/concepts.md"
# Backticked names of the glossary that are not this package's.
OTHERS = {"ValueError", "True", "None", "False"}


def defined_names() -> set[str]:
    """Every class and function of the package, and every name that a class body or an assignment to `self` defines."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
                names |= {target.attr for target in targets if isinstance(target, ast.Attribute)}
    return names


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_title(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ("log.md", "cli.md")], ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    paths = re.findall(r"`((?:[\w-]+/)+(?:[\w-]+\.py)?)`", page.read_text())
    folders = {path.name for path in PACKAGE.iterdir()} | {"headstart", "tests", "docs", "examples", "benchmarks", "recipes"}
    for path in paths:
        if path.split("/")[0] in folders and "FOLDER" not in path and path != "serve/":
            assert (HOME / path).exists() or (PACKAGE / path).exists(), path


def test_every_class_that_the_concepts_name_exists():
    names = defined_names()
    for name in re.findall(r"`([A-Z]\w*[a-z]\w*(?:\.\w+)?)(?:\([^)]*\))?`", CONCEPTS.read_text()):
        assert set(name.split(".")) - names - OTHERS == set(), name
