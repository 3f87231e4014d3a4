"""Compiles the kernels beside this file into one shared library, with any C++ compiler: no torch, no Python headers.

    python headstart/target/kernels/cpp/build.py [FOLDER]     # FOLDER: where the library goes (default: beside the sources)

The library's name contains a digest of its sources, so that one made from other sources is never loaded. This file must not import
anything but the standard library: the package is built with it before torch is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-w")
HIDDEN = "-Wl,--exclude-libs,ALL"  # the C++ library inside must not serve, or be served by, that of torch
AVX512 = ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
BF16 = (*AVX512, "-mavx512bf16", "-mavx512vnni")
LEVELS = {
    "avx512": AVX512,
    "avx512_bf16": BF16,
    "amx": (*BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}  # level.cpp is compiled once for each


def is_supported() -> bool:
    """Whether there are kernels for this kind of processor and operating system: 64-bit x86 with Linux."""
    return platform.machine() == "x86_64" and sys.platform == "linux"


def file_name() -> str:
    """The name of the library that belongs to these sources."""
    digest = hashlib.sha256()
    for source in sorted((*HERE.glob("*.hpp"), *HERE.glob("*.cpp"), Path(__file__))):
        digest.update(source.read_bytes())
    return f"libheadstart-{digest.hexdigest()[:12]}.so"


def find_compiler() -> list[str] | None:
    """The C++ compiler that CXX names, or a usual one; None where there is none."""
    for command in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    return None


def build(folder: Path) -> Path:
    """Compile the library into a folder, in about 10 seconds; returns its path. One that is there is kept.

    Raises OSError where there is no compiler, where it fails, and where the folder cannot be written.
    """
    target = folder / file_name()
    if target.exists():
        return target
    compiler = find_compiler()
    if compiler is None:
        raise OSError("there is no C++ compiler; install one, or name it in the environment variable CXX")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        commands = {"library": [*compiler, *FLAGS, "-c", "library.cpp"]}
        for level, flags in LEVELS.items():
            commands[level] = [*compiler, *FLAGS, *flags, f"-DHEADSTART_LEVEL=headstart_{level}", "-c", "level.cpp"]
        objects = [str(Path(scratch, f"{name}.o")) for name in commands]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, ([*command, "-o", out] for command, out in zip(commands.values(), objects, strict=True))))
        made = Path(scratch, target.name)
        _run([*compiler, "-shared", "-static-libstdc++", "-static-libgcc", HIDDEN, *objects, "-o", str(made), "-lpthread"])
        made.replace(target)  # at once: another process may be building too
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{shlex.join(command)} failed: {done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE))
