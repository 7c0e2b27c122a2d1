"""How time and memory of an evaluation grow with the number of samples; writes docs/results/growth.md.

    python tools/evaluate_growth.py ../shared/data [--suite rapid] [--samples 1000 10000]

The argument is a folder with `cifar10-jpeg.tar.xz` and `models/cifar_cnn_a_adv.model`. Each run is the real command in
a process of its own, one worker; its peak is what the system says of that process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _nets import CIFAR10
from _study import ROOT, publish, table, versions

HEADER = ("samples", "robust", "worker seconds", "seconds per 1000 samples", "peak memory, MiB")


def evaluated(data: Path, suite: str, samples: int) -> list[object]:
    """Return a row of the table."""
    flags = ["--model", str(data / "models" / "cifar_cnn_a_adv.model"), "--architecture", "small_cnn"]
    flags += ["--dataset", "cifar10", "--data-dir", str(data), "--eps", "2/255", "--suite", suite, "--device", "cpu"]
    flags += ["--limit", str(samples), "--workers", "1", "--json"]
    for key, values in CIFAR10.items():
        flags += ["--set", f"{key}={list(values)}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "cli.py"), "evaluate", *flags, "--out", folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            said = run.stdout.read()
            _, status, usage = os.wait4(run.pid, 0)
            run.returncode = os.waitstatus_to_exitcode(status)
        if run.returncode:
            raise SystemExit(f"the evaluation failed with exit code {run.returncode}")
    report = json.loads(said)
    seconds = report["seconds"]
    pace, robust = 1000 * seconds / samples, report["results"]["empirical"]["count"]
    return [samples, robust, f"{seconds:.0f}", f"{pace:.1f}", f"{usage.ru_maxrss / 1024:.0f}"]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Measure how cost grows.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--suite", default="rapid")
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 10000])
    options = parser.parse_args()
    rows = [evaluated(options.data, options.suite, samples) for samples in options.samples]
    said = f"cifar_cnn_a_adv, CIFAR-10 (JPEG), Linf 2/255, suite `{options.suite}`, one worker."
    publish("growth.md", "\n\n".join([said, table(HEADER, rows), versions("torch")]))


if __name__ == "__main__":
    main()
