"""Redraws the README's tables and the plots of docs/ from bench/results: `python -m bench.plot [--check]`.

A table stands between `<!-- bench:AREA -->` and `<!-- /bench -->`, and shows the newest results of that area.
With --check, results also have to name commits of this history, where there is one to look in.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bench import machine
from clsp_fast import console

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- bench:(\w+) -->\n(.*?)<!-- /bench -->", re.DOTALL)
COLOURS = (
    *("#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#1f78b4"),
    *("#666666", "#8c2d04", "#17becf", "#000000", "#a6cee3", "#b15928"),
)


@console.command
def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Command line; returns the exit code: with --check, 1 if something would change."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=main.__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit code 1 if out of date, or measured at a commit that is not in this history",
    )
    check = parser.parse_args(arguments).check
    readme = root / "README.md"
    files = {readme: render_readme(readme.read_text(), root / "bench/results")}
    for area in areas(readme.read_text()):
        document, cases = newest(root / "bench/results", area)
        if all("providers" not in case for case in cases.values()):
            continue
        files[root / f"docs/bench-{area}.svg"] = plot(document, cases)
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(root)} {'does not follow from bench/results' if check else 'redrawn'}")
        if not check:
            path.write_text(files[path])
    foreign = _foreign_commits(root) if check else []
    return int(check and bool(stale or foreign))


def _foreign_commits(root: Path) -> list[str]:
    """Says which commits that results name are no ancestors of HEAD, and returns them; those that git cannot
    judge are said, too, but not returned."""
    named: dict[str, set[str]] = {}
    for path in sorted((root / "bench/results").glob("*.json")):
        for case in json.loads(path.read_text())["cases"].values():
            named.setdefault(case["commit"], set()).add(path.name)
    found = []
    for commit, files in named.items():
        is_ancestor = machine.is_ancestor(commit, root)
        if is_ancestor is None:
            print(f"warning: no history here to look for commit {commit} of {', '.join(files)} in")
        elif not is_ancestor:
            print(f"commit {commit} of {', '.join(files)} is not in the history of HEAD: measure again")
            found.append(commit)
    return found


def areas(readme: str) -> list[str]:
    """The areas that the README has a table of."""
    return [match[1] for match in BLOCK.finditer(readme)]


def render_readme(readme: str, results: Path) -> str:
    """The README with its tables made anew."""

    def render(match: re.Match[str]) -> str:
        return f"<!-- bench:{match[1]} -->\n{markdown(*newest(results, match[1]))}\n<!-- /bench -->"

    return BLOCK.sub(render, readme)


def newest(results: Path, area: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest results file that has cases of an area, and these cases.

    Raises:
        SystemExit: no file has any.
    """
    documents = [(json.loads(path.read_text()), path.name) for path in results.glob("*.json")]
    for document, _ in sorted(documents, key=lambda item: (item[0]["date"], item[1]), reverse=True):
        cases = {name: c for name, c in document["cases"].items() if c["area"] == area and "not_run" not in c}
        if cases:
            return document, cases
    raise SystemExit(f"{results} has no results of {area!r}: run `python -m bench.run {area} --json`")


def markdown(document: dict[str, Any], cases: dict[str, Any]) -> str:
    """The table of an area: our time, and by how much it is shorter than each peer's."""
    if any("rows" in case for case in cases.values()):
        return "\n\n".join(_plain(case) for case in cases.values() if "rows" in case)
    lines = ["| | clsp_fast | time of others over ours |", "|---|---|---|"]
    for case in cases.values():
        rows = case["providers"]
        ours = next(iter(rows))
        if "cpu_s" not in rows[ours]:
            lines.append(f"| {case['what']} | {rows[ours]['status']} | |")
            continue
        best_s = rows[ours][f"{case['clock']}_s"]["min"]
        rate = _rate(case["amount"] / best_s, case["unit"])
        threads = f", {case['threads']} threads" if case["threads"] > 1 else ""
        memory = _memory(rows[ours])
        peers = ", ".join(_peer(name, row) for name, row in rows.items() if "ratio" in row)
        lines.append(f"| {case['what']}{threads} | {_digits(best_s * 1e3)} ms{rate}{memory} | {peers} |")
    return "\n".join([*lines, "", caption(document, cases)])


def _plain(case: dict[str, Any]) -> str:
    header, *rows = case["rows"]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(["| " + " | ".join(row) + " |" for row in lines])


def _rate(per_second: float, unit: str) -> str:
    if unit == "calls":
        return ""
    rounded = float(f"{per_second:.3g}")
    return (
        f", {_digits(rounded)} x real time" if unit == "audio seconds" else f", {_digits(rounded)} {unit}/s"
    )


def _memory(row: dict[str, Any]) -> str:
    return f", {row['peak_bytes'] / 2**20:.0f} MiB" if row.get("peak_bytes") else ""


def _peer(name: str, row: dict[str, Any]) -> str:
    missed = f" (goal {row['goal']:.3g})" if "goal" in row and not row["reached"] else ""
    return f"{name} **{_digits(row['ratio'])}**{missed}{_memory(row)}"


def caption(document: dict[str, Any], cases: dict[str, Any]) -> str:
    """Machine, versions, commit, rounds and spread: what the figures have to be read with."""
    commits = sorted({c["commit"] + " with changes" * c["dirty"] for c in cases.values()})
    every = [(case, row) for case in cases.values() for row in case["providers"].values()]
    spreads = sorted(r[f"{c['clock']}_s"]["spread"] for c, r in every if r["status"] == "timed")
    packages = {row["package"] for _, row in every if "package" in row}
    rounds = sorted({c["rounds"] for c in cases.values()})
    missing = {n for c in cases.values() for n, row in c["providers"].items() if row["status"] == "missing"}
    made_with = "; ".join(
        [machine.line(document["machine"]), *([", ".join(sorted(packages))] if packages else [])]
    )
    text = (
        f"{made_with}. Commit {', '.join(commits)}, "
        f"{document['date']}; n = {', '.join(map(str, rounds))} interleaved rounds, minimum CPU time of one "
        f"thread, wall time of several. Distance of the quartiles over the median: in the middle "
        f"{spreads[len(spreads) // 2]:.0%}, at most {spreads[-1]:.0%}."
    )
    return text + (f" Not there to compare with: {', '.join(sorted(missing))}." if missing else "")


def plot(document: dict[str, Any], cases: dict[str, Any]) -> str:
    """An SVG of every peer's time over ours, on a logarithmic axis."""
    rows = [
        (name, {p: r["ratio"] for p, r in c["providers"].items() if "ratio" in r})
        for name, c in cases.items()
    ]
    peers = sorted({peer for _, ratios in rows for peer in ratios})
    colour = {peer: COLOURS[i % len(COLOURS)] for i, peer in enumerate(peers)}
    most = max([10.0, *(ratio for _, ratios in rows for ratio in ratios.values())])
    least = min([0.5, *(ratio for _, ratios in rows for ratio in ratios.values())])
    left, width, top, pitch = 210, 560, 36 + 18 * math.ceil(len(peers) / 4), 22
    height = top + pitch * len(rows) + 40

    def x(ratio: float) -> float:
        return left + width * math.log(ratio / least) / math.log(most / least)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 30} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{left + width + 30}" height="{height}" fill="#ffffff"/>',
    ]
    for i, peer in enumerate(peers):
        at_x, at_y = 20 + 190 * (i % 4), 18 + 18 * (i // 4)
        parts.append(f'<circle cx="{at_x}" cy="{at_y - 4}" r="5" fill="{colour[peer]}"/>')
        parts.append(f'<text x="{at_x + 10}" y="{at_y}">{escape(peer)}</text>')
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500):
        if least <= tick <= most:
            line = f'x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top - 8}" y2="{height - 34}"'
            parts.append(f'<line {line} stroke="{"#000000" if tick == 1 else "#dddddd"}"/>')
            parts.append(f'<text x="{x(tick):.1f}" y="{height - 20}" text-anchor="middle">{tick:g}</text>')
    for i, (name, ratios) in enumerate(rows):
        y = top + pitch * i + 8
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        parts += [f'<circle cx="{x(r):.1f}" cy="{y}" r="5" fill="{colour[p]}"/>' for p, r in ratios.items()]
    label = f"time over clsp_fast's (line at 1); {document['machine']['cpu']}, {document['date']}"
    parts.append(f'<text x="{left}" y="{height - 4}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
