"""What a run ran on: versions, hardware, the state of the source, the command."""

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from condzoo.training.precision import Numerics

PACKAGES = ("condzoo", "torch", "torchvision", "timm", "numpy", "pillow", "datasets", "safetensors", "pydantic")


def describe_environment(numerics: Numerics) -> dict[str, Any]:
    """Everything beside the recipe that may move a run's numbers or its speed."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(numerics.device),
        "precision": numerics.precision,
        "channels_last": numerics.channels_last,
        "source": _source(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's model name and instruction set, as torch uses it."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def device_name(device: torch.device) -> str:
    """A GPU's model name; else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _source() -> dict[str, Any] | None:
    """Commit of the repository this package is used from, and whether files differ from it; None outside one.

    Where git does not tell, `error` says why.
    """
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError) as error:
        # not what it wrote before its time was over: that need not be why, and is of bytes
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else ""
        return {"commit": None, "changed": None, "error": (said or str(error)).splitlines()[0]}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
