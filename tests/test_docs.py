"""Every Python snippet of the documentation runs; the files and commands it names exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SNIPPETS = {
    page: re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    for page in PAGES
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.mark.parametrize("page", [p for p in PAGES if SNIPPETS[p]], ids=lambda page: page.name)
def test_snippets_run(page):
    namespace = {"__name__": page.stem}
    for snippet in SNIPPETS[page]:
        exec(compile(snippet, page.name, "exec"), namespace)


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            assert heading in [h.lower().replace(" ", "-") for h in headings], target


@each_page
def test_files_named_exist(page):
    for path in re.findall(r"`((?:csrc|tfwn|models|tests|benchmarks)/[\w./]+)`", page.read_text()):
        if "_build_info" not in path:
            assert (ROOT / path).exists(), path


def test_make_targets_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?<!\w)make ([a-z-]+)(?:`|$| TENSORFLOW)", page.read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
