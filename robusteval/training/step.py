"""One step of training."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from robusteval.rng import derive_seed, generator
from robusteval.training import average
from robusteval.training.augment import augment
from robusteval.training.awp import Recording, perturbation, shifted
from robusteval.training.checkpoint import TrainState
from robusteval.training.objective import Loss, StepContext
from robusteval.training.parallel import ALONE
from robusteval.training.plan import Plan
from robusteval.training.schedule import midpoint


def train_step(plan: Plan, state: TrainState, step: int, rows: Tensor) -> Loss:
    """Take one optimizer step on the training samples ``rows``; every random draw is derived from the step."""
    config, moment = plan.config, (state.epoch, step)
    taken, steps = state.epoch * plan.steps_per_epoch + step, config.epochs * plan.steps_per_epoch
    _seed_global(derive_seed(config.seed, "layers", *moment, plan.team.rank), plan.device)  # for dropout and the like
    ctx = _context(plan, state, rows, moment, midpoint(taken, steps))
    for group in state.optimizer.param_groups:
        group["lr"] = config.optimizer.lr * config.schedule.scale(ctx.progress)
    state.optimizer.zero_grad()
    loss = _differentiate(plan, state, ctx)
    plan.team.average_gradients(state.model)
    if config.clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_grad_norm)
    state.optimizer.step()
    if state.average is not None:
        average.after_step(state.average, state.model, config.average, taken, steps)
    return loss


def rehearse(plan: Plan, state: TrainState, smoothing: float) -> float:
    """Return the loss of the first two samples under label smoothing; ``state`` is spoilt by it."""
    state.model.train()
    with torch.random.fork_rng(devices=[plan.device] if plan.device.type == "cuda" else []):
        ctx = _context(replace(plan, team=ALONE), state, torch.arange(2), (0, 0), 0.0)
        return float(plan.objective(replace(ctx, smoothing=smoothing)).value.detach())


def _context(plan: Plan, state: TrainState, rows: Tensor, moment: tuple[int, int], progress: float) -> StepContext:
    config, share = plan.config, plan.team.share(len(rows))
    x = plan.train.images(rows)
    if config.augment:
        x = augment(x, plan.info.pad, plan.info.flip, generator(config.seed, "augment", *moment))
    x, own = share.mine(x).to(plan.device, plan.dtype), share.mine(rows)
    attack_rng = generator(config.seed, "attack", *moment)
    return StepContext(
        model=state.network,
        x=x,
        y=plan.train.labels[own].to(plan.device),
        ids=plan.train.ids[own].to(plan.device),
        threat=plan.threat,
        attack=config.adversary.bind(state.network, x, plan.threat, attack_rng, share),
        rng=generator(config.seed, "objective", *moment),
        progress=progress,
        population=plan.population,
        state=state.objective,
        smoothing=config.label_smoothing,
        share=share,
        traces=state.traces,
    )


def _differentiate(plan: Plan, state: TrainState, ctx: StepContext) -> Loss:
    """Fill the gradients of the objective, at perturbed weights where the run asks for that."""
    awp = plan.config.awp
    if state.proxy is None or ctx.progress < awp.start:
        return _backward(plan, ctx)
    state.proxy.load_state_dict(state.network.state_dict())
    recording = Recording(ctx.attack)
    rehearsal = replace(
        ctx,
        model=state.proxy,  # its BatchNorm statistics are thrown away; the attack runs on the model itself
        attack=recording,
        rng=ctx.rng.clone_state(),
        state={name: value.clone() for name, value in ctx.state.items()},
    )
    value = plan.objective(rehearsal).value * ctx.share.weight
    with shifted(state.network, perturbation(state.proxy, value, awp.gamma, plan.team)):
        return _backward(plan, replace(ctx, attack=recording.replay()))


def _backward(plan: Plan, ctx: StepContext) -> Loss:
    loss = plan.objective(ctx)
    (loss.value * ctx.share.weight).backward()  # type: ignore[no-untyped-call]
    return loss


def _seed_global(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
