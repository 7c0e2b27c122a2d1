"""The page: a plain table without script, sortable and filterable with it, for everybody."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, one_sentence
from leaderboard_kit import SCRIPT, Files, changed

from robusteval.baselines.rank import load
from robusteval.evaluation.validate import read_report
from robusteval.leaderboard import pages
from robusteval.leaderboard.entry import Point, Published, entry_of

REFERENCES = sum(entry.threat in ("Linf", "L2") and entry.eps is not None for entry in load())


@pytest.fixture(scope="module")
def entries(small_run: Path) -> list[Published]:
    """Three submissions, one of each status, that differ in what is sorted and filtered."""
    entry = entry_of(read_report(small_run))
    point = Point(eps="0.05", empirical=entry.empirical, certified=None)
    made = []
    for number, status in enumerate(("claimed", "checked", "refuted")):
        clean = entry.clean.of(entry.clean.count - number, entry.clean.total)
        facts = {"model": f"{'zya'[number]}-net{SCRIPT}", "clean": clean, "curve": (point,) * number}
        other = {"norm": "L2", "eps": "0.5", "radius": 0.5} if number else {}
        report = entry.model_copy(update={**facts, **other, "certified": entry.empirical if number == 1 else None})
        common = {"owner": "alice", "received": "2026-02-03T00:00:00+00:00", "reason": "Because."}
        made.append(Published(id=str(number) * 64, status=status, report=report, **common))
    return made


@pytest.fixture(scope="module")
def site(entries: list[Published], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    pages.write_site(entries, out)
    return out


def test_without_script_the_page_is_a_table_of_everything(site: Path) -> None:
    text = (site / "index.html").read_text()
    assert text.count('<th role="rowheader"') == 3 + REFERENCES
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert len(re.findall(r"<script|\son\w+=|style=|javascript:", text)) == 1  # the one file
    for number in range(3):
        assert f'href="submissions/{str(number) * 64}.html"' in text
        assert "<script" not in (site / "submissions" / f"{str(number) * 64}.html").read_text()
    first, refuted = text.index('class="reference"'), text.index("a-net")
    assert text.index("y-net") < refuted < text.index("z-net") < first, "what is refuted is last of its setting"


def test_build_writes_valid_runs_and_refuses_others(cli: Cli, small_run: Path, files: Files, tmp_path: Path) -> None:
    built = cli("leaderboard", "build", small_run, small_run, "--out", tmp_path / "site")
    assert (built.returncode, "1 results" in built.stdout) == (0, True), built.stderr
    assert len(list((tmp_path / "site" / "submissions").iterdir())) == 1
    forged = tmp_path / "forged"
    shutil.copytree(small_run, forged)
    for name, data in changed(files, results__clean__count=12).items():
        (forged / name).write_bytes(data)
    done = cli("leaderboard", "build", small_run, forged, "--out", tmp_path / "other")
    assert (done.returncode, one_sentence(done.stderr)) == (3, True), done.stderr
    assert not (tmp_path / "other").exists()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


class Watched:
    """A page with what it complained of and which hosts it asked."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.page = browser.new_context(**options).new_page()
        self.trouble: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)

    def column(self, key: str) -> list[str]:
        """Return the values of the rows that are shown, in order."""
        found: list[str] = self.page.eval_on_selector_all(
            f'#board tbody tr:not([hidden]) [data-key="{key}"]', "cells => cells.map(cell => cell.dataset.value)"
        )
        return found

    def check(self, address: str) -> None:
        """Assert that nothing went wrong and nobody else was asked."""
        assert self.trouble == []
        assert all(url.startswith(address) for url in self.asked)


def test_headers_sort_and_choices_filter(chromium: Any, address: str) -> None:
    watched = Watched(chromium, address)
    page = watched.page
    assert page.locator("#count").inner_text() == f"{3 + REFERENCES} of {3 + REFERENCES} rows"
    header = page.locator('th[data-key="clean"]')
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    numbers = [float(value) for value in watched.column("clean")]
    assert numbers == sorted(numbers, reverse=True)
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    numbers = [float(value) for value in watched.column("clean")]
    assert numbers == sorted(numbers)
    page.locator('th[data-key="certified"]').get_by_role("button").click()
    assert header.get_attribute("aria-sort") is None
    assert [value != "" for value in watched.column("certified")] == [True] + [False] * (2 + REFERENCES)
    page.get_by_label("Data", exact=True).select_option("digits")
    page.get_by_label("Sort by").select_option("model 1")
    assert [value[0] for value in watched.column("model")] == ["a", "y", "z"]
    page.get_by_label("Norm", exact=True).select_option("L2")
    assert [value[0] for value in watched.column("model")] == ["a", "y"]
    page.get_by_label("Status", exact=True).select_option("checked")
    assert page.locator("#count").inner_text() == f"1 of {3 + REFERENCES} rows"
    page.get_by_role("link", name="y-net").click()
    assert "checked" in page.locator("h2").first.inner_text()
    page.get_by_role("link", name="All results").click()
    assert page.locator("#board").is_visible()
    watched.check(address)


def test_without_script_the_controls_are_not_there(chromium: Any, address: str) -> None:
    watched = Watched(chromium, address, java_script_enabled=False)
    assert watched.page.locator("#filters").is_hidden()
    assert watched.page.locator("#board tbody tr").count() == 3 + REFERENCES
    assert watched.page.get_by_role("button").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("path", ["", f"submissions/{'1' * 64}.html"])
def test_everybody_can_read_it(chromium: Any, address: str, path: str, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    size = {"width": width, "height": 800}
    watched = Watched(chromium, address + path, viewport=size, color_scheme=scheme, bypass_csp=True)
    wide = watched.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, "the page itself scrolls sideways"
    watched.page.evaluate("document.querySelectorAll('tbody tr:nth-child(n + 9)').forEach(row => row.remove())")
    found = axe.Axe().run(watched.page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []
    watched.check(address)
