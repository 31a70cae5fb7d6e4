"""The documentation's pages and the blocks of code in them."""

import re

from helpers.environments import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
_BLOCK = re.compile(
    r"^(`{3,})(\{[\w-]+\})? ?(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL
)
_OPTION = re.compile(r":[\w-]+:")


def blocks(page, *kinds):
    """Yields the code of the blocks of some kinds ("code-cell", "python", "bash", …).

    The code is without the block's options.
    """
    for _, role, language, body in _BLOCK.findall(page.read_text()):
        if role.strip("{}") in kinds or language in kinds:
            lines = body.splitlines(keepends=True)
            yield "".join(line for line in lines if not _OPTION.match(line))


def captioned(page):
    """Returns the blocks of a page that have a caption, as `{caption: code}`."""
    captions = {}
    for *_, body in _BLOCK.findall(page.read_text()):
        first_line, _, code = body.partition("\n")
        if first_line.startswith(":caption: "):
            captions[first_line.removeprefix(":caption: ")] = code.lstrip("\n")
    return captions
