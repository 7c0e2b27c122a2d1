"""Suite `rapid` against `standard` on one GPU: preact_resnet18, CIFAR-10, Linf 8/255; writes docs/results/speed_gpu.md.

    python tools/gpu_rapid.py DATA [--minutes 9] [--epochs 10] [--samples 1000] [--keep runs/gpu_rapid]

DATA has CIFAR-10 or its JPEG copy; unpack that first (`tar xf cifar10-jpeg.tar.xz`). The net is trained here, by
PGD-10 adversarial training with the recipe `unified`. A call stops after about --minutes; the same call goes on, and
the last one writes. `--dry-run` rehearses all of it on a CPU and prints instead: it trains on 64 images, then takes the
published `cifar_cnn_a_adv` in DATA, 16 images and 2/255.

Rates are those of the whole evaluation, with all that it does besides passes. "Share" is the arithmetic of the passes,
a backward one counted as a forward one because only the input's gradient is asked for, over what the same device
reaches in bfloat16 on one large matrix product. Passes inside proofs are not counted.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from _nets import cifar_cnn_a_adv
from _study import MARK, ROOT, cached, publish, table, versions
from gpu_study import INTERRUPTED, TINY, run_for
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from robusteval.comparison.calibrate import Side, reference
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import Plan, prepare
from robusteval.models.io import weights_digest
from robusteval.settings import flatten
from robusteval.training.recipes import load_recipe
from robusteval.verdict import ROBUST, Verdict

Way = tuple[str, str, bool]
"""A suite, the precision of its search, and whether that is compiled."""

WAYS: tuple[Way, ...] = (
    ("standard", "float32", False),
    *(("rapid", "float32", False), ("rapid", "bfloat16", False), ("rapid", "bfloat16", True)),
)
HEADER = ("suite", "robust", "only it breaks", "only `standard` breaks", "seconds", "ratio", "images per second")
HEADER += ("passes per image", "passes per second", "share of the bfloat16 rate")
PROFILED, LINES = ("apgd-margin", "halving"), 15
WARMING = 16
WARM: set[Way] = set()
"""What has run in this process."""


def train(data: str, folder: Path, epochs: int, minutes: float, dry_run: bool) -> None:
    """Train, or go on; leave the process if there is more to do."""
    settings = flatten(load_recipe("unified").settings) | {"objective.name": "at", "dataset": "cifar10"}
    settings |= {"data_dir": data, "epochs": epochs, "precision": "bfloat16", "channels_last": True, "device": "cuda"}
    settings |= {**TINY, "device": "cpu"} if dry_run else {}
    sets = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    code = run_for([sys.executable, str(ROOT / "cli.py"), "train", *sets, "--out", str(folder)], minutes)
    if code == INTERRUPTED:
        leave("training was interrupted")
    if code:
        sys.exit(code)


def leave(why: str) -> NoReturn:
    """End the call."""
    print(f"{why}; the same call goes on", file=sys.stderr)
    sys.exit(INTERRUPTED)


def one_way(plan: Plan, way: Way) -> Plan:
    """Return the plan with another suite and search."""
    suite, precision, compiled = way
    search = plan.config.model_copy(update={"precision": precision, "compiled": compiled})
    return replace(plan, config=search) if suite == plan.suite.name else reference(plan, suite)


def judged(plan: Plan, way: Way, first: int, part: int) -> dict[str, Any]:
    """Judge the samples of the part that begins at ``first``, after what is done once in a process."""
    if way not in WARM:
        Side(one_way(plan, way), {}, []).judge(range(min(WARMING, len(plan.split))), 0)
        WARM.add(way)
    side = Side(one_way(plan, way), {}, [])
    side.judge(range(first, min(first + part, len(plan.split))), first // part)
    verdicts = {str(sample): verdict.value for sample, verdict in side.verdicts.items()}
    return {"verdicts": verdicts, "seconds": side.seconds[0], "passes": side.forward + side.backward}


def device_rate(device: torch.device) -> float:
    """Return operations per second of a large matrix product in bfloat16, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(10):
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def operations(plan: Plan) -> int:
    """Return what one image costs in a forward pass, a multiplication and an addition counted as two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plan.model.module(plan.split.images(slice(0, 1)).to(plan.device))
    return counter.get_total_flops()


def profiled(plan: Plan, way: Way) -> dict[str, Any]:
    """Return where the time of attacks on a few images goes, the dearest first: kernels, or operators on a CPU."""
    whole = one_way(plan, way)
    attacks = replace(
        whole, suite=replace(whole.suite, specs=tuple(s for s in whole.suite.specs if s.name in PROFILED))
    )
    side, places = Side(attacks, {}, []), range(min(WARMING, len(plan.split)))
    side.judge(places, 0)
    cuda = plan.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        side.judge(places, 0)
    spent = [
        (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6, event.count)
        for event in record.key_averages()
        if not cuda or event.device_type == DeviceType.CUDA
    ]
    most = sorted(spent, key=lambda one: -one[1])
    return {"plain": side.seconds[0], "busy": sum(seconds for _, seconds, _ in most), "operators": most[:LINES]}


def rows(found: dict[Way, list[dict[str, Any]]], cost: int, rate: float) -> list[list[object]]:
    """Return the table. Raises `SystemExit` where one way proved what another broke."""
    verdicts = {way: {i: v for part in parts for i, v in part["verdicts"].items()} for way, parts in found.items()}
    kept = {way: {int(i) for i, v in said.items() if v in ROBUST} for way, said in verdicts.items()}
    for sample in verdicts[WAYS[0]]:
        if {Verdict.BROKEN, Verdict.CERTIFIED} <= {said[sample] for said in verdicts.values()}:
            raise SystemExit(f"sample {sample} was both proved and broken: no number here can be trusted")
    least, lines = found[WAYS[0]], []
    for way, parts in found.items():
        suite, precision, compiled = way
        seconds, passes = (sum(part[key] for part in parts) for key in ("seconds", "passes"))
        breaks, misses = kept[WAYS[0]] - kept[way], kept[way] - kept[WAYS[0]]
        differs = [", ".join(map(str, sorted(ids))) or "none" for ids in (breaks, misses)]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(least, parts, strict=True)]
        total = f"{sum(a['seconds'] for a in least) / seconds:.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        name, samples = f"{suite}, {precision}{', compiled' if compiled else ''}", len(verdicts[way])
        speeds = [f"{samples / seconds:.1f}", f"{passes / samples:.0f}", f"{passes / seconds:.0f}"]
        share = f"{100 * passes * cost / seconds / rate:.1f} %"
        lines.append([name, len(kept[way]), *differs, f"{seconds:.0f}", total, *speeds, share])
    return lines


@click.command()
@click.argument("data")
@click.option("--keep", type=click.Path(path_type=Path), default=Path("runs/gpu_rapid"), show_default=True)
@click.option("--minutes", default=1e5, help="Stop this call after about so long.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--samples", default=1000, show_default=True)
@click.option("--part", default=250, show_default=True, help="Samples judged at once, and between which to stop.")
@click.option("--dry-run", is_flag=True, help="Rehearse on the CPU with next to nothing.")
def main(data: str, keep: Path, minutes: float, epochs: int, samples: int, part: int, dry_run: bool) -> None:
    """Compare, or go on with it."""
    ends = time.monotonic() + 60 * minutes
    if dry_run:
        keep, samples, part = keep / "rehearsal", 16, 8
    train(data, keep / "model", epochs, minutes, dry_run)
    net = {"model": str(keep / "model"), "dataset": "cifar10", "data_dir": data, "norm": "Linf", "eps": "8/255"}
    rest = {"suite": "rapid", "limit": samples, "chunk_size": part, "device": "cpu" if dry_run else "cuda"}
    config = {**(cifar_cnn_a_adv(Path(data)) if dry_run else net), **rest}
    plan = prepare(EvalConfig.model_validate(config))
    name = torch.cuda.get_device_name() if plan.device.type == "cuda" else "CPU"
    about = [weights_digest(plan.model.module), plan.suite.sha256, len(plan.split), part, name, torch.__version__]
    results = keep / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    found: dict[Way, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for turn, first in enumerate(range(0, len(plan.split), part)):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            file = "-".join([*map(str, way), str(first)])
            if not (results / f"{file}.json").is_file() and time.monotonic() > ends:
                leave("time is up")
            found[way].append(cached(results, file, lambda w=way, f=first: judged(plan, w, f, part)))
            print(*way, first, f"{found[way][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    cost, rate = operations(plan), device_rate(plan.device)
    spent = cached(results, "profile", lambda: profiled(plan, WAYS[2]))
    said = f"{plan.model.name}, {plan.split.info.title}, Linf {plan.threat.label}, {len(plan.split)} images, {name}. "
    said += f"One image costs {cost / 1e9:.2f} Gflop forward; the device reaches {rate / 1e12:.1f} Tflop/s in bfloat16."
    profiled_on = f"{' and '.join(PROFILED)} of {' '.join(WAYS[2][:2])} on {min(WARMING, len(plan.split))} images"
    left = f"What is left: {profiled_on} took {spent['plain']:.2f} s without the profiler; with it, all operators took "
    left += f"{spent['busy']:.2f} s, most of them"
    operators = [[key, f"{took:.2f}", count] for key, took, count in spent["operators"]]
    tables = table(HEADER, rows(found, cost, rate)), table(("operator", "seconds", "calls"), operators)
    figures = [said, tables[0], left, tables[1], versions("torch")]
    if dry_run:
        print(f"{MARK}\n" + "\n\n".join(figures))
    else:
        publish("speed_gpu.md", "\n\n".join(figures))


if __name__ == "__main__":
    main()
