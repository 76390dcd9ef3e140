"""Which module may import which, what an import costs, and sizes that keep the code readable."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from itertools import chain, takewhile
from pathlib import Path
from xml.etree import ElementTree

import architecture
import pytest

from clsp_fast import data

ROOT, PACKAGE = architecture.ROOT, architecture.PACKAGE
# What a box of the picture imports, and nothing else. Every box may import "basics", which import nothing;
# commands and `import clsp_fast` may import every box below them.
ALLOWED = {
    "contrastive": {"engine", "kernels"},
    "config": set(),
    "storage": {"config"},
    "towers": {"config"},
    "loss": {"contrastive", "engine", "kernels"},
    "audio": {"engine", "storage"},
    "console": {"storage"},
    "captioning": {"audio", "console", "data", "engine", "storage"},
    "demo": {"audio", "captioning", "storage"},
    "features": {"audio", "console", "engine"},
    "data": {"audio", "config", "console", "features", "storage"},
    "model": {"audio", "config", "console", "features", "storage", "towers"},
    "evaluation": {"audio", "config", "data", "loss", "model", "storage"},
    "training": {"config", "console", "data", "demo", "evaluation", "loss", "model", "storage", "towers"},
}
HELPER = "tests/architecture.py"
BENCH = sorted((ROOT / "bench").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
MODULES = list(architecture.package_files().values())


def distributions(path: Path) -> set[str]:
    """The top-level packages that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_every_python_file_is_checked() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:  # a checkout, not an unpacked archive
        seen = {str(path.relative_to(ROOT)) for path in (*MODULES, *KERNELS, *BENCH, *TESTS)}
        assert {name for name in tracked.stdout.split() if (ROOT / name).exists()} <= seen
    assert len(MODULES) >= 60
    assert len({path.parent for path in MODULES}) >= 8


def test_every_module_has_its_box() -> None:
    for module in architecture.package_files():
        box = architecture.box_of(module)
        assert box in set(chain(*architecture.LAYERS)), f"{module}: add {box} to BOXES or LAYERS of {HELPER}"


@pytest.mark.parametrize("box", list(chain(*architecture.LAYERS)))
def test_boxes_import_only_what_they_may(box: str) -> None:
    below = set(chain(*takewhile(lambda layer: box not in layer, architecture.LAYERS)))
    imported = architecture.box_graph()[box]
    assert imported <= below, f"{box} imports {imported - below}, which no lower layer of {HELPER} holds"
    if box not in ("commands", "package"):
        allowed = ALLOWED.get(box, set())
        imported = imported - {"basics"}
        assert imported <= allowed, f"{box} imports {imported - allowed}, which ALLOWED does not list"
        assert imported == allowed, f"ALLOWED lists {allowed - imported}, which {box} does not import"


def test_imports_form_no_cycle() -> None:
    cycle = architecture.cycle(architecture.import_graph())
    assert not cycle, " -> ".join([*cycle, cycle[0]])


def test_a_cycle_is_found_and_arrows_that_a_longer_path_replaces_are_left_out() -> None:
    assert architecture.cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    graph: dict[str, set[str]] = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert architecture.cycle(graph) == []
    assert architecture.arrows(graph) == [("a", "b"), ("b", "c")]


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b as c\ndef f():\n    from d import e\nimport importlib\nimportlib.import_module('g.h')\n"
    )
    assert architecture.imported_names(path) == {"a.b", "d.e", "importlib", "g.h"}


def test_imports_of_the_package_are_absolute() -> None:
    """A relative import would be missing from the graph."""
    for module, path in architecture.package_files().items():
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes), module


def test_nothing_imports_a_command() -> None:
    commands = {f"clsp_fast.{name}" for name in architecture.COMMANDS}
    for module, imported in architecture.import_graph().items():
        if module != "clsp_fast":
            assert not imported & commands, f"{module} imports {imported & commands}"


def test_the_picture_shows_the_imports() -> None:
    drawn = architecture.draw()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    same = architecture.PICTURE.read_text() == drawn
    assert same, "docs/architecture.svg is out of date: run `python tests/architecture.py`"


def listed_modules() -> list[str]:
    """Python files, rooms, and files of csrc/ without suffix that have a line in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text()
    return re.findall(r"^- `([^`]+)`: \S", text, re.MULTILINE)


def test_every_module_has_a_line_in_the_docs() -> None:
    modules = {
        f"{path.parent.relative_to(ROOT)}/" if path.name == "__init__.py" else str(path.relative_to(ROOT))
        for path in (*MODULES, *KERNELS, *BENCH)
    } - {"clsp_fast/"} | {"clsp_fast/__init__.py"}
    modules |= {f"csrc/{p.stem}" for p in (ROOT / "csrc").iterdir() if p.suffix in (".h", ".cpp")}
    listed = listed_modules()
    missing, extra = sorted(modules - {*listed}), sorted({*listed} - modules)
    assert not missing, (
        f"docs/architecture.md has no line that begins with: {', '.join(f'- `{m}`:' for m in missing)}"
    )
    assert not extra, f"docs/architecture.md lists what does not exist: {', '.join(extra)}"
    assert len(listed) == len(set(listed)), "docs/architecture.md lists a module twice"


def test_files_and_names_in_the_docs_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    paths = set(re.findall(r"`((?:clsp_fast|csrc|kernels|bench|docs|tests)/[\w./]+\.\w+)`", text))
    assert len(paths) > 60
    gone = [path for path in sorted(paths) if "NAME" not in path and not (ROOT / path).exists()]
    assert not gone, f"docs/architecture.md names files that do not exist: {', '.join(gone)}"
    # Where the docs write "`path`: `name`" or "`name` of `path`", the file defines the name.
    named = re.findall(r"`([\w/]+\.(?:py|cpp))`: (?:the loop of )?((?:`\w+`(?: and )?)+)", text)
    named += [(path, names) for names, path in re.findall(r"((?:`\w+`(?: or )?)+) of `([\w/]+\.py)`", text)]
    assert len(named) >= 5
    for path, names in named:
        source = (ROOT / path).read_text()
        for name in re.findall(r"\w+", re.sub(r"\b(and|or)\b", "", names)):
            assert re.search(rf"^(def |class |\w.* )?{name}\b", source, re.M), (
                f"docs/architecture.md: {path} defines no {name}"
            )


@pytest.mark.parametrize("path", BENCH, ids=lambda path: path.stem)
def test_bench_imports_no_test(path: Path) -> None:
    assert not distributions(path) & {"tests", *(test.stem for test in TESTS)}


def test_the_package_imports_neither_bench_nor_tests() -> None:
    for path in MODULES:
        assert not distributions(path) & {"bench", "tests", "conftest"}, path


def test_the_engine_includes_neither_python_nor_torch() -> None:
    for path in (ROOT / "csrc").iterdir():
        if not path.name.startswith("bind"):
            text = path.read_text()
            assert "Python.h" not in text, path
            assert "pybind11" not in text, path
        assert "include <torch" not in path.read_text(), path


def test_instruction_sets_are_named_in_one_file() -> None:
    files = [path for path in (ROOT / "csrc").iterdir() if path.stem != "simd"]
    assert len(files) > 30
    for path in files:
        assert not re.search("avx|bmi2|__x86_64__", path.read_text(), re.IGNORECASE), path


def test_kernels_stay_a_namespace_package() -> None:
    # With an __init__.py, Python started in the root would import this folder instead of the distribution
    # `kernels`, and transformers would break.
    assert not (ROOT / "kernels/__init__.py").exists()


def test_kernels_import_only_torch_triton_and_each_other() -> None:
    for path in KERNELS:
        for node in ast.walk(ast.parse(path.read_text())):
            if (isinstance(node, ast.ImportFrom) and node.level == 0) or isinstance(node, ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                for name in names:
                    top = str(name).split(".")[0]
                    assert top in {"torch", "triton"} | sys.stdlib_module_names, f"{path.name}: {name}"


def test_required_packages_are_imported() -> None:
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
    printed = [run.stdout.split() for run in runs]
    assert [heavy for _, *heavy in printed] == [[]] * 5
    assert min(float(seconds) for seconds, *_ in printed) < 0.3


def test_reading_a_manifest_needs_neither_torch_nor_the_frontend() -> None:
    code = (
        "import sys, clsp_fast.data.manifest, clsp_fast.data.captions;"
        "print(*sorted({'torch', 'clsp_fast.audio', 'clsp_fast.features'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "\n"


def test_every_public_name_of_data_is_found() -> None:
    for name in data.__all__:
        assert getattr(data, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = data.nothing


def test_using_a_saved_model_does_not_import_the_compiler(model_folder: Path) -> None:
    # Importing the compiler takes more than a second, longer than the rest of a search for one sentence.
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
    for paths, limit in (([*MODULES, *BENCH, *TESTS], 80), (KERNELS, 120)):
        for path in paths:
            for function in functions(ast.parse(path.read_text())):
                lines = (function.end_lineno or 0) - function.lineno + 1
                assert lines <= limit, f"{path.name}: {function.name} has {lines} lines"


def test_every_module_and_public_function_is_documented() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
