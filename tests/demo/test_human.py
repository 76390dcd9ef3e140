"""Human speech for training: fetching the packages, reading them, and the corpus made of them."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import soundfile

from clsp_fast.data.manifest import read_manifest
from clsp_fast.demo import engines, human, recordings
from clsp_fast.demo.human import HumanConfig
from clsp_fast.demo.recordings import PACKAGES, FetchError
from clsp_fast.demo.signal import SAMPLE_RATE_HZ, resample
from clsp_fast.storage import files

GAME = "usr/share/games/fillets-ng/sound"
STAMPS = "usr/share/tuxpaint/stamps/animals"
# package -> (path of a recording, sex of the voice)
CONTENT: dict[str, list[tuple[str, str]]] = {
    "fillets-ng-data-cs": [
        *((f"{GAME}/city/cs/vit-m-{word}.ogg", "female") for word in ("jdi", "pockej", "hlava")),
        *((f"{GAME}/city/cs/vit-v-{word}.ogg", "male") for word in ("jdi", "pockej", "hlava")),
        (f"{GAME}/city/cs/hs-a.ogg", "male"),
    ],
    "fillets-ng-data-nl": [
        *((f"{GAME}/keys/nl/v-{word}.ogg", "male") for word in ("noa", "wat", "ga")),
        (f"{GAME}/keys/en/m-b.ogg", "female"),
    ],
    "festvox-ru": [("usr/share/festival/voices/russian/x/wav/ru_0001.wav", "male")],
    "tuxpaint-stamps-default": [
        (f"{STAMPS}/cat_desc.ogg", "female"),
        (f"{STAMPS}/cat_desc_be.ogg", "female"),
        (f"{STAMPS}/cat_desc_es.ogg", "female"),
        (f"{STAMPS}/cat_desc_bg.ogg", "male"),
        (f"{STAMPS}/cat.ogg", "male"),  # the sound of the cat
    ],
}


def speech(sex: str, seed: int) -> np.ndarray:
    voice = engines.Synth().voices(sex, "test")[0]
    manner = engines.Manner(
        f0_hz={"female": 250.0, "male": 105.0}[sex], syllables_per_s=4.0, liveliness="normal"
    )
    return engines.Synth().speak("we should go home now.", voice, manner, np.random.default_rng(seed))


def encoded(x: np.ndarray, suffix: str) -> bytes:
    file = io.BytesIO()
    rate = 22_050  # of the real packages, none has 16 kHz
    soundfile.write(file, resample(x, rate / SAMPLE_RATE_HZ), rate, format=suffix.upper())
    return file.getvalue()


def archive(contents: dict[str, bytes], compression: str = "xz") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{compression}") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def deb(members: dict[str, bytes]) -> bytes:
    """An ar archive, which a .deb is."""
    raw = b"!<arch>\n"
    for name, content in members.items():
        raw += f"{name:16s}{0:<12d}{0:<6d}{0:<6d}{'100644':8s}{len(content):<10d}`\n".encode()
        raw += content + b"\n" * (len(content) % 2)
    return raw


@pytest.fixture(scope="module")
def contents() -> dict[str, dict[str, bytes]]:
    """package -> path -> content of the file."""
    voices = {sex: [speech(sex, seed) for seed in range(3)] for sex in ("female", "male")}
    return {
        package: {
            path: encoded(voices[sex][i % 3], path.rpartition(".")[2]) for i, (path, sex) in enumerate(paths)
        }
        for package, paths in CONTENT.items()
    }


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory, contents: dict[str, dict[str, bytes]]) -> Path:
    """A folder with the four packages."""
    folder = tmp_path_factory.mktemp("packages")
    for name, parts in contents.items():
        members = {"debian-binary": b"2.0\n", "control.tar.xz": archive({}), "data.tar.xz": archive(parts)}
        (folder / f"{name}_1.0_all.deb").write_bytes(deb(members))
    return folder


@pytest.fixture
def apt_get(tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A false apt-get on the PATH, which "downloads" from the folder `packages`. Returns its file."""
    command = tmp_path / "bin" / "apt-get"
    command.parent.mkdir()
    script(command, f'[ "$1" = download ] && cp {packages}/"$2"_*.deb . && echo "$2" >> {tmp_path}/fetched')
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    return command


def script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_packages_are_fetched_once(tmp_path: Path, apt_get: Path) -> None:
    said: list[str] = []
    paths = recordings.fetch(tmp_path / "kept", say=said.append)
    assert [path.name.partition("_")[0] for path in paths] == [*PACKAGES]
    assert all(
        package.licence in line and str(package.megabytes) in line
        for package, line in zip(PACKAGES.values(), said[:4], strict=True)
    )
    assert f"--data.recordings {tmp_path / 'kept'}" in said[4]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted(p.name for p in paths)
    assert recordings.fetch(tmp_path / "kept", say=said.append) == paths
    assert len(said) == 5
    assert (tmp_path / "fetched").read_text().split() == [*PACKAGES]


def test_a_truncated_package_is_fetched_again(tmp_path: Path, apt_get: Path) -> None:
    kept = tmp_path / "kept"
    paths = recordings.fetch(kept, say=lambda line: None)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-100])
    assert recordings.fetch(kept, say=lambda line: None) == paths
    assert paths[1].read_bytes() == whole


def test_two_runs_share_a_folder(tmp_path: Path, apt_get: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a run looks at a damaged package, another run replaces it. The file is there all the time."""
    kept = tmp_path / "kept"
    paths = recordings.fetch(kept, say=lambda line: None)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-100])
    script(apt_get, f'[ -e {kept}/"$2"_*.deb ] && {apt_get.read_text().splitlines()[1]}')
    seek_data = recordings._seek_data
    other_runs: list[Any] = []

    def check(file: IO[bytes], path: Path) -> str:
        try:
            return seek_data(file, path)
        except FetchError:
            if not other_runs:
                other_runs.append(None)
                other_runs[0] = recordings.fetch(kept, say=lambda line: None)
                assert paths[1].read_bytes() == whole
            raise

    monkeypatch.setattr(recordings, "_seek_data", check)
    assert recordings.fetch(kept, say=lambda line: None) == paths == other_runs[0]
    assert paths[1].read_bytes() == whole
    assert sorted(kept.iterdir()) == sorted(paths)


def test_a_damaged_package_of_another_version_is_replaced(tmp_path: Path, apt_get: Path) -> None:
    paths = recordings.fetch(tmp_path / "kept", say=lambda line: None)
    older = paths[0].with_name(f"{next(iter(PACKAGES))}_0.9_all.deb")
    older.write_bytes(paths[0].read_bytes()[:-100])
    assert recordings.fetch(tmp_path / "kept", say=lambda line: None) == paths
    assert next(recordings.read(tmp_path / "kept", next(iter(PACKAGES)))).content
    paths[0].unlink()
    assert recordings.fetch(tmp_path / "kept", say=lambda line: None) == paths
    assert not older.exists()


def test_without_apt_get_the_error_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"no apt-get .*packages\.debian\.org.*--data\.recordings FOLDER"):
        recordings.fetch(tmp_path / "kept", say=lambda line: None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'echo "E: Unable to locate package $2" >&2; exit 100',
            r"Unable to locate .*apt-get update` as root",
        ),
        ('echo "E: Failed to fetch: Hash Sum mismatch" >&2; exit 100', r"Hash Sum mismatch\. Try again"),
        ("exit 0", r"could not download .*no output"),
        ('echo "!<arch>" > "$2"_1_all.deb', r"incomplete"),
        ('echo "<html>" > "$2"_1_all.deb', r"not a Debian package"),
    ],
)
def test_failed_downloads_are_explained(tmp_path: Path, apt_get: Path, line: str, message: str) -> None:
    script(apt_get, line)
    with pytest.raises(FetchError, match=message):
        recordings.fetch(tmp_path / "kept", say=lambda line: None)
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path, apt_get: Path) -> None:
    script(apt_get, 'echo "E: Write error - write (28: No space left on device)" >&2; exit 100')
    with pytest.raises(files.DiskFull, match=r"kept.*needed about 41. MB"):
        recordings.fetch(tmp_path / "kept", say=lambda line: None)


def test_recordings_are_read_from_packages_and_from_unpacked_folders(
    tmp_path: Path, packages: Path, contents: dict[str, dict[str, bytes]]
) -> None:
    for name, parts in contents.items():
        for path, content in parts.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    for name, parts in contents.items():
        packed = {recording.path: recording.content for recording in recordings.read(packages, name)}
        unpacked = {recording.path: recording.content for recording in recordings.read(tmp_path, name)}
        assert packed == unpacked
        left_out = parts.keys() - packed.keys()
        assert {path.rpartition("/")[2] for path in left_out} <= {"m-b.ogg", "cat.ogg"}
        assert all(parts[path] == content for path, content in packed.items())


def test_without_dpkg_deb_nothing_is_fetched_that_only_it_unpacks(
    tmp_path: Path, apt_get: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(apt_get.parent))
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": "mint", "ID_LIKE": "ubuntu debian"})
    with pytest.raises(FetchError, match=r"may be compressed with zstd, .*--data\.recordings"):
        recordings.fetch(tmp_path / "kept", say=lambda line: None)
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize("status", [0, 2])
def test_dpkg_deb_unpacks_zstd_and_its_failure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    (tmp_path / "data.tar").write_bytes(archive({f"{GAME}/a/cs/m-a.ogg": b"sound"}, ""))
    (tmp_path / "fillets-ng-data-cs_1_all.deb").write_bytes(deb({"data.tar.zst": b"anything"}))
    script(tmp_path / "dpkg-deb", f"cat {tmp_path}/data.tar; exit {status}")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    reader = recordings.read(tmp_path, "fillets-ng-data-cs")
    assert next(reader).content == b"sound"
    if status:
        with pytest.raises(FetchError, match=r"_1_all\.deb is damaged"):
            next(reader)
    else:
        assert list(reader) == []


@pytest.mark.parametrize("cut_off", [0, 40])
def test_damaged_packages_are_named(tmp_path: Path, cut_off: int) -> None:
    data = archive({f"{GAME}/a/cs/m-a.ogg": bytes(range(256)) * 40})
    damaged = data[:200] + bytes(40) + data[240 : len(data) - cut_off]
    (tmp_path / "fillets-ng-data-cs_1_all.deb").write_bytes(deb({"data.tar.xz": damaged}))
    with pytest.raises(FetchError, match=r"fillets-ng-data-cs_1_all\.deb is damaged"):
        list(recordings.read(tmp_path, "fillets-ng-data-cs"))
    with pytest.raises(FetchError, match=r"no recording of festvox-ru"):
        list(recordings.read(tmp_path, "festvox-ru"))


def test_voices_are_known_from_paths() -> None:
    names = {
        ("fillets-ng-data-cs", f"{GAME}/city/cs/vit-m-hlava.ogg"): ("fillets-ng-data-cs/m", "female"),
        ("fillets-ng-data-nl", f"{GAME}/city/nl/v-proc.ogg"): ("fillets-ng-data-nl/v", "male"),
        ("fillets-ng-data-nl", f"{GAME}/city/nl/start-1.ogg"): ("fillets-ng-data-nl/others", ""),
        ("festvox-ru", "wav/ru_0001.wav"): ("festvox-ru", "male"),
        ("tuxpaint-stamps-default", f"{STAMPS}/cat_desc_pt_BR.wav"): ("tuxpaint/pt_BR", ""),
        ("tuxpaint-stamps-default", f"{STAMPS}/cat_desc.ogg"): ("tuxpaint/en", ""),
        ("tuxpaint-stamps-default", f"{STAMPS}/cat_desc_ca.ogg"): ("tuxpaint/ca", "male"),
    }
    assert {key: tuple(recordings.voice_of(*key)) for key in names} == names
    sexes = [
        recordings.voice_of("tuxpaint-stamps-default", f"{STAMPS}/a_desc_{name.rpartition('/')[2]}.ogg").sex
        for name in human.HELD_OUT
    ]
    assert sexes == ["male", "male", "female", "female"]


SETTINGS = {"rough": 1.0, "noisy": 1.0, "warped": 1.0, "workers": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> human.HumanCorpus:
    return human.prepare(
        tmp_path_factory.mktemp("run") / "human", HumanConfig(recordings=packages, **SETTINGS)
    )


def rows(manifest: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def test_no_voice_is_in_both_splits(corpus: human.HumanCorpus) -> None:
    train, test = rows(corpus.train), rows(corpus.test)
    assert {row["speaker"] for row in test} == {"tuxpaint/bg", "tuxpaint/es"}
    voices = {row["speaker"] for row in train}
    assert voices >= {"fillets-ng-data-cs/m", "fillets-ng-data-cs/v", "festvox-ru", "tuxpaint/en"}
    assert not voices & set(human.HELD_OUT)
    assert all("-" not in str(row["id"]).rpartition("-")[2] for row in test)  # no copies
    kinds = Counter(str(row["id"]).rpartition("-")[2] for row in train)
    assert min(kinds["noisy"], kinds["warped"], kinds["whisper"] + kinds["creaky"]) >= 3
    listed = {str(row["audio"]) for row in train + test}
    assert {f"audio/{path.name}" for path in (corpus.folder / "audio").iterdir()} == listed


def test_manifests_train_and_tell_the_truth(corpus: human.HumanCorpus) -> None:
    for path in (corpus.train, corpus.test):
        manifest = read_manifest(path)
        assert not manifest.problems
        assert not manifest.unknown
        for clip in manifest.clips:
            for kind in ("global", "fine"):
                assert all(claims.items() <= clip.tags.items() for claims in clip.claims[kind])
            assert soundfile.info(clip.audio).frames / SAMPLE_RATE_HZ == pytest.approx(clip.duration_s)
            assert soundfile.info(clip.audio).samplerate == SAMPLE_RATE_HZ
    test = read_manifest(corpus.test).clips
    assert {clip.tags["speaker"]: clip.tags["sex"] for clip in test} == {
        "tuxpaint/bg": "male",
        "tuxpaint/es": "female",
    }
    assert all(float(clip.tags["f0_hz"]) > 80 for clip in test)
    for row in rows(corpus.train):
        tags = row["tags"]
        assert isinstance(tags, dict)
        if str(row["id"]).endswith(("whisper", "creaky")):
            assert str(row["id"]).endswith(tags["quality"])
            assert not {"pitch", "liveliness"} & tags.keys()


def test_a_complete_corpus_is_kept_and_a_damaged_one_is_made_again(
    corpus: human.HumanCorpus, packages: Path
) -> None:
    config = HumanConfig(recordings=packages, **SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in corpus.folder.rglob("*") if path.is_file()}
    assert human.prepare(corpus.folder, config) == corpus
    assert {path: path.stat().st_mtime_ns for path in before} == before
    kept = {path: path.read_bytes() for path in before}
    next(iter((corpus.folder / "audio").iterdir())).unlink()
    made: list[tuple[int, int]] = []
    progress = lambda done, total: made.append((done, total))  # noqa: E731
    again = human.prepare(
        corpus.folder, HumanConfig(recordings=packages, **SETTINGS | {"workers": 1}), progress=progress
    )
    assert again == corpus  # the number of workers changes nothing
    assert {path: path.read_bytes() for path in kept if path.name != "human.json"} == {
        path: content for path, content in kept.items() if path.name != "human.json"
    }
    assert made


def test_the_description_names_sources_and_licences(corpus: human.HumanCorpus) -> None:
    text = human.describe(corpus)
    assert all(f"{name}: " in text and package.licence in text for name, package in PACKAGES.items())
    assert "2 that only the test has" in text


def test_a_corpus_replaces_no_other_files(tmp_path: Path, packages: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files that are no human corpus"):
        human.prepare(tmp_path, HumanConfig(recordings=packages))
    with pytest.raises(FetchError, match=r"there is no folder .*nowhere"):
        human.prepare(tmp_path / "human", HumanConfig(recordings=tmp_path / "nowhere"))
    with pytest.raises(FetchError, match=r"no recording of"):
        human.prepare(tmp_path / "human", HumanConfig(recordings=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_long_recording_is_cut_where_it_is_quiet() -> None:
    rng = np.random.default_rng(0)
    loud, quiet = rng.standard_normal(6400) * 0.3, rng.standard_normal(4800) * 0.005
    x = np.concatenate([np.zeros(8000), *[loud, quiet] * 12, np.zeros(8000)])
    part = human.cut(x, np.random.default_rng(1))
    assert 1.9 < len(part) / SAMPLE_RATE_HZ <= 3.2
    assert max(np.std(part[:320]), np.std(part[-320:])) < 0.1
    short = human.cut(x[8000:24000], np.random.default_rng(1))
    assert len(short) <= 16000


def test_a_recording_as_long_as_the_longest_stretch_is_kept_whole() -> None:
    """51,300 samples are more than 3.2 s, and have 160 whole blocks: as many as the longest stretch."""

    class Longest(np.random.Generator):
        def uniform(self, low: float = 0.0, high: float = 1.0, size: None = None) -> float:  # type: ignore[override]
            return 3.195

    x = np.random.default_rng(0).standard_normal(51_300)
    part = human.cut(x, Longest(np.random.PCG64(0)))
    np.testing.assert_array_equal(part, x[:51_200])


def test_frequent_labels_are_left_out_of_some_clips() -> None:
    labels = {"monotone": 40, "normal": 90, "lively": 900}
    clips = [{"tags": {"liveliness": name, "sex": "male"}} for name, n in labels.items() for _ in range(n)]
    pitches = {"low": 20, "medium": 200, "high": 400}
    clips += [{"tags": {"pitch": name, "sex": "female"}} for name, n in pitches.items() for _ in range(n)]
    human._balance(clips, np.random.default_rng(0))
    counts = Counter(clip["tags"].get("liveliness") for clip in clips)
    assert [counts[name] for name in labels] == [40, 90, 120]
    counts = Counter(clip["tags"].get("pitch") for clip in clips)
    assert [counts[name] for name in pitches] == [20, 200, 300]


def test_a_rare_label_does_not_take_the_others_away() -> None:
    labels = {"monotone": 1, "normal": 40, "lively": 900}
    clips = [{"tags": {"liveliness": name}} for name, n in labels.items() for _ in range(n)]
    clips += [{"tags": {"speed": name}} for name, n in {"slow": 1, "fast": 70}.items() for _ in range(n)]
    human._balance(clips, np.random.default_rng(0))
    counts = Counter(clip["tags"].get("liveliness") for clip in clips)
    assert [counts[name] for name in labels] == [1, 40, 50]
    assert Counter(clip["tags"].get("speed") for clip in clips)["fast"] == 50
