"""The code blocks of the documentation, and what is done with each.

A block of Python or shell is run, after `tests/prelude.py` and the page's earlier blocks, unless a
comment in the line before it says who runs it:

    <!-- run: NAME -->        a recipe of `tests/recipes.py`
    <!-- ci: NAME -->         `.ci/run`
    <!-- not run: REASON -->  nobody
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
RUN = ("python", "bash")

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[\w ]+): (?P<what>.*?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: The document, relative to the checkout.
        line: Where its first line is.
        language: What its fence says.
        code: Its text.
        mark: What the comment before it says that is done with it; empty without one.
        what: The rest of that comment.
    """

    page: str
    line: int
    language: str
    code: str
    mark: str
    what: str

    @property
    def is_run(self) -> bool:
        return self.language in RUN and not self.mark


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a document, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page.relative_to(ROOT).as_posix(),
            text.count("\n", 0, found.start("code")) + 1,
            found["language"],
            found["code"],
            found["mark"] or "",
            found["what"] or "",
        )
        for found in _BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
