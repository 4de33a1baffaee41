"""Builds a wheel, installs it into a fresh environment, and compares the compiled steps in it with the torch code.

python .ci/check_wheel.py              # the wheel's dependencies come from the package registry
python .ci/check_wheel.py --borrow     # torch and the others are those of this environment
python .ci/check_wheel.py --installed  # only the comparison, with the package that this environment has
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"FGO_REQUIRE_NATIVE": "1"}


def build(folder: Path) -> Path:
    """The wheel, checked for its tag and its contents."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    (wheel,) = folder.glob("*.whl")
    if "-py3-none-" not in wheel.name:
        raise SystemExit(f"{wheel.name} serves one version of Python only, expected the tag py3-none")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = [info for info in archive.infolist() if "/libfgo_geo." in info.filename]
    if len(libraries) != 1:
        raise SystemExit(f"{wheel.name} holds {len(libraries)} compiled libraries, expected one; files: {names}")
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MB, the library {libraries[0].file_size / 2**20:.2f} MB")
    return wheel


def install(wheel: Path, folder: Path, borrow: bool) -> Path:
    """The Python of a fresh environment that has the wheel."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    alone = ["--no-deps"] if borrow else []
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *alone, str(wheel)]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    if borrow:
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([str(python), "-c", query], check=True, capture_output=True, text=True).stdout.strip()
        Path(own, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def compare() -> None:
    """Raise unless the compiled steps are there and equal the torch code, with every instruction set."""
    import torch
    from torch import nn

    import fgo_geo
    from fgo_geo import RiemannianFGSGD, constrain, kernels
    from fgo_geo.paths.native.library import instruction_set, library

    def trained(path: str, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 17, 5), nn.Conv2d(17, 8, (2, 3)), nn.Linear(8, 4))
        constrain(model.to(dtype), strategy="pio", manifolds=("sphere", "oblique", "stiefel", "euclidean"))
        optimizer = RiemannianFGSGD(model.parameters(), lr=0.1, momentum=0.9)
        with kernels.use_path(path):
            for _ in range(3):
                for parameter in model.parameters():
                    parameter.grad = torch.randn_like(parameter)
                optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    if library() is None:
        raise SystemExit("the compiled library is missing")
    print(f"fgo_geo {fgo_geo.__version__} in {Path(fgo_geo.__file__).parent}: {instruction_set()}")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        expected = trained("reference", dtype)
        for limit in (2, 1, 0):  # AVX-512, AVX2, neither
            instruction_set(limit)
            for actual, wanted in zip(trained("fused", dtype), expected, strict=True):
                torch.testing.assert_close(actual, wanted, atol=tolerance, rtol=tolerance)
        instruction_set(2)
    print("The compiled steps equal the torch code.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the flags ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--borrow", action="store_true", help="take the dependencies from this environment")
    parser.add_argument("--installed", action="store_true", help="only compare, in this environment")
    options = parser.parse_args(arguments)
    if options.installed:
        compare()
        return
    with tempfile.TemporaryDirectory() as name:
        wheel = build(Path(name))
        python = install(wheel, Path(name, "environment"), options.borrow)
        command = [str(python), str(Path(__file__).resolve()), "--installed"]
        subprocess.run(command, check=True, cwd=name, env=ENVIRONMENT)


if __name__ == "__main__":
    main()
