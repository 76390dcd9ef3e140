"""`caption generate`: requests from a manifest, what is left out, sharding, answers from elsewhere, scale."""

from __future__ import annotations

import base64
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from sample_data import MakeClips, write_rows
from stub_server import MODEL, StubServer, caption, key_of, stub_process

from clsp_fast import audio
from clsp_fast import caption as command
from clsp_fast.captioning.answers import AnswerIndex, read_answers, read_record
from clsp_fast.captioning.generate import describe_tags, read_facts, seed_of, wav_bytes


@pytest.fixture
def manifest(tmp_path: Path, make_clips: MakeClips) -> Path:
    """Twelve lines: two share an id, one is blank, one is damaged, one is too long, one lacks its file."""
    clips = make_clips(tmp_path / "clips", 12)
    soundfile.write(clips[11], np.zeros(31 * 16000), 16000)  # its length is not in the manifest
    rows: list[dict[str, Any]] = [
        {"id": f"clip{i}", "audio": f"clips/{path.name}"} for i, path in enumerate(clips)
    ]
    rows[0]["tags"] = {"accent": "Scottish", "speaking_rate": "very slow", "gender": "female"}
    rows[1] |= {"tags": {"situational_tags": ["sad", "whispered"]}, "start_s": 0.05, "duration_s": 0.05}
    rows[2]["id"] = "clip1"
    rows[5]["duration_s"] = 30.5
    rows[6]["audio"] = "clips/none.wav"
    lines = [json.dumps(row) for row in rows]
    lines[3], lines[4] = "", "{"
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


GOOD_ROWS = (0, 1, 2, 7, 8, 9, 10)


def run(*words: str | Path, model: str = MODEL) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as stop:
        command.main(["generate", *map(str, words), "--server.model", model, "--server.backoff-s", "0.01"])
    code = stop.value.code
    if not isinstance(code, int):
        raise RuntimeError(code)
    return code


def texts(work: Path) -> dict[int, list[str]]:
    """Row -> its candidates."""
    with AnswerIndex(work / "generate") as index:
        rows = {row: [t for answer in index.of_row(row) for t in answer.texts] for row in range(index.rows)}
    return {row: candidates for row, candidates in rows.items() if candidates}


def test_every_good_clip_gets_its_candidates(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    with StubServer(keep=True) as server:
        assert run(manifest, work, "--server.servers", server.url) == 3
        output, errors = capsys.readouterr()
        assert "7 requests answered" in output
        assert "failed: 1 (1 x " in output
        assert "none.wav" in output
        assert "left out: bad lines: 1, clips over 30 s: 2" in output
        assert "line 5: not JSON" in errors
        bodies = {body["seed"]: body for body in server.bodies}
        candidates = texts(work)
        assert tuple(candidates) == GOOD_ROWS
        for row in GOOD_ROWS:
            body = bodies[seed_of(0, row, 0)]
            assert candidates[row] == [caption(key_of(body), i) for i in range(5)]
        # Nothing is sent again.
        assert run(manifest, work, "--server.servers", server.url) == 3
        assert server.sent.total() == 7
    check_body(bodies[seed_of(0, 0, 0)], manifest.parent / "clips/00000.wav", 0.0, None)
    check_body(bodies[seed_of(0, 1, 0)], manifest.parent / "clips/00001.wav", 0.05, 0.05)
    prompts = [bodies[seed_of(0, row, 0)]["messages"][0]["content"][1]["text"] for row in (0, 1, 2)]
    assert "accent: Scottish; speaking rate: very slow." in prompts[0]
    assert "female" not in prompts[0]
    assert "situational tags: sad, whispered." in prompts[1]
    assert "known about the speaker" not in prompts[2]
    record = read_record(work / "generate")
    assert record["manifest_path"] == str(manifest)
    assert record["settings"]["manifest"]["name"] == "m.jsonl"
    names = {answer.custom_id for answer in read_answers(work / "generate")}
    assert {"1.0/generate/clip1", "2.0/generate/clip1", "6.0/generate/clip6"} <= names


def check_body(body: dict[str, Any], path: Path, start_s: float, duration_s: float | None) -> None:
    """The request holds the clip and the paper's sampling."""
    (message,) = body["messages"]
    sound = message["content"][0]
    assert (message["role"], sound["type"], sound["input_audio"]["format"]) == ("user", "input_audio", "wav")
    sent, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["input_audio"]["data"])), dtype="float32")
    assert rate == 16000
    loaded = audio.load(path, start_s=start_s, duration_s=duration_s)
    assert np.array_equal(sent, np.clip(np.rint(loaded * 32768), -32768, 32767) / 32768)
    names = ("n", "temperature", "top_p", "top_k", "max_tokens", "model")
    assert [body[name] for name in names] == [5, 0.6, 0.95, 20, 512, MODEL]


def test_wav_bytes_are_exact_for_16_bit_samples(tmp_path: Path) -> None:
    samples = np.arange(-32768, 32768, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    data = wav_bytes(audio.load(tmp_path / "a.wav"))
    assert np.array_equal(soundfile.read(io.BytesIO(data), dtype="int16")[0], samples)
    loud = soundfile.read(io.BytesIO(wav_bytes(np.array([-2, 1, 2], np.float32))), dtype="int16")[0]
    assert loud.tolist() == [-32768, 32767, 32767]


def test_one_candidate_a_request(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[str | Path] = ["--candidates", "5", "--rows", "7:9"]
    with StubServer(choices=1, keep=True) as server:
        address = ("--server.servers", server.url)
        assert run(manifest, tmp_path / "a", *words, *address) == 0
        warned = capsys.readouterr()
        assert "a request for 5 candidates was answered with 1; if the server ignores n" in warned.err
        assert "answers with fewer candidates than asked: 2" in warned.out
        words += ["--candidates-per-request", "1"]
        assert run(manifest, tmp_path / "b", *words, *address) == 0
        assert "fewer" not in capsys.readouterr().out
        assert server.sent.total() == 2 + 10
    assert [len(candidates) for candidates in texts(tmp_path / "b").values()] == [5, 5]
    assert len({key_of(body) for body in server.bodies[2:]}) == 10  # each with a seed of its own
    with StubServer(keep=True) as server:
        words[-1] = "2"
        assert run(manifest, tmp_path / "c", *words, "--server.servers", server.url) == 0
        assert sorted(body["n"] for body in server.bodies) == [1, 1, 2, 2, 2, 2]
    assert [len(candidates) for candidates in texts(tmp_path / "c").values()] == [5, 5]


def test_rows_share_the_work(manifest: Path, tmp_path: Path) -> None:
    packed = tmp_path / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(manifest.read_bytes()))
    with StubServer() as server:
        address = ("--server.servers", server.url)
        assert run(manifest, tmp_path / "all", *address) == 3
        for rows in ("0:4", "4:9", "9:"):
            run(packed, tmp_path / "parts", *address, "--rows", rows)
    assert texts(tmp_path / "parts") == texts(tmp_path / "all")


def test_rows_whose_clips_are_all_too_long_are_recorded(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "w"
    with StubServer() as server:
        assert run(manifest, work, "--server.servers", server.url, "--rows", "0:2") == 0
        assert run(manifest, work, "--server.servers", server.url, "--rows", "5:6") == 3
    assert "left out: clips over 30 s: 1" in capsys.readouterr().out
    assert read_record(work / "generate")["rows"] == [[0, 2], [5, 6]]


def test_a_second_range_in_the_same_folder(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "w"
    with StubServer() as server:
        for rows, done in (("7:10", 3), ("0:2", 2), ("9:11", 1)):
            assert run(manifest, work, "--server.servers", server.url, "--rows", rows) == 0
            output, errors = capsys.readouterr()
            noun = "request" if done == 1 else "requests"
            assert f"{done} {noun} answered" in output
            assert f"{done} of {done} {noun}," in errors  # not of those that were done before
    assert read_record(work / "generate")["rows"] == [[0, 2], [7, 11]]
    assert tuple(texts(work)) == (0, 1, 7, 8, 9, 10)


def answers_to(work: Path) -> list[dict[str, Any]]:
    """Lines with answers to the job files of a folder, as another program writes them."""
    stub, answers = StubServer(), []
    for path in sorted((work / "generate").glob("jobs*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            response = {"status_code": 200, "body": stub.answer(row["body"])}
            answers.append({"custom_id": row["custom_id"], "response": response, "error": None})
    return answers


def test_job_files_cover_the_rows_of_earlier_calls(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "w"
    assert run(manifest, work, "--jobs-only", "--rows", "0:2") == 0
    assert "earlier calls" not in capsys.readouterr().out
    assert run(manifest, work, "--jobs-only", "--rows", "7:9") == 0
    assert "job files cover the rows of this and earlier calls: 0:2, 7:9" in capsys.readouterr().out
    assert [answer["custom_id"].partition(".")[0] for answer in answers_to(work)] == ["0", "1", "7", "8"]
    with pytest.raises(RuntimeError, match=r"m\.jsonl has 12 lines, so no row of 100:; rows"):
        run(manifest, work, "--jobs-only", "--rows", "100:")


def test_an_import_without_rows_takes_those_of_earlier_calls(manifest: Path, tmp_path: Path) -> None:
    work = tmp_path / "w"
    for rows in ("0:2", "7:9"):
        assert run(manifest, work, "--jobs-only", "--rows", rows) == 0
    answers = answers_to(work)
    assert run(manifest, work, "--answers", write_rows(tmp_path / "a.jsonl", answers[:3])) == 3
    assert run(manifest, work, "--answers", write_rows(tmp_path / "b.jsonl", answers[3:])) == 0
    assert read_record(work / "generate")["rows"] == [[0, 2], [7, 9]]
    assert tuple(texts(work)) == (0, 1, 7, 8)
    # A new folder has no earlier calls.
    assert run(manifest, tmp_path / "new", "--answers", tmp_path / "a.jsonl") == 3
    assert read_record(tmp_path / "new/generate")["rows"] == [[0, None]]


def test_job_files_and_answers_from_elsewhere(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    assert run(manifest, work, "--jobs-only", "--shard-rows", "8") == 3
    output, errors = capsys.readouterr()
    assert "jobs-00000.jsonl: 4 requests" in output
    assert "jobs-00001.jsonl: 3 requests" in output
    assert "left out: 1 requests that cannot be made (1 x " in output
    assert "clips/none.wav" in output
    assert errors.startswith(f"{manifest}, line 5: not JSON: ")
    assert errors.count("\n") == 1
    answers = answers_to(work)
    path = write_rows(tmp_path / "out.jsonl", [*answers, answers[0], {"custom_id": "x", "response": {}}])
    assert run(manifest, work, "--answers", path) == 3
    output = capsys.readouterr().out
    assert "7 answers added, 1 already answered, 1 with an id that is not" in output
    assert "2 requests have no answer: name servers, or write them with --jobs-only" in output
    with StubServer() as server:
        assert run(manifest, tmp_path / "direct", "--server.servers", server.url) == 3
        assert run(manifest, work, "--server.servers", server.url) == 3
        assert server.sent.total() == 7
    assert texts(work) == texts(tmp_path / "direct")


@pytest.mark.parametrize("words", [("--jobs-only",), ("--answers", "out.jsonl"), ("--server.servers", "URL")])
def test_the_exit_code_tells_whether_every_clip_has_candidates(
    words: tuple[str, ...], manifest: Path, tmp_path: Path
) -> None:
    """0 for rows 7 and 8; 3 with an unreadable, a damaged or a long clip, or without an answer."""
    assert run(manifest, tmp_path / "made", "--jobs-only", "--rows", "7:11") == 0
    answers = answers_to(tmp_path / "made")
    codes = {}
    with StubServer() as server:
        options = [word.replace("URL", server.url) for word in words]
        if words[0] == "--answers":
            options[1] = str(write_rows(tmp_path / "out.jsonl", answers[:2]))
        for rows in ("7:9", "6:9", "4:9", "5:9", "10:12", "5:6"):
            codes[rows] = run(manifest, tmp_path / rows.replace(":", "-"), *options, "--rows", rows)
        if words[0] == "--answers":
            codes["7:10"] = run(manifest, tmp_path / "short", *options, "--rows", "7:10")
    assert codes.pop("7:9") == 0
    assert set(codes.values()) == {3}


def test_addresses_in_place_of_sound(manifest: Path, tmp_path: Path) -> None:
    kinds = []
    for url in ("file", "https://example.org/data/"):
        with StubServer(keep=True) as server:
            words = ("--audio-url", url, "--server.servers", server.url, "--rows", "0:3")
            assert run(manifest, tmp_path / url[:4], *words) == 0
        sounds = [body["messages"][0]["content"][0] for body in server.bodies]
        kinds.append(sorted(sound["type"] for sound in sounds))
        urls = {sound["audio_url"]["url"] for sound in sounds if sound["type"] == "audio_url"}
        start = (manifest.parent.as_uri() + "/") if url == "file" else url
        assert urls == {f"{start}clips/00000.wav", f"{start}clips/00002.wav"}
    assert kinds == [["audio_url", "audio_url", "input_audio"]] * 2  # the second clip is a part of its file


def test_a_prompt_of_the_user_with_a_system_message(manifest: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "p.txt"
    prompt.write_text("[system]\nYou hear {everything}.\n[user]\nKnown: {tags}\n")
    with StubServer(keep=True) as server:
        words = ("--prompt", prompt, "--server.servers", server.url, "--rows")
        assert run(manifest, tmp_path / "w", *words, "0:1") == 0
        assert run(manifest, tmp_path / "w", *words, "2:3") == 0
        system, user = server.bodies[0]["messages"]
        assert system == {"role": "system", "content": "You hear {everything}."}
        assert user["content"][1]["text"].startswith("Known: accent: Scottish")
        _, user = server.bodies[1]["messages"]
        assert [part["type"] for part in user["content"]] == ["input_audio"]
        prompt.write_text("Another one.")
        with pytest.raises(RuntimeError, match="was begun with another --prompt; choose"):
            run(manifest, tmp_path / "w", *words, "0:1")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--candidates", "3"], "was begun with candidates 5, not 3"),
        (["--sampling.top-k", "0"], "was begun with sampling.top_k 20, not 0; it has no answers: delete"),
        (["--seed", "1"], "was begun with seed 0, not 1"),
        (["--tags", "accent"], r"tags \['accent', 'speaking_rate', 'situational_tags'\], not \['accent'\];"),
    ],
)
def test_other_settings_are_refused(words: list[str], match: str, manifest: Path, tmp_path: Path) -> None:
    assert run(manifest, tmp_path / "w", "--jobs-only", "--rows", "0:1") == 0
    with pytest.raises(RuntimeError, match=match):
        run(manifest, tmp_path / "w", "--jobs-only", *words)
    with manifest.open("a") as file:
        file.write("\n")
    with pytest.raises(RuntimeError, match=r"begun with other content of m\.jsonl; it has no answers"):
        run(manifest, tmp_path / "w", "--jobs-only")


def test_tags_that_no_clip_has_are_named(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (manifest, tmp_path / "w", "--jobs-only", "--rows", "7:9", "--tags", "accent")
    assert run(*words, "gender", "mood", "pace") == 0
    message = "m.jsonl has the tag mood, pace (--tags); the tags are accent, gender, situational_tags"
    assert message in capsys.readouterr().err
    assert run(*words[:1], tmp_path / "v", *words[2:], "gender") == 0
    assert "warning" not in capsys.readouterr().err


def test_wrong_calls_name_the_fix(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, match in (
        ((tmp_path / "no.jsonl", tmp_path / "w"), "no.jsonl does not exist; expected a manifest"),
        ((tmp_path, tmp_path / "w"), "is a folder; expected a manifest"),
        ((manifest, tmp_path / "w", "--prompt", tmp_path / "p.txt"), "p.txt does not exist"),
    ):
        with pytest.raises(RuntimeError, match=f"^clsp_fast.caption: .*{match}"):
            run(*words)
    listed = tmp_path / "list"
    listed.write_text("clips/00000.wav\n")
    with pytest.raises(RuntimeError, match=r"list holds no usable clip \(line 1: not JSON.*such as"):
        run(listed, tmp_path / "w")
    for rows, match in (("3:4", "no lines"), ("4:5", "line 5: not JSON.*")):
        with pytest.raises(RuntimeError, match=rf"rows {rows} of .* holds no usable clip \({match}\)"):
            run(manifest, tmp_path / "w", "--rows", rows)
    with pytest.raises(RuntimeError, match=r"m\.jsonl has 12 lines, so no row of 50:99; rows"):
        run(manifest, tmp_path / "w", "--rows", "50:99")
    assert run(manifest, tmp_path / "w", "--shard-rows", "5") == 2
    assert "--shard-rows must be given with --jobs-only" in " ".join(capsys.readouterr().err.split())
    with StubServer() as server, pytest.raises(RuntimeError, match=f"it serves {MODEL}: correct --server.mo"):
        run(manifest, tmp_path / "x", "--server.servers", server.url, model="other")
    for option, value in (("--rows", "5"), ("--rows", "7:3"), ("--audio-url", "ftp://x")):
        assert run(manifest, tmp_path / "w", option, value) == 2
        assert f"{option} must be" in capsys.readouterr().err
    assert run(manifest, tmp_path / "w") == 2
    assert "--server.servers must be the URL of at least one server" in capsys.readouterr().err


def test_help_imports_no_subcommand() -> None:
    code = (
        "import sys; from clsp_fast import caption\n"
        "try: caption.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'aiohttp', 'clsp_fast.captioning.generate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "generate" in done.stdout


def test_facts_tags_and_seeds(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a\nb")
    assert (read_facts(tmp_path / "m").lines, read_facts(tmp_path / "m").bytes) == (2, 3)
    tags = {"accent": " ", "speaking_rate": "slow\npace", "other": "x"}
    assert describe_tags(tags, ("accent", "speaking_rate", "mood")) == "speaking rate: slow pace"
    seeds = {seed_of(seed, row, part) for seed in range(5) for row in range(100) for part in range(5)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**31 for seed in seeds)


# The parent's memory would count in ru_maxrss, so the child reads its own high-water mark.
SCALE = """
import sys, time
from pathlib import Path
from clsp_fast import caption
start = time.perf_counter()
try:
    caption.main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
status = Path("/proc/self/status").read_text()
(peak,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
print(code, peak, time.perf_counter() - start)
"""


@pytest.mark.slow
@pytest.mark.multiproc
def test_ten_thousand_clips_need_no_more_memory_than_a_thousand(
    tmp_path: Path, make_clips: MakeClips
) -> None:
    clips, peaks = make_clips(tmp_path / "clips", 50), []
    with stub_process() as url:
        for count in (1_000, 10_000):
            rows = [{"id": f"clip{i}", "audio": str(clips[i % 50])} for i in range(count)]
            path, work = write_rows(tmp_path / f"{count}.jsonl", rows), tmp_path / str(count)
            words = ["generate", path, work, "--server.servers", url, "--server.model", MODEL]
            done = subprocess.run(
                [sys.executable, "-c", SCALE, *map(str, words)], capture_output=True, text=True, check=True
            )
            code, peak, seconds = map(float, done.stdout.split()[-3:])
            assert code == 0, done.stderr
            print(f"{count} clips: {count / seconds:.0f} a second, peak {peak / 1024:.0f} MiB")
            peaks.append(peak)
            assert len(texts(work)) == count
            assert peak > 0
    assert peaks[1] - peaks[0] < 5 * 1024  # KiB; the answers of 10,000 clips are 16 MB


def test_a_file_on_another_machine_is_sent_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"audio": "a.wav", "duration_s": 2.0}, {"audio": "b.wav", "start_s": 1.0, "duration_s": 2.0}]
    words = ("--audio-url", "https://example.org", "--jobs-only")
    assert (
        run(write_rows(tmp_path / "m.jsonl", rows), tmp_path / "w", *words) == 3
    )  # b.wav cannot be cut here
    (line,) = (tmp_path / "w/generate/jobs.jsonl").read_text().splitlines()
    (message,) = json.loads(line)["body"]["messages"]
    assert message["content"][0]["audio_url"] == {"url": "https://example.org/a.wav"}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command.main(["generate", "--help"])
    help_text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "If a file is not on this machine, a clip without start_s and channel counts as" in help_text
