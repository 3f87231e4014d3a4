"""Headstart: exact self-speculative decoding for causal language models.

Holds the public names. Each is imported from its module at first use, so that `import headstart` imports neither torch nor
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headstart.drafters import Drafter
    from headstart.engine.engine import Engine
    from headstart.engine.generate_hook import custom_generate
    from headstart.engine.llm import LLM, load
    from headstart.engine.scheduler import Request
    from headstart.speculation.params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Drafter",
    "Engine",
    "Request",
    "SamplingParams",
    "__version__",
    "custom_generate",
    "load",
]

_MODULES = {
    "LLM": "headstart.engine.llm",
    "Drafter": "headstart.drafters",
    "Engine": "headstart.engine.engine",
    "Request": "headstart.engine.scheduler",
    "SamplingParams": "headstart.speculation.params",
    "custom_generate": "headstart.engine.generate_hook",
    "load": "headstart.engine.llm",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'headstart' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
