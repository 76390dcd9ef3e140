"""Labels of measured values: bands, changes, quantiles of a corpus, and what is left open."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest

from clsp_fast.captioning import labels as labelling
from clsp_fast.captioning.labels import FIXED, CorpusValues, labels, speech_problem
from clsp_fast.captioning.measure import Measurement, measure


@functools.cache
def noise_measured() -> Measurement:
    return measure([np.random.default_rng(0).standard_normal(8_000).astype(np.float32) * 0.01])[0]


def counted(syllables: int) -> dict[str, Any]:
    """The fields of a part in which each syllable has a voiced nucleus."""
    return {"nuclei": syllables, "voiced_nuclei": syllables}


def measured(**whole: Any) -> Measurement:
    """A man's clear voice of 4 s, with the given values; `halves` and `thirds` list values of the parts."""
    noise = noise_measured()
    parts = {name: whole.pop(name, None) for name in ("halves", "thirds")}
    other = {name: whole.pop(name) for name in ("formants_hz", "snr_db") if name in whole}
    normal: dict[str, Any] = {
        "start_s": 0.0,
        "duration_s": 4.0,
        "level_db": -27.0,
        "voiced": 0.9,
        "f0_hz": 118.0,
        "f0_sd": 1.6,
        "nuclei": 16,
        "voiced_nuclei": 16,
        "pauses": 1,
        "pause_s": 0.25,
        "hnr_db": 14.0,
        "creak": 0.05,
    }
    normal["clear_voice"] = whole.get("voiced", normal["voiced"])
    part = dataclasses.replace(noise.whole, **normal | whole)

    def split(name: str, count: int) -> tuple[Any, ...]:
        small = {"duration_s": part.duration_s / count, "pause_s": 0.0} | counted(part.nuclei // count)
        given = parts[name] or [{}] * count
        return tuple(dataclasses.replace(part, **small | values) for values in given)

    return dataclasses.replace(
        noise,
        **{"duration_s": part.duration_s, "formants_hz": (500.0, 1500.0, 2500.0, 3500.0), "snr_db": 30.0}
        | other,
        whole=part,
        halves=split("halves", 2),
        thirds=split("thirds", 3),
    )


def test_a_plain_voice_has_neutral_labels() -> None:
    assert labels(measured()) == {
        "sex": "male",
        "pitch": "medium",
        "speed": "medium",
        "liveliness": "normal",
        "loudness": "normal",
        "quality": "normal",
    }


@pytest.mark.parametrize(
    ("values", "attribute", "label"),
    [
        ({"f0_hz": 90.0}, "pitch", "low"),
        ({"f0_hz": 105.0}, "pitch", None),  # between two bands
        ({"f0_hz": 290.0}, "pitch", "high"),
        ({"f0_hz": 290.0}, "sex", "female"),
        (counted(10), "speed", "slow"),
        (counted(24), "speed", "fast"),
        ({"duration_s": 0.7}, "speed", None),
        ({"duration_s": 0.7}, "liveliness", None),
        (counted(2), "speed", None),
        # slow because of the pauses, but the words themselves are not
        (counted(12) | {"pauses": 2, "pause_s": 1.4}, "speed", None),
        ({"f0_sd": 0.4}, "liveliness", "monotone"),
        ({"f0_sd": 4.5}, "liveliness", "lively"),
        ({"f0_sd": math.nan}, "liveliness", None),
        ({"level_db": -40.0}, "loudness", "quiet"),
        ({"level_db": -15.0}, "loudness", "loud"),
        ({"pauses": 0, "pause_s": 0.0}, "pauses", "continuous"),
        ({"pauses": 0, "pause_s": 0.0, "duration_s": 2.0}, "pauses", None),
        ({"pauses": 2, "pause_s": 1.4}, "pauses", "long"),
        ({"pauses": 3, "pause_s": 0.8}, "pauses", None),
    ],
)
def test_values_have_labels(values: dict[str, Any], attribute: str, label: str | None) -> None:
    assert labels(measured(**values)).get(attribute) == label


def test_without_a_sex_the_pitch_is_named_only_if_it_is_the_same_for_both() -> None:
    between = labels(measured(f0_hz=172.0, formants_hz=(500.0, 1500.0, 2750.0, 3800.0)))
    assert not {"sex", "pitch"} & set(between)
    known = {"sex": ""}  # given, but captions have no word for it
    assert "sex" not in labels(measured(), known=known)
    assert labels(measured(f0_hz=290.0), known=known)["pitch"] == "high"
    assert labels(measured(f0_hz=90.0), known=known)["pitch"] == "low"
    assert "pitch" not in labels(measured(f0_hz=150.0), known=known)


def test_known_labels_replace_measured_ones() -> None:
    tags = labels(measured(), known={"sex": "female", "speed": "fast", "loudness": ""})
    assert (tags["sex"], tags["speed"]) == ("female", "fast")
    assert tags["pitch"] == "low"  # 118 Hz is low for a woman
    assert "loudness" not in tags
    whispered = labels(measured(), known={"quality": "whisper"})
    assert not {"pitch", "liveliness", "sex"} & set(whispered)


def test_whispered_and_creaky_voices_have_neither_pitch_nor_sex() -> None:
    whisper = labels(measured(**counted(18), voiced=0.02, f0_hz=math.nan, f0_sd=math.nan, hnr_db=math.nan))
    assert whisper == {"speed": "medium", "loudness": "normal", "quality": "whisper"}
    creaky = labels(measured(creak=0.8, voiced=0.3, f0_hz=70.0, hnr_db=3.0))
    assert creaky == {"loudness": "normal", "quality": "creaky"}


def test_speed_is_named_only_where_syllables_are_no_pulses() -> None:
    clear, creaky = {"voiced": 0.9, "clear_voice": 0.9}, {"creak": 0.8}
    fast: dict[str, Any] = counted(24)
    unknown = {"voiced": 0.4, "clear_voice": 0.08}
    clips = [
        measured(**fast, halves=[clear, creaky]),
        measured(**fast, halves=[creaky, clear]),
        measured(**fast, **unknown),
    ]
    for clip in clips:
        assert "speed" not in labels(clip)
        assert labels(clip, known={"quality": "whisper"})["speed"] == "fast"
    assert labels(clips[0], known={"speed": "slow"})["speed"] == "slow"
    corpus = CorpusValues()
    for clip in clips * 40:
        corpus.add(clip, {})
    assert corpus.bands().speed == FIXED.speed


def test_unvoiced_nuclei_are_syllables_only_in_a_whisper() -> None:
    voiced: dict[str, Any] = {"nuclei": 24, "voiced_nuclei": 16}
    assert labels(measured(**voiced))["speed"] == "medium"
    whisper = {"nuclei": 18, "voiced_nuclei": 0, "voiced": 0.0, "clear_voice": 0.0}
    assert labels(measured(**whisper))["speed"] == "medium"
    hoarse = measured(nuclei=18, voiced_nuclei=8, clear_voice=0.3)
    assert labels(hoarse)["speed"] == "slow"
    assert labels(hoarse, known={"quality": "whisper"})["speed"] == "medium"
    halves: list[dict[str, Any]] = [whisper | {"nuclei": 9}, counted(8) | {"clear_voice": 0.9}]
    changing = measured(nuclei=17, voiced_nuclei=8, halves=halves)
    assert labels(changing)["quality"] == "whisper>normal"
    assert labels(changing)["speed"] == "medium"


def test_a_half_that_is_nearly_silent_is_not_slow() -> None:
    few = [counted(2) | {"pause_s": 1.0}, counted(12)]
    assert "speed" not in labels(measured(halves=few))
    assert "speed" not in labels(measured(halves=[counted(0) | {"pause_s": 2.0}, counted(12)]))


def test_a_hoarse_voice_is_no_whisper() -> None:
    assert "quality" not in labels(measured(voiced=0.4, clear_voice=0.08))
    assert "quality" not in labels(measured(voiced=0.2, clear_voice=0.15))
    assert labels(measured(voiced=0.2, clear_voice=0.05))["quality"] == "whisper"


@pytest.mark.parametrize(
    ("values", "attribute", "label"),
    [
        ({"thirds": [{"f0_hz": 95.0}, {}, {"f0_hz": 150.0}]}, "pitch", "low>high"),
        ({"thirds": [{"f0_hz": 150.0}, {}, {"f0_hz": 95.0}]}, "pitch", "high>low"),
        ({"thirds": [{"f0_hz": 95.0}, {"f0_hz": 150.0}, {"f0_hz": 95.0}]}, "pitch", "low>high>low"),
        # a fall within the melody of a lively voice, and one that stays within high pitch
        ({"thirds": [{"f0_hz": hz, "f0_sd": 3.0} for hz in (150.0, 118.0, 95.0)]}, "pitch", "medium"),
        ({"f0_hz": 150.0, "thirds": [{"f0_hz": hz} for hz in (160.0, 145.0, 119.0)]}, "pitch", None),
        ({"thirds": [{"level_db": -38.0}, {}, {"level_db": -20.0}]}, "loudness", "quiet>loud"),
        (
            {"thirds": [{"level_db": -20.0}, {"level_db": -36.0}, {"level_db": -21.0}]},
            "loudness",
            "loud>quiet>loud",
        ),
        ({"thirds": [{"level_db": -25.0}, {}, {"level_db": -30.0}]}, "loudness", "normal"),
        ({"halves": [5, 12]}, "speed", "slow>fast"),
        ({"halves": [12, 5]}, "speed", "fast>slow"),
        ({"halves": [9, 8]}, "speed", "medium"),
        ({"halves": [10, 6]}, "speed", "fast>slow"),
        ({"halves": [7, 4]}, "speed", None),  # different, but not clearly
    ],
)
def test_changes_are_named(values: dict[str, Any], attribute: str, label: str | None) -> None:
    if "halves" in values:
        values = {"halves": [counted(count) for count in values["halves"]]}
    else:
        first, *_, last = values["thirds"]
        values = values | {"halves": [first, last]}
    tags = labels(measured(**values))
    assert tags.get(attribute) == label
    assert ">" not in tags.get("pitch", "") or "liveliness" not in tags
    brief = labels(measured(**values | {"duration_s": 1.2}))
    assert ">" not in brief.get(attribute, "")


def test_a_change_of_quality_is_named() -> None:
    clear = {"voiced": 0.9, "clear_voice": 0.9}
    whisper = {"voiced": 0.0, "clear_voice": 0.0, "hnr_db": math.nan}
    assert labels(measured(halves=[clear, whisper]))["quality"] == "normal>whisper"
    assert labels(measured(halves=[{"creak": 0.8}, clear]))["quality"] == "creaky>normal"


def corpus_values(f0_hz: np.ndarray, known: dict[str, str], **values: np.ndarray) -> CorpusValues:
    corpus = CorpusValues()
    for i, hz in enumerate(f0_hz):
        corpus.add(measured(f0_hz=float(hz), **{name: float(v[i]) for name, v in values.items()}), known)
    return corpus


def test_bands_of_a_corpus_are_its_quantiles() -> None:
    rates = np.linspace(3.0, 6.0, 100)
    bands = corpus_values(np.linspace(80, 180, 100), {"sex": "male"}, duration_s=16 / rates).bands()
    shares = [sum(labelling.label(rate, bands.speed) == name for rate in rates) for name in bands.speed]
    assert shares == pytest.approx([30, 20, 30], abs=1)
    low, medium, high = bands.pitch["male"].values()
    assert low[1] == pytest.approx(110, abs=1)
    assert medium == pytest.approx((120, 140), abs=1)
    assert high[0] == pytest.approx(150, abs=1)
    assert bands.pitch["female"] == FIXED.pitch["female"]  # no woman speaks


def test_bands_of_a_uniform_corpus_keep_audible_gaps() -> None:
    hz = np.linspace(119.0, 121.0, 60)
    bands = corpus_values(hz, {}, level_db=np.linspace(-45.5, -44.5, 60)).bands()
    assert {labelling.label(value, bands.pitch["male"]) for value in hz} <= {"medium", ""}
    assert bands.loudness["quiet"][1] == pytest.approx(-48)
    assert bands.loudness["loud"][0] == pytest.approx(-42)


def test_words_relative_to_a_corpus_never_mean_their_opposite() -> None:
    bands = corpus_values(np.linspace(150, 160, 60), {"sex": "male"}, f0_sd=np.linspace(4, 9, 60)).bands()
    assert bands.pitch["male"]["low"][1] <= FIXED.pitch["male"]["medium"][1]
    assert bands.liveliness["monotone"][1] <= FIXED.liveliness["normal"][1]


def test_few_clips_have_the_fixed_bands() -> None:
    assert corpus_values(np.linspace(80, 180, 20), {}).bands() == FIXED


def test_recordings_without_speech_are_recognised() -> None:
    rng = np.random.default_rng(0)
    t = np.arange(32_000) / 16_000
    waveforms = {
        "silent": np.zeros(32_000),
        "short": np.concatenate([np.zeros(16_000), 0.1 * rng.standard_normal(3200), np.zeros(16_000)]),
        "no_speech": 0.1 * rng.standard_normal(32_000),
    }
    assert {name: speech_problem(measure([x.astype(np.float32)])[0]) for name, x in waveforms.items()} == {
        name: name for name in waveforms
    }
    tone = (0.1 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    assert speech_problem(measure([tone])[0]) == "no_speech"
    assert not speech_problem(measured())


def test_sparse_speech_is_speech() -> None:
    sparse = {"duration_s": 40.0, "pauses": 5, "pause_s": 34.0} | counted(18)
    assert not speech_problem(measured(**sparse))
    assert not speech_problem(measured(**sparse, snr_db=5.0))
    clicks = {"duration_s": 10.0, "pauses": 2, "pause_s": 9.7} | counted(3)
    assert speech_problem(measured(**clicks)) == "short"
