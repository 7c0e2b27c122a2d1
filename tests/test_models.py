"""Architectures in the registry, saved, loaded and against published nets; test_conformance.py has their contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robusteval.errors import RobustevalError, UsageError
from robusteval.models.base import Classifier, check_fit, frozen
from robusteval.models.io import (
    ARCHITECTURES,
    build_model,
    load_model,
    parameter_count,
    save_model,
    weights_digest,
)
from robusteval.settings import PluginSpec

SMALL: dict[str, dict[str, Any]] = {
    "cnn7": {"width": 4, "hidden": 16},
    "preact_resnet18": {"width": 4},
    "resnet18": {"width": 4},
    "wide_resnet": {"depth": 10, "width": 1},
}


def spec_of(name: str) -> PluginSpec:
    return PluginSpec(name=name, params=SMALL.get(name, {}))


def build(name: str, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, seed: int = 0) -> Classifier:
    mean, std = (0.4, 0.5, 0.45)[: shape[0]], (0.2, 0.25, 0.3)[: shape[0]]
    return build_model(spec_of(name), shape, classes, mean, std, seed=seed)


def warmed(name: str, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> Classifier:
    """Return a net whose BatchNorm statistics are not the initial ones, in eval mode."""
    model = build(name, shape, classes)
    model.train()(images(shape, 8))
    return model.eval()


def images(shape: tuple[int, int, int], count: int = 3) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


every_architecture = pytest.mark.parametrize("name", ARCHITECTURES.names())


def test_the_catalog_finds_exactly_the_architecture_files() -> None:
    assert set(ARCHITECTURES.names()) >= {"cnn7", "preact_resnet18", "resnet18", "small_cnn", "wide_resnet"}
    assert all(ARCHITECTURES.describe().values())


@every_architecture
def test_default_hyper_parameters_build(name: str) -> None:
    with torch.device("meta"):
        module = ARCHITECTURES.build(name).build((3, 32, 32), 10)
    assert parameter_count(module) > 1000


@every_architecture
def test_seed_alone_decides_the_weights_and_the_global_rng_is_left_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights_digest(build(name, seed=3))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert weights_digest(build(name, seed=3)) == first != weights_digest(build(name, seed=4))


@every_architecture
def test_save_and_load_give_the_same_bits(name: str, tmp_path: Path) -> None:
    model = warmed(name)
    card = {
        "architecture": {"name": name, "params": SMALL.get(name, {})},
        "shape": (3, 32, 32),
        "num_classes": 10,
        "training": {"extra_data": False, "epochs": 3},
    }
    save_model(tmp_path / "net", model, card)
    rng = torch.get_rng_state()
    loaded = load_model(str(tmp_path / "net"), None, (3, 32, 32), 10)
    assert torch.equal(rng, torch.get_rng_state())
    assert weights_digest(loaded.module) == weights_digest(model)
    assert torch.equal(loaded.module(images((3, 32, 32))), model(images((3, 32, 32))))
    assert not loaded.module.training
    assert all(parameter.requires_grad for parameter in loaded.module.parameters())
    assert (loaded.name, loaded.extra_data, loaded.training["epochs"]) == ("net", False, 3)
    assert loaded.architecture.startswith(name)


def test_normalisation_is_exactly_x_minus_mean_over_std() -> None:
    model = Classifier(nn.Flatten(), (0.5, 0.25), (0.5, 2.0))
    x = torch.tensor([1.0, 0.25]).view(1, 2, 1, 1)
    assert model(x).tolist() == [[1.0, 0.0]]


def test_integer_mean_and_std_become_floats() -> None:
    assert Classifier(nn.Flatten(), (0,), (1,)).mean.dtype == torch.float32


def test_small_cnn_has_the_parameters_of_the_published_net() -> None:
    state = build_model(PluginSpec(name="small_cnn"), (1, 28, 28), 10, (0.0,), (1.0,)).backbone.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items() if "weight" in name} == {
        "0.weight": (16, 1, 4, 4),
        "2.weight": (32, 16, 4, 4),
        "5.weight": (100, 1568),
        "7.weight": (10, 100),
    }


def test_published_parameter_counts() -> None:
    """ResNet-18 for CIFAR-10 has 11 173 962 parameters, WRN-28-10 has 36 479 194 (36.5M in the paper)."""
    counts = {}
    for name in ("resnet18", "wide_resnet"):
        with torch.device("meta"):
            counts[name] = parameter_count(ARCHITECTURES.build(name).build((3, 32, 32), 10))
    assert counts == {"resnet18": 11_173_962, "wide_resnet": 36_479_194}


@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 8, 3)])
def test_small_cnn_refuses_images_below_4x4(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="at least 4x4"):
        build_model(PluginSpec(name="small_cnn"), shape, 10, (0.0,), (1.0,))


@pytest.mark.parametrize(("depth", "nearest"), [(27, 28), (29, 28), (4, 10), (15, 16)])
def test_wide_resnet_depth_must_be_6n_plus_4(depth: int, nearest: int) -> None:
    with pytest.raises(UsageError, match=rf"depth = {depth}.*({nearest}|greater than)"):
        ARCHITECTURES.build("wide_resnet", {"depth": depth})


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (1.0,)), ((0.0,) * 3, (0.0,) * 3), ((float("nan"),) * 3, (1.0,) * 3)]
)
def test_wrong_normalisation_is_a_usage_error(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="mean"):
        build_model(PluginSpec(name="small_cnn"), (3, 8, 8), 10, mean, std)


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'resnet18'"):
        build_model(PluginSpec(name="resnet19"), (3, 8, 8), 10, (0.0,) * 3, (1.0,) * 3)


def test_digest_sees_names_dtypes_shapes_and_single_bits() -> None:
    module = nn.Linear(2, 3)
    digests = {weights_digest(module)}
    with torch.no_grad():
        module.weight[0, 0] = torch.nextafter(module.weight[0, 0], torch.tensor(9.0))
    digests.add(weights_digest(module))
    digests.add(weights_digest(nn.Sequential(module)))
    digests.add(weights_digest(module.double()))
    assert len(digests) == 4


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(3, 3)
    assert parameter_count(nn.Sequential(layer, layer)) == 12


def test_frozen_restores_mixed_modes_and_flags_after_an_error() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    module[1].eval()
    module[0].bias.requires_grad_(False)
    with pytest.raises(KeyError), frozen(module):
        raise KeyError(tuple(parameter.requires_grad for parameter in module.parameters()))
    with frozen(module):
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert [part.training for part in module] == [True, False]
    assert [parameter.requires_grad for parameter in module.parameters()] == [True, False, True, True]


class _Broken(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> Any:
        if isinstance(self.output, Exception):
            raise self.output
        return self.output


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (torch.zeros(2, 7), r"\(2, 7\)"),
        ([1, 2], "list"),
        (torch.full((2, 10), float("nan")), "NaN"),
        (KeyError("head"), "KeyError"),
    ],
)
def test_check_fit_says_what_is_wrong(output: Any, said: str) -> None:
    with pytest.raises(RobustevalError, match=said) as raised:
        check_fit(_Broken(output), (1, 8, 8), 10, "'net'")
    assert "\n" not in str(raised.value)


def as_theirs(name: str, theirs: nn.Module, **params: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of RobustBench's network and of ours with the same weights."""
    x = images((3, 32, 32), 8)
    theirs.train()(x)
    ours = ARCHITECTURES.build(name, params).build((3, 32, 32), 10)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval()(x), ours.eval()(x)


def robustbench_nets() -> Any:
    pytest.importorskip("timm")
    from robusteval.models.zoo._robustbench_import import import_robustbench

    import_robustbench()
    from robustbench.model_zoo.architectures import resnet, wide_resnet

    return resnet, wide_resnet


def test_networks_are_robustbench_s_given_its_weights() -> None:
    resnet, wide_resnet = robustbench_nets()
    pairs = [
        as_theirs("resnet18", resnet.ResNet18()),
        as_theirs("preact_resnet18", resnet.PreActResNet18(), final_norm=False, shared_shortcut=False),
        as_theirs(
            "preact_resnet18",
            resnet.PreActResNet(resnet.PreActBlock, [2, 2, 2, 2], bn_before_fc=True, out_shortcut=True),
        ),
        as_theirs("wide_resnet", wide_resnet.WideResNet(depth=16, widen_factor=2), depth=16, width=2),
    ]
    for theirs, ours in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
