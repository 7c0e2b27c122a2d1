"""`analyze`: margins, gradients and trajectories against closed forms, and the real commands."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, one_sentence
from PIL import Image
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from robusteval.analysis import gradients
from robusteval.analysis.margin_views import summary
from robusteval.analysis.margins import TINY, Margins, margin, measure, scale_free
from robusteval.analysis.subjects import Request, gather
from robusteval.analysis.trajectory import ce_margin, ce_time, overtaking, ovr_margin, ovr_time
from robusteval.datasets.base import DataInfo, Split, TensorPixels, hold_out
from robusteval.models.base import Classifier
from robusteval.models.io import build_model, save_model
from robusteval.settings import PluginSpec
from robusteval.threat import Norm, ThreatModel
from robusteval.training.objective import OBJECTIVES, StepContext

EPS = "0.05"
CLASSES = ("a", "b")


def linear(weight: Tensor, scale: float = 1.0) -> nn.Module:
    """Return a two-class model with logits ``scale * (0, w (x - 1/2))``, so that margins lie around 0."""
    layer = nn.Linear(weight.numel(), 2)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.stack([torch.zeros_like(weight), weight]))
        layer.bias.copy_(scale * torch.stack([torch.zeros(()), -weight.sum() / 2]))
    return nn.Sequential(nn.Flatten(), layer)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def grey() -> Split:
    """Forty images whose pixels stay clear of the box's walls, so that a ball of 0.05 fits in."""
    rng = torch.Generator().manual_seed(2)
    info = DataInfo("Grey", (1, 3, 4), CLASSES, (0.5,), (1.0,))
    x, y = 0.1 + 0.8 * torch.rand((40, 1, 3, 4), generator=rng), torch.arange(40) % 2
    return Split(info, "test", TensorPixels(x), y, torch.arange(40))


def signed(split: Split, weight: Tensor) -> Tensor:
    """Return the exact clean margins of `linear` on ``split``."""
    value = (split.images(slice(None)).flatten(1).double() - 0.5) @ weight.double()
    return torch.where(split.labels == 1, value, -value)


@pytest.fixture(scope="module")
def small() -> Classifier:
    """An untrained network for images of 8 x 8 pixels and three classes."""
    return build_model(PluginSpec(name="small_cnn"), (1, 8, 8), 3, (0.5,), (0.25,), seed=0)


@pytest.fixture(scope="module")
def net(small: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model whose card names the data beside it: 60 noisy pictures of three classes in each part."""
    root, rng = tmp_path_factory.mktemp("analysis"), np.random.default_rng(0)
    for i in range(120):
        folder = root / "pictures" / ("train", "test")[i % 2] / f"class {i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    training = {"dataset": f"imagefolder:{root / 'pictures'}", "norm": "Linf", "eps": "0.1"}
    card = {"architecture": {"name": "small_cnn"}, "shape": (1, 8, 8), "num_classes": 3, "training": training}
    save_model(root / "net", small, card)
    return root / "net"


@pytest.mark.parametrize(("norm", "dual"), [("Linf", 1), ("L2", 2)])
def test_margins_of_a_linear_model_are_exact(grey: Split, weight: Tensor, norm: str, dual: int) -> None:
    found = measure(linear(weight), grey, ThreatModel.parse(norm, EPS), steps=40)  # on the L2 sphere it takes a while
    exact = signed(grey, weight)
    attacked = exact - float(EPS) * float(torch.linalg.vector_norm(weight.double(), ord=dual))
    assert torch.allclose(found.clean.double(), exact, atol=1e-5)
    assert torch.allclose(found.adversarial.double(), attacked, atol=1e-5)
    assert found.clean_accuracy == float((exact > 0).double().mean())
    assert found.robust_accuracy == float((attacked > 0).double().mean())
    assert 0 < found.robust_accuracy < found.clean_accuracy
    assert torch.equal(found.ids, grey.ids)
    assert torch.equal(found.labels, grey.labels)


def test_scale_free_margins_forget_the_scale(grey: Split, weight: Tensor) -> None:
    threat = ThreatModel.parse("Linf", EPS)
    one, seven = (measure(linear(weight, scale), grey, threat) for scale in (1.0, 7.0))
    assert torch.allclose(one.scaled, seven.scaled, rtol=1e-5)
    assert torch.allclose(7 * one.adversarial, seven.adversarial, rtol=1e-4, atol=1e-5)
    logits, y = torch.randn(50, 10, generator=torch.Generator().manual_seed(3)), torch.arange(50) % 10
    assert torch.allclose(scale_free(logits, y), scale_free(7 * logits + 3, y), rtol=1e-4, atol=1e-5)
    assert torch.equal(scale_free(torch.ones(2, 3), torch.tensor([0, 1])), torch.zeros(2))


def test_accuracy_is_argmax_also_where_logits_tie() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [float("nan"), 0.0, 0.0]])
    y = torch.tensor([0, 1, 2, 1])
    found = margin(logits, y)
    assert found[:3].tolist() == [0.0, -TINY, -TINY]
    one = Margins(torch.arange(4), y, found, found, found)
    assert one.right.tolist() == [True, False, False, False]
    assert one.robust_accuracy == 0.25


def test_results_do_not_depend_on_the_batch_and_flags_stay(small: Classifier) -> None:
    x, y = torch.rand((70, 1, 8, 8), generator=torch.Generator().manual_seed(4)), torch.arange(70) % 3
    info = DataInfo("Noise", (1, 8, 8), ("a", "b", "c"), (0.5,), (0.25,))
    split, threat = Split(info, "test", TensorPixels(x), y, torch.arange(70)), ThreatModel.parse("Linf", "0.1")
    small.train()
    found = [measure(small, split, threat, steps=4, batch=batch) for batch in (70, 16, 33, 5)]
    assert all(part.training for part in small.modules())
    assert all(value.requires_grad and value.grad is None for value in small.parameters())
    small.eval()
    for other in found[1:]:
        for name in ("clean", "adversarial", "scaled"):
            assert torch.equal(getattr(found[0], name), getattr(other, name)), name
    alone = measure(small, split.take(torch.tensor([69, 3])), threat, steps=4)
    assert torch.equal(alone.adversarial, found[0].adversarial[[69, 3]])
    other_seed = measure(small, split, threat, steps=4, seed=1)
    assert not torch.equal(other_seed.adversarial, found[0].adversarial)


def test_the_hard_set_is_the_smallest_margins_ids_breaking_ties() -> None:
    values = torch.tensor([3.0, -1.0, 0.5, 0.5, 2.0])
    one = Margins(torch.tensor([9, 4, 8, 2, 1]), torch.tensor([0, 0, 1, 1, 1]), values, values, values)
    assert one.hardest(40).tolist() == [False, True, False, True, False]
    assert (int(one.hardest(0).sum()), int(one.hardest(100).sum()), int(one.hardest(59).sum())) == (0, 5, 2)
    record = summary(one, 40, ("a", "b", "none of these"))
    assert (record["L"]["samples"], record["rest"]["samples"]) == (2, 3)
    assert record["L"]["adversarial_margin"] == pytest.approx(-0.25)
    assert record["rest"]["adversarial_margin"] == pytest.approx(5.5 / 3)
    assert record["classes"]["b"]["robust_accuracy"] == 1.0
    assert record["classes"]["none of these"]["adversarial_margin"] is None


def test_gradient_norms_of_a_linear_model(grey: Split, weight: Tensor) -> None:
    found = gradients.measure(linear(weight), grey, ThreatModel.parse("Linf", EPS))
    for slopes in (found.clean, found.adversarial):
        wrong = torch.sigmoid(-slopes.margin.double())  # d CE / dx = -(1 - p_y) d margin / dx with two classes
        for order, ce, of_margin in ((1, slopes.ce_l1, slopes.margin_l1), (2, slopes.ce_l2, slopes.margin_l2)):
            length = float(torch.linalg.vector_norm(weight.double(), ord=order))
            assert torch.allclose(of_margin.double(), torch.full((40,), length).double(), rtol=1e-5)
            assert torch.allclose(ce.double(), wrong * length, rtol=1e-4)
    exact = measure(linear(weight), grey, ThreatModel.parse("Linf", EPS))
    assert torch.allclose(found.adversarial.margin, exact.adversarial)
    distance = found.clean.distance(Norm.LINF)
    assert distance is not None
    assert torch.allclose(distance.double(), signed(grey, weight) / float(weight.double().abs().sum()), atol=1e-5)
    assert found.clean.distance(Norm.L1) is None


ORACLE = {
    1: (0.938271, 1.715572, 0.885709, 0.380679),
    10: (4.152978, 5.047133, 4.354650, 2.613117),
    100: (6.845234, 7.566776, 9.137659, 7.242212),
    1000: (9.202125, 9.899073, 13.803672, 11.957878),
}


@pytest.mark.parametrize("t", ORACLE)
def test_trajectories_against_the_bisected_values(t: int) -> None:
    found = (ce_margin(t, 10), ce_margin(t, 10, 2.0), ovr_margin(t), ovr_margin(t, 0.4))
    assert np.allclose([float(value) for value in found], ORACLE[t], rtol=0, atol=5.1e-7)


def test_trajectories_satisfy_their_equations_without_overflow() -> None:
    for classes in (2, 3, 10, 1000, 10**9):
        for t in (1e-9, 1e-3, 1.0, 30.0, 1e6):
            assert ce_time(float(ce_margin(t, classes, 2.0)), classes, 2.0) == pytest.approx(t, rel=1e-6)
            assert ovr_time(float(ovr_margin(t, 0.4)), 0.4) == pytest.approx(t, rel=1e-6)
    huge = np.array([1e6, 1e12, 1e300])
    assert np.all(np.isfinite(ce_margin(huge, 10)) & np.isfinite(ovr_margin(huge)))
    assert ovr_margin(1e300) / ce_margin(1e300, 10) == pytest.approx(2, abs=0.01)
    assert abs(float(ce_margin(0, 10))) < 1e-12


@pytest.mark.parametrize(("classes", "t", "height"), [(10, 7.01, 3.65), (100, 97.8, 9.09), (1000, 998, 13.80)])
def test_overtaking_times(classes: int, t: float, height: float) -> None:
    time, at = overtaking(classes)
    assert (time, at) == (pytest.approx(t, rel=1e-3), pytest.approx(height, abs=0.005))
    assert float(ce_margin(time, classes)) == pytest.approx(float(ovr_margin(time)), abs=1e-9)


def test_who_is_behind_at_first() -> None:
    early = np.geomspace(1e-3, 1e6, 400)
    for classes in (2, 3, 4):
        assert overtaking(classes) == (0, 0)
        assert np.all(ovr_margin(early) >= ce_margin(early, classes) - 1e-12)
    for classes, weight, lam in ((5, 1.0, 1.0), (4, 1.0, 0.4), (1000, 1.0, 1.2), (10, 3.0, 2.0)):
        time, _ = overtaking(classes, weight, lam)
        lead = ovr_margin(early, lam) - ce_margin(early, classes, weight)
        assert np.all(lead[early > 1.001 * time] > 0)
        assert lead[early < 0.999 * time][-1] < 0
    assert overtaking(10, 1.0, 2.0) == (0, 0)


class FreeLogits(nn.Module):
    """A model whose logits are its parameters, whatever the input."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.from_numpy(logits)[None])

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


class NoAttack:
    """The adversary of the simple problem: none."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __call__(self, loss: Callable[[Tensor], Tensor], **kwargs: Any) -> Tensor:
        return self.x


def flow(objective: str, params: dict[str, float], weight: float, classes: int, times: list[float]) -> np.ndarray:
    """Return the margins of gradient flow on the free logits, descending the project's own objective."""
    descend = OBJECTIVES.build(objective, params)
    x, zero = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    threat, rng = ThreatModel.parse("Linf", EPS), torch.Generator()

    def velocity(t: float, logits: np.ndarray) -> np.ndarray:
        model = FreeLogits(logits)
        loss = descend(StepContext(model, x, zero, zero, threat, NoAttack(x), rng, 0.5, 1))  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(weight * loss.value, model.logits)
        return -grad[0].numpy()

    path = solve_ivp(velocity, (0, times[-1]), np.zeros(classes), "LSODA", t_eval=times, rtol=1e-9, atol=1e-11)
    return np.asarray(path.y[0] - path.y[1])


@pytest.mark.parametrize("classes", [2, 10])
def test_the_curves_are_those_of_the_projects_own_objectives(classes: int) -> None:
    times = [0.3, 1.0, 5.0, 20.0, 60.0]
    for weight in (1.0, 2.0):
        found = flow("at", {}, weight, classes, times)
        assert np.allclose(found, ce_margin(times, classes, weight), atol=2e-7)
    for lam in (1.0, 0.4):
        found = flow("sovr", {"m": 100.0, "lam": lam}, 1.0, classes, times)
        assert np.allclose(found, ovr_margin(times, lam), atol=2e-7)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_figures(folder: Path, figures: set[str], tables: set[str]) -> None:
    """Every figure is there as PNG and SVG with a CSV of numbers, and nothing else is."""
    expected = {f"{name}.{kind}" for name in figures for kind in ("png", "svg", "csv")}
    assert {path.name for path in folder.iterdir()} == expected | {f"{name}.csv" for name in tables} | {"analysis.json"}
    for name in figures:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<dc:date>" not in (folder / f"{name}.svg").read_text()
        assert read(folder / f"{name}.csv")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_cut(net: Path, folder: Path, cut: object) -> str:
    """Return a copy of the model whose card says how its run cut the training part."""
    shutil.copytree(net, folder)
    card = json.loads((folder / "config.json").read_text())
    card["training"]["cut"] = cut
    (folder / "config.json").write_text(json.dumps(card))
    return str(folder)


def test_only_what_was_trained_on_counts_as_training_data(net: Path, tmp_path: Path) -> None:
    cut = {"held_out": 12, "seed": 3, "limit": 30}
    one, same = with_cut(net, tmp_path / "one", cut), with_cut(net, tmp_path / "same", cut)
    whole = gather(Request(models=(str(net),))).split("train")
    rest, validation = hold_out(whole, 12, seed=3)
    trained = gather(Request(models=(one, same))).split("train")
    assert torch.equal(trained.ids, hold_out(rest, 30, seed=3)[1].ids)
    assert len(trained) == 30
    assert not set(trained.ids.tolist()) & set(validation.ids.tolist())
    assert len(gather(Request(models=(one,))).split("test")) == 60
    others = (cut | {"seed": 4}, cut | {"limit": -1}, cut | {"more": 1}, "all", None)
    for number, other in enumerate(others):
        different = with_cut(net, tmp_path / str(number), other)
        assert len(gather(Request(models=(one, different))).split("train")) == len(whole) == 60


def test_analyze_margins(cli: Cli, net: Path, tmp_path: Path) -> None:
    asked = ("analyze", "margins", net, "--limit", "60", "--steps", "3", "--m", "25", "--device", "cpu")
    done = cli(*asked, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    folder = tmp_path / record.pop("out")
    assert folder.match("runs/analyze-margins-*")
    assert json.loads((folder / "analysis.json").read_text()) == record
    check_figures(folder, {"margins", "scaled", "hard", "classes"}, {"samples"})
    samples = read(folder / "samples.csv")
    for part in ("train", "test"):
        of = record["results"]["net"][part]
        rows = [row for row in samples if row["split"] == part]
        assert len(rows) == of["all"]["samples"] == 60
        assert np.mean([float(row["adversarial"]) for row in rows]) == pytest.approx(of["all"]["adversarial_margin"])
        assert np.mean([float(row["clean"]) >= 0 for row in rows]) == pytest.approx(of["all"]["clean_accuracy"])
        hard = [float(row["adversarial"]) for row in rows if row["in_L"] == "1"]
        assert len(hard) == of["L"]["samples"] == 15
        assert np.mean(hard) == pytest.approx(of["L"]["adversarial_margin"])
        bins = [row for row in read(folder / "margins.csv") if (row["split"], row["input"]) == (part, "PGD")]
        mass = sum(float(row["density"]) * (float(row["bin_high"]) - float(row["bin_low"])) for row in bins)
        assert mass == pytest.approx(1)
        assert float(bins[-1]["cumulative"]) == pytest.approx(1)
        assert sum(float(row["share"]) for row in read(folder / "hard.csv") if row["split"] == part) == pytest.approx(1)
    before = contents(folder)
    again = cli(*asked)
    assert again.returncode == 0, again.stderr
    assert "Mean logit margin" in again.stdout
    assert contents(folder) == before


def test_analyze_gradients_of_two_models(cli: Cli, net: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    for path in net.iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    asked = ("analyze", "gradients", net, "twin", "--label", "a $ b", "--label", "two")
    done = cli(*asked, "--limit", "40", "--steps", "2", "--out", "figures", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    check_figures(tmp_path / "figures", {"norms", "scatter"}, set())
    assert record["results"]["a $ b"] == record["results"]["two"]
    rows = [
        row for row in read(tmp_path / "figures" / "scatter.csv") if (row["model"], row["input"]) == ("two", "clean")
    ]
    assert len(rows) == 40
    of = record["results"]["two"]["clean"]
    assert np.median([float(row["ce_l1"]) for row in rows]) == pytest.approx(of["ce_l1_median"])
    distances = [float(row["margin"]) / float(row["margin_l1"]) for row in rows]
    assert np.median(distances) == pytest.approx(of["linear_distance_median"])


def test_analyze_trajectory(cli: Cli, tmp_path: Path) -> None:
    done = cli("analyze", "trajectory", "--classes", "10,3", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    folder = tmp_path / record["out"]
    check_figures(folder, {"trajectory"}, {"table"})
    assert record["classes"]["10"]["ratio"] == pytest.approx([0.94, 1.05, 1.33, 1.50], abs=0.005)
    assert record["classes"]["10"]["overtakes"]["ce"]["t"] == pytest.approx(7.01, abs=0.005)
    assert record["classes"]["3"]["overtakes"]["ce"]["t"] == 0
    table = [row for row in read(folder / "table.csv") if row["classes"] == "10"]
    assert [float(row["ovr"]) for row in table] == pytest.approx(record["classes"]["10"]["ovr"])
    before = contents(folder)
    shown = cli("analyze", "trajectory", "--classes", "10,3")
    assert "asymptotic" in shown.stdout
    assert "K >= 5" in shown.stdout
    assert contents(folder) == before


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown analysis": (("margin",), "Did you mean 'margins'?"),
    "missing model": (("margins", "nowhere"), "no model 'nowhere'"),
    "nothing trained yet": (("margins",), "runs/latest"),
    "unknown dataset": (("margins", "MODEL", "--dataset", "digit"), "Did you mean 'digits'?"),
    "unknown norm": (("gradients", "MODEL", "--norm", "Lnf"), "Did you mean 'Linf'?"),
    "eps of zero": (("gradients", "MODEL", "--eps", "0"), "eps '0' is zero"),
    "a percentage": (("margins", "MODEL", "--m", "nan"), "percentage"),
    "no images": (("margins", "MODEL", "--limit", "0"), "--limit 0"),
    "labels": (("margins", "MODEL", "--label", "a", "--label", "b"), "2 --label for 1 models"),
    "same label": (("margins", "MODEL", "OTHER", "--label", "a", "--label", "a"), "label 'a' is given twice"),
    "same model": (("margins", "MODEL", "MODEL"), "is given twice"),
    "data unknown": (("margins", "MUTE"), "does not say which data"),
    "different data": (("margins", "MODEL", "APART"), "different dataset"),
    "different eps": (("margins", "MODEL", "OTHER"), "different eps"),
    "no numbers": (("trajectory", "--classes", "ten"), "--classes 'ten'"),
    "one class": (("trajectory", "--classes", "1"), "--classes 1"),
    "no time": (("trajectory", "--times", "0"), "--times 0"),
    "no weight": (("trajectory", "--lam", "nan"), "--lam nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(cli: Cli, net: Path, tmp_path: Path, name: str) -> None:
    arguments, text = WRONG[name]
    places, card = {"MODEL": str(net)}, json.loads((net / "config.json").read_text())
    training = card["training"]
    for place, said in (
        ("OTHER", {**training, "eps": "0.2"}),
        ("APART", {**training, "dataset": "digits"}),
        ("MUTE", {}),
    ):
        if place in arguments:
            places[place] = str(tmp_path / place)
            (tmp_path / place).mkdir()
            (tmp_path / place / "model.safetensors").write_bytes((net / "model.safetensors").read_bytes())
            (tmp_path / place / "config.json").write_text(json.dumps(card | {"training": said}))
    done = cli("analyze", *(places.get(argument, argument) for argument in arguments))
    assert (done.returncode, one_sentence(done.stderr)) == (2, True), done.stderr
    assert text in done.stderr
    assert done.stdout == ""


def test_help_names_the_analyses_without_importing_them(cli: Cli) -> None:
    done = cli("analyze", "-h")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("margins", "gradients", "trajectory", "sweep"))
