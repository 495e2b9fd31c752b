"""Builds the region decoder in C at install time. Without a compiler or libjpeg-turbo's headers the install goes on."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("dist_trainer") / "data"


class RegionDecoder(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile for this platform; a wheel with the library in it carries the platform's tag."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        source, target = root / FOLDER / "jpeg_region.c", root / FOLDER / "_jpeg_region.so"
        built = target.with_suffix(".built")  # renamed when it is whole: a process may have the old one mapped
        compiler = shlex.split(os.environ.get("CC", "cc"))
        command = [*compiler, *["-O3", "-shared", "-fPIC", "-o"], str(built), str(source), "-ljpeg"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            reason = "" if done.returncode == 0 else (done.stderr.strip() or "failed").splitlines()[0]
        except OSError as error:
            reason = f"{compiler[0]}: {error.strerror}"
        if reason:
            target.unlink(missing_ok=True)
            print(
                f"region decode of JPEGs is not built ({reason}); Debian: apt install gcc libjpeg-dev", file=sys.stderr
            )
            return
        built.replace(target)
        build_data["artifacts"].append(str(FOLDER / target.name))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
