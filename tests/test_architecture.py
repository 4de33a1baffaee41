"""Borders of the project: who imports whom, what the README promises, what the repository must not hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fgo_geo"

# The rooms, and what each may import of the others: arrows point down only.
# linalg <- weights <- manifolds <- {paths, models} <- {optim, measures} <- distributed
GEOMETRY = {"linalg", "weights", "manifolds"}
MAY_IMPORT = {
    "linalg": set(),
    "weights": {"linalg"},
    "manifolds": {"linalg", "weights"},
    "paths": GEOMETRY,
    "models": GEOMETRY,
    "optim": {*GEOMETRY, "paths"},
    "measures": {*GEOMETRY, "models"},
    "distributed": {*GEOMETRY, "paths", "models", "optim", "measures"},
    "_former_names": set(),
    "_geoopt": set(),
    "__main__": {*GEOMETRY, "paths", "__init__"},
}


# Every file of every room, so that a missing one and one that nobody placed are noticed.
FILES = {
    "": ["__init__.py", "__main__.py", "_former_names.py", "_geoopt.py"],
    "distributed": [
        *("__init__.py", "checkpoints.py", "exchange.py", "local.py", "owners.py", "parcels.py", "sharding.py"),
    ],
    "linalg": [
        "__init__.py",
        "chebyshev.py",
        "closed_forms.py",
        "factors.py",
        "matmul.py",
        "memory.py",
        "newton_schulz.py",
        "polar_derivative.py",
        "precision.py",
        "products.py",
        "shards.py",
        "smooth.py",
        "spectral.py",
        "values.py",
        "workspace.py",
    ],
    "manifolds": [
        "__init__.py",
        "balls.py",
        "declared.py",
        "embedded.py",
        "oblique.py",
        "product.py",
        "replaced.py",
        "sphere.py",
        "stiefel.py",
        "stiefel_geodesics.py",
    ],
    "measures": [
        "__init__.py",
        "bounds.py",
        "report/__init__.py",
        "report/data.py",
        "report/plot.py",
        "report/presentation.py",
        "report/reading.py",
        "report/record.py",
        "report/table.py",
        "report/weights.py",
    ],
    "models": [
        "__init__.py",
        "choose.py",
        "constrain.py",
        "entry.py",
        "feature_stats.py",
        "folding.py",
        "loading.py",
        "plan.py",
        "renormalize.py",
        "replicas.py",
        "sharded.py",
        "sites.py",
        "slips.py",
        "start.py",
        "surgery.py",
        "watch.py",
    ],
    "optim": [
        "__init__.py",
        "base.py",
        "channel_directed.py",
        "channel_metrics.py",
        "fgsgd.py",
        "finite.py",
        "groups.py",
        "inner_steps.py",
        "on_manifolds.py",
        "options.py",
        "points.py",
        "requests.py",
        "schedules.py",
        "step_size.py",
        "telemetry.py",
    ],
    "paths": [
        "__init__.py",
        "kept.py",
        "kernel_tables.py",
        "native/__init__.py",
        "native/blocks.py",
        "native/channels.py",
        "native/kernels.py",
        "native/library.py",
        "native/line_tables.py",
        "native/lines.py",
        "native/matrices.py",
        "native/rows.py",
        "native/stiefel.py",
        "pieces.py",
        "protocol.py",
        "reference.py",
        "router.py",
        "rules.py",
        "shared_products.py",
        "triton/__init__.py",
        "triton/_sweeps.py",
        "triton/launches.py",
    ],
    "weights": [
        "__init__.py",
        "blocks.py",
        "components.py",
        "filters.py",
        "grouping.py",
        "kernels.py",
        "kind_checks.py",
        "kinds.py",
        "layout.py",
        "norms.py",
        "operator_norms.py",
        "parts.py",
        "radius.py",
        "strategies.py",
        "words.py",
    ],
}

# Files of more than 500 lines, as "room/name", each with the reason why it is one room and not several.
LONGER: dict[str, str] = {}


def name_of(path: Path) -> str:
    """The dotted name of a module file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, package: str) -> set[str]:
    """Names that a module of the given package imports, ``from a import b`` as ``a.b``; relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def parts_imported(source: str, package: str) -> set[str]:
    """The parts of the package that a module imports; the package itself is called ``__init__``."""
    own = [name.split(".") for name in imports_of(source, package) if name.split(".")[0] == "fgo_geo"]
    return {names[1] if len(names) > 1 and names[1] in MAY_IMPORT else "__init__" for names in own}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import fgo_geo.optim.fgsgd", {"optim"}),
        ("import fgo_geo", {"__init__"}),
        ("from fgo_geo import linalg, ScaledSphere", {"linalg", "__init__"}),
        ("from fgo_geo.manifolds import Stiefel", {"manifolds"}),
        ("from . import step_size", {"optim"}),
        ("from .. import measures", {"measures"}),
        ("from ..models import Plan", {"models"}),
        ("def f():\n    from fgo_geo.measures import report", {"measures"}),
        ("import torch\nfrom fgo_geometry import report", set()),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert parts_imported(source, "fgo_geo.optim") == expected


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SOURCES = sorted([*PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.hpp")])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    part = name_of(path).split(".")[1]
    assert part in MAY_IMPORT, f"say in MAY_IMPORT what {part} may import"
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    unwanted = parts_imported(path.read_text(encoding="utf-8"), package) - MAY_IMPORT[part] - {part}
    assert not unwanted, f"{name_of(path)} may not import {sorted(unwanted)}"


def test_every_file_is_listed_and_every_listed_file_exists():
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    listed = {f"{room}/{name}".lstrip("/") for room, names in FILES.items() for name in names}
    assert found - listed == set(), "say in FILES which room they are in"
    assert listed - found == set(), "these are missing"
    assert set(FILES) - {""} == set(MAY_IMPORT) - {"_former_names", "_geoopt", "__main__"}


@pytest.mark.parametrize("path", [*MODULES, *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_longer_than_one_can_read_at_once(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    name = path.relative_to(PACKAGE).as_posix()
    assert lines <= 500 or LONGER.get(name), f"{name} has {lines} lines: split it, or say why in LONGER"


def test_the_table_has_no_cycle():
    remaining = dict(MAY_IMPORT)
    while remaining:
        free = {part for part, wanted in remaining.items() if not wanted & remaining.keys()}
        assert free, f"these import each other: {sorted(remaining)}"
        remaining = {part: wanted for part, wanted in remaining.items() if part not in free}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_no_two_modules_of_a_room_import_each_other(room):
    paths = {name_of(path): path for path in MODULES if name_of(path).split(".")[1] == room}
    sources = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    packages = {name: name if path.stem == "__init__" else name.rpartition(".")[0] for name, path in paths.items()}
    remaining = {name: modules_imported(source, packages[name]) for name, source in sources.items()}
    while remaining:
        free = {name for name, wanted in remaining.items() if not (wanted - {name}) & remaining.keys()}
        assert free, f"these import each other, or one that does: {sorted(remaining)}"
        remaining = {name: wanted for name, wanted in remaining.items() if name not in free}


def modules_imported(source: str, package: str) -> set[str]:
    """The modules that an import names: ``a.b`` of ``from a import b`` where it is a module, else ``a``."""
    existing = {name_of(path) for path in MODULES}
    names = imports_of(source, package)
    return {name if name in existing else name.rpartition(".")[0] for name in names} & existing


def needed_on_import(source: str) -> set[str]:
    """Top-level names of what importing a module imports: not inside functions, not for type checkers alone."""
    body = ast.parse(source).body
    executed = [node for node in body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    executed = [node for node in executed if ast.unparse(getattr(node, "test", node)) != "TYPE_CHECKING"]
    return {name.split(".")[0] for name in imports_of(ast.unparse(ast.Module(executed, [])), "fgo_geo")}


def test_the_package_needs_only_what_it_declares():
    declared = {re.split(r"[^\w-]", line)[0] for line in requires("fgo-geo") or [] if "extra ==" not in line}
    allowed = declared | {"fgo_geo"} | sys.stdlib_module_names
    for path in [*MODULES, PACKAGE / "__init__.py"]:
        missing = needed_on_import(path.read_text(encoding="utf-8")) - allowed
        assert not missing, f"{name_of(path)} needs {sorted(missing)}, which pyproject.toml doesn't declare"


def test_the_bounds_know_no_module():
    path = PACKAGE / "measures" / "bounds.py"
    names = imports_of(path.read_text(encoding="utf-8"), "fgo_geo") if path.exists() else set()
    assert not [name for name in names if name.startswith("torch.nn")]


PROGRAMS = [path for path in sorted((ROOT / "examples").rglob("*.py")) if not path.name.startswith("plot_")]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_a_program_imports_the_package_before_geoopt_so_that_no_warning_heads_its_output(path):
    """Importing Geoopt alone warns that ``torch.jit.script`` is deprecated."""
    imported: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            imported += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(str(node.module).partition(".")[0])
    if "geoopt" in imported and path.parent.name != "training":  # whose __init__.py comes first
        assert {"fgo_geo", "training"} & set(imported[: imported.index("geoopt")])


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").read_bytes() == b""


def test_the_reference_has_every_module():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    documented = set(re.findall(r"automodule:: ([\w.]+)", pages))
    existing = {name_of(path) for path in [*MODULES, PACKAGE / "__init__.py"] if not path.stem.startswith("_")}
    existing |= {name_of(path) for path in MODULES if path.name == "__init__.py"}
    assert existing - documented == set(), "give them a place in docs/reference"


def test_every_file_has_the_same_version():
    from fgo_geo import __version__

    stated = {
        "CITATION.cff": r"^version: (.+)$",
        ".conda/recipe.yaml": r"^  version: ([\d.]+)$",
        "CHANGELOG.md": r"^## \[(\d[^\]]*)\]|version ([\d.]+), the first",
    }
    for name, pattern in stated.items():
        found = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert found, f"{name} states no version"
        assert next(filter(None, found.groups())) == __version__, name


# -- The README ------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_the_readme_starts_with_two_commands_of_one_line():
    blocks = [text for language, text in FENCED.findall(README) if language == "bash"]
    assert len(blocks) >= 2
    for block in blocks[:2]:
        assert len(block.strip().splitlines()) == 1
        assert block.startswith("pip install")
    assert "examples/train.py" in blocks[0]
    assert "pytest" in blocks[1]


def test_the_readme_names_no_missing_file():
    prose = FENCED.sub("", README)
    links = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose)}
    links = {target for target in links if target and "://" not in target}
    quoted = set(re.findall(r"`([\w.-]+/[\w./*-]*|[\w-]+\.(?:py|md|toml))`", prose))
    named = {name for name in links | quoted if not name.startswith("runs/")}
    assert named
    assert not [name for name in sorted(named) if not list(ROOT.glob(name.rstrip("/")))]


def test_the_code_of_the_readme_runs():
    namespace: dict[str, object] = {}
    blocks = [text for language, text in FENCED.findall(README) if language == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


# -- The repository --------------------------------------------------------------------------------


def tracked_files() -> list[Path]:
    """Files under version control, or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    paths = [ROOT / name for name in output.split("\0") if name]
    return [path for path in paths if path.is_file() and path.suffix not in {".png", ".npz", ".pt"}]


FORBIDDEN = {
    "a path of one machine": r"(?<![\w.}$])/(?:home|root|Users|tmp|work|opt|mnt|usr/local)/\w",
    "a package registry": r"\b(?:pypi|pythonhosted|anaconda|npmjs)\.(?:org|io|com)\b|--(?:extra-)?index-url",
    "a conflict marker": r"^(?:<{7}|>{7}) ",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(FORBIDDEN[what], line)
    ]
    assert not found, f"{what}: {found}"
