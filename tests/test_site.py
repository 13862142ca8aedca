"""The documentation site: it builds without a warning, its links lead on, a browser shows it."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlparse

import pytest

import runlora_fx

ROOT = Path(__file__).parent.parent
PHONE = {"width": 390, "height": 844}

missing = [name for name in ("mkdocs", "material", "mkdocstrings") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"{', '.join(missing)} not installed: pip install '.[docs]'"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The site's folder, and what MkDocs printed; strict, so that a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    return folder, printed


def test_the_site_builds_without_warnings(built: tuple[Path, str]) -> None:
    folder, printed = built
    assert (folder / "index.html").is_file()
    assert "WARNING" not in printed
    assert "not included in the" not in printed  # pages without a place in the navigation


# --- what is in the pages


class Parsed(HTMLParser):
    """Anchors, links and resources of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.resources.append(given["href"])
        elif tag in ("script", "img") and "src" in given:
            self.resources.append(given["src"])


def pages_of(folder: Path) -> dict[str, Parsed]:
    """By address on the site, all pages."""
    found = sorted(folder.rglob("*.html"))
    return {f"/{page.relative_to(folder).as_posix()}": Parsed(page) for page in found}


def file_of(address: str) -> str:
    """The file that a server sends for an address."""
    return f"{address}index.html" if address.endswith("/") else address


def test_every_link_and_anchor_leads_on(built: tuple[Path, str]) -> None:
    folder, _ = built
    pages = pages_of(folder)
    assert len(pages) > 20
    broken = []
    for address, page in pages.items():
        if address == "/404.html":  # its links begin at the root of the site
            continue
        for link in page.links:
            if urlparse(link).scheme:
                continue
            target = urlparse(urljoin(address, link))
            path = file_of(unquote(target.path))
            if path in pages:
                if target.fragment and unquote(target.fragment) not in pages[path].ids:
                    broken.append(f"{address} -> {link}")
            elif not (folder / path[1:]).is_file():
                broken.append(f"{address} -> {link}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(built: tuple[Path, str]) -> None:
    folder, _ = built
    for address, page in pages_of(folder).items():
        assert [r for r in page.resources if urlparse(r).netloc] == [], address
        if address != "/404.html":
            here = [urlparse(urljoin(address, r)).path for r in page.resources]
            assert [p for p in here if not (folder / p[1:]).is_file()] == [], address


def test_the_reference_has_all_public_names(built: tuple[Path, str]) -> None:
    folder, _ = built
    page = Parsed(folder / "reference" / "index.html")
    assert {f"runlora_fx.{name}" for name in runlora_fx.__all__} <= page.ids
    text = (folder / "reference" / "index.html").read_text(encoding="utf-8")
    # Roles of Sphinx are not left over in the docstrings.
    assert not [role for role in (":class:", ":func:", ":attr:", ":mod:") if role in text]


def test_scripts_and_results_have_pages(built: tuple[Path, str]) -> None:
    folder, _ = built
    script = (folder / "examples" / "train_peft" / "index.html").read_text(encoding="utf-8")
    assert "Fine-tune a PEFT model" in script
    assert (folder / "benchmarks" / "results" / "traffic" / "index.html").is_file()
    assert "Semantic Versioning" in (folder / "changelog" / "index.html").read_text("utf-8")


# --- in a browser


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(built: tuple[Path, str]) -> Iterator[str]:
    """The site on a server of this machine."""
    handler = partial(Quiet, directory=str(built[0]))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium")  # none: the one that playwright installs
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
        except api.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


def addresses(built: tuple[Path, str]) -> list[str]:
    """The pages of the navigation, and one of a script."""
    folder, _ = built
    found = [page.parent for page in folder.glob("*/index.html")]
    names = [f"{page.name}/" for page in found]
    return ["", *sorted(names), "examples/train_peft/", "benchmarks/results/traffic/"]


def test_pages_load_without_errors(built: tuple[Path, str], address: str, browser: Any) -> None:
    page = browser.new_page()
    errors: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    # The search's worker may still be on its way when the next page is asked for.
    aborted = "net::ERR_ABORTED"
    page.on("requestfailed", lambda r: errors.append(r.url) if r.failure != aborted else None)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    names = addresses(built)
    assert len(names) >= 18
    for name in names:
        answer = page.goto(address + name, wait_until="load")
        assert answer.status == 200
        assert page.locator("h1").count() == 1, name
        pictures = page.locator("article img")
        for i in range(pictures.count()):
            assert pictures.nth(i).evaluate("image => image.decode().then(() => image.width)") > 0
    page.close()
    assert errors == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.slow
def test_pages_fit_on_a_phone(built: tuple[Path, str], address: str, browser: Any) -> None:
    page = browser.new_page(viewport=PHONE)
    wide = {}
    for name in addresses(built):
        page.goto(address + name, wait_until="load")
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > PHONE["width"]:
            wide[name] = width
    page.close()
    assert wide == {}


@pytest.mark.slow
def test_search_finds_dropout(address: str, browser: Any) -> None:
    page = browser.new_page()
    page.goto(address, wait_until="load")
    page.locator("input.md-search__input").click()
    page.locator("input.md-search__input").fill("dropout")
    results = page.locator(".md-search-result__link")
    results.first.wait_for(timeout=120_000)
    found = [results.nth(i).get_attribute("href") or "" for i in range(results.count())]
    page.close()
    assert [href for href in found if "/memory/" in href]
