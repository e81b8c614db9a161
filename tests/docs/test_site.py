"""The documentation's site builds without a warning, its links lead somewhere, and it needs nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


ROOT = Path(__file__).parents[2]
HOSTS = {
    "arxiv.org",
    "cosmic-ray.readthedocs.io",
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "pytorch.org",
    "semver.org",
    "visualqa.org",
}
# What a browser fetches by itself, as against links, which a reader follows.
FETCHED = {"src", "srcset", "poster", "data"}
FETCHED_RELATIONS = {"stylesheet", "icon", "preconnect", "preload", "modulepreload", "dns-prefetch", "manifest"}


class Page(HTMLParser):
    """Anchors, links and assets of an HTML file, and which links are of the site's menu."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.assets, self.menu = {""}, [], [], []
        self.in_menu = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "nav":
            self.in_menu = "md-nav--primary" in (attributes.get("class") or "") or self.in_menu
        self.assets += [attributes[name] for name in FETCHED if attributes.get(name)]
        if tag == "link" and FETCHED_RELATIONS & set(attributes.get("rel", "").split()):
            self.assets.append(attributes["href"])
        elif tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])


def problems_of(site, hosts=HOSTS):
    """What is wrong with links and assets in the folder `site`, one line each."""
    pages = {path: Page(path.read_text("utf-8")) for path in site.rglob("*.html")}
    problems = []
    for path, page in pages.items():
        place = path.relative_to(site)
        for link in page.links + page.assets:
            parts = urlsplit(link)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                if link in page.assets:
                    problems.append(f"{place} fetches {link}")
                elif parts.scheme != "https" or parts.hostname not in hosts or parts.port or parts.username:
                    problems.append(f"{place} links to {link}, which is no https address of a known host")
                continue
            address = unquote(parts.path)
            if path == site / "404.html":  # which a server shows under any address
                address = address.removeprefix("/")
            target = (path.parent / address).resolve() if address else path
            if not target.is_relative_to(site) or not target.is_file():
                problems.append(f"{place} has {link}, which is no file")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                problems.append(f"{place} has {link}, an anchor that is not there")
    for path in site.rglob("*.css"):
        for address in re.findall(r"(?:url\(|@import\s*)[\"']?((?:https?:)?//[^\"')]+)", path.read_text("utf-8")):
            problems.append(f"{path.relative_to(site)} fetches {address}")
    return problems


def pages_of_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:\n")[1]
    return re.findall(r": ([\w/.-]+\.md)$", menu, flags=re.MULTILINE)


def test_every_page_is_in_the_menu():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    cards = {f"repository/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("model_cards/*.md")}
    menu = pages_of_the_menu()
    assert len(menu) == len(set(menu))
    assert {page for page in menu if not page.startswith("repository/")} == pages
    assert cards <= set(menu)


@pytest.mark.slow
def test_site(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    site = tmp_path / "site"
    run = subprocess.run([*command, "--site-dir", site], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not re.search(r"^(WARNING|ERROR)", run.stderr, flags=re.MULTILINE), run.stderr
    assert not problems_of(site)

    pages = {page: (site / page).with_suffix(".html") for page in pages_of_the_menu()}
    assert all(path.is_file() or (path.parent / "index.html").is_file() for path in pages.values())
    # Docstrings are those that `auto_docstring` writes, and no section of one is left unread.
    for page in ("llava_uhd", "moe_llava", "llava_mole", "api"):
        text = (site / f"{page}.html").read_text("utf-8")
        assert ":::" not in text
        assert not re.search(r"^(?:<p>)?(?:Args|Parameters|Returns|Raises):", text, flags=re.MULTILINE)
    assert "rows, columns" in (site / "llava_uhd.html").read_text("utf-8")
    assert "<code>&lt;|reg0|&gt;</code>" in (site / "fidelity.html").read_text("utf-8")
    # The search works from the disk: the index is a script.
    index = (site / "search" / "search_index.js").read_text("utf-8")
    assert index.startswith("var __index = ") and "adaptive" in index


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ('<a href="other.html">', "no file"),
        ('<a href="../outside.html">', "no file"),
        ('<a href="#nowhere">', "an anchor"),
        ('<a href="index.html#nowhere">', "an anchor"),
        ('<a href="http://arxiv.org/abs/1">', "no https"),
        ('<a href="https://example.org/">', "no https"),
        ('<a href="https://arxiv.org:8443/">', "no https"),
        ('<a href="javascript:alert(1)">', "no https"),
        ('<img src="missing.png">', "no file"),
        ('<script src="https://unpkg.com/x"></script>', "fetches"),
        ('<link rel="preconnect stylesheet" href="//fonts.gstatic.com">', "fetches"),
        ("<link rel='stylesheet' href='style.css'>", "fetches"),
    ],
)
def test_problems_are_found(tmp_path, page, problem):
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "outside.html").write_text("<p>")
    good = '<h1 id="top">1</h1><a href="#top"><a href="index.html#top"><a href="https://arxiv.org/abs/1#a">'
    (site / "index.html").write_text(good)
    assert problems_of(site) == []
    (site / "index.html").write_text(good + page)
    if "style.css" in page:
        (site / "style.css").write_text("@font-face { src: url('https://fonts.gstatic.com/a.woff') }")
    (found,) = problems_of(site)
    assert problem in found
