"""The public names of the package: adding or removing one requires a change of this file."""

import subprocess
import sys

import pytest

import headstart

PUBLIC = {"LLM", "Drafter", "Engine", "Request", "SamplingParams", "__version__", "custom_generate", "load"}


def test_all_lists_the_public_names():
    assert set(headstart.__all__) == PUBLIC
    assert set(dir(headstart)) == PUBLIC


def test_every_lazy_name_is_public():
    assert set(headstart._MODULES) | {"__version__"} == PUBLIC


def test_an_unknown_name_is_refused_with_the_names_that_exist():
    with pytest.raises(AttributeError, match=r"no attribute 'Decoder'; its public names are .*load"):
        _ = headstart.Decoder


def test_importing_headstart_imports_nothing_heavy():
    """Shell completion and `--help` must not wait for torch."""
    program = "import sys, headstart; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"torch", "torch.distributed", "transformers"} & set(loaded.stdout.split()) == set()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_exists_in_the_module_it_is_imported_from(name):
    value = getattr(headstart, name)
    assert getattr(value, "__module__", headstart._MODULES.get(name)) == headstart._MODULES.get(name)
