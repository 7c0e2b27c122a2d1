"""The conformance suite of objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robusteval.attacks._steps import ascend
from robusteval.models.base import Classifier
from robusteval.rng import SampleRng, generator
from robusteval.testing._purity import bits, disturb, marked, require, untouched
from robusteval.threat import ThreatModel
from robusteval.training.adversary import Adversary, attacked
from robusteval.training.objective import Found, LogitLoss, Loss, Objective, Start, StepContext
from robusteval.training.share import Share

THREAT = ThreatModel.parse("Linf", "0.1")
POPULATION, BATCH, STEPS = 1000, 24, 30


def check_objective(objective: Objective) -> None:
    """Raise `AssertionError` unless ``objective`` keeps the contract of `robusteval.training.objective.Objective`.

    What it returns, that it leaves everything but its state as found, that it is a function of its context, that
    logits of 10^4 and a last batch of two do it no harm, that the order of a batch does not matter, and that
    descending it lowers it.
    """
    _check_repeats(objective)
    _check_ragged_batch(objective)
    _check_huge_logits(objective)
    _check_order(objective)
    _check_descent(objective)


def _net() -> nn.Module:
    """Return a small net in training mode with one BatchNorm kept in eval mode and one frozen parameter."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        first, frozen_norm = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm1d(64)
        layers = [first, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), frozen_norm, nn.Linear(64, 3)]
    model = nn.Sequential(*layers).train()
    frozen_norm.eval()
    next(iter(first.parameters())).requires_grad_(False)
    return model


def _data(count: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 8, 8, generator=generator(0, "objective"))
    return x, (20 * x.flatten(1)[:, :16].mean(1) - 9).round().long().clamp(0, 2)


def _context(model: nn.Module, x: Tensor, y: Tensor, ids: Tensor | None = None) -> StepContext:
    attack = Adversary(steps=3).bind(model, x, THREAT, generator(0, "inner attack"))
    ids = 3 + 7 * torch.arange(len(x)) if ids is None else ids
    return StepContext(model, x, y, ids, THREAT, attack, generator(0, "objective's own"), 0.5, POPULATION)


def _call(objective: Objective, ctx: StepContext) -> Loss:
    """Return the loss, looked at from all sides."""
    marked(ctx.model)
    with untouched(str(objective), ctx.model, ctx.x, ctx.y, ctx.ids, buffers=False):
        loss = objective(ctx)
    count = len(ctx.x)
    require(loss.value.shape == (), f"{objective} returns a value of shape {tuple(loss.value.shape)}, not a number")
    require(loss.value.isfinite(), f"{objective} returns the loss {float(loss.value.detach())}")
    require(loss.value.requires_grad, f"{objective} returns a loss without a graph")
    found = tuple(loss.logits.shape)
    require(len(found) == 2 and found[0] == count, f"{objective} returns logits {found} for {count} inputs")
    odd = [name for name, value in loss.metrics.items() if not isinstance(value, float) or not math.isfinite(value)]
    require(not odd, f"{objective} returns metrics that are no finite floats: {', '.join(odd)}")
    return loss


def _gradients(objective: Objective, ctx: StepContext, loss: Loss) -> list[Tensor]:
    parameters = [parameter for parameter in ctx.model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss.value, parameters, allow_unused=True)
    gradients = [gradient for gradient in found if gradient is not None]
    require(gradients, f"{objective} does not depend on the model's parameters")
    require(all(g.isfinite().all() for g in gradients), f"{objective} has NaN or infinite gradients")
    require(any(g.any() for g in gradients), f"{objective} has no gradient at all")
    return gradients


def _state_bits(ctx: StepContext) -> list[tuple[str, bytes | None]]:
    return sorted((name, bits(value)) for name, value in ctx.state.items())


def _check_repeats(objective: Objective) -> None:
    runs = []
    for _ in range(2):
        disturb()
        ctx = _context(_net(), *_data(BATCH))
        loss = _call(objective, ctx)
        gradients = _gradients(objective, ctx, loss)
        runs.append((bits(loss.value), bits(loss.logits), list(map(bits, gradients)), _state_bits(ctx)))
    require(runs[0] == runs[1], f"{objective} is not a function of its context: a second call differs")


def _check_ragged_batch(objective: Objective) -> None:
    """Try the two samples that an epoch leaves over, after a full batch, with the state that one left."""
    model, (x, y) = _net(), _data(BATCH)
    full = _context(model, x, y)
    _gradients(objective, full, _call(objective, full))
    last = replace(_context(model, x[:2], y[:2], full.ids[-2:]), state=full.state)
    _gradients(objective, last, _call(objective, last))


def _check_huge_logits(objective: Objective) -> None:
    """Try logits of about 10^4, half of them right and half of them wrong, with the real inner attack on top."""
    x, _ = _data(8)
    layer = nn.Linear(64, 3)
    with torch.no_grad():
        layer.weight.normal_(generator=generator(0, "huge")).mul_(1e4)
        layer.bias.zero_()
        model = Classifier(nn.Sequential(nn.Flatten(), layer), (0.5,), (1.0,)).train()
        y = model(x).argmax(1)
    y[::2] = (y[::2] + 1) % 3
    ctx = _context(model, x, y)
    _gradients(objective, ctx, _call(objective, ctx))


@dataclass(frozen=True)
class _PerSampleAttack:
    """An inner attack whose start depends on each sample's id, so that the order of a batch cannot matter."""

    ctx: StepContext

    def __call__(
        self,
        loss: LogitLoss,
        *,
        start: Start | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        radius: float | None = None,
    ) -> Tensor:
        ctx = self.ctx
        threat = ctx.threat if radius is None else ctx.threat.resized(radius)
        begin = SampleRng(0, tuple(ctx.ids.tolist()), 0).draw(threat.sample, ctx.x)
        with attacked(ctx.model, "eval"):
            size = step_size or threat.radius / 4
            return ascend(lambda point: loss(ctx.model(point)), ctx.x, begin, threat, steps or 3, size).detach()

    def logits(self, x: Tensor) -> Tensor:
        return self.ctx.attack.logits(x)

    def run(self, search: Callable[[nn.Module], Found]) -> Found:
        return self.ctx.attack.run(search)


@dataclass(frozen=True)
class _PerSampleShare(Share):
    """A share whose draws depend on each sample's id."""

    ids: tuple[int, ...] = ()

    def draw(self, sampler: Callable[[Tensor, torch.Generator], Tensor], x: Tensor, rng: torch.Generator) -> Tensor:
        return SampleRng(1, self.ids, 0).draw(sampler, x)


def _ordered(objective: Objective, order: Sequence[int]) -> tuple[Loss, StepContext, bool]:
    """Return the loss of a batch in ``order``, its context, and whether the objective drew from `rng` itself."""
    x, y = _data(BATCH)
    ctx = _context(_net(), x[order], y[order], 3 + 7 * torch.tensor(order))
    ctx = replace(ctx, attack=_PerSampleAttack(ctx), share=_PerSampleShare(ids=tuple(ctx.ids.tolist())))
    before = bits(ctx.rng.get_state())
    return _call(objective, ctx), ctx, bits(ctx.rng.get_state()) != before


def _check_order(objective: Objective) -> None:
    """Require that logits follow the order of the batch, and that the value does not.

    The value is let off where the objective draws from `rng` past `StepContext.draw`.
    """
    order = torch.randperm(BATCH, generator=generator(0, "order")).tolist()
    straight, ctx, draws = _ordered(objective, range(BATCH))
    shuffled, other, _ = _ordered(objective, order)
    if draws:
        return
    same = torch.allclose(shuffled.logits, straight.logits[order], rtol=1e-2, atol=1e-2)
    require(same, f"{objective} returns logits in another order than the batch")
    values = float(straight.value.detach()), float(shuffled.value.detach())
    require(math.isclose(*values, rel_tol=1e-3), f"{objective} depends on the order of the batch: {values}")
    for name, value in ctx.state.items():
        close = torch.allclose(value.float(), other.state[name].float(), rtol=1e-2, atol=1e-2)
        require(close, f"{objective} keeps state '{name}' by position in the batch; index it with ids")


def _check_descent(objective: Objective) -> None:
    model, (x, y) = _net(), _data(BATCH)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    state: dict[str, Tensor] = {}
    values = []
    for _ in range(STEPS):
        loss = objective(replace(_context(model, x, y), state=state))
        optimizer.zero_grad()
        loss.value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        values.append(float(loss.value.detach()))
    last = sum(values[-5:]) / 5
    require(last < values[0], f"{objective} goes from {values[0]:.4g} to {last:.4g} when descended on one batch")
