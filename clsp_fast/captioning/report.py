"""`caption report WORK`: what was kept and dropped, how long the captions are, and what they cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from clsp_fast.captioning import generate, judge
from clsp_fast.captioning.answers import ANSWERS, Answer, parse_answer, read_record
from clsp_fast.captioning.filter import CHARACTERS_A_BIN, COUNTS, WORDS_A_BIN, FilterCounts
from clsp_fast.captioning.rows import asked_rows, describe_rows, rows_as_json
from clsp_fast.checks import require
from clsp_fast.storage import files

STEPS = ("generate", "verify", "judge")
"""The steps that ask a server."""
_WIDTH = 80
_NAME_WIDTH = 26
_BAR = 16
_LONG = 1024
_LONGEST_RANGES = 26
_KEYS_OF_COUNTS = (*(key.name for key in fields(FilterCounts)), "provenance", "rows")
_MOST_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Prints what was kept and dropped by each rule, the lengths of the captions, and what the answers cost.
    Writes WORK/report.json, report.md and report.png.

    Run it after any step: what later steps would add is left out.
    """

    work: Path
    """Working folder of the other subcommands."""
    price_prompt: float = 0.0
    """Price of a million tokens of prompts, in any currency."""
    price_completion: float = 0.0
    """Price of a million tokens of answers."""

    def __post_init__(self) -> None:
        for name in ("price_prompt", "price_completion"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, name, "a number >= 0", value)


class Table(NamedTuple):
    """A table: its columns, the first of which holds names, and its rows of text."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def text(self) -> str:
        """The table for a terminal of 80 columns."""
        width = (_WIDTH - _NAME_WIDTH) // max(1, len(self.columns) - 1)
        lines = []
        for row in (self.columns, *self.rows):
            name = row[0] if len(row[0]) < _NAME_WIDTH else row[0][: _NAME_WIDTH - 2] + "…"
            lines.append(
                (f"{name:<{_NAME_WIDTH}}" + "".join(f"{cell:>{width}}" for cell in row[1:])).rstrip()
            )
        return "\n".join(lines)

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in lines)


def report(config: ReportConfig) -> int:
    """Reports on a work folder. Returns the exit code of the command, 0.

    Raises:
        FileNotFoundError: the folder holds no job and no counts. ValueError: a file in it is damaged.
        DiskFull: there is no room.
    """
    figures = read_figures(config)
    tables = dict(make_tables(figures))
    picture = draw_picture(figures, config.work / "report.png")
    files.write_json(config.work / "report.json", figures)
    text = "\n\n".join(f"{title}\n{table.text()}" for title, table in tables.items())
    parts = [f"# Captions of {config.work.resolve().name}"]
    parts += [f"## {title}\n\n{table.markdown()}" for title, table in tables.items()]
    files.write_text(config.work / "report.md", "\n\n".join(parts) + "\n")
    print(text)
    if "filter" not in figures:
        print("\n`filter` has not run: this report holds only what the answers cost")
    elif _outdated(figures):
        asked, counted = (_rows(value) for value in (figures["rows"], figures["filter"]["rows"]))
        print(
            f"\n`generate` was asked for the rows {asked}, but `filter` counted {counted}: run `filter` again"
        )
    print(f"\n{picture}\nreport: {config.work / 'report.md'}")
    return 0


def read_figures(config: ReportConfig) -> dict[str, Any]:
    """The content of report.json: "cost" and "model" of each step, "rows" that `generate` was asked for, and
    the files of `filter` and `judge`, if any."""
    figures: dict[str, Any] = {"cost": {}, "model": {}}
    for step in STEPS:
        folder = config.work / step
        if (folder / ANSWERS).exists():
            record = read_record(folder)
            figures["model"][step] = str(record["settings"].get("model", ""))
            if step == generate.STEP:
                figures["rows"] = rows_as_json(asked_rows(record))
            figures["cost"][step] = _cost(folder, config)
    counts, results = config.work / COUNTS, config.work / judge.STEP / judge.RESULTS
    if counts.exists():
        figures["filter"] = _read_object(counts, _KEYS_OF_COUNTS)
    if results.exists():
        figures["judge"] = _read_object(results, ("scores",))
    if not figures["cost"] and "filter" not in figures:
        raise FileNotFoundError(f"{config.work} holds nothing to report on; run `generate` first")
    if figures["cost"]:
        costs = figures["cost"].values()
        figures["cost"]["total"] = {key: sum(cost[key] for cost in costs) for key in next(iter(costs))}
    return figures


def _cost(folder: Path, config: ReportConfig) -> dict[str, float]:
    """Requests, texts and tokens of a step. A request that failed and was answered later counts as both.

    Damaged lines are counted and left out, as by the steps that read the answers. An incomplete last line is
    that of a run that was killed or goes on.
    """
    keys = ("answered", "failed", "damaged", "texts", "truncated", "prompt_tokens", "completion_tokens")
    cost: dict[str, float] = dict.fromkeys(keys, 0)
    for answer in _answers(folder, cost):
        if answer.error is not None:
            cost["failed"] += 1
            continue
        cost["answered"] += 1
        cost["texts"] += len(answer.texts)
        cost["truncated"] += answer.finish_reasons.count("length")
        for key in ("prompt_tokens", "completion_tokens"):
            cost[key] += answer.usage.get(key, 0)
    tokens = (
        cost["prompt_tokens"] * config.price_prompt,
        cost["completion_tokens"] * config.price_completion,
    )
    return cost | {"price": sum(tokens) / 1e6}


def _answers(folder: Path, cost: dict[str, float]) -> Iterator[Answer]:
    with (folder / ANSWERS).open("rb") as file:
        for line in file:
            try:
                yield parse_answer(line)
            except ValueError:
                cost["damaged"] += line.endswith(b"\n")


def _read_object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The object in a JSON file that has all of these keys."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(value, dict), "the file", "one JSON object", value)
        for key in keys:
            require(key in value, f'"{key}"', "in the file", None)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; run the subcommand that writes it again") from error
    return dict(value)


def make_tables(figures: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """(title, table) of everything that the figures hold."""
    counts = figures.get("filter")
    if counts:
        yield "Clips and candidates", _overview(counts)
        yield "Dropped candidates", _reasons(counts)
        if counts["global_captions"]:
            yield "Global captions of the manifest", _shares("caption", counts["global_captions"])
        yield "Captions per clip", _per_clip(counts)
        yield "Length in characters", _lengths(counts["characters"], CHARACTERS_A_BIN)
        yield "Length in words", _lengths(counts["words"], WORDS_A_BIN)
    if figures["cost"]:
        yield "Requests and tokens", _costs(figures)
    if "judge" in figures:
        yield from _judgement(figures["judge"])


def _overview(counts: Mapping[str, Any]) -> Table:
    rows = []
    for key in ("clips", "candidates"):
        total = counts[key].get("total", 0)
        rows.append((key, f"{total:,}", ""))
        names = [name for name in counts[key] if name != "total"]
        rows += [
            (f"  {name}", f"{counts[key][name]:,}", _percent(counts[key][name], total)) for name in names
        ]
    hours = {kind: seconds / 3600 for kind, seconds in counts["audio_s"].items()}
    rows.append(("hours of audio", f"{hours['total']:,.2f}" if hours["total"] else "unknown", ""))
    for kind in ("asked", "kept") if hours["total"] else ():
        rows.append((f"  {kind}", f"{hours[kind]:,.2f}", _percent(hours[kind], hours["total"])))
    if counts["partly_answered"]:
        rows.append(("clips answered in part", f"{counts['partly_answered']:,}", ""))
    if counts["unknown_durations"]:
        rows.append(("  clips without duration", f"{counts['unknown_durations']:,}", ""))
    rows.append(("rows of the manifest", _rows(counts["rows"]), ""))
    verifier = counts["provenance"]["verifier"]
    rows.append(("verified by", "nothing" if verifier is None else verifier["model"], ""))
    rules = counts["provenance"]
    rows.append(("rules", f"{rules['rules']} ({rules['rules_digest']})", ""))
    return Table(("", "count", "share"), rows)


def _rows(ranges: Sequence[Sequence[int | None]]) -> str:
    text = describe_rows(ranges)
    return text if len(text) <= _LONGEST_RANGES else f"{len(ranges)} ranges"


def _reasons(counts: Mapping[str, Any]) -> Table:
    """A candidate has one first reason, and may have several."""
    total = counts["candidates"].get("total", 0)
    rows = [
        (reason, f"{counts['first_reasons'].get(reason, 0):,}", f"{count:,}", _percent(count, total))
        for reason, count in sorted(counts["all_reasons"].items(), key=lambda item: (-item[1], item[0]))[
            :_MOST_ROWS
        ]
    ]
    return Table(("reason", "first", "any", "any, share"), rows)


def _shares(name: str, counts: Mapping[str, int]) -> Table:
    total = sum(counts.values())
    return Table(
        (name, "count", "share"),
        [(key, f"{count:,}", _percent(count, total)) for key, count in counts.items()],
    )


def _per_clip(counts: Mapping[str, Any]) -> Table:
    candidates, captions = counts["candidates_per_clip"], counts["captions_per_clip"]
    numbers = sorted({int(number) for number in (*candidates, *captions)})
    rows = [
        (str(number), f"{candidates.get(str(number), 0):,}", f"{captions.get(str(number), 0):,}")
        for number in numbers[:_MOST_ROWS]
    ]
    return Table(("number", "clips, candidates", "clips, captions kept"), rows)


def _lengths(histogram: Mapping[str, Mapping[str, int]], width: int) -> Table:
    """A histogram with at most about twenty rows: bins are joined, and lengths from 1,024 on share one."""
    bins = {
        kind: {int(number): count for number, count in values.items()} for kind, values in histogram.items()
    }
    usual = [number for number in bins["all"] if number * width < _LONG]
    step = max(1, -(-(max(usual, default=0) + 1) // 16))
    last = max(usual, default=0) // step
    joined = {
        kind: [sum(c for n, c in values.items() if min(n // step, last + 1) == i) for i in range(last + 2)]
        for kind, values in bins.items()
    }
    largest = max(1, *joined["kept"])
    rows = []
    for i, (every, kept) in enumerate(zip(joined["all"], joined["kept"], strict=True)):
        low, high = i * step * width, (i + 1) * step * width - 1
        if every or kept:
            name = f"{max(low, _LONG):,} and more" if i > last else f"{low:,} - {high:,}"
            rows.append((name, f"{every:,}", f"{kept:,}", ("#" * round(kept / largest * _BAR)).ljust(_BAR)))
    return Table(("length", "all", "kept", "kept"), rows)


def _costs(figures: Mapping[str, Any]) -> Table:
    costs = figures["cost"]
    steps = [step for step in (*STEPS, "total") if step in costs and (step != "total" or len(costs) > 2)]
    names = {
        "answered": "requests answered",
        "failed": "failures",
        "damaged": "damaged lines",
        "texts": "texts",
        "truncated": "  cut at the token limit",
        "prompt_tokens": "tokens of prompts",
        "completion_tokens": "tokens of answers",
    }
    if not any(costs[step]["damaged"] for step in steps):
        del names["damaged"]
    rows = [(name, *(f"{costs[step][key]:,}" for step in steps)) for key, name in names.items()]
    if any(costs[step]["price"] for step in steps):
        rows.append(("price", *(f"{costs[step]['price']:,.2f}" for step in steps)))
        hours = _hours_asked(figures)
        if hours:
            rows.append(
                ("  for an hour of audio", *(f"{costs[step]['price'] / hours:,.4f}" for step in steps))
            )
    return Table(("", *steps), rows)


def _hours_asked(figures: Mapping[str, Any]) -> float:
    """Hours that the servers were asked about; 0 if they are not known, because a clip states no duration, or
    because `filter` has not run since other rows were asked for."""
    counts = figures.get("filter")
    if counts is None or counts["unknown_durations"] or _outdated(figures):
        return 0.0
    return float(counts["audio_s"]["asked"]) / 3600


def _outdated(figures: Mapping[str, Any]) -> bool:
    """Whether `generate` was asked for further rows after `filter` ran."""
    return "filter" in figures and "rows" in figures and bool(figures["rows"] != figures["filter"]["rows"])


def _judgement(results: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Means with 95 % intervals, one row for each system and aspect."""
    scores = results.get("scores", {})
    systems = dict(scores.get("systems", {}))
    if "difference" in scores:
        systems["difference"] = scores["difference"]
    rows: list[tuple[str, ...]] = []
    for name, aspects in systems.items():
        rows += [(aspect, name[-16:], *_with_interval(figure)) for aspect, figure in aspects.items()]
    if rows:
        yield (
            f"Judge: scores from 1 to 5, {scores['clips']} clips",
            Table(("aspect", "captions", "mean", "95 %"), rows),
        )
    pairs = results.get("pairs")
    if pairs and pairs["clips"]:
        rows = [(name, *_with_interval(figure)) for name, figure in pairs.items() if name != "clips"]
        yield f"Judge: comparisons in both orders, {pairs['clips']} clips", Table(("", "mean", "95 %"), rows)


def _with_interval(figure: Mapping[str, Any]) -> tuple[str, str]:
    low, high = figure["interval"]
    return f"{figure['mean']:.3f}", f"{low:.3f} to {high:.3f}"


def _percent(count: float, total: float) -> str:
    return f"{100 * count / total:.1f} %" if total else ""


def draw_picture(figures: Mapping[str, Any], path: Path) -> str:
    """Draws reasons, captions per clip and lengths.

    Returns:
        A line that says where the picture is, or why there is none.
    """
    counts = figures.get("filter")
    if not counts:
        return f"{path.name}: not drawn, `filter` has not run"
    try:
        import matplotlib as mpl
    except ImportError:
        return f"{path.name}: not drawn, matplotlib is missing (pip install matplotlib)"
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    reasons = list(counts["all_reasons"])[::-1][-20:]
    for offset, key, label in ((0.2, "first_reasons", "first reason"), (-0.2, "all_reasons", "any reason")):
        values = [counts[key].get(reason, 0) for reason in reasons]
        axes[0, 0].barh([i + offset for i in range(len(reasons))], values, 0.4, label=label)
    axes[0, 0].set_yticks(range(len(reasons)), reasons)
    axes[0, 0].set(title=f"dropped, of {counts['candidates'].get('total', 0):,} candidates")
    numbers = {int(number): count for number, count in counts["captions_per_clip"].items()}
    axes[0, 1].bar(list(numbers), list(numbers.values()), label="clips")
    axes[0, 1].set(title="captions per clip")
    for axis, key, width in (
        (axes[1, 0], "characters", CHARACTERS_A_BIN),
        (axes[1, 1], "words", WORDS_A_BIN),
    ):
        _draw_histogram(axis, counts[key], width)
        axis.set(title=f"length in {key}")
    for axis in axes.flat:
        axis.legend(fontsize="small")
    files.replace_file(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)
    return f"picture: {path}"


def _draw_histogram(axis: Any, histogram: Mapping[str, Mapping[str, int]], width: int) -> None:
    """Bars of all whole answers, and of the captions that were kept. Lengths over 1,024 count as 1,024."""
    for kind, values in histogram.items():
        counts: dict[int, int] = {}
        for number, count in values.items():
            start = min(int(number) * width, _LONG)
            counts[start] = counts.get(start, 0) + count
        axis.bar(list(counts), list(counts.values()), width, align="edge", alpha=0.6, label=kind)
