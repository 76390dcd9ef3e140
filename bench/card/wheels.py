"""Puts into .card/ what a bare machine with a card lacks: `make card-wheels`.

Such a machine has Python 3.12, torch, triton, numpy, pytest, safetensors and tokenizers, and no network. The
folder gets the wheel of this library, built from the files of the working tree that git does not ignore, and
the packages that may be missing there. docs/card.md says how to install them. If a needed package cannot be
had, the folder stays as it was. PYTHON312=/path/to/python3.12 names the interpreter that builds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.card import provenance

ROOT = Path(__file__).parent.parent.parent
TARGET = ROOT / ".card"
VERSION = "3.12"
# Their versions are those of constraints.txt, or stand here.
REQUIRED = (
    *("einops", "soundfile", "cffi", "pycparser"),
    *("tyro", "docstring_parser", "typeguard", "typing_extensions"),
)
FOR_TESTS = (
    *("pytest-xdist", "execnet", "pytest-timeout", "hypothesis"),
    *("lhotse", "audioread", "cytoolz", "toolz", "intervaltree", "sortedcontainers"),
)
PEERS = ("memeff==0.3.1", "inf-cl==1.2.1", "siglip-kernel==0.1.2")
BUILD_TOOLS = ("scikit_build_core", "pybind11", "cmake", "ninja")
# pip takes a tag literally: a wheel for glibc 2.17 is not found under 2.28.
GLIBC = ("2_34", "2_31", "2_28", "2_27", "2_26", "2_24", "2_17")
PLATFORMS = (
    *(f"manylinux_{version}_x86_64" for version in GLIBC),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a package that is not a peer is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.card.wheels", description=__doc__)
    parser.parse_args(arguments)
    python = find_python()
    versions = pinned_versions()
    # Beside the target, so that the new folder can be renamed. Git ignores both.
    with tempfile.TemporaryDirectory(prefix=".card-", dir=TARGET.parent, ignore_cleanup_errors=True) as made:
        folder = Path(made) / "new"
        folder.mkdir()
        build(python, versions, folder)
        packages = (*REQUIRED, *FOR_TESTS, *PEERS)
        missing = [package for package in packages if not download(package, versions, folder)]
        for package in missing:
            needed = "a peer, which is then left out" if package in PEERS else "NEEDED"
            print(f"not downloaded: {package} ({needed})")
        if any(package not in PEERS for package in missing):
            print(f"{TARGET} is unchanged", file=sys.stderr)
            return 1
        if TARGET.exists():
            TARGET.rename(Path(made) / "old")
        folder.rename(TARGET)
    wheels = sorted(TARGET.glob("*.whl"))
    for path in wheels:
        print(f"{path.stat().st_size / 2**20:6.2f} MB  {path.name}")
    print(f"{sum(path.stat().st_size for path in wheels) / 2**20:6.2f} MB  in {TARGET}")
    return 0


def find_python() -> str:
    """A Python 3.12: PYTHON312, python3.12 on the PATH, or one of pyenv.

    Raises:
        SystemExit: there is none.
    """
    given = os.environ.get("PYTHON312")
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{VERSION}*/bin/python"))
    candidates = [given] if given else [shutil.which(f"python{VERSION}"), *map(str, pyenv)]
    for candidate in candidates:
        if candidate and _version_of(candidate) == VERSION:
            return candidate
    tried = f"PYTHON312={given} is not one" if given else f"neither python{VERSION} nor pyenv has one"
    raise SystemExit(
        f"card-wheels needs Python {VERSION}, and {tried}: set PYTHON312=/path/to/python{VERSION}"
    )


def _version_of(python: str) -> str:
    """ "3.12" for an interpreter that runs, else ""."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def pinned_versions() -> dict[str, str]:
    """Package -> version, from constraints.txt; names in lower case with underscores."""
    pairs = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return {_normal(name): version for name, version in pairs}


def _normal(name: str) -> str:
    return name.lower().replace("-", "_")


def requirement(package: str, versions: dict[str, str]) -> str:
    """The package with its version, "name==1.2"."""
    return package if "==" in package else f"{package}=={versions[_normal(package)]}"


def build(python: str, versions: dict[str, str], folder: Path) -> None:
    """Builds the wheel of the library for Python 3.12, and notes from which code it was built."""
    with tempfile.TemporaryDirectory(prefix="clsp-wheels-") as temporary:
        source, tools = Path(temporary) / "source", Path(temporary) / "tools"
        copy_sources(source)
        _run(python, "-m", "venv", str(tools))
        required = [requirement(package, versions) for package in BUILD_TOOLS]
        _run(str(tools / "bin/pip"), "install", "--quiet", *required)
        environment = os.environ | {"PATH": f"{tools / 'bin'}:{os.environ.get('PATH', '')}"}
        command = (str(tools / "bin/pip"), "wheel", "--quiet", "--no-build-isolation", "--no-deps")
        _run(*command, "--wheel-dir", str(folder), str(source), environment=environment)
    commit = _git("rev-parse", "--short=12", "HEAD").strip()
    provenance.write_wheel(folder / "built-from.json", ROOT, commit, code_differs())


def code_differs() -> bool:
    """Whether the code in the wheel is not that of the commit; new files that git does not ignore count."""
    paths = [f":(glob){pattern}" for pattern in provenance.CODE]
    return bool(_git("status", "--porcelain", "--untracked-files=normal", "--", *paths).strip())


def copy_sources(target: Path) -> None:
    """Copies the files that git tracks or does not ignore, without the tests."""
    for name in _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        path = ROOT / name
        if name and path.is_file() and not name.startswith("tests/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / name)


def download(package: str, versions: dict[str, str], folder: Path) -> bool:
    """Downloads the wheel of a package for Python 3.12 on x86-64, without what it requires."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", VERSION, "--implementation", "cp", *platforms]
    command += ["--dest", str(folder), requirement(package, versions)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print((done.stderr.strip().splitlines() or ["pip gave no reason"])[-1], file=sys.stderr)
    return done.returncode == 0


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise SystemExit(f"card-wheels needs git and a checkout: {reason.strip()}") from error


def _run(*command: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{(done.stdout + done.stderr)[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
