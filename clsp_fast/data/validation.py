"""Checks a manifest for what training could not read."""

from __future__ import annotations

from pathlib import Path

from clsp_fast.checks import counted
from clsp_fast.config import DataConfig
from clsp_fast.data.audit import audit
from clsp_fast.data.loader import ClipFeatures
from clsp_fast.data.manifest import read_manifest
from clsp_fast.storage import paths


def validate(manifest: Path, *, decode: bool = False) -> int:
    """Checks a manifest and prints the findings.

    A caption that is empty after normalisation or a placeholder is a finding, too. What only looks wrong,
    such as captions that are shifted by a row, is a warning, which does not change the exit code.

    Args:
        manifest: JSONL manifest or lhotse cuts.
        decode: also decode every clip and compute its features, as training will.

    Returns:
        The number of findings; the command's exit code is 1 if there is one.
    """
    content = read_manifest(manifest)
    findings = [f"line {problem.line}: {problem.message}" for problem in content.problems]
    if decode:
        features = ClipFeatures(DataConfig(cache_mb=0))
        for start in range(0, len(content.clips), 64):
            features.read(content.clips[start : start + 64])
        findings += [f"clip {clip_id}: {detail}" for clip_id, detail in features.details.items()]
    else:
        problems = ((clip, paths.problem(clip.audio)) for clip in content.clips)
        findings += [f"clip {clip.id}: {clip.audio} {problem}" for clip, problem in problems if problem]
    captions = audit(content.clips)
    print(content.describe())
    for line in (*findings, *captions.findings, *(f"warning: {text}" for text in captions.warnings)):
        print(line)
    count = len(findings) + captions.count
    warned = f", {counted(len(captions.warnings), 'warning')}" if captions.warnings else ""
    print(f"{counted(count, 'finding')}{warned}")
    return count
