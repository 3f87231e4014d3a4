"""Both kinds of kernels that a CPU may have."""

import pytest

from headstart.target.kernels.library import SWITCH, library


@pytest.fixture(params=["compiled", "torch"])
def kernels(request, monkeypatch):
    """The compiled kernels, or those of torch, as on a processor without the others."""
    if request.param == "torch":
        monkeypatch.setenv(SWITCH, "torch")
    library.cache_clear()
    if request.param == "compiled" and library() is None:
        pytest.skip("there are no compiled kernels for this processor, or no compiler")
    yield request.param
    library.cache_clear()


@pytest.fixture(params=["amx", "avx512_bf16", "avx512"])
def level(request):
    """Each set of instructions that this processor has."""
    lib = library()
    if lib is None:
        pytest.skip("there are no compiled kernels for this processor, or no compiler")
    try:
        yield lib.use(request.param)
    except OSError:
        pytest.skip(f"this processor does not have {request.param}")
    finally:
        lib.use(None)
