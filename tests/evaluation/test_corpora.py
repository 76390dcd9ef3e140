"""Readers of the corpora, with the names and oddities of real copies."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from sample_data import LFS_POINTER, write_rows

from clsp_fast.data.captions import Captions
from clsp_fast.evaluation import tasks
from clsp_fast.evaluation.corpora import read_corpus


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_ravdess(tmp_path: Path) -> None:
    for actor in (1, 2):
        for emotion in range(1, 9):
            touch(tmp_path / f"Actor_{actor:02d}/03-01-{emotion:02d}-01-02-01-{actor:02d}.wav")
    touch(tmp_path / "Actor_01/03-02-03-01-02-01-01.wav")  # sung
    touch(tmp_path / "Actor_01/01-01-03-01-02-01-01.wav")  # with a picture
    touch(tmp_path / "Actor_01/notes.wav")
    touch(tmp_path / "audio_speech_actors_01-24/Actor_01/03-01-01-01-02-01-01.wav")  # a copy
    clips = read_corpus(tmp_path, "ravdess")
    assert len(clips) == 16
    emotions = {c.id[6:8]: c.tags["emotion"] for c in clips}
    assert emotions == {
        "01": "neutral", "02": "calm", "03": "happy", "04": "sad",
        "05": "angry", "06": "fear", "07": "disgust", "08": "surprised",
    }  # fmt: skip
    assert {(c.tags["speaker"], c.tags["gender"]) for c in clips} == {("01", "male"), ("02", "female")}
    known = tasks.read_tasks()
    assert all(known[name].label_of(c) for c in clips for name in ("ravdess-emotion", "ravdess-gender"))


def test_crema_d(tmp_path: Path) -> None:
    for name in (
        "1001_DFA_ANG_XX",
        "1001_IEO_HAP_HI",
        "1002_TIE_NEU_XX",
        "9999_TIE_SAD_XX",
        "1002_TIE_XXX_XX",
    ):
        touch(tmp_path / f"AudioWAV/{name}.wav")
    with pytest.raises(FileNotFoundError, match=r"no VideoDemographics\.csv.*https://.*CREMA-D"):
        read_corpus(tmp_path, "crema-d", ["emotion", "age"])
    table = tmp_path / "VideoDemographics.csv"
    table.write_text(
        "ActorID,Age,Sex,Race,Ethnicity\n1001,51,Male,Caucasian,Not Hispanic\n1002,21,Female,x,y\n"
    )
    clips = {c.id: dict(c.tags) for c in read_corpus(tmp_path, "crema-d", ["age"])}
    assert clips.pop("9999_TIE_SAD_XX") == {"emotion": "sad", "speaker": "9999"}
    assert clips == {
        "1001_DFA_ANG_XX": {"emotion": "angry", "gender": "male", "age": "51", "speaker": "1001"},
        "1001_IEO_HAP_HI": {"emotion": "happy", "gender": "male", "age": "51", "speaker": "1001"},
        "1002_TIE_NEU_XX": {"emotion": "neutral", "gender": "female", "age": "21", "speaker": "1002"},
    }
    table.write_text("Actor,Years\n1001,51\n")
    with pytest.raises(ValueError, match="must have the columns ActorID, Age and Sex"):
        read_corpus(tmp_path, "crema-d", ["age"])
    assert len(read_corpus(tmp_path, "crema-d", ["emotion"])) == 4


EVALUATION = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
A-E3:\tval 3; act 2; dom  2;\t()

[10.0100 - 11.3925]\tSes01F_impro01_M001\texc\t[4.0000, 3.5000, 3.5000]
C-E2:\tExcited;\t()

[14.8872 - 18.0175]\tSes01F_impro01_M002\txxx\t[2.0000, 2.5000, 2.0000]
"""


def test_iemocap(tmp_path: Path) -> None:
    folder = tmp_path / "IEMOCAP_full_release/Session1"
    evaluation = folder / "dialog/EmoEvaluation"
    evaluation.mkdir(parents=True)
    (evaluation / "Ses01F_impro01.txt").write_text(EVALUATION)
    (evaluation / "._Ses01F_impro01.txt").write_bytes(b"\x00\x05\x16\x07")
    touch(evaluation / "Categorical/Ses01F_impro01_e2_cat.txt")
    clips = read_corpus(tmp_path, "iemocap")
    assert [(c.id, c.tags["emotion"], c.tags["gender"], c.tags["speaker"]) for c in clips] == [
        ("Ses01F_impro01_F000", "neutral", "female", "Ses01F"),
        ("Ses01F_impro01_M001", "excited", "male", "Ses01M"),
        ("Ses01F_impro01_M002", "no agreement", "male", "Ses01M"),
    ]
    assert Path(clips[0].audio) == folder / "sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"
    counts = Counter(tasks.read_tasks()["iemocap-emotion"].label_of(c) for c in clips)
    assert counts == {"neutral": 1, "happy": 1, None: 1}


def test_paraspeechcaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "ears/a/b.wav")
    row = {
        "source": "ears",
        "relative_audio_path": "a/b.wav",
        "text_description": ["A man, whispering.", "Two."],
        "intrinsic_tags": ["deep"],
        "situational_tags": ["whispered", "sad"],
        "gender": "male",
        "accent": None,
        "speakerid": "p001",
        "duration": 2.5,
    }
    other = {"relative_audio_path": "c.wav", "text_description": "One."}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(other) + "\n")
    first, second = read_corpus(path, "paraspeechcaps")
    assert Path(first.audio) == tmp_path / "ears/a/b.wav"
    assert first.captions == Captions(("A man, whispering.", "Two."), ())
    assert dict(first.tags) == {
        "gender": "male", "source": "ears", "speaker": "p001",
        "intrinsic_tags": "deep", "situational_tags": "whispered, sad",
    }  # fmt: skip
    assert Path(second.audio) == tmp_path / "c.wav"
    for bad in (
        "nonsense",
        "[" * 100_000,
        "3",
        '{"relative_audio_path": "x"}',
        '{"relative_audio_path": null, "text_description": "One."}',
        json.dumps(other | {"text_description": [3]}),
    ):
        path.write_text(json.dumps(other) + "\n" + bad + "\n")
        assert len(read_corpus(path, "paraspeechcaps")) == 1
        assert f"{path}: left out: 1 bad rows (line 2)" in capsys.readouterr().err
        path.write_text("\n" + bad + "\n")
        with pytest.raises(ValueError, match=r"rows\.jsonl holds no row of ParaSpeechCaps; line 2: "):
            read_corpus(path, "paraspeechcaps")


@pytest.mark.parametrize("layout", ["ravdess", "iemocap"])
def test_a_folder_of_something_else_is_named(tmp_path: Path, layout: str) -> None:
    touch(tmp_path / "a.wav")
    with pytest.raises(ValueError, match=f"holds no recording of the layout '{layout}'"):
        read_corpus(tmp_path, layout)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_corpus(tmp_path / "none", layout)
    with pytest.raises(ValueError, match="layout must be one of"):
        read_corpus(tmp_path, "zip")


TABLE = "ActorID,Age,Sex,Race,Ethnicity\n1001,51,Male,x,y\n1040,42,Female,x,y\n1076,25,Female,x,y\n"


def test_crema_d_with_the_oddities_of_real_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("1001_DFA_ANG_XX.wav", "1001_DFA_HAP_HI.WAV", "1040_ITH_SAD_X.wav", "1076_mti_neu_lo.Wav")
    others = (
        "1001_DFA_XXX_XX.wav",
        "notes.wav",
        "._1001_DFA_ANG_XX.wav",
        "a.mp3",
        "a.txt",
    )
    unknown = "1099_DFA_ANG_XX.wav"
    for name in (*names, *others, unknown):
        touch(tmp_path / "AudioWAV" / name)
    touch(tmp_path / "copy/1040_ITH_SAD_X.wav")
    (tmp_path / "VideoDemographics.csv").write_text(TABLE)
    clips = {Path(c.audio).name: c.tags for c in read_corpus(tmp_path, "crema-d", ["age"])}
    assert sorted(clips) == sorted((*names, unknown))
    assert dict(clips[unknown]) == {"emotion": "angry", "speaker": "1099"}
    assert dict(clips["1040_ITH_SAD_X.wav"]) == {
        "emotion": "sad", "gender": "female", "age": "42", "speaker": "1040",
    }  # fmt: skip
    message = capsys.readouterr().err
    for part in (
        f"{tmp_path}: left out: ",
        "2 with an unexpected form of name (._1001_DFA_ANG_XX.wav, notes.wav)",
        "1 from tasks of age and gender, because VideoDemographics.csv lacks the actor (1099_DFA_ANG_XX.wav)",
        "1 of an unknown emotion (1001_DFA_XXX_XX.wav)",
        "1 not WAV (a.mp3)",
        "1 duplicates (1040_ITH_SAD_X.wav)",
    ):
        assert part in message
    assert "a.txt" not in message


def test_crema_d_without_its_table_has_only_emotions(tmp_path: Path) -> None:
    touch(tmp_path / "AudioWAV/1001_DFA_ANG_XX.wav")
    (clip,) = read_corpus(tmp_path, "crema-d", ["emotion"])
    assert dict(clip.tags) == {"emotion": "angry", "speaker": "1001"}
    for field in ("age", "gender"):
        with pytest.raises(FileNotFoundError, match=r"VideoDemographics\.csv"):
            read_corpus(tmp_path, "crema-d", [field])
    (tmp_path / "VideoDemographics.csv").write_text("\ufeffActorid,AGE, sex\r\n1001,51,MALE\r\n1002,,\r\n")
    for source in (tmp_path, tmp_path / "AudioWAV"):  # the table may be one folder up
        (clip,) = read_corpus(source, "crema-d", ["age"])
        assert (clip.tags["age"], clip.tags["gender"]) == ("51", "male")
    (tmp_path / "VideoDemographics.csv").write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=r'VideoDemographics\.csv is a Git LFS pointer.*"git lfs pull"'):
        read_corpus(tmp_path, "crema-d", ["gender"])
    assert len(read_corpus(tmp_path, "crema-d", ["emotion"])) == 1


def linked_corpus(tmp_path: Path, layout: str) -> Path:
    """A corpus whose speaker or session folder is a link, and which has loops of links."""
    corpus, away = tmp_path / "corpus", tmp_path / "away"
    if layout == "ravdess":
        touch(away / "03-01-05-01-02-01-07.WAV")
        touch(away / "notes.wav")
        link = corpus / "Actor_07"
    elif layout == "crema-d":
        touch(away / "1001_DFA_ANG_XX.wav")
        link = corpus / "AudioWAV"
    else:
        table = away / "dialog/EmoEvaluation/Ses01F_impro01.txt"
        table.parent.mkdir(parents=True)
        table.write_text("[6.2901 - 8.2357]\tSes01F_impro01_F000\tang\t[2.5, 2.5, 2.5]\n[broken\n")
        touch(away / "sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.WAV")
        touch(away / "sentences/wav/Ses01F_impro01/Ses01F_impro01_F001.wav")
        link = corpus / "Session1"
    corpus.mkdir()
    link.symlink_to(away, target_is_directory=True)
    (away / "up").symlink_to(corpus, target_is_directory=True)
    (away / "self").symlink_to(".", target_is_directory=True)
    (corpus / "alias").symlink_to(away, target_is_directory=True)
    (corpus / "nowhere").symlink_to(tmp_path / "none")
    return corpus


@pytest.mark.parametrize(
    ("layout", "left_out"),
    [
        ("ravdess", "1 with an unexpected form of name (notes.wav)"),
        ("crema-d", ""),
        ("iemocap", "1 lines of an unexpected form (Ses01F_impro01.txt); 1 in no table of emotions"),
    ],
)
def test_links_of_a_corpus_are_followed_and_their_loops_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, left_out: str
) -> None:
    (clip,) = read_corpus(linked_corpus(tmp_path, layout), layout)
    assert clip.tags["emotion"] == "angry"
    assert Path(clip.audio).is_file()
    message = capsys.readouterr().err
    assert left_out in message
    assert "1 dead links (nowhere)" in message
    assert "duplicates" not in message


def test_dead_links_and_other_formats_of_a_corpus_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "Actor_01/03-01-01-01-01-01-01.wav")
    for suffix in (".mp4", ".M4A", ".flac"):
        touch(tmp_path / f"Actor_04/03-01-01-01-01-01-04{suffix}")
    (tmp_path / "Actor_02").symlink_to("/no/such")
    (tmp_path / "Actor_03").symlink_to("Actor_03")
    assert len(read_corpus(tmp_path, "ravdess")) == 1
    message = capsys.readouterr().err
    assert "2 dead links (Actor_02, Actor_03)" in message
    assert "3 not WAV (" in message


def test_only_tables_of_turns_that_cannot_be_read_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = tmp_path / "Session1/dialog/EmoEvaluation"
    evaluation.mkdir(parents=True)
    (evaluation / "Ses01F_impro01.txt").write_text(EVALUATION)
    (evaluation / "Ses01F_impro02.txt").symlink_to("nowhere.txt")
    (evaluation / "Ses01F_impro03.txt").write_text(LFS_POINTER)
    (evaluation / "Ses01F_impro04.txt").write_bytes(bytes(5000))
    (evaluation / "Ses01F_impro05.txt").mkdir()
    assert len(read_corpus(tmp_path, "iemocap")) == 3
    message = capsys.readouterr().err
    assert "1 dead links" in message
    assert "2 tables of turns that cannot be read" in message


@pytest.mark.parametrize("table", ["dangling", "Git LFS", "semicolons"])
def test_emotions_of_crema_d_need_no_table(tmp_path: Path, table: str) -> None:
    touch(tmp_path / "AudioWAV/1001_DFA_ANG_XX.wav")
    file = tmp_path / "VideoDemographics.csv"
    if table == "dangling":
        file.symlink_to("nowhere.csv")
    else:
        file.write_text(LFS_POINTER if table == "Git LFS" else "ActorID;Age;Sex\n1001;51;Male\n")
    (clip,) = read_corpus(tmp_path, "crema-d", ["emotion"])
    assert dict(clip.tags) == {"emotion": "angry", "speaker": "1001"}
    with pytest.raises((FileNotFoundError, ValueError), match=r"VideoDemographics\.csv"):
        read_corpus(tmp_path, "crema-d", ["age"])


def test_bad_lines_of_a_manifest_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav"}\nno JSON\n{"audio": 3}\n')
    assert len(read_corpus(tmp_path / "m.jsonl", "manifest")) == 1
    assert "left out: 2 bad lines (line 2, line 3)" in capsys.readouterr().err


def test_a_row_whose_path_is_too_long_loses_no_other_row(tmp_path: Path) -> None:
    rows = [{"relative_audio_path": name, "text_description": "One."} for name in ("a" * 5000, "b.wav")]
    assert len(read_corpus(write_rows(tmp_path / "rows.jsonl", rows), "paraspeechcaps")) == 2
