"""The lhotse extractor inside lhotse: values, datasets, workers, mixing, manifests."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numerics import assert_agrees
from torch.utils.data import DataLoader

from clsp_fast import _C, features

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lhotse
    from lhotse import CutSet, Fbank, FeatureSet, MonoCut, Recording, SupervisionSegment
    from lhotse.dataset import CutMix, K2SpeechRecognitionDataset, OnTheFlyFeatures, SimpleCutSampler
    from lhotse.features.base import FeatureExtractor

    from clsp_fast.lhotse import ClspFbank, ClspFbankConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of lhotse, its imports and torch
SAMPLES = (24000, 16001, 24079, 5000)


def voice(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time_s = np.arange(samples) / 16000
    tones = sum(np.sin(2 * np.pi * 110 * k * time_s + seed) / k for k in range(1, 40))
    wave = 0.1 * np.sin(7 * time_s) ** 2 * tones + 0.003 * rng.standard_normal(samples)
    return wave.astype(np.float32)


def lhotse_fbank() -> Any:
    return Fbank(lhotse.FbankConfig(num_mel_bins=128))


@pytest.fixture
def cuts(tmp_path: Path) -> Any:
    """A CutSet of generated recordings of different lengths, each with its transcript."""
    cuts_of_recordings = []
    for i, samples in enumerate(SAMPLES):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, voice(samples, i), 16000, subtype="FLOAT")
        recording = Recording.from_file(path)
        text = SupervisionSegment(f"s{i}", recording.id, 0.0, recording.duration, text=f"text {i}")
        cut = MonoCut(f"c{i}", 0.0, recording.duration, 0, recording=recording, supervisions=[text])
        cuts_of_recordings.append(cut)
    return CutSet.from_cuts(cuts_of_recordings)


def assert_same(result: Any, expected: Any) -> None:
    """Compares two float32 implementations. test_features.py compares ClspFbank with float64."""
    assert type(result) is type(expected)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    energies = [np.exp(np.asarray(x, np.float64)) for x in (result, expected)]
    difference = np.abs(energies[0] - energies[1]) / energies[1].max(axis=-1, keepdims=True)
    # Twice the bound of ENERGY_ROUNDING in test_features.py, because both sides round.
    assert difference.max() < 2 * (2 * (9 + 10) + 16 / 2) * np.finfo(np.float32).eps


@pytest.mark.parametrize("shape", [(-1,), (1, -1)])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_clip_has_the_values_and_the_type_of_lhotses_fbank(shape: tuple[int, ...], kind: Any) -> None:
    wave = kind(voice(12345).reshape(shape))
    assert_same(ClspFbank().extract(wave, 16000), lhotse_fbank().extract(wave, 16000))


def as_list(kind: Any) -> list[Any]:
    return [kind(voice(samples, i)) for i, samples in enumerate(SAMPLES)]


BATCHES = {
    "list of numpy": as_list(np.asarray),
    "list of torch": as_list(torch.from_numpy),
    "list of (1, samples)": [clip[None] for clip in as_list(torch.from_numpy)],
    "list of equal lengths": [voice(8000, i) for i in range(3)],
    "list of one": [voice(8000)],
    "matrix": np.stack([voice(8000, i) for i in range(3)]),
    "tensor": torch.from_numpy(np.stack([voice(8000, i) for i in range(3)])),
    "tensor with channels": torch.from_numpy(np.stack([voice(8000, i) for i in range(3)]))[:, None],
    "one row": torch.from_numpy(voice(8000))[None],
    "one clip": voice(8000),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_has_the_values_and_the_form_of_lhotses_fbank(name: str) -> None:
    result, expected = (x.extract_batch(BATCHES[name], 16000) for x in (ClspFbank(), lhotse_fbank()))
    if isinstance(expected, list):
        assert isinstance(result, list)
        for a, b in zip(result, expected, strict=True):
            assert_same(a, b)
    else:
        assert_same(result, expected)


@pytest.mark.parametrize("padded", [24079, 30000])
def test_a_padded_batch_with_lengths_has_the_values_of_lhotses_fbank(padded: int) -> None:
    batch = torch.zeros(len(SAMPLES), padded)
    for row, clip in zip(batch, as_list(torch.from_numpy), strict=True):
        row[: len(clip)] = clip
    lengths = torch.tensor(SAMPLES)
    result, expected = (x.extract_batch(batch, 16000, lengths=lengths) for x in (ClspFbank(), lhotse_fbank()))
    for a, b in zip(result, expected, strict=True):
        assert_same(a, b)


def test_reflection_makes_clips_independent_of_their_batch() -> None:
    extractor = ClspFbank(ClspFbankConfig(tail="reflect"))
    clips = as_list(torch.from_numpy)
    together = extractor.extract_batch(clips, 16000)
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    with_lengths = extractor.extract_batch(padded, 16000, lengths=SAMPLES)
    for clip, a, b in zip(clips, together, with_lengths, strict=True):
        assert torch.equal(a, extractor.extract(clip, 16000))
        assert np.array_equal(a, b)
    zeros = ClspFbank().extract_batch(clips, 16000)
    assert not torch.equal(zeros[3][-1], together[3][-1])


def test_a_batch_is_one_call_of_the_engine_and_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(features, "_C", Recorded(calls))
    rows = ClspFbank().extract_batch([clip[None] for clip in as_list(torch.from_numpy)], 16000)
    assert len(calls) == 1
    assert {row.untyped_storage().data_ptr() for row in rows} == {rows[0].untyped_storage().data_ptr()}


def test_a_batch_copies_no_waveform(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(features, "_C", Recorded(calls))
    clips = [torch.from_numpy(voice(4000, i))[None] for i in range(3)]
    ClspFbank().extract_batch(clips, 16000)
    assert [wave.ctypes.data for wave in calls[0]] == [clip.data_ptr() for clip in clips]


class Recorded:
    """The extension; it records the arguments of `fbank_batch`."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(_C, name)

    def fbank_batch(self, waveforms: Any, *arguments: Any, **settings: Any) -> None:
        self.calls.append(waveforms)
        _C.fbank_batch(waveforms, *arguments, **settings)


@pytest.mark.parametrize("batched", [True, False])
def test_on_the_fly_features_are_those_of_the_recipe(cuts: Any, batched: bool) -> None:
    result, expected = (
        OnTheFlyFeatures(extractor, use_batch_extract=batched)(cuts)
        for extractor in (ClspFbank(), lhotse_fbank())
    )
    assert_same(result[0], expected[0])
    assert torch.equal(result[1], expected[1])
    assert result[0][3, -1, 0].item() == pytest.approx(features.PADDING_VALUE)


def test_a_training_dataset_works_with_cut_mix_and_workers(cuts: Any) -> None:
    def batches(extractor: Any) -> list[dict[str, Any]]:
        dataset = K2SpeechRecognitionDataset(
            cut_transforms=[CutMix(cuts, p=1.0, snr=(10, 20), seed=0)],
            input_strategy=OnTheFlyFeatures(extractor),
        )
        sampler = SimpleCutSampler(cuts, max_cuts=2, shuffle=False)
        return list(DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=2))

    result, expected = batches(ClspFbank()), batches(lhotse_fbank())
    assert len(result) == 2
    for a, b in zip(result, expected, strict=True):
        assert a["supervisions"]["text"] == b["supervisions"]["text"]
        assert_same(a["inputs"], b["inputs"])


def stored(cuts: Any, extractor: Any, folder: Path) -> Any:
    return cuts.compute_and_store_features(extractor, folder, storage_type=lhotse.NumpyFilesWriter)


def test_stored_features_are_read_and_mixed_like_lhotses(cuts: Any, tmp_path: Path) -> None:
    result, expected = (
        stored(cuts, extractor, tmp_path / name)
        for name, extractor in (("clsp_fast", ClspFbank()), ("lhotse", lhotse_fbank()))
    )
    result.to_file(tmp_path / "cuts.jsonl.gz")
    result = CutSet.from_file(tmp_path / "cuts.jsonl.gz").to_eager()
    assert {cut.features.type for cut in result} == {"clsp-fbank"}
    for a, b in zip(result, expected, strict=True):
        assert_same(a.load_features(), b.load_features())
    mixed, expected_mixed = (x[0].mix(x[1], offset_other_by=0.25, snr=5) for x in (result, expected))
    assert_same(mixed.load_features(), expected_mixed.load_features())


@pytest.mark.parametrize("collate", [True, False])
def test_features_are_stored_in_batches_like_lhotses(cuts: Any, tmp_path: Path, collate: bool) -> None:
    def store(extractor: Any, name: str) -> Any:
        settings = {"batch_duration": 60.0, "num_workers": 0, "collate": collate}
        return cuts.compute_and_store_features_batch(
            extractor, tmp_path / name, storage_type=lhotse.NumpyFilesWriter, **settings
        )

    for a, b in zip(store(ClspFbank(), "clsp_fast"), store(lhotse_fbank(), "lhotse"), strict=True):
        assert_same(a.load_features(), b.load_features())


def test_a_feature_set_survives_its_file(cuts: Any, tmp_path: Path) -> None:
    manifest = FeatureSet.from_features(cut.features for cut in stored(cuts, ClspFbank(), tmp_path / "f"))
    manifest.to_file(tmp_path / "features.jsonl.gz")
    loaded = FeatureSet.from_file(tmp_path / "features.jsonl.gz").to_eager()
    assert list(loaded) == list(manifest)
    for cut, row in zip(cuts, loaded, strict=True):
        assert np.array_equal(row.load(), ClspFbank().extract(cut.load_audio(), 16000))


def test_the_configuration_survives_yaml(tmp_path: Path) -> None:
    extractor = ClspFbank(ClspFbankConfig(tail="reflect", num_threads=2))
    extractor.to_yaml(tmp_path / "extractor.yaml")
    loaded = FeatureExtractor.from_yaml(tmp_path / "extractor.yaml")
    assert type(loaded) is ClspFbank
    assert loaded.config == extractor.config
    assert (loaded.frame_shift, loaded.feature_dim(16000)) == (0.01, 128)


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"num_filters": 80}, "128"), ({"sampling_rate": 8000}, "16000"), ({"tail": "none"}, "reflect")],
)
def test_another_configuration_is_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ClspFbankConfig(**settings)


def test_another_rate_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"resample\(16000\)"):
        ClspFbank().extract(voice(8000), 8000)
    with pytest.raises(ValueError, match=r"resample\(16000\)"):
        ClspFbank().extract_batch([voice(8000)], 22050)


def test_two_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one channel.*\(2, 8000\)"):
        ClspFbank().extract(np.zeros((2, 8000), np.float32), 16000)


def test_an_empty_batch_is_an_empty_list() -> None:
    assert ClspFbank().extract_batch([], 16000) == []


def test_lengths_of_a_list_are_refused() -> None:
    with pytest.raises(TypeError, match="padded torch batch"):
        ClspFbank().extract_batch([voice(8000)], 16000, lengths=[8000])


def test_mixing_scaling_and_energy_follow_lhotses() -> None:
    a, b = (ClspFbank().extract(voice(8000, i), 16000) for i in range(2))
    assert ClspFbank.mix(a, b, 0.1).dtype == np.float32
    assert_agrees(ClspFbank.mix(a, b, 0.1), Fbank.mix(a, b, 0.1), count=8, dtype=np.float32)
    assert_agrees(ClspFbank.scale(a, 0.1), Fbank.scale(a, 0.1), count=8, dtype=np.float32)
    # A sum of 6,400 exponentials of up to 16.
    count = 16 + 6400**0.5
    assert_agrees(ClspFbank.compute_energy(a), Fbank.compute_energy(a), count=count, dtype=np.float32)
    silence = np.full_like(a, -1000)
    assert np.allclose(ClspFbank.mix(silence, silence, 1.0), features.PADDING_VALUE)


def test_without_lhotse_the_extra_is_named() -> None:
    code = "import sys; sys.modules['lhotse'] = None; import clsp_fast.lhotse"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "pip install 'clsp_fast[lhotse]'" in run.stderr
