"""The library of compiled kernels: where it is found or built, which instructions it uses, and its threads.

What each function takes stands in `cpp/library.cpp` and `cpp/kernels.hpp`.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch

from headstart.target.kernels.cpp.build import build, file_name, find_compiler, is_supported

SWITCH = "HEADSTART_KERNELS"  # environment variable: "torch" leaves the library out, a level's name chooses that one
KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float}  # of arguments: pointer, number, float


class Library:
    """The loaded library.

    Attributes:
    level: the instructions that it uses: "amx", "avx512_bf16" or "avx512".
    """

    def __init__(self, path: Path, level: str | None = None) -> None:
        """level: which instructions; None: the best that this processor has. Raises OSError where it has none of them."""
        self._functions = ctypes.CDLL(str(path))
        self._choose = self._functions.headstart_choose
        self._choose.argtypes, self._choose.restype = [ctypes.c_char_p], ctypes.c_char_p
        self.level = self.use(level)
        self.linear = self._function("linear", "ppnp")
        self.mlp = self._function("mlp", "pppnpp")
        self.norm = self._function("norm", "npnnpfp")
        self.pack = self._function("pack", "npnnnnpn")
        self.attention = self._function("attention", "p")
        self.children = self._function("children", "p")
        self.attention_layer = self._function("attention_layer", "pppnpppp")
        self.forward = self._function("forward", "p")
        self._set_threads = self._function("threads", "n")
        self._lock, self._local = threading.Lock(), threading.local()
        self._threads = 0
        self._working: set[int] = set()  # threads inside `working`

    def _function(self, name: str, kinds: str) -> Callable[..., None]:
        """A function of the library that returns nothing. kinds: of its arguments, a letter of `KINDS` each."""
        function: Callable[..., None] = getattr(self._functions, f"headstart_{name}")
        function.argtypes, function.restype = [KINDS[kind] for kind in kinds], None  # type: ignore[attr-defined]
        return function

    def use(self, level: str | None) -> str:
        """Choose the instructions; None: the best ones. Returns their name. Raises OSError where the processor lacks them.

        For the whole process, and not while any of its threads computes. Packs of int8 weights cannot be used with "avx512".
        """
        chosen: bytes | None = self._choose(level.encode() if level else None)
        if chosen is None:
            raise OSError(f"this processor does not have {level or 'AVX-512'}")
        self.level = chosen.decode()
        return self.level

    @contextmanager
    def working(self) -> Iterator[None]:
        """A context in which this library has torch's threads, and torch has one: threads of both would wait for each other.

        torch's threads spin for about a millisecond after each operation, on a core that the library needs. Results do not depend
        on the number of threads. The context may be entered again inside, and by several threads at once.
        """
        depth = getattr(self._local, "depth", 0)
        try:
            try:
                if depth == 0:
                    self._take_threads()
                self._local.depth = depth + 1
                yield
            finally:
                self._leave(depth)
        finally:  # again: an interruption may come at the first statement of the other one
            self._leave(depth)

    def _take_threads(self) -> None:
        with self._lock:
            threads = torch.get_num_threads()  # always: the first call in a thread gives it the number that is set for all
            if not self._working - {threading.get_ident()}:  # while others work, it is 1
                self._threads = threads
                self._set_threads(threads)
            self._working.add(threading.get_ident())
            torch.set_num_threads(1)  # of the calling thread, and of threads to come

    def _leave(self, depth: int) -> None:
        """Return to a depth. Outside of all contexts, torch has its threads again. May be called twice."""
        self._local.depth = depth
        with self._lock:
            if depth == 0 and threading.get_ident() in self._working:
                torch.set_num_threads(self._threads)
                self._working.discard(threading.get_ident())


@cache
def library() -> Library | None:
    """The library, built first where it is missing and a compiler is there; None where it cannot be used."""
    wanted = os.environ.get(SWITCH, "")
    if wanted == "torch" or not is_supported():
        return None
    try:
        return Library(_find(), wanted or None)
    except OSError as error:
        if wanted:
            raise ValueError(f"{SWITCH} is {wanted!r}, but {error}; unset it, or set it to 'torch'") from None
        return None


def _find() -> Path:
    """The library beside its sources, or in the user's cache. Raises OSError where it is in neither and cannot be built."""
    beside = Path(__file__).parent / "cpp"
    cached = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "headstart"
    for folder in (beside, cached):
        if (folder / file_name()).exists():
            return folder / file_name()
    if find_compiler() is None:
        raise OSError("the compiled kernels are not installed, and there is no C++ compiler to make them with")
    try:
        return build(beside if os.access(beside, os.W_OK) else cached)
    except OSError as error:
        message = f"the compiled kernels cannot be built, so torch's are used: {error}; {SWITCH}=torch leaves them out"
        warnings.warn(message, stacklevel=3)
        raise


def working() -> AbstractContextManager[None]:
    """`Library.working`, where the library is there."""
    lib = library()
    return nullcontext() if lib is None else lib.working()
