"""Tests the kernels with another version of triton: in its interpreter, and what it compiles them to.

`make test-triton` runs this. A CUDA build of torch installs the version of triton that it was made for, which
is older than the pinned one. It gets an environment of its own, build/triton-VERSION, which takes all other
packages from the environment that runs this script.

    python tests/triton_versions.py [--write] [-- arguments of pytest]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
# torch 2.10 and 2.11 install it. Its interpreter does not work with numpy 2.4.
TRITON, NUMPY = "triton==3.6.0", "numpy==2.3.5"
# numpy 2.3 warns of what numpy 2.4 refuses.
ALLOWED_WARNING = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
FILES = ["test_interpreter.py", *sorted(path.name for path in Path(__file__).parent.glob("test_kernel_*.py"))]


def environment(folder: Path) -> Path:
    """The Python of the environment, which is made if it is missing."""
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, TRITON, NUMPY], check=True)
        # Packages of this environment come first on the path, then those of the running one. A plain path
        # would do without the .pth files there, which editable installs need.
        packages = next(folder.glob("lib/python*/site-packages"))
        line = f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n"
        (packages / "rest.pth").write_text(line)
        (folder / "complete").touch()
    return python


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tests the kernels with another version of triton.")
    parser.add_argument("--write", action="store_true", help="rewrite the budgets instead of testing them")
    parser.add_argument("arguments", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args(arguments)
    python = environment(ROOT / f"build/{TRITON.replace('==', '-')}")
    if options.write:
        command = ["-m", "clsp_fast.kernels.budgets", "write", "kernels", "--beside"]
    else:
        paths = [str(ROOT / "tests" / name) for name in FILES]
        command = ["-m", "pytest", "-q", "-W", ALLOWED_WARNING, *options.arguments, *paths]
    return subprocess.run([str(python), *command], cwd=ROOT, env=dict(os.environ), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
