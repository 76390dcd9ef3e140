"""Text files of users: readers accept all encodings and line ends, and refuse files that are no text."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import soundfile
from sample_data import LFS_POINTER

from clsp_fast import data, embed, evaluate, score, train
from clsp_fast.data import manifest
from clsp_fast.embed import EmbedConfig
from clsp_fast.evaluation import corpora
from clsp_fast.evaluation.ratings import read_ratings
from clsp_fast.evaluation.tasks import Task, read_tasks
from clsp_fast.score import ScoreConfig
from clsp_fast.storage import textfile
from clsp_fast.storage.embedding_folder import EmbeddingHeader

WAYS: dict[str, Callable[[str], bytes]] = {
    "plain": lambda text: text.encode(),
    "mark": lambda text: text.encode("utf-8-sig"),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "mark and crlf": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "old mac": lambda text: text.replace("\n", "\r").encode(),
    "no last end": lambda text: text.rstrip("\n").encode(),
    "blank lines": lambda text: ("\n" + text.replace("\n", "\n \n")).encode(),
    "utf-16 of PowerShell": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "utf-16 big": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-16 without a mark": lambda text: text.encode("utf-16-le"),
    "utf-16 big without a mark": lambda text: text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
    "utf-32 without a mark": lambda text: text.encode("utf-32-be"),
    "gzip": lambda text: gzip.compress(text.encode()),
    "gzip and mark": lambda text: gzip.compress(text.encode("utf-8-sig")),
    "gzip in parts": lambda text: gzip.compress(text[:9].encode()) + gzip.compress(text[9:].encode()),
}
NAMES = ("clips/café.wav", "clips/b.wav")
CAPTION = "Une voix calme, très basse."
ROWS = [{"audio": name, "caption": CAPTION, "id": str(i)} for i, name in enumerate(NAMES)]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read_manifest(file: Path) -> list[str]:
    return [clip.audio for clip in manifest.read_manifest(file, need_captions=False).clips]


def read_sources(file: Path) -> list[str]:
    return [clip.audio for clip in manifest.read_source(str(file))[0]]


def read_stream(file: Path) -> list[str]:
    with io.TextIOWrapper(file.open("rb")) as stream:
        return [clip.audio for clip in manifest.read_source("-", stream)[0]]


def read_short_tasks(file: Path) -> dict[str, Task]:
    return read_tasks(file, short=True)


def read_pairs(file: Path) -> list[str]:
    with textfile.open_text(file, "pairs") as pairs:
        return [line.row["audio"] for line in score._lines(pairs.file, "1/1") if not line.problem]


def read_captions(file: Path) -> list[str]:
    rows = corpora.read_corpus(file, "paraspeechcaps")
    assert {clip.captions.global_captions for clip in rows} == {(CAPTION,)}
    return [clip.audio for clip in rows]


PARASPEECHCAPS = "".join(
    json.dumps({"relative_audio_path": name, "text_description": CAPTION}, ensure_ascii=False) + "\n"
    for name in NAMES
)
RATINGS = "clip,caption,rater,rating,category\n" + "".join(f'{n},"{CAPTION}",r,3,all\n' for n in NAMES)
READERS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "manifest": (JSON_LINES, read_manifest),
    "manifest to embed": (JSON_LINES, read_sources),
    "manifest on standard input": (JSON_LINES, read_stream),
    "list": ("".join(f"{name}\n" for name in NAMES), read_sources),
    "list on standard input": ("".join(f"{name}\n" for name in NAMES), read_stream),
    "pairs": (JSON_LINES, read_pairs),
    "ratings": (RATINGS, lambda file: [rating.clip for rating in read_ratings(file)]),
    "corpus rows": (PARASPEECHCAPS, read_captions),
    "tasks": (json.dumps({"t": {n: ["x"] for n in NAMES}}, ensure_ascii=False) + "\n",
              lambda file: read_tasks(file)["t"].names),
    "tasks of training": (json.dumps({"t": {n: ["x"] for n in NAMES}}, ensure_ascii=False) + "\n",
                          lambda file: read_short_tasks(file)["t"].names),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_every_way_of_writing(
    reader: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if (reader, way) == ("ratings", "blank lines"):
        return  # the first line of a table has its columns
    content, read = READERS[reader]
    file = tmp_path / "given.txt"
    file.write_bytes(WAYS[way](content))
    assert [name.removeprefix(f"{tmp_path}/") for name in read(file)] == list(NAMES)


def test_actors_and_turns_are_read_in_every_way_of_writing(tmp_path: Path) -> None:
    (tmp_path / "crema/AudioWAV").mkdir(parents=True)
    (tmp_path / "crema/AudioWAV/1001_DFA_ANG_XX.wav").touch()
    session = tmp_path / "iemocap/Session1/dialog/EmoEvaluation"
    session.mkdir(parents=True)
    turn = "[6.29 - 8.23]\tSes01F_impro01_F000\tneu\t[2.5, 2.5, 2.5]\n"
    for name, way in WAYS.items():
        if name == "blank lines":
            continue  # the first line of a table has its columns
        (tmp_path / "crema/VideoDemographics.csv").write_bytes(way("ActorID,Age,Sex\n1001,51,Male\n"))
        (session / "Ses01F_impro01.txt").write_bytes(way(turn))
        assert [clip.tags["age"] for clip in corpora.read_corpus(tmp_path / "crema", "crema-d", ["age"])] == [
            "51"
        ]
        assert [clip.tags["emotion"] for clip in corpora.read_corpus(tmp_path / "iemocap", "iemocap")] == [
            "neutral"
        ]


def test_the_configuration_of_a_run_is_read_in_every_way_of_writing(tmp_path: Path) -> None:
    for way in WAYS.values():
        (tmp_path / "c.json").write_bytes(way(json.dumps({"seed": 7}) + "\n"))
        assert train.parse([str(tmp_path / "c.json")]).seed == 7


def test_names_that_are_not_utf8_survive_in_every_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ratings = "clip,caption,rater,rating,category\nclips/caf\udce9.wav,calm,r,3,all\n"
    rows = '{"relative_audio_path": "clips/caf\udce9.wav", "text_description": "calm"}\n'
    texts = {"list": "clips/caf\udce9.wav\n", "ratings": ratings, "corpus rows": rows}
    for reader, (_, read) in READERS.items():
        if "tasks" in reader:
            continue
        text = texts.get(reader.split(" on ")[0], '{"audio": "clips/caf\udce9.wav"}\n')
        (tmp_path / "given").write_bytes(os.fsencode(text))
        if reader == "corpus rows":
            names = [clip.audio for clip in corpora.read_corpus(tmp_path / "given", "paraspeechcaps")]
        else:
            names = read(tmp_path / "given")
        assert [os.fsencode(name).endswith(b"clips/caf\xe9.wav") for name in names] == [True], reader
    (tmp_path / "given").write_text(json.dumps({"audio": "caf\udce9.wav"}))
    assert os.fsencode(read_manifest(tmp_path / "given")[0]).endswith(b"/caf\xe9.wav")


def packed(write: Callable[[io.BytesIO], object]) -> bytes:
    with io.BytesIO() as file:
        write(file)
        return file.getvalue()


def recording(kind: str, **options: Any) -> Callable[[], bytes]:
    samples = 0.1 * np.random.default_rng(0).standard_normal(4000)
    return lambda: packed(lambda file: soundfile.write(file, samples, 16000, format=kind, **options))


def archive(mode: str) -> bytes:
    def write(file: io.BytesIO) -> None:
        with tarfile.open(fileobj=file, mode=mode, format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            member = tarfile.TarInfo("a.wav")
            member.size = 5000
            tar.addfile(member, io.BytesIO(bytes(5000)))

    return packed(write)


def zipped() -> bytes:
    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as target:
            target.writestr("a.wav", bytes(100))

    return packed(write)


NEMO = {"audio_filepath": "../v.wav", "duration": 1.5, "text": "hello there", "offset": 0.0}
HEADER = EmbeddingHeader(model="m", frontend="f", dim=2).to_line()
INDEX_LINE = '{"id": "a", "audio": "v.wav", "shard": 0, "row": 0}'
NO_LISTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "wav": (recording("WAV"), "a recording"),
    "flac": (recording("FLAC"), "a recording"),
    "mp3": (recording("MP3"), "a recording"),
    "ogg": (recording("OGG"), "a recording"),
    "aiff": (recording("AIFF"), "a recording"),
    "au": (recording("AU"), "a recording"),
    "caf": (recording("CAF"), "a recording"),
    "w64": (recording("W64"), "a recording"),
    "rf64": (recording("RF64"), "a recording"),
    "sphere": (recording("NIST"), "a recording"),
    "voc": (recording("VOC", subtype="PCM_16"), "a recording"),
    "webm": (lambda: b"\x1aE\xdf\xa3\x9fB\x86\x81\x01" + bytes(range(256)), "ffmpeg"),
    "m4a": (lambda: b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(range(256)), "ffmpeg"),
    "aac": (lambda: b"\xff\xf1\x50\x80\x02\x1f\xfc" + bytes(range(256)), "ffmpeg"),
    "amr": (lambda: b"#!AMR\n" + bytes(range(256)), "ffmpeg"),
    "wma": (lambda: b"0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel" + bytes(range(256)), "ffmpeg"),
    "avi": (lambda: b"RIFF\x10\0\0\0AVI LIST" + bytes(range(256)), "ffmpeg"),
    "tar": (lambda: archive("w"), "a tar archive.*unpack"),
    "tar.gz": (lambda: archive("w:gz"), "a tar archive.*unpack"),
    "zip": (zipped, "a zip archive.*unpack"),
    "xz": (lambda: lzma.compress(JSON_LINES.encode()), "xz.*decompress"),
    "bz2": (lambda: bz2.compress(JSON_LINES.encode()), "bzip2.*decompress"),
    "npy": (lambda: packed(lambda file: np.save(file, np.ones(9))), "a numpy array"),
    "npz": (lambda: packed(lambda file: np.savez(file, a=np.ones(9))), "a zip archive"),
    "safetensors": (lambda: safetensors.numpy.save({"a": np.ones(9)}), "safetensors"),
    "parquet": (lambda: b"PAR1\x15\x04\x15\x10" + bytes(range(64)), "Parquet"),
    "arrow": (lambda: b"ARROW1\0\0" + bytes(range(64)), "Arrow"),
    "sqlite": (lambda: b"SQLite format 3\0" + bytes(range(64)), "SQLite"),
    "pickle": (lambda: pickle.dumps([1, 2]), "a pickle"),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(range(64)), "a picture"),
    "zeros": (lambda: bytes(5000), "a binary file of an unknown kind"),
    "noise": (lambda: np.random.default_rng(0).bytes(999), "a binary file"),
    "half a gzip": (lambda: gzip.compress(os.urandom(20000))[:9000], "cannot be read|a binary file"),
    "find -print0": (lambda: b"clips/a.wav\0clips/b.wav\0clips/c.wav\0", "NUL|JSON lines|no usable clip"),
    "csv": (lambda: b"path,caption\n../v.wav,A man.\n", "a CSV table.*expected "),
    "csv in utf-16": (lambda: "path,caption\n../v.wav,A man.\n".encode("utf-16"), "a CSV table"),
    "csv of other columns": (lambda: b"id;text;file\n1;A man;v.wav\n", "a table.*expected "),
    "tsv": (lambda: b"client_id\tpath\tsentence\nx\tv.mp3\tHi.\n", "a tab-separated table"),
    "csv without a header": (lambda: b"v.wav,A man.\n", "a CSV table"),
    "csv of unknown columns": (lambda: b"emotion,utterance\nhappy,a.wav\nsad,b.wav\n", "a CSV table"),
    "csv in german": (lambda: b"nr;Satz;datei\n1;\"Ja; gut\";a.wav\n", "a table"),
    "psv": (lambda: b"speaker|where\ns1|a.wav\n", "a table"),
    "csv without a header, path last": (lambda: b"happy,a.wav\nsad,b.wav\n", "a CSV table"),
    "one column": (lambda: b"filename\na.wav\nb.wav\n", "a table of one column.*remove the first line"),
    "wav.scp": (lambda: b"utt1 a.wav\nutt2 b.wav\n", "Kaldi wav.scp.*sed"),
    "wav.scp of roots": (lambda: b"ab /data/my a.wav\nac /data/b.wav\n", "Kaldi wav.scp"),
    "wav.scp of stems": (lambda: b"84-121-0 84/121/84-121-0.flac\n", "Kaldi wav.scp"),
    "wav.scp with tabs": (lambda: b"utt1\ta.wav\nutt2\tb.wav\n", "Kaldi wav.scp"),
    "wav.scp of commands": (lambda: b"utt1 sph2pipe -f wav a.sph |\n", "Kaldi wav.scp"),
    "fairseq": (lambda: b"/root\na.wav\t24000\nb.wav\t16000\n", "a fairseq manifest.*awk"),
    "yaml": (lambda: b"- audio: a.wav\n  text: x\n", "YAML"),
    "yaml list": (lambda: b"- a.wav\n- b.wav\n", "YAML"),
    "playlist": (lambda: b"#EXTM3U\n#EXTINF:1,x\na.wav\n", "a playlist"),
    "hugging face": (lambda: b'{"file_name": "a.wav", "text": ""}', 'rename "file_name" to "audio", "text"'),
    "wav_path": (lambda: b'{"wav_path": "a.wav"}\n{"wav_path": "b.wav"}\n', 'rename "wav_path" to "audio"'),
    "data": (lambda: json.dumps({"version": 1, "data": ROWS}).encode(), r"jq -c '\.data\[\]'"),
    "data over lines": (lambda: json.dumps({"data": ROWS * 99}, indent=1).encode(), r"jq -c '\.data\[\]'"),
    "nemo": (lambda: json.dumps(NEMO).encode() + b"\n", 'rename "audio_filepath" to "audio", "duration" to'),
    "json array": (lambda: json.dumps(ROWS).encode(), "a JSON array; write one object a line"),
    "json array over lines": (lambda: json.dumps(ROWS, indent=1).encode(), "a JSON array; write one object"),
    "json over lines": (lambda: json.dumps(ROWS[0], indent=1).encode(), "several lines; write one object"),
    "index": (lambda: f"{HEADER}\n{INDEX_LINE}\n".encode(), "index of a folder of embeddings"),
    "git lfs": (LFS_POINTER.encode, "git lfs pull"),
    "html": (lambda: b"<!doctype html>\n<html><body>404</body></html>\n", "HTML"),
}  # fmt: skip


def no_model(*_: object, **__: object) -> Any:
    raise AssertionError("the model was loaded before the input was checked")


@pytest.mark.parametrize("name", ["given.txt", "given.jsonl"])
@pytest.mark.parametrize("kind", NO_LISTS)
def test_every_command_names_and_refuses_what_is_no_list(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (embed, score, evaluate):
        monkeypatch.setattr(module, "load_model", no_model)
    make, message = NO_LISTS[kind]
    file, out = tmp_path / name, tmp_path / "out"
    zeroshot = evaluate.ZeroshotConfig(source=file, task=("ravdess-emotion",))
    file.write_bytes(make())
    commands: dict[str, Callable[[], object]] = {
        "embed": lambda: embed.embed(EmbedConfig(source=str(file), out=out)),
        "validate": lambda: data.validate(file),
        "train": lambda: manifest.read_manifest(file),
        "score": lambda: score.score(ScoreConfig(pairs=str(file), scores=str(out))),
        "retrieval": lambda: evaluate.retrieval(evaluate.RetrievalConfig(source=file)),
        "zeroshot": lambda: evaluate.zeroshot(zeroshot),
    }
    for command, run in commands.items():
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}") as refusal:
            run()
        assert re.search(message, str(refusal.value)), command
        assert len(str(refusal.value)) < 800, command
        assert not out.exists(), command
    with (
        io.TextIOWrapper(file.open("rb")) as stream,
        pytest.raises(ValueError, match=r"^(standard input|stdin) "),
    ):
        manifest.read_source("-", stream)


@pytest.mark.parametrize("kind", ["wav", "tar", "zip", "csv of other columns", "json array", "zeros", "html"])
def test_what_is_no_table_or_task_is_named_and_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "given"
    file.write_bytes(NO_LISTS[kind][0]())
    for read in (read_tasks, read_short_tasks, lambda path: list(read_ratings(path))):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}"):
            read(file)


def test_a_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    readers = (manifest.read_manifest, read_tasks, read_short_tasks,
               lambda path: list(read_ratings(path)),
               lambda path: score.score(ScoreConfig(pairs=str(path), scores="-")))  # fmt: skip
    for read in readers:
        with pytest.raises(FileNotFoundError, match=f"^{tmp_path} is a folder, not "):
            read(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"none does not exist or is not a file; expected "):
            read(tmp_path / "none")
        with pytest.raises((OSError, ValueError), match="too long"):
            read(tmp_path / ("x" * 304))


def test_a_list_may_come_through_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    code = "import sys; open(sys.argv[1], 'w').write('a.wav\\nb.wav\\n')"
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pipe")])
    try:
        assert read_sources(tmp_path / "pipe") == ["a.wav", "b.wav"]
    finally:
        writer.kill()
        writer.wait()


def test_values_of_unused_keys_may_be_no_json(tmp_path: Path) -> None:
    row = '{"audio": "a.wav", "captions": ["x"], "mos": %s}'
    for value in ("NaN", "-Infinity", "1e999", "9" * 5000, '{"deep": [NaN]}', '"\\ud800"'):
        (tmp_path / "m.jsonl").write_text(row % value)
        result = manifest.read_manifest(tmp_path / "m.jsonl")
        assert (len(result.clips), result.problems) == (1, []), value
        pair = textfile.json_object(row % value)
        assert pair["audio"] == "a.wav"
        json.dumps(pair, allow_nan=False)
    for value in ("NaN", "-Infinity", "1e999", "9" * 5000, "-1", '"1"'):
        for key in ("start_s", "duration_s", "channel"):
            (tmp_path / "m.jsonl").write_text((row % value).replace("mos", key) + "\n" + row % 3)
            (problem,) = manifest.read_manifest(tmp_path / "m.jsonl").problems
            assert key in problem.message or len(value) > 1000, (key, value)


def test_no_line_fills_the_memory(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_text("x" * 5000 + "\nab\n\n" + "y" * 3000)
    with (tmp_path / "zeros").open() as file:
        lines = list(textfile.lines(file, 1000))
    assert [(number, len(text), textfile.is_whole(text, 1000)) for number, text in lines] == [
        (1, 1000, False), (2, 3, True), (4, 1000, False),
    ]  # fmt: skip


class Slow(io.RawIOBase):
    """A pipe whose writer sends one byte at a time."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part, self.content = self.content[:1], self.content[1:]
        buffer[: len(part)] = part
        return len(part)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("buffered", [False, True])
def test_a_slow_pipe_is_read_like_a_file(way: str, buffered: bool) -> None:
    stream: Any = Slow(WAYS[way](JSON_LINES * 50))
    stream = io.BufferedReader(stream) if buffered else stream
    with textfile.open_text(stream, "a manifest") as text:
        assert text.head.lstrip().startswith('{"audio"')
        assert sum(1 for _ in textfile.lines(text.file, 1000)) == 100
    assert not stream.closed


@pytest.mark.parametrize("kind", ["wav", "avi", "tar.gz", "xz", "zip", "zeros"])
def test_binary_files_are_recognised_in_a_slow_pipe(kind: str) -> None:
    make, message = NO_LISTS[kind]
    with pytest.raises(ValueError, match=message), textfile.open_text(Slow(make()), "a list"):  # type: ignore[arg-type]
        pass


def test_files_that_cat_joined_hold_several_byte_order_marks(tmp_path: Path) -> None:
    for content in (JSON_LINES, "a.wav\nb.wav\n"):
        (tmp_path / "given").write_bytes(2 * content.encode("utf-8-sig"))
        clips, problems = manifest.read_source(str(tmp_path / "given"))[:2]
        assert not any("\ufeff" in clip.audio for clip in clips)
        assert not any("not JSON" in problem.message for problem in problems)
    with io.StringIO("\ufeff12345\n\ufeff1234\n\ufeff") as file:
        lines = list(textfile.lines(file, 5))
    assert [(text, textfile.is_whole(text, 5)) for _, text in lines] == [
        ("12345", False), ("1234\n", True),
    ]  # fmt: skip
