"""The report: figures, tables of 80 columns, Markdown, the picture, and what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from caption_jobs import CLIP, failure, good, make_verdicts, make_work

from clsp_fast import caption
from clsp_fast.captioning.answers import ANSWERS, custom_id
from clsp_fast.captioning.filter import COUNTS, FilterConfig, filter
from clsp_fast.captioning.report import ReportConfig, Table, report
from clsp_fast.console import INCOMPLETE


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Three clips with verdicts: 7 candidates of which 3 are kept, and a failed request."""
    texts = {
        0: [good("Ann", 140), good("Bea", 240), "short"],
        1: ["no speakers", good("Cid", 700), good("Dan", 2000)],
        2: [good("Eve")],
    }
    clips = [CLIP | {"id": f"c{i}", "duration_s": 1800.0, "global_captions": ["short"]} for i in range(4)]
    work = make_work(tmp_path, clips, texts)
    with (work / "generate" / ANSWERS).open("a") as file:
        file.write(json.dumps(failure(custom_id("generate", 3, "c3"))) + "\n")
    make_verdicts(work, {(0, 0): [], (0, 1): [], (1, 1): [], (2, 0): ["absence", "background"]})
    assert filter(FilterConfig(work=work)) == INCOMPLETE
    return work


def run(work: Path, *options: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as done:
        caption.main(["report", str(work), *options])
    assert done.value.code == 0
    figures: dict[str, Any] = json.loads((work / "report.json").read_text())
    return figures


def row_of(text: str, name: str) -> list[str]:
    """The cells of the first line that begins with the name."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name + " ")][:1]
    return line.strip().removeprefix(name).split()


def test_the_table_holds_the_counts_and_fits_80_columns(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = run(work)
    shown = capsys.readouterr().out
    tables = shown[: shown.index("picture: ")]
    assert max(map(len, tables.splitlines())) <= 80
    assert row_of(shown, "clips") == ["4"]
    assert row_of(shown, "candidates") == ["7"]
    assert row_of(shown, "short") == ["2", "2", "28.6", "%"]
    assert row_of(shown, "speakers") == ["0", "1", "14.3", "%"]
    assert row_of(shown, "verifier: background") == ["1", "1", "14.3", "%"]
    assert row_of(shown, "verifier: absence") == ["0", "1", "14.3", "%"]
    assert row_of(shown, "hours of audio") == ["2.00"]
    assert row_of(shown, "rows of the manifest") == ["all"]
    assert row_of(shown, "verified by") == ["verify-model"]
    assert row_of(shown, "requests answered") == ["3", "4", "7"]
    assert row_of(shown, "failures") == ["1", "0", "1"]
    assert row_of(shown, "tokens of prompts") == ["300", "400", "700"]
    assert figures["filter"] == json.loads((work / COUNTS).read_text())
    assert figures["model"] == {"generate": "generate-model", "verify": "verify-model"}


def test_histograms_hold_every_caption(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(work)
    shown = capsys.readouterr().out
    for unit in ("characters", "words"):
        part = shown[shown.index(f"Length in {unit}") :].split("\n\n")[0].splitlines()[2:]
        cells = [line[26:].split() for line in part]
        assert sum(int(row[0]) for row in cells) == 7
        assert sum(int(row[1]) for row in cells) == 3
    assert row_of(shown, "1,024 and more")[:2] == ["1", "0"]


def test_prices_become_money(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(work, "--price-prompt", "2", "--price-completion", "10000")
    assert round(figures["cost"]["generate"]["price"], 6) == 0.3006
    assert round(figures["cost"]["total"]["price"], 6) == 0.7014
    shown = capsys.readouterr().out
    assert row_of(shown, "price") == ["0.30", "0.40", "0.70"]
    assert row_of(shown, "for an hour of audio")[-1] == "0.3507"


def test_the_cost_of_a_shard_is_divided_by_its_hours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [CLIP | {"id": f"c{i}", "duration_s": 1800.0} for i in range(100)]
    prices = ("--price-prompt", "10000")
    options: dict[str, Any] = {"max_clip_s": 1800.0}
    work = make_work(tmp_path, clips, {8: [good("Ann")]}, asked=(8, 10), **options)
    assert filter(FilterConfig(work=work)) == INCOMPLETE
    run(work, *prices)
    shown = capsys.readouterr().out
    assert row_of(shown, "hours of audio") == ["1.00"]
    assert row_of(shown, "rows of the manifest") == ["8:10"]
    assert row_of(shown, "for an hour of audio") == ["1.0000"]
    # A second shard: as long as `filter` has not counted it, the hours do not fit the tokens.
    make_work(tmp_path, clips, {8: [good("Ann")], 50: [good("Ann")]}, asked=(50, 52), **options)
    run(work, *prices)
    shown = capsys.readouterr().out
    assert "asked for the rows 8:10, 50:52, but `filter` counted 8:10: run `filter` again" in shown
    assert "for an hour of audio" not in shown
    assert filter(FilterConfig(work=work)) == INCOMPLETE
    run(work, *prices)
    shown = capsys.readouterr().out
    assert row_of(shown, "for an hour of audio") == ["1.0000"]
    assert "run `filter` again" not in shown


def test_hours_without_durations_are_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = make_work(tmp_path, [{"id": "b", "audio": "b.wav"}], {0: [good("Ann")]})
    assert filter(FilterConfig(work=work)) == 0
    run(work)
    assert row_of(capsys.readouterr().out, "hours of audio") == ["unknown"]


def test_hours_are_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [CLIP, {"id": "b", "audio": "b.wav"}]
    work = make_work(tmp_path, clips, {row: [good("Ann")] for row in (0, 1)})
    assert filter(FilterConfig(work=work)) == 0
    run(work, "--price-prompt", "1")
    shown = capsys.readouterr().out
    assert row_of(shown, "clips without duration") == ["1"]
    assert "for an hour of audio" not in shown


def test_markdown_and_picture_are_written(work: Path) -> None:
    run(work)
    text = (work / "report.md").read_text()
    assert text.startswith(
        "# Captions of work\n\n## Clips and candidates\n\n|  | count | share |\n| --- | ---: |"
    )
    assert "| short | 2 | 2 | 28.6 % |" in text
    assert (work / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_report_says_so(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(work)
    assert "report.png: not drawn, matplotlib is missing (pip install matplotlib)" in capsys.readouterr().out


def test_before_filter_only_the_cost_is_reported(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / COUNTS).unlink()
    figures = run(work)
    shown = capsys.readouterr().out
    assert "filter" not in figures
    assert row_of(shown, "requests answered") == ["3", "4", "7"]
    assert "`filter` has not run" in shown
    assert "report.png: not drawn" in shown


def test_figures_of_the_judge_are_shown(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = {"mean": 4.25, "interval": [4.0, 4.5]}
    aspects = dict.fromkeys(("correctness", "coverage", "naturalness", "mean"), figure)
    results = {
        "scores": {
            "clips": 12,
            "systems": {"captions.jsonl": aspects, "other.jsonl": aspects},
            "difference": aspects,
        },
        "pairs": {"clips": 9, "better": figure, "tie": figure},
    }
    (work / "judge").mkdir()
    (work / "judge" / "judge.json").write_text(json.dumps(results))
    run(work)
    shown = capsys.readouterr().out
    assert "Judge: scores from 1 to 5, 12 clips" in shown
    assert row_of(shown, "coverage") == ["captions.jsonl", "4.250", "4.000", "to", "4.500"]
    assert row_of(shown, "better") == ["4.250", "4.000", "to", "4.500"]
    assert max(map(len, shown[: shown.index("picture: ")].splitlines())) <= 80


def test_damaged_lines_are_counted_and_left_out(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = work / "generate" / ANSWERS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"custom_id": "3\n\xff\n' + b"".join(lines[1:]) + b'{"custom_id": "9')
    run(work)
    shown = capsys.readouterr().out
    assert row_of(shown, "requests answered") == ["3", "4", "7"]
    assert row_of(shown, "damaged lines") == ["2", "0", "2"]
    path.write_bytes(b"".join(lines))
    run(work)
    assert "damaged lines" not in capsys.readouterr().out


def test_an_empty_folder_and_a_damaged_file_are_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds nothing to report on; run `generate` first"):
        caption.main(["report", str(tmp_path / "none")])
    earlier = json.dumps({"clips": {"total": 3}})
    for text, fault in (("{", "Expecting"), ("[]", "one JSON object"), (earlier, '"candidates" must be in')):
        (work / COUNTS).write_text(text)
        with pytest.raises(ValueError, match=rf"filter\.json is damaged: .*{fault}"):
            report(ReportConfig(work=work))
    with pytest.raises(ValueError, match="price_prompt must be a number >= 0"):
        ReportConfig(work=work, price_prompt=-1.0)


def test_names_that_are_long_or_hold_a_bar_do_not_break_tables() -> None:
    table = Table(("a", "b"), [("x" * 60, "1"), ("p|q", "2")])
    assert max(map(len, table.text().splitlines())) <= 80
    assert table.markdown().splitlines()[3] == "| p&#124;q | 2 |"
