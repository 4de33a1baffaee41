"""Compiles the fused steps. All other settings are in pyproject.toml.

They are a plain C library, written in C++, that contains no code for Python or torch. So one wheel per platform serves
every version of Python, and the compiler is called here with flags of our own instead of those that Python was built
with. The library holds loops for several instruction sets and chooses among them at run time.

The compiler is ``CXX``, or the first of ``c++``, ``g++`` and ``clang++`` that exists; ``CXXFLAGS``, ``LDFLAGS`` and (on
macOS) ``ARCHFLAGS`` are added. Microsoft's compiler lacks the vector types that the sources use: on Windows, clang or
MinGW compiles them. Without a compiler the installation succeeds without the library, unless ``FGO_REQUIRE_NATIVE=1``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WINDOWS, MACOS = sys.platform in ("win32", "cygwin"), sys.platform == "darwin"
SUFFIX = ".dll" if WINDOWS else ".dylib" if MACOS else ".so"
FOLDER = Path("fgo_geo/paths/native")

FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-signed-zeros", "-fno-trapping-math", "-ffp-contract=fast", "-w"]
FLAGS += [] if WINDOWS else ["-fPIC"]
# GCC: loops over the entries of a kernel are unrolled at any size, so that entries stay in registers.
UNROLLED = ["--param=max-completely-peeled-insns=1000"]
# OpenMP's runtime is the one that torch has loaded. Torch's wheels for macOS and Windows bring one under another name:
# a second one in the same process would compete for the processors, so the steps run on one thread there.
OPENMP = [] if WINDOWS or MACOS else ["-fopenmp"]
STATIC = ["-static"] if WINDOWS else []


def run(command: list[str]) -> None:
    """Run a command, and raise what it said if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)} failed:\n{done.stdout}")


def compile_library(sources: list[str], folder: Path, library: Path, extra: list[str]) -> None:
    """Compile the sources, as many at a time as there are processors, and link them."""
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    compiler = shlex.split(os.environ.get("CXX", "")) or found[:1]
    if not compiler:
        raise CompileError("no C++ compiler was found")
    own = shlex.split(os.environ.get("CXXFLAGS", "")) + (shlex.split(os.environ.get("ARCHFLAGS", "")) if MACOS else [])
    objects = [folder / f"{Path(source).stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [
            [*compiler, *FLAGS, *extra, *own, "-c", source, "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        list(pool.map(run, commands))
    linked = [*compiler, "-shared", *OPENMP, *STATIC, *own, *map(str, objects), "-o", str(library)]
    run([*linked, *shlex.split(os.environ.get("LDFLAGS", ""))])


class BuildLibrary(build_ext):
    """Builds a library whose name does not depend on the version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where a library lies below the root of the package."""
        return str(Path(*fullname.split("."))) + SUFFIX

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one library."""
        library, folder = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        library.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            compile_library(ext.sources, folder, library, UNROLLED + OPENMP)
        except CompileError:  # another compiler than GCC, or one without OpenMP: its pragmas are ignored then
            OPENMP.clear()
            compile_library(ext.sources, folder, library, [])


class PlatformWheel(bdist_wheel):
    """A wheel that serves every Python 3 on a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tags."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "fgo_geo.paths.native.libfgo_geo",
            sources=sorted(str(path) for path in FOLDER.glob("*.cpp")),
            depends=sorted(str(path) for path in FOLDER.glob("*.hpp")),
            optional=os.environ.get("FGO_REQUIRE_NATIVE") != "1",
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
