"""The conformance suite of certifiers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from robusteval.attacks.pgd import PGD
from robusteval.attacks.smoothadv import SmoothAdv
from robusteval.certifiers.base import Certifier
from robusteval.models.base import Classifier
from robusteval.smoothing import votes
from robusteval.testing._problems import THREATS, Problem, boundary_distance, corner, linear, relu_net
from robusteval.testing._purity import disturb, marked, require, untouched
from robusteval.threat import ThreatModel
from robusteval.verdict import Certificate

FACTORS = (0.3, 0.7, 0.9, 0.99, 0.999, 1.001, 1.01, 1.5, 3.0)
"""Distances from a linear decision boundary, in eps: below 1 there is an adversarial input."""

EASY = 1000.0
"""A distance at which any method that deserves the name proves a linear classifier robust."""

VOTES = 4000
"""Noisy copies that say what a smoothed classifier answers."""

NET_EPS = {"Linf": ("1/255", "0.02", "0.05"), "L2": ("0.05", "0.2", "0.5"), "L1": ("0.3", "1", "3")}


def check_certifier(certifier: Certifier) -> None:
    """Raise `AssertionError` unless ``certifier`` keeps the contract of `robusteval.certifiers.base.Certifier`.

    For every norm that it supports: nothing is proved that the closed form of a linear classifier or PGD on a random
    ReLU net refutes (for a smoothed classifier, SmoothAdv and the votes at its candidates), the obvious is proved,
    refusals have a reason, the answer repeats and everything is left as found.
    """
    supported = [threat for threat in THREATS if threat.convex and certifier.supports(threat)]
    require(supported, f"{certifier} supports none of the norms {', '.join(threat.norm for threat in THREATS)}")
    for threat in supported:
        for classes in (2, 3, 5):
            _check_linear(certifier, linear(threat, classes, FACTORS))
        _check_refuted(certifier, corner(threat, 0.9), torch.ones(8, dtype=torch.bool), "the closed form")
        _check_easy(certifier, threat)
        for eps in NET_EPS[threat.norm]:
            _check_net(certifier, relu_net(ThreatModel.parse(threat.norm, eps)))


def _check_linear(certifier: Certifier, problem: Problem) -> None:
    model = cast(Classifier, problem.model)
    distance = boundary_distance(model, problem.x, problem.y, problem.threat.norm)
    _check_refuted(certifier, problem, distance < problem.threat.radius, "the closed form")


def _check_net(certifier: Certifier, problem: Problem) -> None:
    sigma = getattr(certifier, "sigma", None) if getattr(certifier, "smoothed", False) else None
    if sigma is not None:
        _check_smoothed_net(certifier, problem, sigma)
        return
    found = PGD(steps=40, restarts=2)(problem.model, problem.x, problem.y, problem.threat, problem.rng).candidates
    broken = (problem.predict(found) != problem.y) & problem.threat.contains(problem.x, found)
    _check_refuted(certifier, problem, broken, "PGD")


def _check_smoothed_net(certifier: Certifier, problem: Problem, sigma: float) -> None:
    """Refute by many more votes than chance could turn; where attacks on the network itself err, g may be right."""
    found = SmoothAdv(sigma)(problem.model, problem.x, problem.y, problem.threat, problem.rng).candidates
    said = votes(problem.model, found, sigma, VOTES, problem.rng, "conformance")
    rival = said.scatter(1, problem.y[:, None], -1).max(1).values
    broken = rival - said.gather(1, problem.y[:, None]).squeeze(1) > 6 * VOTES**0.5
    _check_refuted(certifier, problem, broken & problem.threat.contains(problem.x, found), "SmoothAdv")


def _check_refuted(certifier: Certifier, problem: Problem, broken: Tensor, by: str) -> None:
    certificates = _certify(certifier, problem)
    proved = torch.tensor([certificate.proved for certificate in certificates])
    _check_evidence(certifier, problem, certificates, broken)
    wrong = (proved & broken).nonzero().flatten().tolist()
    require(not wrong, f"{certifier} proves samples {wrong} robust to {problem.threat}, which {by} refutes")
    disturb()
    again = torch.tensor([certificate.proved for certificate in _certify(certifier, problem)])
    require(torch.equal(proved, again), f"{certifier} differs when called again with the same rng")


def _check_evidence(certifier: Certifier, problem: Problem, found: list[Certificate], broken: Tensor) -> None:
    """Require that evidence is enough to see its proof again, and that it proves nothing about refuted samples."""
    given = {row: one.evidence for row, one in enumerate(found) if one.proved and one.evidence is not None}
    if not given:
        return
    recheck = getattr(certifier, "recheck", None)
    require(recheck, f"{certifier} gives evidence and has no `recheck` for it")
    rows, refuted = list(given), broken.nonzero().flatten().tolist()[: len(given)]
    for places, expected in ((rows, True), (refuted, False)):
        if places:
            evidence = list(given.values())[: len(places)]
            seen = recheck(problem.model, problem.x[places], problem.y[places], problem.threat, evidence)  # type: ignore[misc]
            require(seen == [expected] * len(places), f"{certifier} sees {seen} in evidence, not {expected}")


def _check_easy(certifier: Certifier, threat: ThreatModel) -> None:
    tiny = ThreatModel.parse(threat.norm, str(threat.eps / 1000))
    certificates = _certify(certifier, linear(tiny, 3, (EASY,) * 4))
    proved = sum(certificate.proved for certificate in certificates)
    require(proved == 4, f"{certifier} proves {proved} of 4 linear samples {EASY:g} eps from the boundary ({tiny})")


def _certify(certifier: Certifier, problem: Problem) -> list[Certificate]:
    model, x, y = marked(problem.model), problem.x.clone(), problem.y.clone()
    with untouched(f"{certifier} ({problem.threat})", model, x, y):
        certificates = certifier(model, x, y, problem.threat, problem.rng)
    require(len(certificates) == len(x), f"{certifier} returns {len(certificates)} certificates for {len(x)} inputs")
    mute = [c for c in certificates if not c.proved and not c.reason.strip()]
    require(not mute, f"{certifier} refuses {len(mute)} proofs without a reason")
    return certificates
