"""The extension under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

Each of them reports the bugs planted for it (csrc/planted_bug.h), and reports nothing while the tests of the
frontend and of the engine run. No report is suppressed: with one thread each, torch and OpenBLAS cause none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parent.parent
CONTROLS = {
    "address": {"heap": "heap-buffer-overflow", "overflow": "signed integer overflow"},
    "thread": {"race": "ThreadSanitizer: data race"},
}
REPORTS = ("ERROR: AddressSanitizer", "runtime error:", "WARNING: ThreadSanitizer", "CHECK failed")
# When libasan starts, it looks for the function that throws C++ exceptions. It is in libstdc++, which Python
# would load too late.
RUNTIMES = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so",)}
CHOSEN = ("flac", "bad_audio", "audio", "resample", "features", "engine_similarity")
TESTS = [f"tests/test_{name}.py" for name in CHOSEN]
# Comparisons with the error of other packages are meant for the build that users have.
EXCLUDED = "not error_on_speech and not agrees_with_the_recipe"
SHORT = {
    "address": f"{EXCLUDED} and not many_mutants and not after_fork and not gil and not parity",
    "thread": "thread or fork or mixed_formats or batch or plans or bad_folder or engine",
}
LONG = os.environ.get("CLSP_SANITIZE_LONG") == "1"


def runtime(kind: str) -> str:
    """Paths of the libraries to load before Python, from the compiler."""
    compiler = os.environ.get("CXX", "c++")
    if not sys.platform.startswith("linux") or shutil.which(compiler) is None:
        pytest.skip("needs Linux and a compiler")
    paths = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in RUNTIMES[kind]
    ]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip("needs GCC's sanitizer libraries")
    return " ".join(paths)


def build(kind: str) -> Path:
    """Builds the extension with a sanitizer; returns a folder for the module search path."""
    folder = ROOT / "build" / f"sanitize-{kind}"
    options = {
        "CLSP_SANITIZE": kind,
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",  # reports then name functions
        "CMAKE_INTERPROCEDURAL_OPTIMIZATION": "OFF",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    bin_dir = Path(sys.executable).parent
    path = {**os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    for command in (["-S", ROOT, "-B", folder, "-G", "Ninja", *definitions], ["--build", folder]):
        done = subprocess.run(["cmake", *command], env=path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    package = folder / "package" / "clsp_fast"
    package.mkdir(parents=True, exist_ok=True)
    (library,) = folder.glob("_C*.so")
    shutil.copy(library, package)
    return package.parent


def run(kind: str, package: Path, arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of Python under a sanitizer."""
    changes = {
        "LD_PRELOAD": runtime(kind),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{package}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself never frees some memory
        "TSAN_OPTIONS": "exitcode=66",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    # ThreadSanitizer needs certain addresses, which kernels with strong address randomisation may use.
    fixed = ["setarch", "-R"] if kind == "thread" and _can_fix_addresses() else []
    done = subprocess.run(
        [*fixed, sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout


def _can_fix_addresses() -> bool:
    return shutil.which("setarch") is not None and subprocess.run(["setarch", "-R", "true"]).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(3000 if LONG else 900)
@pytest.mark.parametrize("kind", CONTROLS)
def test_planted_bugs_are_reported_and_no_others(kind: str) -> None:
    runtime(kind)
    package = build(kind)
    for bug, report in CONTROLS[kind].items():
        code, output = run(kind, package, ["-c", f"from clsp_fast import _C; _C.planted_bug({bug!r})"])
        assert code != 0, output
        assert report in output, output
    chosen = EXCLUDED if LONG else SHORT[kind]
    # -s: a report ends the process, and the output that pytest had captured would be lost.
    pytest_options = ["-s", "-q", "--noconftest", "-p", "no:cacheprovider", "-k", chosen]
    for _ in range(3):
        code, output = run(kind, package, ["-m", "pytest", *pytest_options, *TESTS])
        # Sometimes ThreadSanitizer cannot place its memory and ends before it has checked anything.
        if "ThreadSanitizer failed to allocate" not in output:
            break
    assert not any(report in output for report in REPORTS), output[-20000:]
    assert code == 0, output[-20000:]
