"""Cuts of lhotse: a JSON line with a MonoCut or MultiCut -> a clip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clsp_fast.data.captions import Captions
from clsp_fast.data.clips import Clip, captions_of, channel_of, id_of, is_path, seconds_of
from clsp_fast.storage import paths
from clsp_fast.storage.textfile import shown

_MODEL_RATE_HZ = 16_000


def clip_of_cut(row: Mapping[str, Any], folder: Path, default_id: str, need_captions: bool) -> Clip:
    """The clip of a cut. Its captions are in the "custom" of the first supervision; if not, the text of that
    supervision is the caption. ValueError says what is wrong with the cut."""
    kind = row.get("type", "MonoCut")
    if kind not in ("MonoCut", "MultiCut"):
        raise ValueError(
            f"a lhotse {shown(kind)} has no single recording; save the cuts as MonoCuts (cuts.trim_to_...)"
        )
    recording = row.get("recording") or {}
    name, channel = _file_of_channel(recording.get("sources") or [{}], row.get("channel"))
    supervisions = row.get("supervisions") or [{}]
    _refuse_transforms(recording.get("transforms") or [])
    custom = dict(supervisions[0].get("custom") or {})
    captions = captions_of(custom)
    text = supervisions[0].get("text")
    # If a cut has captions, its text is a transcript: it says what was spoken, not how.
    if not any(captions) and isinstance(text, str) and text.strip():
        captions = Captions((), (text.strip(),))
    if need_captions and not any(captions):
        raise ValueError("no captions in supervisions[0].custom or supervisions[0].text")
    name = paths.from_text(name) if isinstance(name, str) else name
    if not is_path(name):
        raise ValueError(f"recording.sources[0].source must be a path, got {shown(name)}")
    source = folder / name
    start, duration = seconds_of(row, "start", 0.0), seconds_of(row, "duration", None)
    total = recording.get("duration")
    # lhotse computes the duration of a resampled recording from its manifest, not from the file. It may be
    # wrong, so a cut of the whole recording is read to the end of the file.
    if recording.get("transforms") and start == 0 and _is_as_long(duration, total):
        duration = None
    tags = {key: str(supervisions[0][key]) for key in ("speaker", "gender") if supervisions[0].get(key)}
    tags |= {key: value for key, value in custom.items() if isinstance(value, str)}
    return Clip(
        id=id_of(row.get("id"), default_id),
        audio=str(source) if paths.exists(source) else name,
        start_s=start,
        duration_s=duration,
        channel=channel,
        captions=captions,
        tags=tags,
    )


def _is_as_long(duration: float | None, total: object) -> bool:
    """Whether a cut is as long as its recording, up to rounding."""
    return duration is not None and isinstance(total, (int, float)) and abs(duration - total) < 1e-3


def _refuse_transforms(transforms: Any) -> None:
    """ValueError unless each transform is a lossless Resample. It needs no work: reading resamples anyway."""
    fix = "write the audio out first (CutSet.save_audios)"
    for transform in transforms if isinstance(transforms, list) else [transforms]:
        name = transform.get("name") if isinstance(transform, Mapping) else None
        if not isinstance(transform, Mapping) or name != "Resample":
            raise ValueError(f"recording.transforms may contain only Resample, got {shown(name)}: {fix}")
        kwargs = transform.get("kwargs")
        rates = kwargs if isinstance(kwargs, Mapping) else {}
        target_hz, source_hz = (rates.get(f"{key}_sampling_rate") for key in ("target", "source"))
        # Resampling to a lower rate removes high frequencies, which the file still has.
        least_hz = min(_MODEL_RATE_HZ, source_hz) if isinstance(source_hz, int) else _MODEL_RATE_HZ
        if isinstance(target_hz, int) and target_hz < least_hz:
            raise ValueError(
                f"recording.transforms: Resample to {shown(target_hz)} Hz, below {least_hz}, is lossy: {fix}"
            )


def _file_of_channel(sources: list[Mapping[str, Any]], channel: object) -> tuple[Any, int | None]:
    """The file that has the cut's channel, and the channel's index in this file (None: all its channels).

    lhotse numbers the channels of a recording, and these may be spread over several files. A MultiCut has a
    list of channels.
    """
    wanted = tuple(channel) if isinstance(channel, list) else (channel_of(channel),)
    channels_by_file = [tuple(source.get("channels") or (0,)) for source in sources]
    for source, channels in zip(sources, channels_by_file, strict=True):
        whole = wanted == channels or (wanted == (None,) and len(sources) == 1)
        if whole or (len(wanted) == 1 and wanted[0] in channels):
            if source.get("type") != "file":
                raise ValueError(f'recording.sources must be of type "file", got {shown(source.get("type"))}')
            return source["source"], None if whole else channels.index(wanted[0])
    held = shown([*map(list, channels_by_file)])
    raise ValueError(
        f'"channel" is {shown(channel)}, and the files of recording.sources hold {held}: '
        "a clip must be one channel, or all channels of one file (MultiCut.to_mono splits a cut)"
    )
