"""The pages run: every Python block, in order, with the output that the page shows; and every link and name holds.

A fenced `python` block is run unless the comment `<!-- not run -->` stands before it. All blocks of a page share one
namespace. A fenced `text` or `output` block that directly follows a Python block is what that block prints, and so is
a `mermaid` block after one that calls `to_mermaid`.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import random
import re
import sys
import traceback
import types
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import mlo

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "<!-- not run -->"

FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,})\s*(?P<language>[\w+-]*)")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")
LINK = re.compile(r"\]\(\s*<?([^\s)>]+)>?[^)]*\)|^\s*\[[^\]]+\]:\s*(\S+)|\b(?:src|href)=[\"']([^\"']+)[\"']")
EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line of its first line of text, and what stands before it.

    `comment` is the last line before the fence that is not empty; `follows` says that this line ends a block.
    """

    language: str
    text: str
    line: int
    comment: str
    follows: bool


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def divided(page: str, text: str) -> tuple[list[Block], list[str]]:
    """The fenced blocks of a page, and its other lines (empty ones in the place of blocks)."""
    blocks: list[Block] = []
    prose: list[str] = []
    lines = iter(enumerate(text.splitlines(), 1))
    comment, follows = "", False
    for number, line in lines:
        opening = FENCE.match(line)
        if opening is None:
            prose.append(line)
            if line.strip():
                comment, follows = line.strip(), False
            continue
        closing = re.compile(rf"^\s*{opening['fence'][0]}{{{len(opening['fence'])},}}\s*$")
        inside = []
        for _, content in lines:
            if closing.match(content):
                break
            inside.append(content.removeprefix(opening["indent"]))
        else:
            raise AssertionError(f"{page}:{number}: the block that begins here is never closed")
        prose += [""] * (len(inside) + 2)
        blocks.append(Block(opening["language"].lower(), "\n".join(inside), number + 1, comment, follows))
        comment, follows = "", True
    return blocks, prose


def shown(block: Block, following: Block | None) -> bool:
    """Whether the page shows what `block` prints."""
    if following is None or not following.follows:
        return False
    return following.language in ("text", "output") or (following.language == "mermaid" and "to_mermaid" in block.text)


def stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run(page: str, text: str, filename: str) -> int:
    """Run the blocks of a page and compare what they print; return how many were run."""
    blocks, _ = divided(page, text)
    python = [i for i, b in enumerate(blocks) if b.language == "python"]
    others = [b for b in blocks if b.language in ("py", "python3", "pycon")]
    assert not others, f"{page}:{others[0].line}: write ```python instead of ```{others[0].language}, so that it is run"
    namespace = sys.modules["__main__"].__dict__
    count = 0
    for i in python:
        block = blocks[i]
        if block.comment == NOT_RUN:
            continue
        printed = io.StringIO()
        # Empty lines before the code, so that a traceback gives the lines of the page.
        code = "\n" * (block.line - 1) + block.text
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, filename, "exec", dont_inherit=True), namespace)
        except Exception as error:
            inside = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == filename]
            line = inside[-1] if inside else getattr(error, "lineno", None) or block.line
            raise AssertionError(
                f"{page}:{line}: the block that begins at line {block.line} raised {type(error).__name__}: {error}"
            ) from error
        count += 1
        following = blocks[i + 1] if i + 1 < len(blocks) else None
        if shown(block, following):
            found, expected = stripped(printed.getvalue()), stripped(following.text)
            difference = "\n".join(difflib.unified_diff(expected, found, "the page", "the block", lineterm=""))
            if found != expected:
                raise AssertionError(
                    f"{page}:{following.line}: not what the block at line {block.line} prints\n{difference}"
                )
    assert count or not python, f"{page}: none of its {len(python)} Python blocks is run"
    return count


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A page runs as a script of its own would: torch's defaults, a seed, one thread, a directory to write in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page_runs(page, fresh):
    assert page.exists(), f"{named(page)} does not exist"
    run(named(page), page.read_text(encoding="utf-8"), str(page))


# --- links and names -------------------------------------------------------------------------------------------


def prose(page: Path) -> list[str]:
    return divided(named(page), page.read_text(encoding="utf-8"))[1]


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    names = set()
    for line in prose(page):
        heading = HEADING.match(line)
        if heading is None:
            continue
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
        slug = "".join(c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LN").replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
    return names


def links(page: Path) -> list[tuple[int, str]]:
    """Line and target of every link to something in the repository."""
    found = []
    for number, line in enumerate(prose(page), 1):
        for match in LINK.finditer(re.sub(r"`[^`]*`", "", line)):
            target = next(g for g in match.groups() if g)
            if not EXTERNAL.match(target) and not target.startswith("//"):
                found.append((number, target))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    assert page.exists(), f"{named(page)} does not exist"
    for number, target in links(page):
        place = f"{named(page)}:{number}: the link to {target!r}"
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), f"{place} leaves the repository"
        assert file.exists(), f"{place} leads to no file"
        if fragment and file.suffix == ".md":
            headings = anchors(file)
            assert fragment in headings, f"{place} leads to no heading; there are {', '.join(sorted(headings))}"


def test_every_public_name_is_documented():
    text = "\n".join(p.read_text(encoding="utf-8") for p in PAGES if p.exists())
    missing = [n for n in mlo.__all__ if n != "__version__" and not re.search(rf"\b{n}\b", text)]
    assert not missing, f"mentioned neither in README.md nor in docs/: {', '.join(missing)}"


# --- the checks themselves -------------------------------------------------------------------------------------

PAGE = """# A page

```python
x = 1
print(x, "  ")
```

```text
{}
```

<!-- not run -->
```python
raise RuntimeError
```

    ```python
    x += 1
    if __name__ == "__main__":
        print(x, torch)
    ```
"""


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (PAGE.format(1), r"page:20: the block that begins at line 18 raised NameError: name 'torch' is not defined"),
        (PAGE.format(2), r"page:9: not what the block at line 4 prints\n--- the page\n.*\n.*\n-2\n\+1$"),
        ("```python\nx =\n```", r"page:2: .* raised SyntaxError"),
        ("text\n```python\n1", r"page:2: the block that begins here is never closed"),
        ("<!-- not run -->\n\n```python\n1\n```", r"page: none of its 1 Python blocks is run"),
        ("```py\n1\n```", r"page:2: write ```python instead of ```py"),
    ],
)
def test_a_wrong_page_is_found_out(page, message, fresh):
    with pytest.raises(AssertionError, match=message):
        run("page", page, "page.md")


def test_a_right_page(fresh):
    assert run("page", PAGE.format(1).replace("torch", "'text'"), "page.md") == 2
    assert run("page", "No code.\n\n```bash\nfalse\n```", "page.md") == 0
