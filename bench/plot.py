"""Redraws tables and plots from bench/results: `python -m bench.plot [--check]`.

The tables are in README.md and docs/benchmarks.md, the plots in docs/. A table stands between
`<!-- bench:AREA CASE ... -->` and `<!-- /bench -->`. It shows the newest results of that area: the cases that
are named, or all cases and a caption. With --check, the commits that the results name must be in the history
of HEAD, if this history is available.
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
PAGES = ("README.md", "docs/benchmarks.md")
BLOCK = re.compile(r"<!-- bench:(\w+)((?: [\w.-]+)*) -->\n(.*?)<!-- /bench -->", re.DOTALL)
COLOURS = (
    *("#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#1f78b4"),
    *("#666666", "#8c2d04", "#17becf", "#000000", "#a6cee3", "#b15928"),
)


@console.command
def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Command line; returns the exit code: with --check, 1 if something is out of date."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=main.__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit code 1 if out of date, or measured at a commit that is not in this history",
    )
    check = parser.parse_args(arguments).check
    files: dict[Path, str] = {}
    for page in (root / name for name in PAGES):
        if not page.exists():
            continue
        text = page.read_text()
        files[page] = render(text, root / "bench/results")
        for area in areas(text):
            document, cases = newest(root / "bench/results", area)
            if any("providers" in case for case in cases.values()):
                files[root / f"docs/bench-{area}.svg"] = plot(document, cases)
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(root)} {'does not follow from bench/results' if check else 'redrawn'}")
        if not check:
            path.write_text(files[path])
    foreign = _foreign_commits(root) if check else []
    return int(check and bool(stale or foreign))


def _foreign_commits(root: Path) -> list[str]:
    """Prints and returns the commits that results name but that are not in the history of HEAD.

    A commit that git cannot judge is printed as a warning and not returned.
    """
    named: dict[str, set[str]] = {}
    for path in sorted((root / "bench/results").glob("*.json")):
        for case in json.loads(path.read_text())["cases"].values():
            named.setdefault(case["commit"], set()).add(path.name)
    foreign = []
    for commit, files in named.items():
        is_ancestor = machine.is_ancestor(commit, root)
        if is_ancestor is None:
            print(f"warning: commit {commit} of {', '.join(files)} not checked: no full history here")
        elif not is_ancestor:
            print(f"commit {commit} of {', '.join(files)} is not in the history of HEAD: measure again")
            foreign.append(commit)
    return foreign


def areas(page: str) -> list[str]:
    """The area of each table of a page."""
    return [match[1] for match in BLOCK.finditer(page)]


def render(page: str, results: Path) -> str:
    """The page with its tables drawn from the results.

    Raises:
        SystemExit: an area has no results, or the newest ones lack a case that the page names.
    """

    def draw(match: re.Match[str]) -> str:
        area, names = match[1], match[2].split()
        document, cases = newest(results, area)
        if missing := [name for name in names if name not in cases]:
            raise SystemExit(f"the newest results of {area!r} have no case {', '.join(missing)}")
        table = markdown({name: cases[name] for name in names or cases})
        below = "" if names else f"\n\n{caption(document, cases)}"
        return f"<!-- bench:{area}{match[2]} -->\n{table}{below}\n<!-- /bench -->"

    return BLOCK.sub(draw, page)


def newest(results: Path, area: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest results file that has cases of an area, and these cases.

    Raises:
        SystemExit: no file has cases of the area.
    """
    documents = [(json.loads(path.read_text()), path.name) for path in results.glob("*.json")]
    for document, _ in sorted(documents, key=lambda item: (item[0]["date"], item[1]), reverse=True):
        cases = {name: c for name, c in document["cases"].items() if c["area"] == area and "not_run" not in c}
        if cases:
            return document, cases
    raise SystemExit(f"{results} has no results of {area!r}: run `python -m bench.run {area} --json`")


def markdown(cases: dict[str, Any]) -> str:
    """A table of cases: the time of clsp_fast, and how many times longer each peer takes."""
    if any("rows" in case for case in cases.values()):
        return "\n\n".join(_plain(case) for case in cases.values() if "rows" in case)
    lines = ["| | clsp_fast | time of others over ours |", "|---|---|---|"]
    for case in cases.values():
        rows = case["providers"]
        subject = next(iter(rows.values()))
        if "cpu_s" not in subject:
            lines.append(f"| {case['what']} | {subject['status']} | |")
            continue
        best_s = subject[f"{case['clock']}_s"]["min"]
        rate = _rate(case["amount"] / best_s, case["unit"])
        threads = f", {case['threads']} threads" if case["threads"] > 1 else ""
        peers = ", ".join(_peer(name, row) for name, row in rows.items() if "ratio" in row)
        time = f"{_digits(best_s * 1e3)} ms{rate}{_memory(subject)}"
        lines.append(f"| {case['what']}{threads} | {time} | {peers} |")
    return "\n".join(lines)


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
    """Machine, versions, commit, number of rounds and spread of a table's figures."""
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
        f"thread or wall time of several. Distance of the quartiles over the median: usually "
        f"{spreads[len(spreads) // 2]:.0%}, at most {spreads[-1]:.0%}."
    )
    return text + (f" Not installed, so not compared: {', '.join(sorted(missing))}." if missing else "")


def plot(document: dict[str, Any], cases: dict[str, Any]) -> str:
    """An SVG of every peer's time divided by that of clsp_fast, on a logarithmic axis."""
    rows = [
        (name, {p: r["ratio"] for p, r in c["providers"].items() if "ratio" in r})
        for name, c in cases.items()
    ]
    peers = sorted({peer for _, ratios in rows for peer in ratios})
    colour = {peer: COLOURS[i % len(COLOURS)] for i, peer in enumerate(peers)}
    highest = max([10.0, *(ratio for _, ratios in rows for ratio in ratios.values())])
    lowest = min([0.5, *(ratio for _, ratios in rows for ratio in ratios.values())])
    left, width, top, pitch = 210, 560, 36 + 18 * math.ceil(len(peers) / 4), 22
    height = top + pitch * len(rows) + 40

    def x(ratio: float) -> float:
        return left + width * math.log(ratio / lowest) / math.log(highest / lowest)

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
        if lowest <= tick <= highest:
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
