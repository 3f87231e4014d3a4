"""Builds llama.cpp natively from the llama-cpp-python source package, in a folder of its own.

    python benchmarks/peers/llama_cpp_build.py WORK [--minutes 60]

Downloads the package with pip, unpacks it into WORK and builds only the programs that are asked for, here llama-bench and
llama-batched-bench, static, Release, for this processor. A build that is there is used as it is. Needs cmake and a C++ compiler.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
FOLDER = f"{PACKAGE.replace('-', '_')}-{VERSION}"
PROGRAMS = ("llama-bench", "llama-batched-bench")
SETTINGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "ON",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


class Deadline:
    """The time that is left for all steps. seconds: in total."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._minutes = seconds / 60

    def run(self, command: Sequence[str], log: Path) -> None:
        """Run a command and append what it prints to a log. Raises ValueError where it fails or the time is over."""
        with log.open("a") as file:
            try:
                left = max(0.0, self._end - time.monotonic())
                subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True, timeout=left)
            except FileNotFoundError:
                raise ValueError(f"{command[0]} is not installed; llama.cpp cannot be built without it") from None
            except subprocess.CalledProcessError as error:
                raise ValueError(f"{command[0]} ended with exit status {error.returncode}; see {log}") from None
            except subprocess.TimeoutExpired:
                raise ValueError(f"llama.cpp was not built within {self._minutes:g} minutes; give more, and see {log}") from None


def sources_in(work: Path) -> Path:
    """llama.cpp's sources in the unpacked package."""
    return work / FOLDER / "vendor" / "llama.cpp"


def programs_in(sources: Path, programs: Sequence[str] = PROGRAMS) -> dict[str, Path]:
    """The built ones of these programs, by name."""
    return {name: path for name in programs if (path := sources / "build" / "bin" / name).is_file() and os.access(path, os.X_OK)}


def configure_command(sources: Path, build: Path) -> list[str]:
    """The command that configures a build."""
    return ["cmake", "-S", str(sources), "-B", str(build), *(f"-D{name}={value}" for name, value in SETTINGS.items())]


def build_command(build: Path, jobs: int, programs: Sequence[str] = PROGRAMS) -> list[str]:
    """The command that compiles these programs."""
    return ["cmake", "--build", str(build), "--config", "Release", "-j", str(jobs), "--target", *programs]


def download(work: Path, deadline: Deadline, log: Path) -> None:
    """Get the source package through pip and unpack it."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "-d", str(work)]
    archives = sorted(work.glob(f"{FOLDER}.tar.gz"))
    if not archives:
        deadline.run([*pip, f"{PACKAGE}=={VERSION}"], log)
        archives = sorted(work.glob(f"{FOLDER}.tar.gz"))
    if not archives:
        raise ValueError(f"pip left no {FOLDER}.tar.gz in {work}; see {log}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(work, filter="data")


def ensure_built(work: Path, minutes: float = 60, jobs: int | None = None, programs: Sequence[str] = PROGRAMS) -> Path:
    """llama.cpp's sources with these programs built.

    work: folder for the package and the build.
    minutes: for all that is missing.
    jobs: compilers at once; None: one per processor.
    Raises ValueError, with the name of a log, where a step fails.
    """
    sources = sources_in(work)
    if len(programs_in(sources, programs)) == len(programs):
        return sources
    work.mkdir(parents=True, exist_ok=True)
    deadline, log = Deadline(60 * minutes), work / "build.log"
    if not sources.is_dir():
        download(work, deadline, log)
    deadline.run(configure_command(sources, sources / "build"), log)
    deadline.run(build_command(sources / "build", jobs or os.cpu_count() or 1, programs), log)
    if missing := set(programs) - set(programs_in(sources, programs)):
        raise ValueError(f"the build ended without {min(missing)}; see {log}")
    return sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--jobs", type=int)
    arguments = parser.parse_args()
    try:
        print(ensure_built(arguments.work, arguments.minutes, arguments.jobs))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
