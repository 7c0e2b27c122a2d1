"""Where a number came from: versions, source state, device, determinism."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from robusteval.errors import UsageError

PACKAGES = ("robusteval", "torch", "torchvision", "pyautoattack", "foolbox", "robustbench", "numpy", "pillow", "scipy")
DECIDING = ("robusteval", "torch", "pyautoattack", "foolbox")
"""Packages whose version may change a verdict."""


class Environment(BaseModel):
    """What a run ran on. ``git_commit`` is None for an installed package; ``git_dirty`` then says nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str
    platform: str
    packages: dict[str, str]
    git_commit: str | None
    git_dirty: bool | None
    device: str
    device_name: str
    threads: int
    deterministic: bool


def version_of(package: str) -> str:
    """Return the installed version of ``package``, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _git(*arguments: str) -> str | None:
    """Ask git about the checkout that holds this file; None when the package is not in one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment(device: torch.device) -> Environment:
    """Describe the software and hardware of this process."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages={package: version_of(package) for package in PACKAGES},
        git_commit=_git("rev-parse", "HEAD"),
        git_dirty=None if status is None else bool(status),
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def cpu_count() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` takes CUDA, else the CPU. Raises `UsageError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("mps"):
        raise UsageError("device 'mps' has no float64, in which distances are checked; use cpu.")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"device '{name}' cannot be used: {reason}. Try cpu, cuda or auto.") from error
    return device


@contextmanager
def deterministic(threads: int | None = None) -> Iterator[None]:
    """Ask torch for deterministic, full float32 kernels and ``threads`` CPU threads; restore all afterwards."""
    strictness, before = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")  # `use_deterministic_algorithms` would import torch's compiler first
    memory.fill_uninitialized_memory = False  # it would fill every buffer, though kernels overwrite them all
    torch.set_float32_matmul_precision("highest")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_deterministic_debug_mode(strictness)
        memory.fill_uninitialized_memory = filling
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(before)
