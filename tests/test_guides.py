"""What pages quote: their Python blocks run, in order (those with prompts are doctests), and messages exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    page.relative_to(DOCS).as_posix(): BLOCK.findall(page.read_text(encoding="utf-8")) for page in DOCS.rglob("*.md")
}

del PAGES["guides/many-gpus.md"]  # runs on two processes: test_sharded_checkpoints.py


class Writer:
    """What a page takes for granted of TensorBoard."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert isinstance(name, str)
        assert isinstance(value, float)


def given(page: str) -> dict[str, object]:
    """What the blocks of a page take for granted."""
    import torchvision

    import fgo_geo

    layers = {name: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)) for name in ("backbone", "head", "decoder")}
    names: dict[str, object] = {"writer": Writer(), "step": 0, "torch": torch, "torchvision": torchvision, **layers}
    if page != "guides/channel-directed.md":
        return {**names, "fgo_geo": fgo_geo}
    loss = sum((layer(torch.ones(1, 3, 8, 8)).sum() for layer in layers.values()), torch.zeros(()))
    return {**names, "loss": loss, "scaler": torch.amp.GradScaler("cpu")}


@pytest.mark.parametrize("page", sorted(page for page, blocks in PAGES.items() if blocks))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = given(page)
    for number, block in enumerate(PAGES[page]):
        exec(compile(block.replace("resnet50", "resnet18"), f"{page}, block {number}", "exec"), namespace)


def test_the_pages_have_blocks():
    assert sum(map(len, PAGES.values())) > 10


def texts_of_the_package() -> str:
    """Every text in the code of the package, with ``...`` in place of what a message fills in."""
    found = []
    for path in (DOCS.parent / "fgo_geo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_that_are_explained_exist():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\*\*`(.*)`\*\*$", page, re.MULTILINE)
    assert len(quoted) > 10
    texts = texts_of_the_package()
    missing = [part for message in quoted for part in map(str.strip, message.split("...")) if part not in texts]
    assert not missing


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("DDP", "guides/many-gpus.md"),
        ("GeoTorch", "comparison.md"),
        ("Muon", "guides/any-optimiser.md"),
        ("custom manifold", "guides/own-manifold.md"),
        ("transformer", "guides/transformers.md"),
    ],
)
def test_what_newcomers_search_for_leads_to_its_page(words, page):
    assert re.search(rf"\b{words}\b", (DOCS / page).read_text(encoding="utf-8"))
