"""The check of the documentation's pages notices what it is there for."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("check_pages", Path(__file__).parents[1] / "docs" / "check_pages.py")
assert _SPEC is not None
assert _SPEC.loader is not None
check_pages = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check_pages)

GOOD = '<html><body><main id="top"><a href="other.html#there">x</a><a href="#top">y</a></main></body></html>'
OTHER = '<html><body><h1 id="there">z</h1><a href="https://example.org/">w</a></body></html>'


def site(folder: Path, **pages: str) -> Path:
    for name, text in ({"index": GOOD, "other": OTHER} | pages).items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


def test_links_that_lead_somewhere_are_no_complaint(tmp_path):
    assert list(check_pages.broken_links(site(tmp_path))) == []


@pytest.mark.parametrize("link", ["missing.html", "other.html#nowhere", "#nowhere", "missing.png"])
def test_links_that_lead_nowhere_are_named(link, tmp_path):
    (complaint,) = check_pages.broken_links(site(tmp_path, third=f'<a href="{link}">a</a>'))
    assert complaint.startswith(f"third.html links to {link}, ")


def test_without_chromium_links_alone_decide(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_pages.shutil, "which", lambda name: None)
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert check_pages.main([str(site(tmp_path))]) == 0
    assert "only links were checked" in capsys.readouterr().out
    assert check_pages.main([str(site(tmp_path, third='<a href="no.html">a</a>'))]) == 1


BROKEN = {
    "wide": ('<main><div style="width: 800px">wide</div></main>', "scrolls sideways at 390 px in the light theme"),
    "error": ("<script>nothing.here()</script>", "an exception: ReferenceError"),
    "host": ('<img alt="a" src="http://192.0.2.1/a.png">', "a request to another host: http://192.0.2.1/a.png"),
    "formula": ('<span class="math">x^2</span>', "1 formulas are not drawn"),
    "figure": ('<article><img src="data:," alt="$x$"></article>', "1 figures have no alt text"),
}


@pytest.mark.skipif(not any(map(shutil.which, check_pages.PROGRAMS)), reason="Chromium is not installed")
def test_what_is_wrong_with_a_page_is_noticed_in_chromium(tmp_path, capsys):
    pages = {name: f"<html><body>{text}</body></html>" for name, (text, _) in BROKEN.items()}
    assert check_pages.main([str(site(tmp_path, **pages))]) == 1
    lines = capsys.readouterr().out.splitlines()
    for name, (_, complaint) in BROKEN.items():
        assert any(line.startswith(f"{name}.html: ") and complaint in line for line in lines), (name, lines)
    assert not any(line.startswith(("index.html", "other.html")) for line in lines)
