"""One file makes a plug-in: it is listed and checked, with nothing else touched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, environment

OBJECTIVE = '''
"""A dummy objective."""

from dataclasses import dataclass

from torch.nn import functional as F

from robusteval.training.objective import Loss, StepContext


@dataclass(frozen=True)
class DummyObjective:
    """Adversarial training with label smoothing, by a stranger."""

    smoothing: float = 0.1

    def __call__(self, ctx: StepContext) -> Loss:
        logits = ctx.model(ctx.attack(ctx.cross_entropy))
        return Loss(F.cross_entropy(logits, ctx.y, label_smoothing=self.smoothing), logits)
'''

ATTACK = '''
"""A dummy attack."""

from dataclasses import dataclass

import torch

from robusteval.attacks._losses import margin_loss
from robusteval.attacks._steps import ascend
from robusteval.attacks.base import AttackResult


@dataclass(frozen=True)
class DummyAttack:
    """Margin ascent from the clean input, by a stranger."""

    steps: int = 15

    def supports(self, threat) -> bool:
        return True

    def __call__(self, model, x, y, threat, rng) -> AttackResult:
        size = threat.radius / 5
        return AttackResult(ascend(lambda point: margin_loss(model(point), y), x, x, threat, self.steps, size))
'''

LEAKY = (
    ATTACK.replace("DummyAttack", "DummyLeaky")
    .replace("by a stranger", "by a careless stranger")
    .replace("        size =", "        torch.manual_seed(0)\n        size =")
)

DATASET = '''
"""A dummy dataset."""

from dataclasses import dataclass

import torch

from robusteval.datasets.base import DataInfo, Split, TensorPixels
from robusteval.rng import generator

INFO = DataInfo("Stripes", (1, 6, 6), ("rows", "columns"), (0.5,), (0.25,), {"Linf": "0.1"})


@dataclass(frozen=True)
class DummyDataset:
    """Noisy stripes, across or down, by a stranger."""

    data_dir: str | None = None
    download: bool = False

    def load(self, part) -> Split:
        labels = torch.arange(40) % 2
        stripes = (torch.arange(6) % 2).float().expand(40, 1, 6, 6)
        images = torch.where(labels.view(-1, 1, 1, 1) == 1, stripes, stripes.mT)
        noise = torch.rand(images.shape, generator=generator(0, "stripes", part))
        return Split(INFO, part, TensorPixels(0.7 * images + 0.3 * noise), labels, torch.arange(40))
'''

PLUGINS = {
    "objectives": (
        "trainers",
        "dummy_objective",
        OBJECTIVE,
        "Adversarial training with label smoothing, by a stranger.",
    ),
    "attacks": ("robusteval/attacks", "dummy_attack", ATTACK, "Margin ascent from the clean input, by a stranger."),
    "datasets": ("robusteval/datasets", "dummy_dataset", DATASET, "Noisy stripes, across or down, by a stranger."),
}

COPIED = (
    "robusteval",
    "trainers",
    "schemas",
    "tests/conftest.py",
    "tests/test_conformance.py",
    "cli.py",
    "pyproject.toml",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with three plug-ins more, one file each."""
    target = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        source = ROOT / name
        (target / name).parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    for folder, name, text, _ in PLUGINS.values():
        (target / folder / f"{name}.py").write_text(text.lstrip())
    return target


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder``, which comes first on the path, before any installed robusteval."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )


def conformance(folder: Path, wanted: str) -> tuple[dict[str, int], str]:
    """Run the copy's conformance tests; return how many passed and failed, and all that was printed."""
    told = python(folder, "-m", "pytest", "tests/test_conformance.py", "-k", wanted, "-p", "no:cacheprovider")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", told.stdout)}
    return counts, told.stdout + told.stderr


def test_the_copy_is_what_runs(copy: Path) -> None:
    for program in ("import robusteval; print(robusteval.__file__)", "import robusteval.cli as c; print(c.__file__)"):
        assert Path(python(copy, "-c", program).stdout.strip()).is_relative_to(copy)


def test_a_plugin_of_one_file_is_listed(copy: Path) -> None:
    listed = python(copy, "cli.py", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    found = json.loads(listed.stdout)
    for kind, (_, name, _, summary) in PLUGINS.items():
        assert found[kind][name] == summary


def test_a_plugin_of_one_file_is_checked(copy: Path) -> None:
    counts, told = conformance(copy, "dummy")
    assert counts == {"passed": 4}, told  # one objective, one attack, and both parts of one dataset


def test_a_plugin_that_leaks_its_randomness_fails(copy: Path) -> None:
    path = copy / "robusteval" / "attacks" / "dummy_leaky.py"
    path.write_text(LEAKY.lstrip())
    try:
        counts, told = conformance(copy, "dummy_leaky")
    finally:
        path.unlink()
    assert counts == {"failed": 1}, told
    assert "DummyLeaky(steps=15) (Linf 0.05) changes torch's global generator" in told


def test_listing_imports_no_torch_and_no_plugin() -> None:
    program = (
        "import sys\nfrom robusteval.cli import main\nsys.argv = ['robusteval', 'list', '--json']\nmain()\n"
        "heavy = {'torch', 'numpy', 'foolbox', 'pyautoattack', 'torchvision', 'sklearn'}\n"
        "print(sorted(name for name in sys.modules if name in heavy or name.startswith('robusteval.attacks.')"
        " or name.startswith('robusteval.trainers.')), file=sys.stderr)\n"
    )
    told = python(ROOT, "-c", program)
    assert "pgd" in json.loads(told.stdout)["attacks"]
    assert told.stderr.strip() == "[]"
