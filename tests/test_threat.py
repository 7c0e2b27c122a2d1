from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robusteval.errors import UsageError
from robusteval.rng import SampleRng, derive_seed, generator
from robusteval.threat import Norm, ThreatModel, parse_eps

THREATS = [("Linf", "8/255"), ("Linf", "1"), ("L2", "0.5"), ("L2", "3"), ("L1", "12"), ("L1", "0.25")]
THREATS += [("L0", "3"), ("L0", "500")]


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", Fraction(8, 255)), ("0.5", Fraction(1, 2)), (" .25 ", Fraction(1, 4))]
)
def test_eps_is_exact(text: str, value: Fraction) -> None:
    assert parse_eps(text) == value


def test_decimal_and_fraction_stay_different() -> None:
    a, b = ThreatModel.parse("Linf", "0.031"), ThreatModel.parse("linf", "8/255")
    assert a.eps != b.eps
    assert (str(a), str(b)) == ("Linf 0.031", "Linf 8/255")


@pytest.mark.parametrize(
    "text", ["0", "0/255", "8/0", "-8/255", "-1", "nan", "inf", "1e-3", "eight", "", "8/255/2", "8//255"]
)
def test_eps_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="eps"):
        parse_eps(text)


def test_linf_eps_above_one_is_refused_with_a_hint() -> None:
    with pytest.raises(UsageError, match="8/255"):
        ThreatModel.parse("Linf", "8")
    assert ThreatModel.parse("L2", "8").radius == 8.0


def test_unknown_norm_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="'Linf'"):
        ThreatModel.parse("Lin", "8/255")


def test_distances_by_hand() -> None:
    x = torch.zeros(1, 1, 2, 2)
    x_adv = torch.tensor([[[[0.3, 0.0], [0.4, 0.0]]]])
    expected = {"Linf": 0.4, "L2": 0.5, "L1": 0.7}
    for norm, value in expected.items():
        assert ThreatModel.parse(norm, "1").distance(x, x_adv).item() == pytest.approx(value, abs=1e-7)


def test_contains_refuses_box_budget_and_nan() -> None:
    threat = ThreatModel.parse("Linf", "0.1")
    x = torch.full((6, 1, 2, 2), 0.05)
    x_adv = x.clone()
    x_adv[1] += 0.1
    x_adv[2] += 0.1 + 1e-5
    x_adv[3] -= 0.06
    x_adv[4, 0, 0, 0] = float("nan")
    x_adv[5] += 0.1 + 5e-7
    assert threat.contains(x, x_adv).tolist() == [True, True, False, False, False, True]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), threat=st.sampled_from(THREATS), scale=st.floats(0.01, 10))
def test_projection_and_samples_obey_the_threat(seed: int, threat: tuple[str, str], scale: float) -> None:
    model = ThreatModel.parse(*threat)
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(5, 2, 4, 4, generator=rng)
    wild = x + scale * torch.randn(x.shape, generator=rng)
    projected = model.project(x, wild)
    for point in (projected, model.sample(x, rng)):
        assert model.contains(x, point, tolerance=1e-5 * max(1.0, model.radius)).all()
        assert model.contains(x, model.hold(x, point)).all()
    assert torch.allclose(model.project(x, projected), projected, atol=1e-5)


def test_l0_counts_values_and_keeps_the_largest_changes() -> None:
    threat = ThreatModel.parse("L0", "2")
    x = torch.full((1, 2, 1, 3), 0.5)
    x_adv = torch.tensor([0.5, 0.9, 0.4, 0.0, 0.5, 0.6]).view(1, 2, 1, 3)
    assert threat.distance(x, x_adv).tolist() == [4]
    assert not threat.contains(x, x_adv)
    expected = torch.tensor([0.5, 0.9, 0.5, 0.0, 0.5, 0.5]).view(1, 2, 1, 3)
    for moved in (threat.project(x, x_adv), threat.hold(x, x_adv)):
        assert torch.equal(moved, expected)
    drawn = threat.sample(torch.full((50, 2, 1, 3), 0.5), torch.Generator().manual_seed(0))
    assert threat.distance(torch.full((50, 2, 1, 3), 0.5), drawn).tolist() == [2] * 50
    assert len({tuple(row.flatten().nonzero().flatten().tolist()) for row in drawn != 0.5}) > 5
    with pytest.raises(UsageError, match="no whole number"):
        ThreatModel.parse("L0", "1/2")


def test_l1_projection_is_the_closest_point() -> None:
    """Against scipy's constrained minimiser."""
    from scipy.optimize import minimize

    rng = torch.Generator().manual_seed(3)
    delta = torch.randn(1, 6, generator=rng).double()
    threat = ThreatModel.parse("L1", "0.7")
    x = torch.full((1, 6), 0.5).double()
    ours = (threat.project(x, x + 0.4 * delta) - x).numpy()[0]
    target = (0.4 * delta).numpy()[0]
    bound = {"type": "ineq", "fun": lambda split: 0.7 - split.sum()}
    theirs = minimize(
        lambda split: ((split[:6] - split[6:] - target) ** 2).sum(),
        [0.01] * 12,
        bounds=[(0, 1)] * 12,
        constraints=bound,
        options={"ftol": 1e-14, "maxiter": 1000},
    ).x
    assert ours == pytest.approx(theirs[:6] - theirs[6:], abs=1e-4)


def test_seeds_differ_by_purpose_and_repeat() -> None:
    seeds = {derive_seed(0), derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(1, "a"), derive_seed(0, "a", 1)}
    assert len(seeds) == 5
    assert torch.equal(torch.rand(3, generator=generator(5, "x", 2)), torch.rand(3, generator=generator(5, "x", 2)))


def test_a_sample_draws_alike_in_any_company() -> None:
    threat = ThreatModel.parse("L2", "1")
    x = torch.rand(4, 1, 3, 3)
    rng = SampleRng(7, (10, 11, 12, 13), 0)
    together = rng.draw(threat.sample, x, "start")
    rows = torch.tensor([3, 1])
    apart = rng.take(rows).draw(threat.sample, x[rows], "start")
    assert torch.equal(together[rows], apart)
    assert [norm.value for norm in Norm] == ["Linf", "L2", "L1", "L0"]
