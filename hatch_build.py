"""Compiles the CPU kernels when the package is installed or its wheel is built; without a compiler the package has none."""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("headstart/target/kernels/cpp")


class CompiledKernels(BuildHookInterface):
    """Puts the compiled library into the wheel, which is then for one platform, and for any Python and torch on it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel is made. version: "standard" or "editable"."""
        folder = Path(self.root, FOLDER)
        builder = runpy.run_path(str(folder / "build.py"))
        if self.target_name != "wheel" or not builder["is_supported"]():
            return
        try:
            library = builder["build"](folder)
        except OSError as error:
            self.app.display_warning(f"the compiled kernels are left out: {error}")
            return
        if version != "editable":
            build_data["force_include"][str(library)] = str(FOLDER / library.name)
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
