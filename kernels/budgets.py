"""Measures what each kernel compiles to for each target, without a card: budgets.json, README.md's tables.

    python -m clsp_fast.kernels.budgets measure --targets 90 --dtypes bf16    prints measurements as JSON
    python -m clsp_fast.kernels.budgets blocks lse 90 bf16    prints the kernel's blocks of instructions
    python -m clsp_fast.kernels.budgets write kernels    rewrites kernels/budgets.json and kernels/README.md
    python -m clsp_fast.kernels.budgets write kernels --beside    adds the budgets of another triton version
    python -m clsp_fast.kernels.budgets tables kernels    rewrites kernels/README.md alone

`write` and `tables` refuse a folder that differs from the installed kernels, because these are measured.
The compiler of the triton package compiles each kernel ahead of time, and its disassembler reads the result.
D is 512 and strides are multiples of 16, as in training; k is the largest that the kernel supports. Counts
are numbers of instructions in the code, not of executions, except those of `tile`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

try:
    import triton
except ModuleNotFoundError as error:
    if error.name != "triton" or __name__ != "__main__":
        raise
    sys.exit("triton is missing: pip install 'clsp_fast[triton]'")

from . import sass
from ._launch import INTERPRETED, TARGETS
from .launches import KERNELS, NAMES, Launch, launches
from .tables import FileError, cards_without_column, check_readme, with_table

DTYPES = tuple(NAMES)
SHARED_MEMORY_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
_LAYOUT = r"nvidia_mma<\{.*?warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)"
# Kernel -> the least work for each element of a tile.
_WORK = {
    # A score is compared with the target of its row and with that of its column.
    "rank": (sass.comparisons, 2.0),
    # The maximum of n scores takes n - 1 comparisons; two or more threads share a row, so a row takes n.
    "topk": (sass.comparisons, 1.0),
    # The maximum of 32 scores takes 31 comparisons, or more if threads share them.
    "maxima": (sass.comparisons, 31 / 32),
}
# All other kernels: one exponential. `panel` and `starved` compute a few more for their rows and columns.
_OTHER_WORK = (sass.exponentials, 1.0)


def measure(
    targets: Iterable[int] = TARGETS, dtypes: Iterable[str] = DTYPES, kernels: Iterable[str] = tuple(KERNELS)
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measurements: "target dtype" -> kernel -> registers, spills, shared bytes and instruction counts.

    Of several compilations of a kernel, it is the one with the most spills, then registers. Replaces triton's
    driver, as `launches` says.
    """
    result = {}
    for target, dtype in itertools.product(targets, dtypes):
        recorded = launches(target, dtype)
        result[f"{target} {dtype}"] = {
            name: max(
                (_measure(launch) for launch in recorded[name]), key=lambda m: (m["spills"], m["registers"])
            )
            for name in kernels
        }
    return result


def disassembled(compiled: Any) -> tuple[str, int]:
    """The machine code of a compiled kernel as text, and the registers of a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return code, int(registers.group(1))


def _measure(launch: Launch) -> dict[str, Any]:
    compiled = launch.compile()
    code, registers = disassembled(compiled)
    all_code = sass.instructions(code)
    opcodes = sass.opcode_counts(all_code)
    cost = _tile_cost(launch, compiled, code)
    tile = None
    if cost is not None:
        tile = {
            "rows": launch.constants["BM"],
            "columns": launch.constants["BN"],
            "depth": launch.constants["BK"],
            "step": cost.step,
            "before": cost.before,
            "after": cost.after,
            **_kinds(cost.opcodes),
        }
    return {
        "registers": registers,
        "spills": _count(opcodes, "STL", "LDL"),
        "shared_bytes": compiled.metadata.shared,
        "threads": launch.threads,
        "mma": sorted({m[0] for o in opcodes if (m := re.match(r"HG?MMA\.\w+|UTC[HQ]MMA", o))}),
        "tma_loads": _count(opcodes, "UTMALDG"),
        "async_copies": sum(n for o, n in opcodes.items() if o.startswith("LDGSTS") and ".128" in o),
        "narrow_copies": sum(n for o, n in opcodes.items() if o.startswith("LDGSTS") and ".128" not in o),
        "flushed_comparisons": sass.flushed_comparisons(all_code),
        "atomics": _count(opcodes, "ATOM", "ATOMG", "RED", "REDG"),
        **_kinds(opcodes),
        "tile": tile,
    }


def _tile_cost(launch: Launch, compiled: Any, code: str) -> sass.TileCost | None:
    work, amount = _WORK.get(launch.kernel, _OTHER_WORK)
    rows, columns = launch.constants.get("BM", 0), launch.constants.get("BN", 0)
    copies = element_copies(rows, columns, compiled.asm["ttgir"])
    return sass.tile_cost(code, work, round(amount * launch.elements * copies))


def element_copies(rows: int, columns: int, layouts: str) -> int:
    """Number of threads that hold the same element of a tile, read from the layouts of the compiled kernel.

    It is more than one if the warps cover more rows or columns than the tile has.
    """
    copies = []
    for layout in re.findall(_LAYOUT, layouts):
        warps_down, warps_across, height, width = map(int, layout)
        copies.append(max(1, warps_down * height // rows) * max(1, warps_across * width // columns))
    return min(copies, default=1)


def _kinds(opcodes: Counter[str]) -> dict[str, Any]:
    """Counts of the instructions that decide how fast the code besides the product is."""
    widths = sass.store_widths(opcodes)
    special: Counter[str] = Counter()
    for opcode, number in opcodes.items():
        if opcode.startswith("MUFU."):
            special[opcode.split(".")[1]] += number
    return {
        "stores": {str(width): number for width, number in widths.items()},
        "narrow_stores": sum(number for width, number in widths.items() if width < 16),
        "tma_stores": _count(opcodes, "UTMASTG"),
        "shuffles": _count(opcodes, "SHFL"),
        "special": dict(sorted(special.items())),
    }


def _count(opcodes: Counter[str], *names: str) -> int:
    return sum(number for opcode, number in opcodes.items() if opcode.split(".")[0] in names)


def listing(kernel: str, target: int, dtype: str) -> str:
    """The blocks of a kernel: address, instructions and their kinds; * marks the common path of a tile."""
    launch = launches(target, dtype)[kernel][0]
    compiled = launch.compile()
    code, registers = disassembled(compiled)
    cost = _tile_cost(launch, compiled, code)
    lines = [f"{kernel} sm_{target} {dtype}: {registers} registers"]
    if cost is not None:
        lines.append(f"instructions of a common tile: {cost.before} before, {cost.after} after the product")
        lines.append(f"and {cost.step} for each step of the product over {launch.constants['BK']} elements")
    # Blocks that a matrix instruction ended are joined with the next one.
    group: list[sass.Instruction] = []
    for number, block in enumerate(graph := sass.blocks(code)):
        group += block.instructions
        on_path = cost is not None and number in cost.path
        next_on_path = cost is not None and number + 1 in cost.path
        if block.has_product and on_path == next_on_path and number + 1 < len(graph):
            continue
        kinds = Counter(instruction.opcode.split(".")[0] for instruction in group)
        text = " ".join(f"{name}:{times}" for name, times in kinds.most_common(12))
        first, last = group[0], group[-1]
        lines.append(f"{'*' if on_path else ' '} {first.address:6x} {len(group):5d}  {text}  | {last.text}")
        group = []
    return "\n".join(lines)


def as_json(budgets: dict[str, Any]) -> str:
    """The text of budgets.json, one kernel a line, so that a diff shows which kernels changed."""
    variants = (
        f' "{variant}": {{\n'
        + ",\n".join(f'  "{name}": {json.dumps(measured)}' for name, measured in kernels.items())
        + "\n }"
        for variant, kernels in budgets["kernels"].items()
    )
    return f'{{"triton": "{budgets["triton"]}", "kernels": {{\n' + ",\n".join(variants) + "\n}}\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    if INTERPRETED and options.command != "tables":
        sys.exit("kernels are not compiled while TRITON_INTERPRET=1: unset it")
    try:
        if options.command == "measure":
            print(json.dumps(measure(options.targets, options.dtypes, options.kernels)))
        elif options.command == "blocks":
            print(listing(options.kernel, options.target, options.dtype))
        else:
            _rewrite(options.folder, budgets=options.command == "write", beside=options.beside)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at exit
        sys.exit(1)
    except (OSError, FileError) as error:
        sys.exit(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clsp_fast.kernels.budgets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    selection = commands.add_parser("measure", help="print measurements as JSON")
    for name, values, what in (
        ("targets", TARGETS, "compute capabilities, times 10"),
        ("dtypes", DTYPES, "dtypes of the embeddings"),
        ("kernels", tuple(KERNELS), "names of kernels"),
    ):
        selection.add_argument(
            f"--{name}",
            type=type(values[0]),
            nargs="+",
            choices=values,
            default=values,
            metavar=name[:-1].upper(),
            help=f"{what}: any of {', '.join(map(str, values))}; default: all",
        )
    one = commands.add_parser("blocks", help="print the blocks of a kernel's code")
    one.add_argument("kernel", choices=KERNELS, metavar="KERNEL", help=", ".join(KERNELS))
    one.add_argument("target", type=int, choices=TARGETS, help="compute capability, times 10")
    one.add_argument("dtype", choices=DTYPES, help="dtype of the embeddings")
    writer = commands.add_parser("write", help="compile everything; rewrite budgets.json and README.md")
    writer.add_argument("--beside", action="store_true", help="write budgets-VERSION.json instead")
    tables = commands.add_parser("tables", help="rewrite README.md alone, from budgets and results of cards")
    tables.set_defaults(beside=False)
    for command in (writer, tables):
        command.add_argument("folder", type=Path, help="the folder kernels/ of a checkout")
    return parser


def _rewrite(folder: Path, *, budgets: bool, beside: bool) -> None:
    """Rewrites the tables of README.md and, if `budgets`, first the budgets of the installed triton."""
    folder = folder.absolute()  # bench/results lies beside it
    readme = folder / "README.md"
    # Before the compilation, which takes minutes.
    check_readme(readme)
    _check_installed(folder)
    without_column = cards_without_column(folder)
    if budgets:
        name = f"budgets-{triton.__version__}.json" if beside else "budgets.json"
        text = as_json({"triton": triton.__version__, "kernels": measure()})
        (folder / name).write_text(text)
    readme.write_text(with_table(readme.read_text(), folder))
    for card in without_column:
        print(f"bench/results has times of {card}, for which the tables have no column")


def _check_installed(folder: Path) -> None:
    """Refuses to describe a folder whose code is not what is installed, because the latter is measured."""
    installed = Path(__file__).parent
    differing = [
        path.name
        for path in sorted(folder.glob("*.py"))
        if not (installed / path.name).is_file() or (installed / path.name).read_bytes() != path.read_bytes()
    ]
    if differing:
        raise FileError(
            f"{folder} differs from the installed clsp_fast.kernels, which are measured, in "
            f"{', '.join(differing)}: install first (pip install .)"
        )


if __name__ == "__main__":
    main()
