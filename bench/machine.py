"""Describes the machine and the commit that a figure belongs to, without host names and paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import clsp_fast

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile")
CODE = ("CMakeLists.txt", "clsp_fast", "csrc", "kernels", "bench/*.py")
ROOT = Path(__file__).parent.parent


def describe() -> dict[str, Any]:
    """CPU, relevant instruction sets, cores, memory, GPU, and versions of Python and the main packages."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", info, re.MULTILINE)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "flags": [name for name in FLAGS if flags and name in flags[1].split()],
        "cores": cpus,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "clsp_fast": clsp_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": importlib.metadata.version("numpy"),
        },
    }


def short_name(machine: dict[str, Any]) -> str:
    """The GPU's or CPU's name, fit for a file name."""
    name = machine["gpu"] or re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*|\d+-Core", " ", machine["cpu"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def line(machine: dict[str, Any]) -> str:
    """The description as one line of text."""
    flags = ", ".join(machine["flags"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    size = f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['gpu'] or 'no GPU'}"
    return f"{machine['cpu']} ({flags}), {size}; {versions}"


def commit() -> tuple[str, bool]:
    """The commit of the working tree, and whether the code differs from it; ("unknown", True) outside git."""
    try:
        hash_ = _git("rev-parse", "--short=12", "HEAD")
        return hash_, bool(_git("status", "--porcelain", "--untracked-files=no", "--", *CODE))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def is_ancestor(commit: str, root: Path = ROOT) -> bool | None:
    """Whether a commit is in HEAD's history; None if git, the full history or the commit is missing."""
    try:
        if _git("rev-parse", "--is-shallow-repository", root=root) != "false":
            return None
        _git("merge-base", "--is-ancestor", commit, "HEAD", root=root)
    except OSError:
        return None
    except subprocess.CalledProcessError as error:
        return False if error.returncode == 1 else None
    return True


def version(package: str) -> str:
    """Version of a distribution, or "" if it is not installed."""
    try:
        return importlib.metadata.version(package) if package else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str, root: Path = ROOT) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
