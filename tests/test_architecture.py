"""Which module may import which, what importing costs, and sizes that keep the code readable."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "clsp_fast"
COMMANDS = {"train", "evaluate", "embed", "search", "score", "convert", "export", "caption"}
ROOMS = {"contrastive", "towers", "data", "training", "evaluation", "demo", "sndfile", "storage"}

# What a room, or a module of the top level, may import of the others. Commands may import all but commands.
ALLOWED = {
    # The commands are imported there when somebody asks for one.
    "__init__": {"audio", "config", "features", "loss", "metrics", "similarity", "model"}
    | {"convert", "embed", "evaluate", "export", "score", "search"},
    "_C": set(),
    "checks": set(),
    "contention": set(),
    "metrics": set(),
    "config": {"checks"},
    "storage": {"checks", "config"},
    "console": {"storage"},
    "tokenizer": {"config", "storage"},
    "sndfile": {"storage"},
    "audio": {"_C", "sndfile"},
    "features": {"_C", "audio"},
    "parity": {"audio", "console", "features"},
    "lhotse": {"features"},
    "batches": {"audio", "config", "console", "contention", "features", "storage"},
    "contrastive": {"_C"},
    "loss": {"contrastive", "kernels"},
    "similarity": {"_C", "kernels"},
    "towers": {"config", "kernels"},
    "model": {"audio", "batches", "config", "contention", "storage", "tokenizer", "towers"},
    "data": {"audio", "config", "console", "features", "storage"},
    "evaluation": {"audio", "checks", "config", "contention", "data", "metrics", "model", "similarity"}
    | {"storage"},
    "demo": {"storage"},
    "training": {"config", "console", "contention", "data", "demo", "evaluation", "loss", "model"}
    | {"similarity", "storage", "tokenizer", "towers"},
}
BENCH = sorted((ROOT / "bench").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The room of a file of the package, or its own name if it lies at the top."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Rooms and modules of the top level that a file of the package imports, anywhere in it, but its own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "clsp_fast":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clsp_fast."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("clsp_fast.")}
    return found - {room(path)}


def distributions(path: Path) -> set[str]:
    """First names of all that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_every_file_is_looked_at() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:  # a checkout, not an unpacked archive
        seen = {str(path.relative_to(ROOT)) for path in (*MODULES, *KERNELS, *BENCH, *TESTS)}
        assert {name for name in tracked.stdout.split() if (ROOT / name).exists()} <= seen
    assert len(MODULES) >= 60
    assert {room(path) for path in MODULES if len(path.relative_to(PACKAGE).parts) > 1} == ROOMS


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_only_what_they_may(path: Path) -> None:
    name = room(path)
    if name in COMMANDS:
        assert not imports(path) & COMMANDS, f"{name} imports a command"
    else:
        assert imports(path) <= ALLOWED[name], f"{name} imports {imports(path) - ALLOWED[name]}"


@pytest.mark.parametrize("path", BENCH, ids=lambda path: path.stem)
def test_bench_imports_no_test(path: Path) -> None:
    assert not distributions(path) & {"tests", "conftest", "numerics"}


def test_the_package_does_not_know_bench() -> None:
    for path in MODULES:
        assert "bench" not in distributions(path), path


def test_the_engine_knows_neither_python_nor_torch() -> None:
    for path in (ROOT / "csrc").iterdir():
        if not path.name.startswith("bind"):
            text = path.read_text()
            assert "Python.h" not in text, path
            assert "pybind11" not in text, path
        assert "include <torch" not in path.read_text(), path


def test_one_place_names_instruction_sets() -> None:
    files = [path for path in (ROOT / "csrc").iterdir() if path.stem != "simd"]
    assert len(files) > 30
    for path in files:
        assert not re.search("avx|bmi2|__x86_64__", path.read_text(), re.IGNORECASE), path


def test_kernels_stay_a_namespace_package() -> None:
    # With an __init__.py, running in the root would shadow the `kernels` distribution and break transformers.
    assert not (ROOT / "kernels/__init__.py").exists()


def test_kernels_import_only_torch_triton_and_each_other() -> None:
    for path in KERNELS:
        for node in ast.walk(ast.parse(path.read_text())):
            if (isinstance(node, ast.ImportFrom) and node.level == 0) or isinstance(node, ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                for name in names:
                    top = str(name).split(".")[0]
                    assert top in {"torch", "triton"} | sys.stdlib_module_names, f"{path.name}: {name}"


def test_what_is_required_is_used() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    required = re.search(r"^dependencies = \[(.*?)^\]", project, re.M | re.S)
    assert required is not None
    names = set(re.findall(r'"([a-z]+)>=', required[1]))
    assert len(names) >= 6
    assert names <= set().union(*map(distributions, MODULES))


def test_importing_is_cheap() -> None:
    code = (
        "import sys, time, torch; start = time.process_time(); import clsp_fast.model, clsp_fast.loss;"
        "heavy = {'triton', 'transformers', 'lhotse', 'matplotlib', 'soundfile'} & set(sys.modules);"
        "print(time.process_time() - start, *sorted(heavy))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(5)
    ]
    told = [run.stdout.split() for run in runs]
    assert [heavy for _, *heavy in told] == [[]] * 5
    assert min(float(seconds) for seconds, *_ in told) < 0.3


def test_using_a_saved_model_does_not_import_the_compiler(model_folder: Path) -> None:
    # It takes more than a second, which is more than everything else that a search of one sentence does.
    code = (
        "import sys, numpy, clsp_fast; model = clsp_fast.CLSP.from_pretrained(sys.argv[1]);"
        "model.encode_text(['A calm voice.']); model.encode_audio([numpy.ones(16000, 'f4')]);"
        "print(*{'torch._dynamo', 'triton', 'torch._inductor'} & set(sys.modules))"
    )
    run = [sys.executable, "-c", code, str(model_folder)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "\n"


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_functions_stay_small() -> None:
    for paths, most in (([*MODULES, *BENCH, *TESTS], 80), (KERNELS, 120)):
        for path in paths:
            for function in functions(ast.parse(path.read_text())):
                lines = (function.end_lineno or 0) - function.lineno + 1
                assert lines <= most, f"{path.name}: {function.name} has {lines} lines"


def test_every_module_and_public_function_is_documented() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
