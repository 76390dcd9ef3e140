"""Embedding many recordings: independence of the batch, windows of long recordings, errors by recording."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from numerics import assert_as_exact, in_float64
from torch import Tensor

from clsp_fast import batches, features
from clsp_fast.audio import DEFAULT_LIMITS, AudioError, AudioErrorReason, Segment
from clsp_fast.config import Batching, DataConfig, EncodeConfig
from clsp_fast.model import CLSP


@pytest.fixture(scope="module")
def exact(tiny: CLSP) -> CLSP:
    """`tiny` in float64."""
    return in_float64(tiny)  # type: ignore[no-any-return]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    envelope = 0.1 + 0.1 * np.sin(np.arange(int(seconds * 16000)) / (700 + 100 * seed))
    return (envelope * rng.standard_normal(int(seconds * 16000))).astype(np.float32)


@pytest.mark.slow
def test_one_utterance_one_embedding_alone_or_in_any_batch(tiny: CLSP, exact: CLSP) -> None:
    rng = np.random.default_rng(0)
    clips = [noise(float(seconds), i) for i, seconds in enumerate(rng.uniform(0.1, 3.0, 16))]
    for long_audio in ("whole", "window"):
        alone, truth = (
            torch.cat([model.encode_audio([c], long_audio=long_audio, window_s=1.0) for c in clips])
            for model in (tiny, exact)
        )
        for _ in range(100):
            chosen = rng.permutation(len(clips))[: rng.integers(2, 9)]
            together = tiny.encode_audio(
                [clips[i] for i in chosen],
                batch_seconds=float(rng.uniform(0.5, 12)),
                long_audio=long_audio,
                window_s=1.0,
            )
            rows = torch.from_numpy(chosen)
            assert_as_exact(together, alone[rows], truth[rows])


def mean_of_windows(model: CLSP, parts: list[Tensor]) -> Tensor:
    """The definition: embeddings of a clip's windows, weighted by their frames."""
    with torch.no_grad():
        rows = torch.cat([model.encode_features(x[None], torch.tensor([len(x)])) for x in parts])
    return F.normalize(rows.T @ torch.tensor([float(len(x)) for x in parts], dtype=rows.dtype), dim=0)


def test_a_long_clip_is_the_weighted_mean_of_its_windows(tiny: CLSP, exact: CLSP) -> None:
    clip = noise(2.6)
    embedded = tiny.encode_audio([clip, noise(0.5)], long_audio="window", window_s=1.0)[0]
    frames = features.extract(clip).values[0]
    parts = [frames[:100], frames[100:200], frames[200:260]]
    truth = mean_of_windows(exact, parts)
    assert_as_exact(embedded, mean_of_windows(tiny, parts), truth)
    assert float((tiny.encode_audio([clip])[0] - embedded).abs().max()) > 1e-3  # windows make a difference


def test_a_rest_too_short_for_a_window_joins_the_window_before_it(tiny: CLSP, exact: CLSP) -> None:
    clip = noise(2.05)
    embedded = tiny.encode_audio([clip], long_audio="window", window_s=1.0)[0]
    frames = features.extract(clip).values[0]
    parts = [frames[:100], frames[100:]]
    assert_as_exact(embedded, mean_of_windows(tiny, parts), mean_of_windows(exact, parts))


def test_a_long_clip_can_be_refused(tiny: CLSP) -> None:
    assert tiny.encode_audio([noise(1.0)], long_audio="error", window_s=1.0).shape == (1, 128)
    with pytest.raises(AudioError, match=r"audio\[1\]: is 1\.1 s long, over 1 s") as error:
        tiny.encode_audio([noise(1.0), noise(1.1)], long_audio="error", window_s=1.0)
    assert error.value.reason == AudioErrorReason.TOO_LONG


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"long_audio": "windows"}, "long_audio must be"),
        ({"window_s": 0.5}, "window_s must be at least 1 second, got 0.5"),
        ({"window_s": float("nan")}, "window_s must be"),
        ({"batch_seconds": 0}, "batch_seconds must be positive, got 0"),
    ],
)
def test_wrong_options_are_named(tiny: CLSP, option: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.encode_audio([noise(1.0)], **option)  # type: ignore[arg-type]


def test_errors_are_kept_by_recording(tiny: CLSP, exact: CLSP, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1.5), 16000)
    soundfile.write(tmp_path / "short.wav", noise(0.05), 16000)
    (tmp_path / "text.wav").write_text("no audio")
    names = ["short.wav", "a.wav", "missing.wav", "text.wav", "a.wav"]
    sources = [tmp_path / name for name in names[:4]] + [Segment(tmp_path / "a.wav", start_s=0.5)]
    errors: dict[int, AudioError] = {}
    embedded = tiny.encode_audio(sources, errors=errors, long_audio="error", window_s=1.2)
    reasons = {i: str(error.reason) for i, error in sorted(errors.items())}
    assert reasons == {0: "too_short", 1: "too_long", 2: "open", 3: "format"}
    for i, error in errors.items():
        assert error.path.endswith(names[i])
    assert embedded[:4].isnan().all()
    alone, truth = (model.encode_audio([sources[4]])[0] for model in (tiny, exact))
    assert_as_exact(embedded[4], alone, truth)
    waves = [noise(1.0), noise(1.0)[:79], np.full(16000, np.nan, np.float32)]
    errors.clear()
    embedded = tiny.encode_audio(waves, errors=errors)
    assert {i: str(error.reason) for i, error in errors.items()} == {1: "too_short", 2: "non_finite"}
    alone, truth = (model.encode_audio(waves[:1])[0] for model in (tiny, exact))
    assert_as_exact(embedded[0], alone, truth)
    assert tiny.encode_audio([tmp_path / "missing.wav"], errors={}).shape == (1, 128)


def test_progress_counts_recordings_not_windows(tiny: CLSP, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    clips = [noise(2.5), noise(0.5), noise(0.3)]
    tiny.encode_audio(clips, long_audio="window", window_s=1, batch_seconds=1, progress=seen.append)
    assert sum(seen) == 3
    assert capsys.readouterr().err == ""


def test_compressed_files_count_by_their_decoded_size(tmp_path: Path) -> None:
    for suffix in (".wav", ".WAV", ".flac", ".opus", ".mp3"):
        (tmp_path / f"a{suffix}").write_bytes(bytes(1000))
    names = ["a.wav", "a.WAV", "a.flac", "a.opus", "a.mp3"]
    blocks = list(batches._blocks([tmp_path / name for name in names], 32_000))
    assert blocks == [[3, 4], [0, 1, 2]]


def test_blocks_of_recordings_come_in_order_of_size(
    tiny: CLSP, exact: CLSP, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [noise(0.2 + 0.1 * i, i) for i in range(9)]
    together, truth = tiny.encode_audio(clips), exact.encode_audio(clips)
    sizes: list[int] = []
    extract = features.extract
    monkeypatch.setattr(features, "extract", lambda x, **kw: (sizes.append(len(x)), extract(x, **kw))[1])
    blocks = batches._blocks
    monkeypatch.setattr(batches, "_blocks", lambda items: blocks(items, 60_000))
    assert_as_exact(tiny.encode_audio(clips), together, truth)
    assert len(sizes) > 3
    assert sum(sizes) == 9


def test_waveforms_out_of_scale_are_refused_as_by_load(tiny: CLSP) -> None:
    good = noise(0.5)
    for loud in (good * 32768, (good * 32768).astype(np.float64), torch.from_numpy(good * 32768)):
        with pytest.raises(AudioError, match="rescale it") as caught:
            tiny.encode_audio([good, loud])
        assert caught.value.reason.value == "amplitude"
        errors: dict[int, AudioError] = {}
        embeddings = tiny.encode_audio([loud, good], errors=errors)
        assert list(errors) == [0]
        assert errors[0].reason.value == "amplitude"
        assert embeddings[0].isnan().all()
        assert torch.allclose(embeddings[1], tiny.encode_audio([good])[0], atol=1e-5)
        with pytest.raises(AudioError) as caught:
            tiny.encode_audio([Segment(loud)])
        assert caught.value.reason.value == "amplitude"


def test_each_setting_has_one_default() -> None:
    defaults = dataclasses.asdict(Batching())
    keywords = inspect.signature(CLSP.encode_audio).parameters
    assert {name: keywords[name].default for name in defaults} == defaults
    assert EncodeConfig().batching == defaults | {"long_audio": "window"}
    assert DataConfig().slack_seconds == DEFAULT_LIMITS.slack_s == defaults["slack_seconds"]
