"""Hooks of MkDocs: what lies outside of docs/ becomes pages, so that links work on the site too.

``[script](../benchmarks/traffic.py)`` in docs/memory.md -> the page ``benchmarks/traffic`` of the
site, which shows the script.

Invariant: links in the Markdown files are those that work in the checkout.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
#: What is shown besides docs/: files that pages link to.
SHOWN = ("CHANGELOG.md", "benchmarks/*.py", "benchmarks/results/**/*.*", "examples/**/*.py")
COPIED = (".svg", ".json")

_LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(class|func|mod|meth|attr):<code>~?([\w.]+)</code>")


def address(path: str) -> str:
    """Where a file of the checkout is on the site, in terms of docs/."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "CHANGELOG.md":
        return "changelog.md"
    return str(Path(path).with_suffix(".md")) if path.endswith(".py") else path


def with_site_links(text: str, path: str) -> str:
    """The text of a file of the checkout, with links to where things are on the site."""

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[2]))
        if not (ROOT / target).is_file():
            return found[0]
        here = posixpath.dirname(address(path)) or "."
        return f"{found[1]}{posixpath.relpath(address(target), here)}{found[3] or ''})"

    return _LINK.sub(link, text)


def page_of_script(path: Path) -> str:
    """A page that shows a script: its first line, where it is, its code."""
    code = path.read_text(encoding="utf-8")
    summary = (ast.get_docstring(ast.parse(code)) or path.stem).split("\n")[0]
    name = path.relative_to(ROOT).as_posix()
    return f"# {path.stem}\n\n{summary}\n\n`{name}`:\n\n````python\n{code}````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/."""
    for path in sorted(found for pattern in SHOWN for found in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        to = address(name)
        if path.suffix == ".py":
            files.append(File.generated(config, to, content=page_of_script(path)))
        elif path.suffix == ".md":
            text = with_site_links(path.read_text(encoding="utf-8"), name)
            files.append(File.generated(config, to, content=text))
        elif path.suffix in COPIED:
            files.append(File.generated(config, to, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside of docs/ at their pages."""
    if page.file.generated_by is not None:
        return markdown
    return with_site_links(markdown, f"docs/{page.file.src_uri}")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Roles in docstrings, such as ``:class:``, become links to the API reference."""

    def link(found: re.Match[str]) -> str:
        name = found[2]
        code = f"<code>{name.rpartition('.')[2]}</code>"
        # Only whole names of the package are anchors.
        return f'<a href="#{name}">{code}</a>' if name.startswith("runlora_fx.") else code

    return _ROLE.sub(link, html)
