"""`report.html` in a real browser: it sorts, filters and opens samples, asks no host, and axe-core has nothing to say.

Needs the packages `playwright` and `axe-playwright-python` and a Chromium on the PATH; no browser is downloaded.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_html import DIGESTS, HOSTILE, hostile, row
from test_report import example

from robusteval.render.html import render
from robusteval.render.pictures import Gallery, Picture, data_uri

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH")

SIZES = {"phone": (390, 844), "desktop": (1280, 900)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a page with 120 samples, of which the first 40 are broken, the next 20 misclassified; and a hostile one."""
    uris = [data_uri(torch.rand(1, 8, 8)) for _ in range(3)]
    pictures = {i: Picture(uris[0], uris[1], uris[2], 5.0) for i in range(10)}
    rows = [row(i, "broken", label=i % 2, margin=float(i * 37 % 101)) for i in range(40)]
    rows += [row(i, "misclassified", prediction=0, margin=-1.0, reason=None) for i in range(40, 60)]
    rows += [row(i, margin=200.0 + i) for i in range(60, 120)]
    stage = {"plugin": "pgd", "params": {}, "name": "pgd", "kind": "attack"}
    suite = {**example().suite.model_dump(), "stages": [stage]}
    folder = tmp_path_factory.mktemp("pages")
    texts = {"plain": render(example(suite=suite), rows, Gallery(pictures, 30), DIGESTS), "hostile": hostile()}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


class Visit:
    """A page that is open, what it complained about and what it asked for."""

    def __init__(self, browser: Any, path: Path, size: str = "desktop", scheme: str = "light") -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *error: object) -> None:
        asked = [url[:60] for url in self.requests if not url.startswith(("file:", "data:"))]
        self.context.close()
        if error[0] is None:
            assert self.complaints == []
            assert asked == []

    def column(self, place: int) -> list[str]:
        """Return the texts of a column of the sample table."""
        cells: list[str] = self.page.locator(f"#samples tbody tr > :nth-child({place})").all_inner_texts()
        return [text.strip() for text in cells]

    @property
    def found(self) -> str:
        text: str = self.page.locator("#found").inner_text()
        return text


def test_sorting_the_samples(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        assert visit.column(1) == [str(i) for i in range(50)]
        header = visit.page.locator("#samples th", has_text="margin")
        for order in ("ascending", "descending"):
            header.get_by_role("button").click()
            assert header.get_attribute("aria-sort") == order
            margins = [float(text) for text in visit.column(6)]
            assert margins == sorted(margins, reverse=order == "descending")
            assert visit.page.locator("#samples th[aria-sort]").count() == 1
        assert max(margins) == 319
        distance = visit.page.locator("#samples th", has_text="distance")
        for _ in range(2):
            distance.get_by_role("button").click()
            assert visit.column(7)[:40] == ["0.05"] * 40
            assert visit.column(7)[40:] == [""] * 10, "what has no distance comes last either way"


def test_filtering_and_paging(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        page = visit.page
        page.get_by_label("Verdict").select_option(label="unknown (60)")
        assert visit.found == "60 of 120 samples"
        assert set(visit.column(4)) == {"? unknown"}
        page.get_by_role("button", name="Next page").click()
        assert visit.column(1) == [str(i) for i in range(110, 120)]
        assert page.get_by_role("button", name="Next page").is_disabled()
        page.get_by_role("button", name="Show all").click()
        page.locator("#found", has_text=re.compile(r"^\s*120 ")).wait_for()
        page.get_by_role("combobox", name="Class").select_option(label="a (20)")
        page.get_by_role("combobox", name="Closed by").select_option(label="pgd (40)")
        assert visit.column(1) == [str(i) for i in range(0, 40, 2)]
        page.get_by_role("searchbox", name="Sample").fill("3")
        assert visit.column(1) == ["30", "32", "34", "36", "38"]
        page.get_by_role("searchbox", name="Sample").fill("zzz")
        assert (visit.found, visit.column(1)) == ("0 of 120 samples", [])


def test_a_sample_opens_by_keyboard_and_closes(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"], "phone") as visit:
        page = visit.page
        page.get_by_role("button", name="sample 5", exact=True).focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        assert "Sample 5" in dialog.inner_text()
        assert "difference \u00d7\u00a05" in dialog.inner_text()
        assert dialog.locator("img").count() == 3
        drawn = "images => images.every(one => one.naturalWidth === 8)"
        assert dialog.locator("img").evaluate_all(drawn)
        assert dialog.locator("img").first.evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"
        dialog.get_by_role("button", name="Next").click()
        assert "Sample 6" in dialog.inner_text()
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert page.evaluate("document.activeElement.textContent") == "5", "focus returns to what opened it"


def test_the_class_table_sorts(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"]) as visit:
        table = visit.page.locator("table[data-sortable]")
        for expected in (["20", "100"], ["100", "20"]):
            table.get_by_role("button", name="samples").click()
            assert table.locator("tbody td:nth-child(2)").all_inner_texts() == expected


@pytest.mark.parametrize(("size", "scheme"), [("phone", "light"), ("desktop", "dark")])
def test_accessibility(browser: Any, files: dict[str, Path], size: str, scheme: str) -> None:
    """No serious or critical violation by axe-core, page and open sample; nothing is wider than the screen."""
    with Visit(browser, files["plain"], size, scheme) as visit:
        page = visit.page
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        found = axe.Axe().run(page).response["violations"]
        page.get_by_role("button", name="sample 5", exact=True).click()
        found += axe.Axe().run(page).response["violations"]
        grave = [
            (one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")
        ]
        assert grave == []


def test_print_shows_the_report_and_no_controls(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["plain"], scheme="dark") as visit:
        visit.page.emulate_media(media="print")
        assert not visit.page.locator("nav").is_visible()
        assert not visit.page.get_by_label("Verdict").is_visible()
        assert visit.page.locator("#samples tbody tr").first.is_visible()
        background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == "rgb(255, 255, 255)"
        assert visit.page.pdf(format="A4").startswith(b"%PDF")


def test_a_hostile_report_runs_nothing(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["hostile"]) as visit:
        page = visit.page
        page.get_by_role("button", name="sample 0", exact=True).click()
        assert HOSTILE in page.get_by_role("dialog").locator("tbody").evaluate("node => node.textContent")
        assert page.evaluate("window.hacked") is None
        assert page.locator("script").count() == 2
        assert page.locator("img[onerror]").count() == 0


def test_the_policy_stops_what_would_be_injected(browser: Any, files: dict[str, Path], tmp_path: Path) -> None:
    """Were a string to break out after all, the browser would refuse to run it."""
    text = files["plain"].read_text(encoding="utf-8")
    for injected in ("<script>window.hacked=1</script>", "<img src=data:, onerror=window.hacked=1>"):
        (tmp_path / "page.html").write_text(text.replace("</body>", f"{injected}</body>"), encoding="utf-8")
        visit = Visit(browser, tmp_path / "page.html")
        visit.page.wait_for_timeout(100)
        assert visit.page.evaluate("window.hacked") is None
        assert "Content Security Policy" in visit.complaints[0]
        visit.context.close()
