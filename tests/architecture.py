"""Reads which file imports which, and draws docs/architecture.svg: `python tests/architecture.py`.

tests/test_architecture.py holds the code to the layers below and the committed picture to the code.
"""

from __future__ import annotations

import ast
import functools
import textwrap
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "clsp_fast"
PICTURE = ROOT / "docs/architecture.svg"
COMMANDS = {"train", "evaluate", "embed", "search", "score", "convert", "export", "caption"}

# The boxes of the picture, from the bottom layer to the top one. The number is the x coordinate of a box's
# middle. A box imports only from layers below its own.
LAYERS: tuple[dict[str, int], ...] = (
    {"basics": 190, "engine": 510, "kernels": 860},
    {"config": 190},
    {"storage": 360, "contrastive": 740},
    {"console": 260, "audio": 460},
    {"towers": 90, "features": 400},
    {"model": 260, "data": 450, "loss": 860},
    {"evaluation": 370, "captioning": 600},
    {"demo": 670},
    {"training": 480},
    {"commands": 480},
    {"package": 480},
)
# Boxes that hold several rooms or modules. Any other box holds the room or module of the same name.
BOXES = {
    "package": {"__init__"},
    "commands": COMMANDS,
    "model": {"batches", "model", "tokenizer"},
    "features": {"features", "lhotse", "parity"},
    "audio": {"audio", "sndfile"},
    "loss": {"loss", "similarity"},
    "basics": {"arguments", "checks", "contention", "copies", "metrics", "precision", "row_stream"},
    "engine": {"_C"},
}
# Titles of the boxes that are neither a room nor named after a module.
TITLES = {
    "package": "import clsp_fast",
    "engine": "_C, from csrc/ (C++)",
    "kernels": "kernels/ (Triton)",
}
WIDTHS = {"engine": 380, "commands": 420, "storage": 210, "kernels": 180}
WIDTH, NARROW = 980, 150  # widths of the picture, and of a box that is not in WIDTHS
LINE, GAP = 17, 40  # heights of a line of text, and of the gap between two layers
COLOURS = """
  .ground { fill: #ffffff } .box { fill: #f6f8fa; stroke: #8c959f } .arrow { stroke: #57606a; fill: none }
  .head { fill: #57606a } text { fill: #1f2328; font: 13px sans-serif; text-anchor: middle }
  .title { font-weight: bold; font-size: 14px }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } .box { fill: #161b22; stroke: #8b949e } .arrow { stroke: #9da7b1 }
    .head { fill: #9da7b1 } text { fill: #e6edf3 }
  }
"""


def module_name(path: Path) -> str:
    """The name under which a file of the package is imported: "clsp_fast.data.loader", "clsp_fast.data"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_files() -> dict[str, Path]:
    """Module -> file, for every Python file of the package and its rooms."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(path: Path) -> set[str]:
    """Every dotted name that a file imports, also inside functions; `from a import b` gives "a.b"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Module -> the modules, kernels and extension of the package that it imports, also inside functions."""
    files = package_files()
    kernels = {f"clsp_fast.kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py")}
    known = {*files, *kernels, "clsp_fast._C"}
    graph = {}
    for module, path in files.items():
        inside = {name for name in imported_names(path) if name.startswith("clsp_fast.")}
        # A name that is not a module is a function or class of the module named before its last dot.
        graph[module] = {n if n in known else n.rpartition(".")[0] for n in inside} - {module, "clsp_fast"}
    return graph


def box_of(module: str) -> str:
    """The box of a module: the box in BOXES that lists it, else the box named after its room or itself."""
    name = [*module.split("."), "__init__"][1]
    return next((box for box, members in BOXES.items() if name in members), name)


def box_graph() -> dict[str, set[str]]:
    """Box -> other boxes that its files import."""
    graph: dict[str, set[str]] = {box: set() for box in chain(*LAYERS)}
    for module, imported in import_graph().items():
        box = box_of(module)
        graph.setdefault(box, set()).update({box_of(name) for name in imported} - {box})
    return graph


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Nodes of one cycle of a graph, in order; empty if there is none."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in finished:
            return []
        for target in sorted(graph.get(node, ())):
            if circle := visit(target, [*path, node]):
                return circle
        finished.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := visit(node, []))), [])


def reachable(graph: Mapping[str, set[str]], node: str) -> set[str]:
    """Everything that a node of a graph without cycles leads to."""
    return graph[node].union(*(reachable(graph, target) for target in graph[node]))


def arrows(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The edges of a graph without cycles that no longer path replaces (its transitive reduction)."""
    return [
        (box, target)
        for box, targets in graph.items()
        for target in sorted(targets)
        if not any(target in reachable(graph, other) for other in targets - {target})
    ]


def contents(box: str) -> list[str]:
    """The names of the files in a box. A header and a source of csrc/ with the same name count once."""
    if box == "engine":
        return sorted({path.stem for path in (ROOT / "csrc").iterdir() if path.suffix in (".h", ".cpp")})
    if box == "package":
        return []
    folder = ROOT / "kernels" if box == "kernels" else PACKAGE / box
    if box not in BOXES:
        stems = {path.stem for path in folder.rglob("*.py")} if folder.is_dir() else {box}
        return sorted(stem for stem in stems if not stem.startswith("__"))
    folders = {f"{name}/" for name in BOXES[box] if (PACKAGE / name).is_dir()}
    return sorted(folders | {name for name in BOXES[box] if (PACKAGE / f"{name}.py").exists()})


def title(box: str) -> str:
    """The bold title of a box."""
    folder = (PACKAGE / box).is_dir()
    return TITLES.get(box, f"{box}/" if folder else box)


def text_lines(box: str) -> list[str]:
    """A box's title, and its files in lines that fit its width."""
    names = contents(box)
    listed = ", ".join(names) if names != [title(box)] else ""
    return [title(box), *textwrap.wrap(listed, WIDTHS.get(box, NARROW) // 7, break_on_hyphens=False)]


Frame = tuple[float, float, float, float]
"""Left, top, right and bottom of a box."""


def draw() -> str:
    """The picture as SVG: the layers from bottom to top, and the arrows between boxes."""
    frames: dict[str, Frame] = {}
    top = 16.0
    for layer in reversed(LAYERS):
        height = 12 + LINE * max(len(text_lines(box)) for box in layer)
        for box, middle in layer.items():
            half = WIDTHS.get(box, NARROW) / 2
            frames[box] = (middle - half, top, middle + half, top + 12 + LINE * len(text_lines(box)))
        top += height + GAP
    size = f'width="{WIDTH}" height="{top - GAP + 16:g}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - GAP + 16:g}" {size}>',
        f"<style>{COLOURS}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="9" markerHeight="9" '
        'orient="auto">'
        '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker>',
        f'<rect class="ground" {size}/>',
    ]
    parts += [_arrow(frames[box], frames[target]) for box, target in arrows(box_graph())]
    for box, (left, upper, right, lower) in frames.items():
        rectangle = f'x="{left:g}" y="{upper:g}" width="{right - left:g}" height="{lower - upper:g}" rx="6"'
        parts.append(f'<rect class="box" {rectangle}/>')
        for i, line in enumerate(text_lines(box)):
            kind = "title" if i == 0 else "files"
            position = f'class="{kind}" x="{(left + right) / 2:g}" y="{upper + 19 + LINE * i:g}"'
            parts.append(f"<text {position}>{escape(line)}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrow(start: Frame, end: Frame) -> str:
    """A line from the lower edge of a box to the upper edge of another one, as steep as the two allow."""
    margin = 14
    x1 = min(max((end[0] + end[2]) / 2, start[0] + margin), start[2] - margin)
    x2 = min(max((start[0] + start[2]) / 2, end[0] + margin), end[2] - margin)
    return f'<path class="arrow" d="M{x1:g} {start[3]:g} L{x2:g} {end[1]:g}" marker-end="url(#head)"/>'


if __name__ == "__main__":
    PICTURE.write_text(draw())
