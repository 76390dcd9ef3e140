"""One function for each library and task of the frontend cases, from the inputs to the timed call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import soundfile
import torch

from bench.frontend_inputs import RATE_HZ, Recording, Recordings, Waveform
from bench.measure import Call
from clsp_fast import audio, features

# Features of one clip.


def clsp(wave: np.ndarray) -> Call:
    return lambda: features.extract(wave, num_threads=1).values[0]


def reference(wave: np.ndarray) -> Call:
    return lambda: features.reference(wave)


def lhotse_fbank() -> Any:
    from lhotse import Fbank, FbankConfig

    return Fbank(FbankConfig(num_mel_bins=features.NUM_MEL_BINS))


def lhotse(wave: np.ndarray) -> Call:
    extractor = lhotse_fbank()
    return lambda: extractor.extract(wave, RATE_HZ)


def asrfront(wave: np.ndarray) -> Call:
    from asrfront import sensevoice

    return lambda: sensevoice.fbank_raw(wave, n_mels=features.NUM_MEL_BINS)


def torchaudio(wave: np.ndarray) -> Call:
    from torchaudio.compliance import kaldi

    tensor = torch.from_numpy(wave)[None]
    settings = {
        "num_mel_bins": features.NUM_MEL_BINS,
        "high_freq": -400.0,
        "snip_edges": False,
        "dither": 0.0,
    }
    return lambda: kaldi.fbank(tensor, sample_frequency=RATE_HZ, **settings)


def kaldi_native_fbank(wave: np.ndarray) -> Call:
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.samp_freq = RATE_HZ
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = 120
    options.mel_opts.high_freq = -400.0

    def call() -> np.ndarray:
        fbank = knf.OnlineFbank(options)
        fbank.accept_waveform(RATE_HZ, wave)
        fbank.input_finished()
        return np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])

    return call


def librosa(wave: np.ndarray) -> Call:
    import librosa

    settings = {"n_fft": 512, "hop_length": 160, "win_length": 400, "n_mels": 128, "fmin": 20, "fmax": 7600}

    def call() -> np.ndarray:
        power = librosa.feature.melspectrogram(y=wave, sr=RATE_HZ, htk=True, norm=None, **settings)
        return np.log(np.maximum(power, 1.1920929e-07)).T

    return call


def transformers(wave: np.ndarray) -> Call:
    from transformers import audio_utils

    mel = audio_utils.mel_filter_bank(
        257, 128, 20, 7600, RATE_HZ, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    window = audio_utils.window_function(400, "povey", periodic=False)
    settings = {"preemphasis": 0.97, "remove_dc_offset": True, "mel_floor": 1.1920929e-07, "log_mel": "log"}

    def call() -> np.ndarray:
        return audio_utils.spectrogram(
            wave, window, 400, 160, fft_length=512, power=2.0, center=False, mel_filters=mel, **settings
        ).T

    return call


# A batch.


def clsp_batch(waves: list[np.ndarray], threads: int) -> Call:
    return lambda: features.extract(waves, num_threads=threads).values


def lhotse_batch(waves: list[np.ndarray]) -> Call:
    extractor = lhotse_fbank()
    tensors = [torch.from_numpy(wave) for wave in waves]
    return lambda: extractor.extract_batch(tensors, RATE_HZ)


def asrfront_batch(waves: list[np.ndarray], threads: int) -> Call:
    from asrfront import sensevoice

    return lambda: sensevoice.fbank_batch(waves, n_mels=128, lfr_m=1, lfr_n=1, n_threads=threads)[0]


def torchaudio_batch(waves: list[np.ndarray]) -> Call:
    calls = [torchaudio(wave) for wave in waves]
    return lambda: torch.nn.utils.rnn.pad_sequence([call() for call in calls], batch_first=True)


# Decoding, at the rate of the file.


def clsp_decode(file: Recording) -> Call:
    return lambda: audio.load(file.path, sample_rate=file.rate_hz)


def soundfile_decode(file: Recording) -> Call:
    return lambda: soundfile.read(file.path, dtype="float32")[0]


def asrfront_decode(file: Recording) -> Call:
    import asrfront

    return lambda: asrfront.load(file.path)


def librosa_decode(file: Recording) -> Call:
    import librosa

    return lambda: librosa.load(file.path, sr=None)[0]


# Resampling.


def clsp_resample(waveform: Waveform) -> Call:
    return lambda: audio.resample(waveform.samples, from_hz=waveform.rate_hz, to_hz=RATE_HZ)


def lhotse_resampler(rate_hz: int) -> Callable[[np.ndarray], np.ndarray]:
    from lhotse.augmentation import get_or_create_resampler

    resampler = get_or_create_resampler(rate_hz, RATE_HZ)
    return lambda samples: resampler(torch.from_numpy(samples)).numpy()


def lhotse_resample(waveform: Waveform) -> Call:
    resampler = lhotse_resampler(waveform.rate_hz)
    return lambda: resampler(waveform.samples)


def torchaudio_resample(waveform: Waveform) -> Call:
    from torchaudio.transforms import Resample

    resampler = Resample(waveform.rate_hz, RATE_HZ)
    return lambda: resampler(torch.from_numpy(waveform.samples)).numpy()


def soxr_resample(waveform: Waveform) -> Call:
    import soxr

    return lambda: soxr.resample(waveform.samples, waveform.rate_hz, RATE_HZ, quality="HQ")


def librosa_resample(waveform: Waveform) -> Call:
    import librosa

    return lambda: librosa.resample(waveform.samples, orig_sr=waveform.rate_hz, target_sr=RATE_HZ)


# From a file to features.


def clsp_file(file: Recording) -> Call:
    return lambda: features.extract_files([file.path], num_threads=1).values[0]


def recipe_file(file: Recording) -> Call:
    extractor = lhotse_fbank()
    resampler = lhotse_resampler(file.rate_hz) if file.rate_hz != RATE_HZ else lambda samples: samples

    def call() -> np.ndarray:
        samples, _ = soundfile.read(file.path, dtype="float32")
        return extractor.extract(resampler(samples), RATE_HZ)

    return call


def asrfront_file(file: Recording) -> Call:
    import asrfront
    from asrfront import sensevoice

    return lambda: sensevoice.fbank_raw(asrfront.load(file.path), n_mels=128)


# A batch of a lhotse recipe: cuts to a padded batch of features.


def lhotse_cuts(files: Recordings) -> Any:
    from lhotse import CutSet, MonoCut, Recording

    opened = (Recording.from_file(path) for path in files.paths)
    return CutSet.from_cuts(MonoCut(r.id, 0.0, r.duration, 0, recording=r) for r in opened)


def clsp_on_the_fly(files: Recordings) -> Call:
    from lhotse.dataset import OnTheFlyFeatures

    from clsp_fast.lhotse import ClspFbank

    cuts, strategy = lhotse_cuts(files), OnTheFlyFeatures(ClspFbank())
    return lambda: strategy(cuts)[0]


def lhotse_on_the_fly(files: Recordings) -> Call:
    from lhotse.dataset import OnTheFlyFeatures

    cuts, strategy = lhotse_cuts(files), OnTheFlyFeatures(lhotse_fbank())
    return lambda: strategy(cuts)[0]


def clsp_files(files: Recordings) -> Call:
    config = features.FbankConfig(tail="zero")
    return lambda: features.extract_files(files.paths, config=config, num_threads=1).values
