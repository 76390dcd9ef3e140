"""The progress line of long jobs."""

from __future__ import annotations

import pytest

from clsp_fast.log import Progress


def test_in_a_file_it_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5, "recordings")
    for _ in range(4):
        progress.add(1)
    progress.add(1, 1)
    progress.add(0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("5 of 5 recordings, ")
    assert lines[-1].endswith(", 1 failed")
    assert len(lines) == 1 or "left" in lines[0]
    assert all("\r" not in line for line in lines)


def test_on_a_terminal_it_stays_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress(2, "recordings")
    progress.add(1)
    progress.add(1)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.endswith("\n")
    assert "\r2 of 2 recordings" in told


def test_without_a_total_and_when_silent(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(None, "lines").add(3)
    assert capsys.readouterr().err.startswith("3 lines, ")
    Progress(3, "lines", active=False).add(3)
    assert capsys.readouterr().err == ""
