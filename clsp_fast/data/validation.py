"""Checks a manifest for what training could not read."""

from __future__ import annotations

from pathlib import Path

from clsp_fast.config import DataConfig
from clsp_fast.data.loader import ClipFeatures
from clsp_fast.data.manifest import read_manifest
from clsp_fast.storage import paths


def validate(manifest: Path, *, decode: bool = False) -> int:
    """Checks a manifest and prints the findings.

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
    print(content.describe())
    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings")
    return len(findings)
