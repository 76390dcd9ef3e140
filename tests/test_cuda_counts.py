"""Training, embedding, retrieval and the loss on a fake card: what the host waits for, launches and bytes.

The counts are compared with tests/golden/cuda_counts.json. They may fall, but not rise. After a change that
is worth more launches, `python tests/fake_cuda.py write` writes the new counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import NOT_COMPILED

import clsp_fast

TESTS = Path(__file__).parent
GOLDEN: dict[str, Any] = json.loads((TESTS / "golden/cuda_counts.json").read_text())
CASES: dict[str, dict[str, dict[str, int]]] = GOLDEN["cases"]
KINDS = ("syncs", "event_waits", "blocking", "mismatches")
WAITS = {"loss*": 0, "ranks*": 1, "topk 10 of*": 1, "search 3 shards": 3}
"""Cases -> how often they may wait for the card, with any version of torch."""
IS_COUNTED_TORCH = torch.__version__.partition("+")[0] == GOLDEN["torch"]
"""Whether the counts were made with the installed version. Those of others may differ."""
Parts = dict[str, dict[str, Any]]
"""Part of a case -> its figures."""
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the fake card is for Linux"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="the fake card needs a CPU build of torch"),
]


# Each group of cases is measured by one child process.
GROUPS = {
    "base": ["step base"],
    "tiny": ["step tiny*", "logged*"],
    "embedding and retrieval": ["encode*", "classify*", "ranks*", "topk*", "search*"],
    "loss": ["loss*"],
}


def measure(patterns: list[str]) -> dict[str, Parts]:
    """Case -> part -> figures, from a child process: the fake card changes torch for good."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(clsp_fast.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "fake_cuda.py"), *patterns]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == NOT_COMPILED and not IS_COUNTED_TORCH:
        pytest.skip(f"the fake card does not compile with torch {torch.__version__}: {done.stderr[:1000]}")
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Parts] = json.loads(done.stdout)
    return results


def lines(parts: Parts, *kinds: str) -> list[str]:
    """The lines of some kinds in all parts of a case, each with its part and how often it ran."""
    return [
        f"{part}: {line} ({count} times)"
        for part, figures in parts.items()
        for kind in kinds
        for line, count in figures[kind].items()
    ]


def faults(case: str, parts: Parts) -> list[str]:
    """What no case may do, whatever the version of torch."""
    faults = lines(parts, "mismatches")
    if "step" in case:
        towers = {name: x for name, x in parts.items() if name.startswith(("forward", "backward"))}
        assert towers
        faults += lines(parts, "blocking") + lines(towers, "syncs")
    if case.startswith("step"):
        # ScaledAdam processes the norms of the gradients on the host. No other step waits for the card.
        faults += waits_beyond(int("ScaledAdam" in case), parts)
    if case.startswith(("encode", "classify")):
        faults += lines(parts, "blocking", "syncs")
    for pattern, limit in WAITS.items():
        if fnmatch(case, pattern):
            faults += waits_beyond(limit, parts)
    return faults


def waits_beyond(limit: int, parts: Parts) -> list[str]:
    """The lines of synchronisations, if they run more than `limit` times altogether."""
    total = sum(count for figures in parts.values() for count in figures["syncs"].values())
    return lines(parts, "syncs") if total > limit else []


def rises(case: str, parts: Parts) -> list[str]:
    """The counts that are larger than the committed ones."""
    rises = [f"{case}: {part} is new" for part in parts.keys() - CASES[case].keys()]
    for part in parts.keys() & CASES[case].keys():
        for name, limit in CASES[case][part].items():
            value = parts[part][name]
            count = sum(value.values()) if isinstance(value, dict) else value
            if count > limit:
                detail = f": {value}" if isinstance(value, dict) else ""
                rises.append(f"{case}, {part}: {name} {count}, not at most {limit}{detail}")
    return rises


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_waits_for_the_card_and_no_count_rises(group: str) -> None:
    measured = measure(GROUPS[group])
    assert not [fault for case, parts in measured.items() for fault in faults(case, parts)]
    expected = {case for case in CASES if any(fnmatch(case, pattern) for pattern in GROUPS[group])}
    assert measured.keys() == expected
    if IS_COUNTED_TORCH:
        risen = [rise for case, parts in measured.items() for rise in rises(case, parts)]
        assert not risen, "if the rise is intended, run `python tests/fake_cuda.py write`"


def test_every_committed_case_is_measured() -> None:
    patterns = [pattern for group in GROUPS.values() for pattern in group]
    assert not [case for case in CASES if not any(fnmatch(case, pattern) for pattern in patterns)]


def test_counts_that_rise_and_waits_are_reported() -> None:
    """The comparison itself must be able to fail."""
    case, parts = (
        "step tiny",
        {"forward, 1 captions a clip": dict(CASES["step tiny"]["forward, 1 captions a clip"])},
    )
    figures: dict[str, Any] = parts["forward, 1 captions a clip"]
    figures |= {kind: {} for kind in KINDS}
    assert rises(case, parts) == faults(case, parts) == []
    figures |= {"launches": figures["launches"] + 1, "syncs": {"clsp_fast/model.py:1: item": 2}}
    assert len(rises(case, parts)) == 2
    assert faults(case, parts) == ["forward, 1 captions a clip: clsp_fast/model.py:1: item (2 times)"] * 2


# The statement in fake_cuda.py with a mistake -> its part, and what the counter says of it.
MISTAKES = {
    "x.sum().item()": ("item", "syncs", "item"),
    "x.cpu()": ("read", "syncs", "copy to the host"),
    "x.nonzero()": ("nonzero", "syncs", "nonzero"),
    "host.to(CARD, non_blocking=True)": ("pageable copy", "blocking", "memory is not page-locked"),
    "host.pin_memory().to(CARD)": ("blocking copy", "blocking", "a copy that is not non_blocking"),
    "x[rows]": ("index", "blocking", "an index of shape (2,) on the CPU"),
    "narrow.to(CARD, non_blocking=True)": ("gaps", "blocking", "memory has gaps"),
    "locked.to(CARD, torch.bfloat16, non_blocking=True)": ("dtype", "blocking", "a copy to another dtype"),
    "torch.cuda.current_stream().synchronize()": ("stream", "syncs", "synchronize"),
    "torch.cuda.synchronize()": ("device", "syncs", "synchronize"),
    "torch.cuda.Event().synchronize()": ("event", "event_waits", "event"),
    "x + host": ("mismatch", "mismatches", "a CPU tensor of shape (4, 512)"),
}


def test_mistakes_are_found_with_their_line() -> None:
    source = [line.strip() for line in (TESTS / "fake_cuda.py").read_text().splitlines()]
    measured = measure(["mistakes"])["mistakes"]
    for statement, (part, kind, message) in MISTAKES.items():
        (line,) = measured[part][kind]
        assert line.startswith(f"tests/fake_cuda.py:{source.index(statement) + 1} ")
        assert message in line
        assert len(lines({part: measured[part]}, *KINDS)) == 1
    assert not lines({"library": measured["library"]}, *KINDS)
    figures = measured["faultless"]
    assert not lines({"faultless": figures}, *KINDS)
    # The copy to the card, the sum, and the copy back. Each tensor has 4 x 512 values of 4 bytes.
    assert figures["copied"] == 2 * 8192
    assert figures["launches"] == 2
    assert figures["bytes"] == 5 * 8192


def test_a_wait_that_one_line_repeats_is_a_fault() -> None:
    waits = {"update": {"syncs": {"clsp_fast/training/scaled_adam.py:1: copy to the host": 1}}}
    for case, limit in (("step tiny, ScaledAdam", 1), ("topk 10 of 1M", 1), ("search 3 shards", 3)):
        parts = {"update": {kind: {} for kind in KINDS}, "forward": {kind: {} for kind in KINDS}}
        parts["backward"] = parts["forward"]
        parts["update"]["syncs"] = dict.fromkeys(waits["update"]["syncs"], limit)
        assert faults(case, parts) == []
        parts["update"]["syncs"] = dict.fromkeys(waits["update"]["syncs"], limit + 1)
        assert len(faults(case, parts)) == 1
    parts["update"]["syncs"] = waits["update"]["syncs"]
    assert len(faults("loss softmax 8k", parts)) == 1


def test_a_fake_card_that_does_not_compile_is_an_error_only_with_the_counted_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other versions of torch may have other internal headers."""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "IS_COUNTED_TORCH", False)
    with pytest.raises(pytest.skip.Exception, match=r"does not compile with torch [\s\S]*no such header"):
        measure(["mistakes"])
    monkeypatch.setattr(module, "IS_COUNTED_TORCH", True)
    with pytest.raises(AssertionError, match="no such header"):
        measure(["mistakes"])
