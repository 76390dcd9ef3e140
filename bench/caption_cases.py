"""The offline captioner: measuring recordings of speech.

The goal is at least 500 times real time a core. A call of `measure-1-thread` measures 80 s of audio, so it
should take at most 160 ms.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from bench.frontend_inputs import RATE_HZ, speech
from bench.measure import Call, Case, Provider, relative
from bench.voice_accuracy import measure_with_praat
from clsp_fast.captioning.measure import Measurement, measure, measure_reference

SECONDS = 5
CLIPS = 16
FRAMES = 100 * SECONDS
# One frame: two real FFTs of 512 points, 252 autocorrelation lags from 227 bins, 11 lags from 166 bins, a
# filter of 63 taps for 80 samples at 8 kHz, and about 30 steps of Laguerre's method (24 operations for each
# of at most 10 coefficients). The search for the path and the quantiles are not counted.
FRAME_FLOPS = 2 * 2.5 * 512 * 9 + 2 * 252 * 227 + 2 * 11 * 166 + 2 * 63 * 80 + 30 * 10 * 24


def table(measurements: list[Measurement]) -> np.ndarray:
    """(clips, values): F0 comes first."""
    return np.array(
        [
            (
                m.whole.f0_hz,
                m.whole.level_db,
                m.whole.nuclei,
                m.whole.voiced,
                m.whole.f0_sd,
                *m.formants_hz,
            )
            for m in measurements
        ]
    )


def same_f0(expected: Any, result: Any) -> tuple[bool, str]:
    """For another definition: the median of F0 of each clip is within 5 %."""
    worst = float(np.max(np.abs(np.asarray(result)[:, 0] / expected[:, 0] - 1)))
    return worst <= 0.05, f"F0 within {worst:.1%} (at most 5 %), other definition"


def clsp(clips: list[np.ndarray], threads: int) -> Call:
    return lambda: table(measure(clips, num_threads=threads))


def numpy_reference(clips: list[np.ndarray]) -> Call:
    return lambda: table([measure_reference(clip) for clip in clips])


def praat(clips: list[np.ndarray]) -> Call:
    import parselmouth  # noqa: F401  (missing: the provider is left out)

    return lambda: np.array([[measure_with_praat(clip)["f0_hz"]] for clip in clips])


def measure_case(threads: int, **settings: Any) -> Case:
    one_thread = Provider("clsp_fast, 1 thread", partial(clsp, threads=1))
    peers = (
        Provider("praat-parselmouth", praat, "praat-parselmouth", same_f0, "pitch, HNR, formants, intensity"),
        Provider("reference (numpy)", numpy_reference),
    )
    return Case(
        name=f"measure-{threads}-thread{'s' * (threads > 1)}",
        area="captioning",
        what=f"everything that the captioner measures, of {CLIPS} clips of {SECONDS} s",
        inputs=lambda: [speech(SECONDS, seed=i) for i in range(CLIPS)],
        expected=lambda clips: table([measure_reference(clip) for clip in clips]),
        gate=relative(1e-3),
        providers=(
            Provider("clsp_fast", partial(clsp, threads=threads)),
            *((one_thread,) if threads > 1 else peers),
        ),
        amount=CLIPS * SECONDS,
        unit="audio seconds",
        flops=CLIPS * FRAMES * FRAME_FLOPS,
        bytes=4 * CLIPS * RATE_HZ * SECONDS,
        threads=threads,
        **settings,
    )


CASES = (
    measure_case(1, goals={"praat-parselmouth": 10.0}),
    measure_case(2, goals={"clsp_fast, 1 thread": 1.8}),
)
