"""Loading models: every form of a model name, and files from people who mean harm."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from robusteval.errors import RobustevalError, UsageError
from robusteval.models.base import Classifier, check_fit
from robusteval.models.io import ZOO, build_model, load_model, save_model, weights_digest
from robusteval.models.zoo._robustbench_import import _pkg_resources, import_robustbench
from robusteval.settings import PluginSpec

SHAPE = (1, 8, 8)
SMALL = PluginSpec(name="small_cnn", params={"width": 2, "hidden": 5})
CARD: dict[str, Any] = {
    "architecture": {"name": "small_cnn", "params": {"width": 2, "hidden": 5}},
    "shape": SHAPE,
    "num_classes": 3,
    "classes": ("a", "b", "c"),
}
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
published = pytest.mark.skipif(not (DATA / "models").is_dir(), reason="the published weights are not at hand")


def small(seed: int = 0) -> Classifier:
    return build_model(SMALL, SHAPE, 3, (0.3,), (0.2,), seed=seed)


def x(count: int = 2, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "net", small(), CARD)
    return tmp_path / "net"


def complaint(spec: str | Path, architecture: PluginSpec | None = None, **options: Any) -> str:
    """Return the error of loading ``spec``, which is one line and no traceback of somebody else's."""
    with pytest.raises(RobustevalError) as raised:
        load_model(str(spec), architecture, SHAPE, 3, **options)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    return str(raised.value)


def edit_card(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(card | changes))


# Folders


def test_the_card_states_the_facts(folder: Path) -> None:
    card = json.loads((folder / "config.json").read_text())
    assert card["format"] == "robusteval-model/1"
    assert card["weights_sha256"] == weights_digest(small())
    assert (card["shape"], card["num_classes"], card["classes"]) == ([1, 8, 8], 3, ["a", "b", "c"])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_run_folder_means_its_best_model(tmp_path: Path) -> None:
    save_model(tmp_path / "run-7" / "best", small(1), CARD)
    (tmp_path / "run-7" / "config.json").write_text("{}")
    (tmp_path / "latest").symlink_to("run-7")
    for spec in ("run-7", "run-7/best", "latest"):
        loaded = load_model(str(tmp_path / spec), None, SHAPE, 3)
        assert loaded.name == "run-7"
        assert weights_digest(loaded.module) == weights_digest(small(1))


def test_a_folder_without_a_model_says_what_is_missing(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no model.safetensors" in complaint(tmp_path / "empty")
    (folder / "config.json").unlink()
    assert "has no config.json" in complaint(folder)


@pytest.mark.parametrize(("shape", "classes"), [((1, 8, 9), 3), (SHAPE, 4), ((3, 8, 8), 3)])
def test_a_model_for_other_data_is_a_usage_error(folder: Path, shape: tuple[int, int, int], classes: int) -> None:
    with pytest.raises(UsageError, match=r"shape \(1, 8, 8\) and 3 classes; the data has"):
        load_model(str(folder), None, shape, classes)


def test_tampered_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert "SHA-256" in complaint(folder)


def test_weights_of_another_net_are_refused(folder: Path) -> None:
    other = build_model(PluginSpec(name="small_cnn"), SHAPE, 3, (0.3,), (0.2,))
    safetensors.torch.save_file(other.state_dict(), folder / "model.safetensors")
    assert "SHA-256" in complaint(folder)
    edit_card(folder, weights_sha256=weights_digest(other))
    assert "'0.weight' has shape (16, 1, 4, 4) in the weights and (2, 1, 4, 4)" in complaint(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert "cannot be read as safetensors" in complaint(folder)


def test_another_normalisation_in_the_card_is_refused(folder: Path) -> None:
    edit_card(folder, mean=[0.5])
    assert "mean = (0.5,) is not the one stored" in complaint(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": {"name": "small_cnn", "params": {"width": 10**9}}}, "width = 1000000000 is not allowed"),
        ({"architecture": {"name": "small_cnn", "params": {"width": 4096, "hidden": 65536}}}, "(2, 1, 4, 4)"),
        ({"architecture": {"name": "wide_resnet", "params": {"depth": 10**9}}}, "depth = 1000000000"),
        ({"architecture": {"name": "wide_resnet", "params": {"depth": 10, "width": 64}}}, "weights lack"),
        ({"architecture": {"name": "../../evil", "params": {}}}, "unknown architecture"),
        ({"architecture": {"name": "os:system", "params": {}}}, "unknown architecture"),
        ({"architecture": {"name": "small_cnn", "params": {"evil": 1}}}, "no parameter 'evil'"),
        ({"architecture": "small_cnn"}, "architecture = 'small_cnn' is not allowed"),
        ({"format": "robusteval-model/2"}, "format"),
        ({"shape": [1, "8", 8]}, "shape"),
        ({"shape": [1, 8, -8]}, "shape"),
        ({"num_classes": True}, "num_classes"),
        ({"std": [0.0]}, "std"),
        ({"mean": [0.3, 0.3]}, "one per channel"),
        ({"classes": ["a"]}, "1 class names"),
        ({"weights_sha256": "no"}, "weights_sha256"),
        ({"training": []}, "training"),
        ({"training": {"loss": float("nan")}}, "not JSON compliant"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_hostile_card_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    edit_card(folder, **changes)
    assert said in complaint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff", '{"format": NaN}'])
def test_a_card_that_is_not_one_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "not a model card" in complaint(folder)


def test_a_huge_width_takes_no_memory(folder: Path) -> None:
    """The first linear layer alone would take 8 TB: it must never be allocated."""
    edit_card(folder, architecture={"name": "cnn7", "params": {"width": 4096, "hidden": 65536}})
    assert "'0.weight' has shape (2, 1, 4, 4)" in complaint(folder)


def test_saving_a_model_under_a_foreign_card_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RobustevalError, match="cannot be saved"):
        save_model(tmp_path / "net", small(), CARD | {"architecture": {"name": "small_cnn", "params": {}}})
    with pytest.raises(RobustevalError, match="num_classes"):
        save_model(tmp_path / "net", small(), CARD | {"num_classes": 1})
    assert not (tmp_path / "net").exists()


def test_a_diverged_model_is_not_saved(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    with pytest.raises(RobustevalError, match="NaN or infinite"):
        save_model(tmp_path / "net", model, CARD)


def test_an_architecture_beside_a_folder_is_a_contradiction(folder: Path) -> None:
    assert "brings its own architecture" in complaint(folder, SMALL)


# Weight files


class SideEffect:
    """Pickles to a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".model", ".bin", ".ckpt", ".pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"evil{suffix}"
    trace = tmp_path / "trace"
    torch.save({"0.weight": SideEffect(trace)}, path, _use_new_zipfile_serialization=zipped)
    said = complaint(path, SMALL)
    assert "refused" in said
    assert "never executed" in said
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the trap itself must work"


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "whole.pt")
    assert "refused" in complaint(tmp_path / "whole.pt", SMALL)


def wrappings() -> dict[str, Any]:
    state = small().backbone.state_dict()
    prefixed = {f"module.{name}": value for name, value in state.items()}
    return {
        "plain": state,
        "data parallel": prefixed,
        "state_dict": {"state_dict": prefixed, "epoch": 3},
        "model": {"model": {f"model.{name}": value for name, value in state.items()}, "optimizer": {"lr": 0.1}},
        "model_state_dict": {"model_state_dict": state},
        "net": {"net": {f"module.backbone.{name}": value for name, value in state.items()}, "acc": 1.0},
        "half": {name: value.half() for name, value in state.items()},
    }


@pytest.mark.parametrize("kind", sorted(wrappings()))
def test_usual_wrappings_are_unwrapped_and_not_normalised(tmp_path: Path, kind: str) -> None:
    torch.save(wrappings()[kind], tmp_path / "net.pt")
    loaded = load_model(str(tmp_path / "net.pt"), SMALL, SHAPE, 3)
    tolerance = 1e-2 if kind == "half" else 0
    torch.testing.assert_close(loaded.module(x()), small().backbone(x()), rtol=0, atol=tolerance)
    assert (loaded.name, loaded.architecture) == ("net", "small_cnn(hidden=5, width=2)")


@pytest.mark.parametrize("names", [("mean", "std"), ("mu", "sigma"), ("normalize.mean", "normalize.std")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_stored_normalisation_is_used(tmp_path: Path, names: tuple[str, str], prefix: str) -> None:
    state = dict(small().backbone.state_dict())
    state |= {names[0]: torch.tensor([0.3]), names[1]: torch.tensor([0.2]).view(1, 1, 1, 1)}
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "net.pt")
    loaded = load_model(str(tmp_path / "net.pt"), SMALL, SHAPE, 3)
    assert torch.equal(loaded.module(x()), small()(x()))


def test_our_own_weights_file_alone_keeps_its_normalisation(folder: Path) -> None:
    loaded = load_model(str(folder / "model.safetensors"), SMALL, SHAPE, 3)
    assert torch.equal(loaded.module(x()), small()(x()))


def test_normalisation_can_be_given(tmp_path: Path) -> None:
    torch.save(small().backbone.state_dict(), tmp_path / "net.pt")
    loaded = load_model(str(tmp_path / "net.pt"), SMALL, SHAPE, 3, mean=(0.3,), std=(0.2,))
    assert torch.equal(loaded.module(x()), small()(x()))
    assert "both or neither" in complaint(tmp_path / "net.pt", SMALL, mean=(0.3,))


def test_batch_norm_counters_may_be_absent(tmp_path: Path) -> None:
    spec = PluginSpec(name="resnet18", params={"width": 2})
    model = build_model(spec, SHAPE, 3, (0.0,), (1.0,)).eval()
    state = {k: v for k, v in model.backbone.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert torch.equal(load_model(str(tmp_path / "old.pth"), spec, SHAPE, 3).module(x()), model(x()))


def altered(**changes: Any) -> dict[str, Any]:
    state = dict(small().backbone.state_dict())
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            altered(**{"2.weight": torch.zeros(4, 3, 4, 4)}),
            "'2.weight' has shape (4, 3, 4, 4) in the weights and (4, 2, 4, 4)",
        ),
        (altered(**{"5.bias": None}), "the weights lack '5.bias' of shape (5,)"),
        (altered(**{"9.bias": torch.zeros(2)}), "the weights have '9.bias' of shape (2,)"),
        (altered(**{"0.bias": torch.zeros(2, dtype=torch.int64)}), "'0.bias' is torch.int64"),
        (altered(**{"0.bias": torch.full((2,), float("nan"))}), "'0.bias' holds NaN"),
        (altered(**{"0.bias": torch.zeros(2).to_sparse()}), "not a dense tensor"),
        (altered(**{"mean": torch.zeros(1), "std": torch.zeros(1)}), "std above 0"),
        (altered(**{"mean": torch.zeros(2), "std": torch.ones(2)}), "one per image channel"),
        ({"epoch": 3}, "no named tensors"),
        (torch.zeros(3), "no named tensors"),
        ([], "no named tensors"),
    ],
)
def test_weights_that_do_not_match_name_the_first_offence(tmp_path: Path, state: Any, said: str) -> None:
    torch.save(state, tmp_path / "net.pt")
    assert said in complaint(tmp_path / "net.pt", SMALL)


def test_a_dict_that_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    assert "no named tensors" in complaint(tmp_path / "loop.pt", SMALL)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    torch.save(small().backbone.state_dict(), tmp_path / "net.pt")
    whole = (tmp_path / "net.pt").read_bytes()
    for content in (
        b"",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-30],
        b"<html>quota exceeded</html>",
        b"\x00" * 99,
    ):
        for suffix in (".pt", ".safetensors"):
            path = tmp_path / f"damaged{suffix}"
            path.write_bytes(content)
            assert "cannot be read as" in complaint(path, SMALL)


def test_a_weights_file_needs_an_architecture_and_a_known_suffix(folder: Path) -> None:
    said = complaint(folder / "model.safetensors")
    assert "architecture must be named" in said
    assert "small_cnn" in said
    assert "must end in one of" in complaint(folder / "config.json", SMALL)


# Names


def test_names_that_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({}, "weights.pt")
    assert "Did you mean 'weights.pt'" in complaint("weihgts.pt", SMALL)
    assert "no such file or folder" in complaint("nowhere/else")
    assert "architecture without weights" in complaint("small_cnn")
    assert "'robustbench:<name of a model>'" in complaint("robustbench")
    assert "lacks the name" in complaint("timm:")
    assert "Did you mean 'robustbench'" in complaint("robustbnch:Wong2020Fast")
    assert "Did you mean 'hub'" in complaint("hubb:some/body")


FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * 7

def good(): return Net()
def number(): return 3
def fails(): raise KeyError("weights.pt\\nand more")
def leaves(): raise SystemExit(9)
def wants(argument): return Net()
def scores(images): return images.reshape(len(images), -1)[:, :3]
def makes_scores(): return scores
def classes(images): return scores(images).argmax(1)
def beyond(images): return classes(images) + 7
def flat(images): return scores(images).ravel()
value = 5
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "package_of_nets").mkdir()
    (tmp_path / "package_of_nets" / "mine.py").write_text(FACTORIES)
    (tmp_path / "broken_net.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "package_of_nets.mine", raising=False)
    monkeypatch.delitem(sys.modules, "package_of_nets", raising=False)
    return "package_of_nets.mine"


def test_a_factory_from_the_current_folder(factories: str) -> None:
    before = list(sys.path)
    for name in ("good", "Net"):
        spec = f"{factories}:{name}"
        loaded = load_model(spec, None, SHAPE, 3)
        assert torch.equal(loaded.module(x()), x().flatten(1)[:, :3] * 7)
        assert (loaded.name, loaded.architecture, loaded.source) == (spec, "Net", spec)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("number", "gave int, not a torch.nn.Module"),
        ("value", "gave int, not a torch.nn.Module"),
        ("fails", "KeyError"),
        ("leaves", "SystemExit: 9"),
        ("goood", "Did you mean 'good'"),
    ],
)
def test_factories_that_fail(factories: str, name: str, said: str) -> None:
    assert said in complaint(f"{factories}:{name}")


def test_a_function_of_one_argument_is_a_model_without_gradients(factories: str) -> None:
    inside = x().requires_grad_()
    for name in ("scores", "makes_scores"):
        loaded = load_model(f"{factories}:{name}", None, SHAPE, 3)
        assert torch.equal(loaded.module(inside), inside.detach().flatten(1)[:, :3])
        assert not loaded.module(inside).requires_grad
        check_fit(loaded.module, SHAPE, 3, "it")
    decided = load_model(f"{factories}:classes", None, SHAPE, 3).module(inside)
    assert torch.equal(decided.argmax(1), inside.detach().flatten(1)[:, :3].argmax(1))
    assert set(decided.unique().tolist()) == {0, 1}
    for name, said in (("beyond", "class 7"), ("wants", "TypeError"), ("flat", "ValueError|expected")):
        odd = load_model(f"{factories}:{name}", None, SHAPE, 3).module
        with pytest.raises(RobustevalError, match=said):
            check_fit(odd, SHAPE, 3, "it")


def test_factories_that_cannot_be_imported(factories: str) -> None:
    assert "no_such_module_anywhere" in complaint("broken_net:good")
    assert "cannot import 'package_of_nets.theirs'" in complaint("package_of_nets.theirs:good")
    assert "brings its own architecture" in complaint(f"{factories}:good", SMALL)


# Published nets


def fashion_mnist_test() -> tuple[torch.Tensor, torch.Tensor]:
    source = DATA / "fashion-mnist"
    with (
        gzip.open(source / "t10k-images-idx3-ubyte.gz") as images,
        gzip.open(source / "t10k-labels-idx1-ubyte.gz") as labels,
    ):
        pixels = torch.frombuffer(bytearray(images.read()[16:]), dtype=torch.uint8)
        targets = torch.frombuffer(bytearray(labels.read()[8:]), dtype=torch.uint8)
    return pixels.view(-1, 1, 28, 28).float() / 255, targets.long()


@published
def test_the_published_fashion_mnist_net_has_its_published_error() -> None:
    """Wong & Kolter 2018: 21.73 % of the 10 000 test images."""
    path = DATA / "models" / "fashion_mnist_wk.pth"
    loaded = load_model(str(path), PluginSpec(name="small_cnn"), (1, 28, 28), 10)
    images, labels = fashion_mnist_test()
    with torch.no_grad():
        predicted = torch.cat([loaded.module(part).argmax(1) for part in torch.split(images, 1000)])
    assert (int((predicted != labels).sum()), len(labels)) == (2173, 10000)
    stored = torch.load(path, weights_only=True, map_location="cpu")
    ours = {name.removeprefix("backbone."): value for name, value in loaded.module.state_dict().items()}
    assert all(torch.equal(ours[name], value) for name, value in stored.items())


@published
def test_the_published_cifar_net_loads_with_its_weights() -> None:
    path = DATA / "models" / "cifar_cnn_a_adv.model"
    loaded = load_model(str(path), PluginSpec(name="small_cnn"), (3, 32, 32), 10)
    stored = torch.load(path, weights_only=True, map_location="cpu")
    ours = {name.removeprefix("backbone."): value for name, value in loaded.module.state_dict().items()}
    assert all(torch.equal(ours[name], value) for name, value in stored.items())
    with pytest.raises(RobustevalError, match=r"'0.weight' has shape \(16, 3, 4, 4\)"):
        load_model(str(path), PluginSpec(name="small_cnn"), (1, 28, 28), 10)


# Zoos

CIFAR = (3, 32, 32)


def test_every_zoo_adapter_is_found_and_described() -> None:
    assert set(ZOO.names()) >= {"hub", "robustbench", "timm", "torchvision"}
    assert all(ZOO.describe().values())
    assert all(callable(ZOO.build(name).load) for name in ZOO.names())


def checkpoint(name: str, folder: Path, threat: str = "Linf") -> nn.Module:
    """Store an entry's own network, with weights drawn here, where RobustBench expects the download."""
    library = import_robustbench()
    entries = library.all_models[library.BenchmarkDataset.cifar_10][library.ThreatModel(threat)]
    network: nn.Module = entries[name]["model"]()
    network.train()(x(4, CIFAR))
    path = folder / "cifar10" / threat / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"last": network.state_dict()} if name.startswith("Andri") else network.state_dict(), path)
    return network.eval()


@pytest.mark.parametrize("spec", ["Wong2020Fast", "cifar10/Linf/Wong2020Fast"])
def test_robustbench_entry_from_a_local_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    network = checkpoint("Wong2020Fast", tmp_path / "models")
    loaded = load_model(f"robustbench:{spec}", None, CIFAR, 10)
    with torch.no_grad():
        assert torch.equal(loaded.module(x(4, CIFAR)), network(x(4, CIFAR)))
    assert (loaded.name, loaded.num_classes, loaded.shape) == ("Wong2020Fast", 10, CIFAR)
    assert not loaded.module.training
    assert capsys.readouterr().out == ""


def test_robustbench_searches_linf_then_l2(tmp_path: Path) -> None:
    network = checkpoint("Rony2019Decoupling", tmp_path, "L2")
    loaded = load_model("robustbench:Rony2019Decoupling", None, CIFAR, 10, source_params={"model_dir": str(tmp_path)})
    with torch.no_grad():
        assert torch.equal(loaded.module(x(2, CIFAR)), network(x(2, CIFAR)))


def test_our_preact_resnet18_is_the_robustbench_entry(tmp_path: Path) -> None:
    network = checkpoint("Wong2020Fast", tmp_path)
    spec = PluginSpec(name="preact_resnet18", params={"final_norm": False, "shared_shortcut": False})
    loaded = load_model(str(tmp_path / "cifar10" / "Linf" / "Wong2020Fast.pt"), spec, CIFAR, 10)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(x(4, CIFAR)), network(x(4, CIFAR)), rtol=1e-4, atol=1e-4)


def zoo_complaint(spec: str, shape: tuple[int, int, int] = CIFAR, classes: int = 10, **params: Any) -> str:
    with pytest.raises(RobustevalError) as raised:
        load_model(spec, None, shape, classes, source_params=params)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_robustbench_names_that_mean_nothing() -> None:
    assert "Did you mean 'Wong2020Fast'" in zoo_complaint("robustbench:wong2020fast")
    assert "Did you mean 'cifar10'" in zoo_complaint("robustbench:cifar11/Linf/Wong2020Fast")
    assert "Did you mean 'Linf'" in zoo_complaint("robustbench:cifar10/linf/Wong2020Fast")
    assert "has no pretrained model 'Wong2020Fast'" in zoo_complaint("robustbench:cifar10/L2/Wong2020Fast")
    assert "not of the form" in zoo_complaint("robustbench:cifar10/Wong2020Fast")
    assert "not those of 'imagenet'" in zoo_complaint("robustbench:imagenet/Linf/Salman2020Do_R18")
    assert "not those of any" in zoo_complaint("robustbench:Wong2020Fast", (1, 28, 28))
    assert "no parameter 'dir'" in zoo_complaint("robustbench:Wong2020Fast", dir="x")


def test_robustbench_checkpoints_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cifar10" / "Linf" / "Wong2020Fast.pt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": SideEffect(tmp_path / "trace")}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert "refused" in zoo_complaint("robustbench:Wong2020Fast", model_dir=str(tmp_path))
    assert not (tmp_path / "trace").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    path.write_bytes(path.read_bytes()[:50])
    assert "cannot be loaded" in zoo_complaint("robustbench:Wong2020Fast", model_dir=str(tmp_path))


def test_robustbench_download_failure_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def unreachable(*_: Any, **__: Any) -> None:
        raise requests.exceptions.ConnectionError("no route\nto host")

    monkeypatch.setattr(import_robustbench(), "download_gdrive_new", unreachable)
    assert "cannot be downloaded" in zoo_complaint("robustbench:Wong2020Fast", model_dir=str(tmp_path))


def test_importing_robustbench_leaves_no_stand_ins() -> None:
    import_robustbench()
    assert not any(name.split(".")[0] == "autoattack" for name in sys.modules)


WITHOUT_SETUPTOOLS = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "pkg_resources" else find(name, *rest)
from robusteval.models.zoo._robustbench_import import import_robustbench
import_robustbench()
from robustbench.loaders import pkg_resources
print(pkg_resources.resource_filename("robustbench.loaders", "helper_files"), "pkg_resources" in sys.modules)
"""


def test_robustbench_imports_without_pkg_resources() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_SETUPTOOLS], capture_output=True, text=True, check=False)
    assert done.stdout.split()[1:] == ["False"], done.stderr
    assert Path(done.stdout.split()[0]).is_dir()


def test_the_pkg_resources_stand_in_finds_files_beside_a_module() -> None:
    import robusteval.models.base as base

    found = _pkg_resources().resource_filename("robusteval.models.base", "io.py")
    assert Path(found) == Path(base.__file__).with_name("io.py")


def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make every connection fail at once, with empty caches."""
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    offline(monkeypatch, tmp_path)
    image_net = (3, 64, 64)
    assert "Did you mean 'resnet18'" in zoo_complaint("torchvision:resnet-18", image_net, 1000)
    assert "1000 classes" in zoo_complaint("torchvision:resnet18")
    assert "cannot be downloaded" in zoo_complaint("torchvision:squeezenet1_1", image_net, 1000)
    plain = torchvision.models.squeezenet1_1().eval()
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: plain)
    loaded = load_model("torchvision:squeezenet1_1", None, image_net, 1000)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(loaded.module(x(1, image_net)), plain((x(1, image_net) - mean) / std))


def test_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    offline(monkeypatch, tmp_path)
    image_net = (3, 64, 64)
    assert "Did you mean 'resnet18" in zoo_complaint("timm:resnet_18", image_net, 1000)
    assert "1000 classes" in zoo_complaint("timm:resnet18")
    assert "'timm:resnet18'" in zoo_complaint("timm:resnet18", image_net, 1000)
    plain = timm.create_model("mobilenetv3_small_050").eval()
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("timm.models._hub.has_hf_hub", lambda: False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(tmp_path / name))
    loaded = load_model("timm:mobilenetv3_small_050", None, image_net, 1000)
    config = plain.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        assert torch.equal(loaded.module(x(1, image_net)), plain((x(1, image_net) - mean) / std))
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "needs the timm package" in zoo_complaint("timm:resnet18", image_net, 1000)


def test_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    assert "not of the form" in complaint("hub:../../etc/passwd")
    asked = []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        return str(folder / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    loaded = load_model("hub:some/body@v1", None, SHAPE, 3)
    assert asked == [("some/body", "model.safetensors", "v1"), ("some/body", "config.json", "v1")]
    assert torch.equal(loaded.module(x()), small()(x()))
    assert (loaded.name, loaded.source) == ("some/body", "hub:some/body@v1")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "needs huggingface_hub" in complaint("hub:some/body")


def test_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_: Any, **__: Any) -> None:
        raise hub.errors.LocalEntryNotFoundError("offline\nand no copy")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    assert "cannot be downloaded" in complaint("hub:some/body")
