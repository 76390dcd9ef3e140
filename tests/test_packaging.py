"""Wheel, sdist and editable installs work, inside and outside the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each build compiles the extension.
pytestmark = pytest.mark.timeout(900)
CHECK = (
    "import numpy, clsp_fast, clsp_fast.kernels; from clsp_fast import _C;"
    "features = clsp_fast.features.extract([numpy.zeros(16000, numpy.float32)]);"
    "print(clsp_fast.__file__, clsp_fast.__version__, _C.__version__, tuple(features.values.shape))"
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks, so that no other file of the working tree enters."""
    target = tmp_path_factory.mktemp("source") / "clsp_fast"
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        if (ROOT / name).is_file() and not name.startswith("tests/golden"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def packages(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an sdist, and the wheel built from that sdist."""
    target = tmp_path_factory.mktemp("dist")
    code = "import os, sys, scikit_build_core.build as b; os.chdir(sys.argv[1]); b.build_sdist(sys.argv[2])"
    run(sys.executable, "-c", code, source, target, cwd=source)
    (sdist,) = target.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(target / "unpacked", filter="data")
    (unpacked,) = (target / "unpacked").iterdir()
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        target,
        unpacked,
        cwd=target,
    )
    return target


def site(target: Path, *what: str | Path) -> Path:
    """A folder with `what` installed, for PYTHONPATH; other packages come from this environment."""
    target.mkdir()
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        target,
        *what,
        cwd=target,
    )
    return target


def test_the_wheel_holds_the_package_and_the_kernels(packages: Path) -> None:
    (wheel,) = packages.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("clsp_fast/_C.") and name.endswith(".so") for name in names)
    assert "clsp_fast/py.typed" in names
    assert "clsp_fast/_C.pyi" in names
    assert "clsp_fast/evaluation/tasks.json" in names
    assert "clsp_fast/captioning/prompts/generate.txt" in names
    assert not [n for n in names if n.startswith(("tests", "bench", "csrc", "kernels/"))]
    assert not [n for n in names if n.startswith("clsp_fast/kernels/__init__")]


def test_the_wheel_works_outside_and_inside_the_tree(packages: Path, source: Path, tmp_path: Path) -> None:
    (wheel,) = packages.glob("*.whl")
    installed = site(tmp_path / "site", wheel)
    outside = run(sys.executable, "-c", CHECK, cwd=tmp_path, PYTHONPATH=str(installed))
    assert outside.startswith(str(installed))
    inside = run(sys.executable, "-c", CHECK, cwd=source, PYTHONPATH=str(installed))
    assert inside.startswith(str(source))  # the tree's Python with the installed extension
    for text in (outside, inside):
        assert text.endswith("(1, 100, 128)\n")
    run(sys.executable, "-m", "clsp_fast.train", "--help", cwd=source, PYTHONPATH=str(installed))


def test_an_extension_of_another_version_is_named(packages: Path, source: Path, tmp_path: Path) -> None:
    (wheel,) = packages.glob("*.whl")
    installed = site(tmp_path / "site", wheel)
    text = (installed / "clsp_fast/__init__.py").read_text()
    (installed / "clsp_fast/__init__.py").write_text(text.replace('__version__ = "', '__version__ = "9.'))
    done = subprocess.run(
        [sys.executable, "-c", "import clsp_fast"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "run `pip install .` again" in done.stderr


def test_a_tree_without_extension_says_what_to_do(source: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(source)!r}); import clsp_fast"
    # -S: no site-packages, so no installed copy whose extension could be found.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "its extension clsp_fast._C was not found; run `pip install .`" in done.stderr


def test_an_editable_install_follows_the_tree(source: Path, tmp_path: Path) -> None:
    code = "import venv, sys; venv.create(sys.argv[1], with_pip=True, system_site_packages=False)"
    run(sys.executable, "-c", code, tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    (purelib,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    # The new environment also sees the packages of this one, so that torch need not be installed again.
    site_packages = [path for path in sys.path if path.endswith("site-packages")]
    (purelib / "parent.pth").write_text("".join(f"{path}\n" for path in site_packages))
    run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", source, cwd=tmp_path)
    assert run(python, "-c", CHECK, cwd=tmp_path).startswith(str(source))
    (source / "clsp_fast/_marker.py").write_text("VALUE = 3\n")
    try:
        assert run(python, "-c", "from clsp_fast import _marker; print(_marker.VALUE)", cwd=tmp_path) == "3\n"
    finally:
        (source / "clsp_fast/_marker.py").unlink()
