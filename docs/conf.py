"""Configuration of the documentation; build it with ``sphinx-build -W -n docs docs/_build/html``."""

from __future__ import annotations

import re
import sys
from importlib.metadata import files
from pathlib import Path
from pydoc import locate
from typing import TYPE_CHECKING

from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style as UnsortedStyle
from pybtex.style.labels import BaseLabelStyle

import fgo_geo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from docutils.nodes import Element, TextElement, document
    from pybtex.database import Entry
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

sys.path.insert(0, str(Path(__file__).parent))  # for figures.py

project = "fgo_geo"
author = "the fgo_geo authors"
copyright = author
release = version = fgo_geo.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build"]
nitpicky = True
# Docstrings may name private functions and type variables: readers of the code find them, the reference has no page.
nitpick_ignore_regex = [
    (r"py:.*", r"(.*\.)?_\w+"),
    (r"py:class", r"torch\.distributed\..*ProcessGroup"),
    # Standard classes that this folder's inventory of Python lacks, and halves of signatures that Sphinx splits.
    (r"py:class", r"enum\.Enum|ctypes\.(CDLL|Structure)|dict\[(int|str)"),
    (r"py:class", r"NDArray|np\.bool_|Integers"),
    (r"py:obj", r"typing\.Literal\[.*"),
]

# -- Pages in Markdown ---------------------------------------------------------------------------

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# -- Reference: docstrings -----------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False

# -- Links ---------------------------------------------------------------------------------------

# The documentation builds without a network: each inventory lists, in Sphinx's plain-text format, just the objects that
# are referred to here. A reference to anything else fails the build and is mended by one more line.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.inv"),
    "numpy": ("https://numpy.org/doc/stable", "inventories/numpy.inv"),
    "matplotlib": ("https://matplotlib.org/stable", "inventories/matplotlib.inv"),
    "pandas": ("https://pandas.pydata.org/docs", "inventories/pandas.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.inv"),
    "geoopt": ("https://geoopt.readthedocs.io/en/latest", "inventories/geoopt.inv"),
}

# Where the name that code uses, or the place of a definition, is not the name that a project documents.
_DOCUMENTED_AS = {
    "Axes": "matplotlib.axes.Axes",
    "Figure": "matplotlib.figure.Figure",
    "Tensor": "torch.Tensor",
    "geoopt.Euclidean": "geoopt.manifolds.Euclidean",
    "geoopt.ManifoldParameter": "geoopt.tensor.ManifoldParameter",
    "geoopt.ManifoldTensor": "geoopt.tensor.ManifoldTensor",
    "geoopt.manifolds.base.Manifold": "geoopt.Manifold",
    "geoopt.optim.rsgd.RiemannianSGD": "geoopt.optim.RiemannianSGD",
    "torch._C.Generator": "torch.Generator",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
}


def follow_alias(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: TextElement) -> Element | None:
    """Resolve a public or imported name of this package where it is defined; pass others on to the inventories."""
    target = str(node.get("reftarget"))
    for name in (target, f"{node.get('py:module')}.{target}"):
        found = locate(name) if name.startswith("fgo_geo.") else None
        if hasattr(found, "__qualname__") and str(getattr(found, "__module__", "")).startswith("fgo_geo."):
            target = f"{found.__module__}.{found.__qualname__}"
            break
    if target.startswith("fgo_geo."):
        domain = env.domains.python_domain
        return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], target, node, content)
    node["reftarget"] = _DOCUMENTED_AS.get(target, target)
    return None


# -- Bibliography --------------------------------------------------------------------------------


class KeyLabels(BaseLabelStyle):
    """Label entries by their keys: ``[Ozay2019]`` on the page as in the code."""

    def format_labels(self, sorted_entries: Iterable[Entry]) -> Iterable[str]:
        """Return one label per entry."""
        return [entry.key for entry in sorted_entries]


class KeyStyle(UnsortedStyle):
    """Entries sorted by author and year, and labelled by their keys."""

    default_label_style = KeyLabels
    default_sorting_style = "author_year_title"


register_plugin("pybtex.style.formatting", "keys", KeyStyle)
bibtex_bibfiles = ["refs.bib"]
bibtex_default_style = "keys"

_CITATION = re.compile(r"\[([A-Z]\w*?\d{4}[a-z]?)\]_")


def cite(text: str) -> str:
    """Turn ``[Ozay2019]_`` into a citation of the bibliography."""
    return _CITATION.sub(r":cite:p:`\1`", text)


def prepare_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Link the citations of a docstring; keep napoleon from reading a property's first words as its type."""
    lines[:] = [cite(line) for line in lines]
    if what == "property" and lines:
        lines[0] = f": {lines[0]}"


def skip_field_alias(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out the fields of named tuples that have no docstring of their own: the class's lists them."""
    return str(getattr(obj, "__doc__", "")).startswith("Alias for field number") or None


def prepare_gallery_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Link the citations in the prose of an example."""
    if name.startswith("gallery/"):
        source[0] = cite(source[0])


# -- Figures -----------------------------------------------------------------------------------------

_WORDS = {
    r"\lambda": "λ",
    r"\tau": "τ",
    r"\alpha": "α",
    r"\log": "log",
    r"\sqrt": "√",
    r"\Vert": "‖",
    r"\|": "‖",
    r"\to": "→",
}
_FORMULA = re.compile(r"\$([^$]*)\$")


def spoken(text: str) -> str:
    """A text with its formulas in plain letters, for alt texts."""

    def plain(match: re.Match[str]) -> str:
        formula = match[1]
        for command, letter in _WORDS.items():
            formula = formula.replace(command, letter)
        return re.sub(r"\\[a-zA-Z]+|[{}_^\\]", "", formula)

    return _FORMULA.sub(plain, text)


def speak_alt_texts(app: Sphinx, doctree: document) -> None:
    """Make the alt texts of figures, which are their titles, readable aloud."""
    for node in doctree.findall(lambda node: "alt" in getattr(node, "attributes", {})):
        node["alt"] = spoken(node["alt"])


def remove_broken_ways_back(app: Sphinx, error: Exception | None) -> None:
    """Take those links out of the pages of source code that lead to no entry of the reference."""
    if error is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir)
    anchors: dict[Path, set[str]] = {}
    link = re.compile(r'<a class="viewcode-back" href="([^"#]*)#([^"]*)">\[docs\]</a>')
    for page in folder.glob("_modules/**/*.html"):

        def kept(match: re.Match[str], page: Path = page) -> str:
            target = (page.parent / match[1]).resolve()
            if target not in anchors:
                anchors[target] = set(re.findall(r'\bid="([^"]+)"', target.read_text(encoding="utf-8")))
            return match[0] if match[2] in anchors[target] else ""

        text = page.read_text(encoding="utf-8")
        page.write_text(link.sub(kept, text), encoding="utf-8")


# -- Gallery -------------------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": str(Path(__file__).parent.parent / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "ignore_pattern": r"^(?!plot_)",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "capture_repr": (),
    "image_srcset": ["2x"],
    "reset_modules": ("matplotlib", "figures.figure_style", "figures.default_type"),
}

# -- HTML ----------------------------------------------------------------------------------------

html_theme = "furo"
highlight_options = {"pycon": {"stripnl": True}}  # a blank line ends the expected output of a doctest
html_title = "fgo_geo"
# Formulas are drawn by a copy of MathJax that is part of the site: it needs no network.
_mathjax = next(str(file.locate()) for file in files("sphinx-mathjax-offline") or [] if file.name == "tex-svg-full.js")
html_static_path = ["_static", _mathjax]
mathjax_path = "tex-svg-full.js"
mathjax3_config = {"options": {"enableMenu": False}}  # its menu would load more files
html_css_files = ["fgo_geo.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app: Sphinx) -> None:
    """Connect the handlers of this file."""
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_field_alias)
    app.connect("source-read", prepare_gallery_page)
    app.connect("doctree-read", speak_alt_texts)
    app.connect("build-finished", remove_broken_ways_back, priority=900)
    app.connect("missing-reference", follow_alias, priority=400)  # before the inventories
