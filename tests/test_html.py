"""`report.html`: what it says, what it does not let through, how large it gets; the `render` command."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Cli, one_sentence
from PIL import Image
from test_report import example

from robusteval.cli.render import _samples
from robusteval.datasets.base import Split
from robusteval.evaluation.validate import reseal
from robusteval.render import _charts
from robusteval.render.html import SIGNS, lead, render
from robusteval.render.pictures import MOST, MOST_BYTES, SIDE, Gallery, Picture, data_uri, gallery
from robusteval.report import Rate, SampleRow
from robusteval.verdict import Verdict

HOSTILE = """</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'"&\u2028{{ 7*7 }}"""
DIGESTS = {"report.json": "0" * 64, "samples.jsonl": "1" * 64}


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": [], "title": [], "h1": []}
        self.text = ""
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open in self.inside:
            self.inside[self._open][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    @property
    def data(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.inside["script"][0])
        return found

    def policy(self) -> str:
        return next(a["content"] or "" for tag, a in self.elements if a.get("http-equiv") == "Content-Security-Policy")


def row(sample: int, verdict: str = "unknown", **facts: object) -> SampleRow:
    base = {"id": sample, "label": 1, "prediction": 1, "margin": 0.5, "verdict": verdict, "reason": "survived"}
    if verdict == "broken":
        base |= {"stage": "pgd", "reason": None, "adv_prediction": 0, "adv_margin": -0.1, "adv_distance": 0.05}
    return SampleRow.model_validate({**base, **facts})


def hostile() -> str:
    """Return a page of a report in which every string that a stranger chooses tries to break out."""
    record = json.loads(example().model_dump_json())
    record["model"] |= {"name": HOSTILE, "source": HOSTILE, "architecture": HOSTILE, "training": {HOSTILE: HOSTILE}}
    record["data"] |= {"title": HOSTILE, "name": HOSTILE, "classes": [HOSTILE, HOSTILE + "2"]}
    record["suite"] |= {"title": HOSTILE, "reference": HOSTILE, "adaptations": [HOSTILE]}
    record["stages"][0] |= {"name": HOSTILE, "warnings": [HOSTILE]}
    record["findings"][0] |= {"name": HOSTILE, "message": HOSTILE, "advice": HOSTILE}
    record["baselines"] |= {"notes": [HOSTILE], "snapshot": HOSTILE}
    record["environment"] |= {"python": HOSTILE, "packages": {HOSTILE: HOSTILE, "robusteval": HOSTILE}}
    record |= {"command": HOSTILE, "created": HOSTILE}
    uri = data_uri(torch.rand(1, 8, 8))
    rows = [row(0, "broken", stage=HOSTILE), row(1, reason=HOSTILE)]
    report = type(example()).model_validate(record)
    return render(report, rows, Gallery({0: Picture(uri, uri, uri, 5.0)}, 3, ("A note.",)), DIGESTS)


def test_strings_of_a_report_stay_text() -> None:
    page = Page(hostile())
    assert "script" not in {tag for tag, attributes in page.elements if attributes.get("onerror")}
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.inside["title"][0] == f"{HOSTILE}: robustness report"
    assert HOSTILE in page.inside["h1"][0]
    assert page.data["classes"] == [HOSTILE, HOSTILE + "2"]
    assert "hacked" not in page.inside["script"][1]
    assert "49" not in page.inside["title"][0]


def test_nothing_is_loaded_and_only_our_own_script_and_style_apply() -> None:
    page = Page(hostile())
    links = [
        a[name] or "" for _, a in page.elements for name in ("src", "href", "xlink:href", "action", "data") if name in a
    ]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links), links
    assert not [a for _, a in page.elements if "style" in a], "the policy would ignore it"
    style, script = page.inside["style"][0], page.inside["script"][1]
    for text in (style, script):
        assert "url(h" not in text
        assert "//" not in text.replace("// ", "")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in page.policy()
    assert page.policy().startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in page.policy()


def test_every_table_header_has_a_scope_and_every_figure_a_name() -> None:
    page = Page(hostile())
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.elements if tag == "th")
    assert all("alt" in attributes for tag, attributes in page.elements if tag == "img")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [a for tag, a in page.elements if tag == "svg" and a.get("role") == "img"]
    assert len(named) >= 3
    assert all(part in ids for a in named for part in (a["aria-labelledby"] or "").split())


def test_the_page_says_what_the_other_renderings_say() -> None:
    page = Page(render(example(), [row(0), row(1, "broken")], Gallery(), DIGESTS))
    for fact in ("75.00 %", "95.00 %", "150/200", "not attempted", "first 200 of 360", "Wong2020Fast", "rank 3"):
        assert fact in page.text, fact
    for fact in ("2 to 9", "fewer targets", "Odd. Look.", "warning", "0" * 64, "2" * 64, "robusteval evaluate"):
        assert fact in page.text, fact
    assert "At most 75.00 % of the 200 images" in page.text
    assert set(SIGNS) == {verdict.value for verdict in Verdict}


def test_the_lead_claims_no_more_than_the_bracket() -> None:
    results = json.loads(example().results.model_dump_json())
    for certified, said in (
        (20, "Between 10.00 % and 75.00 %"),
        (150, "attacks and proofs meet"),
        (149, "Between 74.50"),
    ):
        report = example(results={**results, "certified": Rate.of(certified, 200)})
        assert said in lead(report)


def test_bars_add_up() -> None:
    bars = _charts.stacked({Verdict.MISCLASSIFIED: 10, Verdict.BROKEN: 40, Verdict.UNKNOWN: 50, Verdict.CERTIFIED: 100})
    assert [(bar.verdict, bar.x, bar.width) for bar in bars] == [
        ("certified", 0, 50),
        ("unknown", 50, 25),
        ("broken", 75, 20),
        ("misclassified", 95, 5),
    ]


@pytest.mark.parametrize("spread", [1.0, 1e-30, 1e308, 0.0])
def test_histograms_hold_every_sample_and_stay_in_their_frame(spread: float) -> None:
    rng = np.random.default_rng(0)
    verdicts = [list(Verdict)[i] for i in rng.integers(0, 4, 500)]
    chart = _charts.histogram(
        [(float(v) * spread, verdict) for v, verdict in zip(rng.uniform(-1, 1, 500), verdicts, strict=True)]
    )
    assert chart is not None
    for verdict in Verdict:
        assert sum(bar.count for bar in chart.bars if bar.verdict == verdict) == verdicts.count(verdict)
    assert all(bar.y >= 0 and bar.y + bar.height <= 100.01 and 0 <= bar.x <= 100 for bar in chart.bars)
    columns: dict[float, float] = {}
    for bar in chart.bars:
        columns[bar.x] = columns.get(bar.x, 0) + bar.height
    assert max(columns.values()) == pytest.approx(100, abs=0.01)
    assert _charts.histogram([]) is None


def decode(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_the_pixels(channels: int, tmp_path: Path, digits: Split) -> None:
    x = torch.rand(channels, 9, 7, generator=torch.Generator().manual_seed(0))
    shown = decode(data_uri(x))
    expected = (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(shown.reshape(expected.shape), expected)
    assert decode(data_uri(torch.rand(2, 9, 7))).shape == (9, 7)
    assert max(decode(data_uri(torch.rand(3, 224, 200))).shape) <= SIDE


def save_witnesses(folder: Path, ids: list[int], x_adv: torch.Tensor) -> None:
    (folder / "witnesses").mkdir()
    tensors = {"ids": torch.tensor(ids), "x_adv": x_adv}
    safetensors.torch.save_file(tensors, folder / "witnesses" / "00000.safetensors")


def test_a_difference_is_magnified_by_what_it_says(tmp_path: Path, digits: Split) -> None:
    x = digits.images([7])[0]
    change = torch.zeros_like(x)
    change[0, 0, 0], change[0, 1, 1] = 0.05, -0.025
    x_adv = (x + change).clamp(0, 1)
    save_witnesses(tmp_path, [7], x_adv[None])
    picture = gallery(tmp_path, digits).pictures[7]
    assert picture.clean is not None
    assert picture.difference is not None
    assert picture.scale == pytest.approx(0.5 / float((x_adv - x).abs().max()), rel=1e-6)
    assert np.array_equal(decode(picture.clean), (x[0] * 255).round().numpy().astype(np.uint8))
    expected = ((0.5 + (x_adv - x)[0].double() * picture.scale).clamp(0, 1) * 255).round().numpy()
    assert np.array_equal(decode(picture.difference), expected)
    without = gallery(tmp_path, None)
    assert without.pictures[7].clean is None
    assert without.pictures[7].difference is None
    assert "Clean images are left out" in without.notes[0]


def test_ten_thousand_samples_stay_a_few_megabytes(tmp_path: Path) -> None:
    """Noise compresses worst; the page says how many of the adversarial inputs it leaves out."""
    count = MOST + 300
    save_witnesses(tmp_path, list(range(count)), torch.rand(count, 3, 48, 48))
    pictures = gallery(tmp_path, None)
    assert 0 < len(pictures.pictures) <= MOST
    assert sum(picture.bytes for picture in pictures.pictures.values()) < MOST_BYTES + 30_000
    rows = [row(i, "broken" if i < count else "unknown", margin=0.123456789 * i) for i in range(10_000)]
    text = render(example(), rows, pictures, DIGESTS)
    assert len(text) < 5_000_000
    assert f"{count - len(pictures.pictures)} further adversarial inputs are left out" in text


SUITE = """title = "Small"
[[stages]]
name = "pgd"
attack = "pgd"
params = { steps = 3 }
"""


def test_evaluate_seals_the_page_and_render_makes_the_same_again(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "small.toml").write_text(SUITE)
    flags = ("--suite", "small.toml", "--limit", "20", "--workers", "1", "--eps", "0.1,0.2", "--out", "run")
    done = cli("evaluate", "--model", model_folder, *flags)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    first, manifest = (run / "report.html").read_bytes(), (run / "manifest.json").read_bytes()
    assert b'"report.html"' in manifest
    assert b"data:image/png" in first
    assert cli("validate", "run").returncode == 0

    for name in ("report.html", "report.md", "curve.csv", "curve.png"):
        (run / name).write_text("something else")
    assert cli("validate", "run").returncode == 3
    done = cli("render", "run")
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "run/report.html", "")
    assert ((run / "report.html").read_bytes(), (run / "manifest.json").read_bytes()) == (first, manifest)

    own = hashlib.sha256((run / "samples.jsonl").read_bytes()).hexdigest()
    (run / "report.html").write_bytes(first.replace(own.encode(), b"0" * 64))
    reseal(run, "report.html")
    done = cli("validate", "run")
    assert (done.returncode, "report.html is not made from the files beside it" in done.stderr) == (3, True)

    lines = (run / "samples.jsonl").read_text().splitlines()
    (run / "samples.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    done = cli("render", "run")
    assert (done.returncode, one_sentence(done.stderr)) == (3, True), done.stderr
    assert "not a valid report" in done.stderr


def test_data_that_is_not_what_was_evaluated_gives_no_pictures(
    tmp_path: Path, digits: Split, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads(example().data.model_dump_json())
    right = example(data={**facts, "evaluated": 5, "sha256": digits.take(slice(0, 5)).content_hash})
    found = _samples(right, tmp_path, None)
    assert found is not None
    assert torch.equal(found.labels, digits.labels[:5])
    assert _samples(example(data={**facts, "evaluated": 5}), tmp_path, None) is None
    assert _samples(example(data={**facts, "name": "mnist"}), tmp_path, str(tmp_path)) is None
    (tmp_path / "launch.json").write_text('{"data_dir": ["x"]}')
    assert _samples(example(data={**facts, "name": "mnist"}), tmp_path, None) is None
    assert capsys.readouterr().err.count("clean images are left out") == 3
