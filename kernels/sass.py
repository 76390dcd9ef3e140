"""Reads a kernel's machine code as cuobjdump prints it, and counts the instructions that a tile takes.

`tile_cost` answers what one warp executes for a tile besides the matrix product. Only rare tiles hold a
positive pair, an edge or a starved sum, and their code is left out: the answer is the cheapest path through
the graph of basic blocks that does the work of a whole tile.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, TypeAlias

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", re.MULTILINE)
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_ADDRESS = re.compile(r"\b0x([0-9a-f]+)$")
_MATRIX = re.compile(r"(?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\b")
_ENDS = ("EXIT", "RET", "BPT", "KILL")
_EXPONENTIAL = re.compile(r"MUFU\.EX2\b")
# Scores are compared with numbers in registers. Comparisons with infinity belong to the product of fp32
# operands, and comparisons with zero to the thresholds of the ranks.
_COMPARISON = re.compile(r"FSETP\.[GL][TE]U?\b(?!.*(?:INF|RZ))|FMNMX3?\b")
_FLUSHED = re.compile(r"(?:FSETP?|FMNMX3?)\.(?:\w+\.)*FTZ\b")
_WIDTH = re.compile(r"\.(U?[SU]?8|U?[SU]?16|32|64|128)\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in bytes from the start of the kernel.
        text: opcode and operands, without the predicate.
        predicated: whether a predicate decides if it takes effect; it takes its issue slot in any case.
    """

    address: int
    text: str
    predicated: bool

    @property
    def opcode(self) -> str:
        return self.text.split()[0]

    @property
    def target(self) -> int | None:
        """Where a branch or a call goes."""
        address = _ADDRESS.search(self.text)
        return int(address.group(1), 16) if address and self.opcode.startswith(("BRA", "CALL")) else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        if self.target is not None:  # BRA UP0, 0x10 branches on an operand instead of a predicate
            return self.predicated or "," in self.text
        return self.predicated or not self.opcode.startswith(_ENDS)


@dataclass(frozen=True)
class Block:
    """Instructions that are executed one after the other.

    Attributes:
        following: numbers of the blocks that may follow.
        exits: whether the kernel may end after this block.
    """

    instructions: tuple[Instruction, ...]
    following: tuple[int, ...]
    exits: bool

    @property
    def has_product(self) -> bool:
        return _MATRIX.match(self.instructions[-1].text) is not None


_Trail: TypeAlias = "tuple[int, _Trail] | None"


class _Path(NamedTuple):
    """A path through blocks.

    Attributes:
        cost: number of instructions.
        complete: whether it does the work of a tile.
        returns: whether it ends with the product, and not with the kernel.
        final: whether it ends where no thread goes on.
        trail: its last block and, nested in the same way, those before it.
    """

    cost: int
    complete: bool
    returns: bool
    final: bool
    trail: _Trail

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of its blocks."""
        trail, numbers = self.trail, []
        while trail is not None:
            number, trail = trail
            numbers.append(number)
        return tuple(reversed(numbers))


@dataclass(frozen=True)
class TileCost:
    """Instructions that one warp executes for a common tile.

    Attributes:
        step: for one step of the product's loop, over `depth` elements; matrix instructions are included.
        before: from the start of the kernel to the product; 0 if a program computes several tiles, because
            `after` then ends where the next product starts.
        after: from the end of the product to the end of the tile.
        opcodes: how often each opcode is among the instructions of `after`.
        path: numbers of the blocks that hold the instructions of `after`.
    """

    step: int
    before: int
    after: int
    opcodes: Counter[str]
    path: tuple[int, ...]


def instructions(code: str) -> list[Instruction]:
    """The instructions of a disassembled kernel."""
    return [
        Instruction(int(address, 16), _PREDICATE.sub("", text), text.startswith("@"))
        for address, text in _LINE.findall(code)
    ]


def blocks(code: str) -> list[Block]:
    """The basic blocks of a disassembled kernel. A matrix instruction ends its block.

    A call of a function that returns leads to the next block, and the function counts as nothing: kernels
    call only slow cases of a division. The compiler also uses calls as jumps, to code that never returns.

    Raises:
        ValueError: a branch goes to an address that only a register knows.
    """
    listing = instructions(code)
    jumps = [i for i in listing if i.opcode.startswith(("BRX", "JMP", "JMX"))]
    if jumps:
        raise ValueError(f"cannot follow {jumps[0].text!r} at {jumps[0].address:#x}")
    targets = {instruction.target for instruction in listing}
    parts: list[list[Instruction]] = [[]]
    for instruction in listing:
        if parts[-1] and instruction.address in targets:
            parts.append([])
        parts[-1].append(instruction)
        ends = instruction.target is not None or instruction.opcode.startswith(_ENDS)
        if ends or _MATRIX.match(instruction.text):
            parts.append([])
    parts = [part for part in parts if part]
    number_at = {part[0].address: number for number, part in enumerate(parts)}
    following: list[set[int]] = []
    for number, part in enumerate(parts):
        last = part[-1]
        called = last.opcode.startswith("CALL")
        after = {number + 1} if (called or last.falls_through) and number + 1 < len(parts) else set[int]()
        following.append(after | (set() if called or last.target is None else {number_at[last.target]}))
    jumps_to = {}
    for number, part in enumerate(parts):
        last = part[-1]
        if last.opcode.startswith("CALL") and last.target is not None:
            function = _reachable(following, number_at[last.target])
            if not any(parts[other][-1].opcode.startswith("RET") for other in function):
                after = following[number] if last.predicated else set()
                jumps_to[number] = after | {number_at[last.target]}
    return [
        Block(
            tuple(part),
            tuple(sorted(jumps_to.get(number, following[number]))),
            part[-1].opcode.startswith(_ENDS) and not part[-1].opcode.startswith("RET"),
        )
        for number, part in enumerate(parts)
    ]


def _reachable(following: list[set[int]], start: int) -> set[int]:
    reached, left = {start}, [start]
    while left:
        new = following[left.pop()] - reached
        reached |= new
        left += new
    return reached


def opcode_counts(code: Iterable[Instruction]) -> Counter[str]:
    """How often each opcode occurs."""
    return Counter(instruction.opcode for instruction in code)


def store_widths(opcodes: Counter[str]) -> dict[int, int]:
    """Bytes that a thread stores to global memory by one instruction -> number of such instructions."""
    widths: Counter[int] = Counter()
    for opcode, number in opcodes.items():
        if opcode.split(".")[0] == "STG":
            size = _WIDTH.search(opcode)
            widths[int(size.group(1).lstrip("SU")) // 8 if size else 4] += number
    return dict(sorted(widths.items()))


def exponentials(code: Iterable[Instruction]) -> int:
    """Number of exponentials that a thread computes."""
    return sum(_EXPONENTIAL.match(instruction.text) is not None for instruction in code)


def comparisons(code: Iterable[Instruction]) -> int:
    """Number of times that a thread compares two scores. The maximum of three takes two comparisons."""
    matches = [_COMPARISON.match(instruction.text) for instruction in code]
    return sum(2 if match[0] == "FMNMX3" else 1 for match in matches if match)


def flushed_comparisons(code: Iterable[Instruction]) -> int:
    """Number of comparisons of floats that take denormals for zero."""
    return sum(_FLUSHED.match(instruction.text) is not None for instruction in code)


def tile_cost(code: str, work: Callable[[Iterable[Instruction]], int], needed: int) -> TileCost | None:
    """The cost of a common tile; None for a kernel without a matrix product.

    A path does the work of a tile if it has `needed` instructions that `work` counts: `exponentials` or
    `comparisons`. A rare path that repeats the product computes a part of the tile at a time. If it does
    enough work in spite of that, it has fewer 16-byte stores than the common.

    Raises:
        ValueError: no path from a product does this work.
    """
    graph = blocks(code)
    if not any(block.has_product for block in graph):
        return None
    walk = _Walk(graph, [work(block.instructions) for block in graph], needed)
    costs = [
        cost for number, block in enumerate(graph) if block.has_product for cost in walk.from_product(number)
    ]
    if not costs:
        raise ValueError(f"no path from a product has the {needed} {work.__name__} of a tile")
    # A program of several tiles also has paths to the end of the kernel, after its last tile.
    return min(costs, key=lambda cost: (-store_widths(cost.opcodes).get(16, 0), cost.before > 0, cost.after))


@dataclass(frozen=True)
class _Walk:
    """Cheapest paths through a graph of blocks.

    Attributes:
        work: the work that each block does.
        needed: the work that a path of a tile does.
    """

    graph: list[Block]
    work: list[int]
    needed: int

    def paths(self, starts: Iterable[int], product: int) -> Iterator[_Path]:
        """Cheapest paths that end with block `product`, or with the kernel before they reach that block.

        The work of a block counts once on a path: a rare loop repeats a part of the tile, and its work must
        not add up to that of a tile. No kernel does the common work of its tile in such a loop. Yields at
        most one path for each end and set of blocks that work; all sets that do enough count as one.
        """
        order = count()
        heap: list[tuple[int, int, frozenset[int], int, _Trail]] = [
            (0, next(order), frozenset(), start, None) for start in starts
        ]
        done: set[tuple[int, frozenset[int] | None]] = set()
        while heap:
            cost, _, working, number, trail = heapq.heappop(heap)
            if self.work[number]:
                working |= {number}
            complete = sum(self.work[block] for block in working) >= self.needed
            state = (number, None if complete else working)
            if state in done:
                continue
            done.add(state)
            block = self.graph[number]
            cost += len(block.instructions)
            trail = (number, trail)
            if number == product or block.exits:
                final = block.exits and not block.following
                yield _Path(cost, complete, number == product, final, trail)
            if number != product:
                for successor in block.following:
                    heapq.heappush(heap, (cost, next(order), working, successor, trail))

    def from_product(self, product: int) -> Iterator[TileCost]:
        """The cost of a tile whose product ends with block `product`, if a path does the work of a tile."""
        paths = sorted(self.paths(self.graph[product].following, product), key=lambda path: path.cost)
        step = next(
            (path for path in paths if path.returns and not path.complete),
            _Path(0, False, True, False, None),
        )
        complete = [path for path in paths if path.complete]
        if tile := next((path for path in complete if path.returns), None):
            path = tuple(number for number in tile.blocks if number not in step.blocks)
            opcodes = self._opcodes(tile.blocks)
            opcodes.subtract(self._opcodes(step.blocks))
            yield TileCost(step.cost, 0, tile.cost - step.cost, +opcodes, path)
        elif complete:
            start = next(path for path in self.paths([0], product) if path.returns).blocks
            first = next(at for at, number in enumerate(start) if self.graph[number].has_product)
            before = sum(len(self.graph[number].instructions) for number in start[: first + 1])
            # Some threads may go on after a predicated EXIT, for example to store.
            tile = next((path for path in complete if path.final), complete[0])
            yield TileCost(step.cost, before, tile.cost, self._opcodes(tile.blocks), tile.blocks)

    def _opcodes(self, path: Iterable[int]) -> Counter[str]:
        return opcode_counts(i for number in path for i in self.graph[number].instructions)
