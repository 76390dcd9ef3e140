"""The cost of a tile, read from machine code: of two small compiled kernels, and of graphs written by hand.

golden/tile.sass computes one tile: exp2 of x x^T, stored in 16-bit floats. golden/tiles.sass computes several
tiles in a loop: the maxima of their rows. Both were compiled for sm_80.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
from sample_data import GOLDEN

from clsp_fast.kernels.sass import (
    Instruction,
    blocks,
    comparisons,
    exponentials,
    flushed_comparisons,
    instructions,
    opcode_counts,
    store_widths,
    tile_cost,
)

TILE, TILES = ((GOLDEN / f"{name}.sass").read_text() for name in ("tile", "tiles"))


def code(lines: Sequence[str]) -> str:
    """Lines of machine code as cuobjdump prints them."""
    return "".join(f"        /*{16 * at:04x}*/    {text} ;\n" for at, text in enumerate(lines))


def test_a_program_of_one_tile_is_counted_up_to_the_product_and_from_it_to_the_end() -> None:
    cost = tile_cost(TILE, exponentials, 8)
    assert cost is not None
    assert cost.step == 0x390 // 16 - 0x2A0 // 16 + 1  # the loop
    assert cost.before == 0x370 // 16 + 1  # the first product is at 0x370, without a jump before it
    rest = 1 + 3 + (0x760 - 0x470) // 16 + 1  # the loop's branch, a comparison that skips to 0x470, the end
    assert cost.after == rest == sum(cost.opcodes.values())
    assert cost.opcodes["MUFU.EX2"] == 8
    assert "FSEL" not in cost.opcodes, "the rare part is on the path"
    assert store_widths(cost.opcodes) == {16: 1}
    graph = blocks(TILE)
    assert [graph[number].instructions[0].address for number in cost.path] == [0x390, 0x3A0, 0x470]


def test_a_program_of_several_tiles_is_counted_from_product_to_product_without_a_step() -> None:
    cost = tile_cost(TILES, comparisons, 8)
    assert cost is not None
    assert (cost.step, cost.before) == (16, 0)
    to_the_branch, from_the_branch = (0x640 - 0x470) // 16 + 1, (0x460 - 0x2B0) // 16 + 1
    assert cost.after == to_the_branch + from_the_branch - cost.step == sum(cost.opcodes.values())
    assert store_widths(cost.opcodes) == {4: 1}
    assert cost.opcodes["FMNMX"] == 10


def test_the_path_passes_the_whole_tile_and_not_a_part_that_repeats_the_product() -> None:
    part = ["HMMA.16816.F32 R8, R16, R12, R8", "MUFU.EX2 R8, R8", "STG.E [R2.64], R8", "@P2 BRA 0x90", "EXIT"]
    tile = [
        "HMMA.16816.F32 R4, R16, R12, R4",
        "@P0 BRA 0x0",
        *["MUFU.EX2 R4, R4"] * 4,
        "STG.E.128 [R2.64], R4",
    ]
    cost = tile_cost(code([*tile, "@P1 BRA 0x90", "EXIT", *part]), exponentials, 4)
    assert cost is not None
    assert (cost.step, cost.before, cost.after) == (2, 1, 8)
    assert store_widths(cost.opcodes) == {16: 1}
    with pytest.raises(ValueError, match="no path from a product has the 4 exponentials"):
        tile_cost(code(["HMMA.16816.F32 R4, R16, R12, R4", "EXIT"]), exponentials, 4)


def test_a_rare_loop_does_not_add_up_to_a_tile() -> None:
    start = ["HMMA.16816.F32 R4, R16, R12, R4", "@P0 BRA 0x50"]
    loop = ["MUFU.EX2 R4, R4", "@P1 BRA 0x20", "EXIT"]
    tile = [*["MUFU.EX2 R4, R4"] * 4, *["FADD R4, R4, R5"] * 20, "EXIT"]
    cost = tile_cost(code([*start, *loop, *tile]), exponentials, 4)
    assert cost is not None
    assert (cost.after, cost.path) == (1 + len(tile), (1, 4))
    with pytest.raises(ValueError, match="no path from a product has the 4 exponentials"):
        tile_cost(code([*start, *loop, "EXIT"]), exponentials, 4)


def test_blocks_of_a_loop_that_do_different_work_add_up() -> None:
    start = ["HMMA.16816.F32 R4, R16, R12, R4", "@P0 BRA 0x40"]
    short = ["MUFU.EX2 R4, R4", "BRA 0x70"]
    long = ["MUFU.EX2 R5, R5", "NOP", "NOP"]
    cost = tile_cost(code([*start, *short, *long, "@P1 BRA 0x20", "EXIT"]), exponentials, 2)
    assert cost is not None
    assert cost.after == 1 + len(long) + 1 + len(short) + 1 + 1


def test_a_path_goes_on_after_an_exit_that_only_some_threads_take() -> None:
    tile = ["HMMA.16816.F32 R4, R16, R12, R4", *["MUFU.EX2 R4, R4"] * 4, "@P0 EXIT"]
    cost = tile_cost(code([*tile, "STG.E [R2.64], R4", "EXIT"]), exponentials, 4)
    assert cost is not None
    assert cost.after == 7
    assert store_widths(cost.opcodes) == {4: 1}
    cost = tile_cost(code([*tile, "BRA 0x60"]), exponentials, 4)
    assert cost is not None
    assert cost.after == 5, "no other path ends"


def test_comparisons_with_infinity_and_zero_are_no_work_of_the_tile() -> None:
    step = ["FSETP.GEU.AND P3, PT, |R1|, +INF , PT"] * 4 + [
        "HMMA.1688.F32.TF32 R4, R1, R2, R4",
        "@P0 BRA 0x0",
    ]
    cost = tile_cost(code([*step, "FMNMX R4, R4, R5, !PT", "FMNMX R4, R4, R6, !PT", "EXIT"]), comparisons, 2)
    assert cost is not None
    assert (cost.step, cost.after) == (6, 4)
    lines = [
        "FSETP.GT.AND P1, PT, R4, RZ, PT",
        "FSETP.GT.AND P1, PT, R4, R5, PT",
        "FSETP.NEU.AND P1, PT, R4, R5",
    ]
    assert comparisons(instructions(code(lines))) == 1


@pytest.mark.parametrize(
    ("work", "whole", "less"),
    [
        (exponentials, ["MUFU.EX2 R4, R4"] * 4, ["MUFU.EX2 R4, R4"] * 2),
        (comparisons, ["FMNMX3 R4, R4, R5, R6, !PT"] * 2, ["FMNMX3 R4, R4, R5, R6, !PT"]),
        (comparisons, ["FSETP.GT.AND P1, PT, R4, R5, PT"] * 4, ["FMNMX R4, R4, R5, !PT"] * 3),
    ],
    ids=["exponentials", "maxima of three", "comparisons"],
)
def test_a_path_does_all_of_the_work_and_not_most_of_it(
    work: Callable[[Iterable[Instruction]], int], whole: list[str], less: list[str]
) -> None:
    part = ["HMMA.16816.F32 R4, R16, R12, R4", "@P0 BRA 0x60", *less, "EXIT"]
    part += ["NOP"] * (6 - len(part))  # to 0x60
    cost = tile_cost(code([*part, *whole, "EXIT"]), work, 4)
    assert cost is not None
    assert cost.after == 1 + len(whole) + 1
    # Two blocks of a path add up.
    cost = tile_cost(
        code([part[0], *less, "@P1 BRA 0x0", *whole, "EXIT"]), work, 4 + work(instructions(code(less)))
    )
    assert cost is not None
    assert cost.after == len(less) + 1 + len(whole) + 1
    with pytest.raises(ValueError, match=f"has the 5 {work.__name__}"):
        tile_cost(code([*part, *whole, "EXIT"]), work, 5)


def test_comparisons_that_flush_denormals_are_counted() -> None:
    lines = [
        "FSETP.GT.FTZ.AND P1, PT, R4, R5, PT",
        "FMNMX.FTZ R4, R4, R5, !PT",
        "@P0 FSET.BF.GT.FTZ.AND R4, R4, R5",
    ]
    kept = [
        "FSETP.GT.AND P1, PT, R4, R5, PT",
        "FMNMX R4, R4, R5, !PT",
        "F2I.FTZ.U R4, R5",
        "FADD.FTZ R4, R4, R5",
    ]
    assert flushed_comparisons(instructions(code([*lines, *kept]))) == 3


def test_a_kernel_without_a_product_has_no_tile() -> None:
    assert tile_cost(code(["MUFU.EX2 R4, R4", "STG.E [R2.64], R4", "EXIT"]), exponentials, 1) is None


def test_branches_calls_and_ends_lead_to_the_right_blocks() -> None:
    lines = [
        "BRA.U UP0, 0x20",  # an operand decides
        "@P0 EXIT",
        "CALL.REL.NOINC 0x70",  # of a function, which returns
        "@P1 CALL.REL.NOINC 0x50",  # a jump
        "BRA 0x0",
        "BRA.DIV UR4, 0x40",
        "EXIT",
        "MUFU.RCP R1, R2",
        "RET.REL.NODEC R2 0x0",
    ]
    graph = blocks(code(lines))
    first = [block.instructions[0].address // 16 for block in graph]
    following = {first[n]: {first[f] for f in block.following} for n, block in enumerate(graph)}
    assert following == {0: {1, 2}, 1: {2}, 2: {3}, 3: {4, 5}, 4: {0}, 5: {4, 6}, 6: set(), 7: set()}
    assert [first[n] for n, block in enumerate(graph) if block.exits] == [1, 6]
    with pytest.raises(ValueError, match="cannot follow 'BRX R2 -0x10' at 0x0"):
        blocks(code(["BRX R2 -0x10"]))


def test_instructions_and_stores_are_read() -> None:
    first, second = instructions(
        "/*0000*/ is no line\n" + code(["@!UP1 STG.E.U16 [R2.64], R4", "ISETP.NE P0"])
    )
    assert (first.opcode, first.predicated, second.predicated) == ("STG.E.U16", True, False)
    lines = [
        "STG.E.U8 [R2], R4",
        "STG.E.64 [R2], R4",
        "STG.E.EF.128 [R2], R4",
        "STG.E [R2], R4",
        "STS.U16 [R2], R4",
    ]
    assert store_widths(opcode_counts([first, *instructions(code(lines))])) == {1: 1, 2: 1, 4: 1, 8: 1, 16: 1}
