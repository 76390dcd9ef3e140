"""Search in a folder of embeddings: exact, sharded, with faiss; the page; folders of other models."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numerics import assert_agrees, assert_as_exact, in_float64
from sample_data import MakeClips

from clsp_fast import search as command
from clsp_fast import similarity
from clsp_fast.config import MODEL_PRESETS
from clsp_fast.embed import EmbedConfig, embed
from clsp_fast.kernels import neighbours
from clsp_fast.model import CLSP
from clsp_fast.search import Hit, Result, SearchConfig, page, search, table
from clsp_fast.storage.embedding_folder import Embeddings

TEXTS = ("A calm voice.", "She whispers, fast.")
INFINITY = r"shard-000002\.npy: .*infinity in row 5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("search")
    (root / "clips").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        samples = rng.uniform(0.01, 0.3) * rng.standard_normal(int(rng.integers(2400, 6400)))
        soundfile.write(root / f"clips/{i:05d}.wav", samples, 16000)
    (root / "clips/00007.wav").write_text("no audio")
    shutil.copy(root / "clips/00003.wav", root / "clips/00039.wav")
    source, out = str(root / "clips"), root / "embeddings"
    embed(EmbedConfig(source=source, out=out, model=str(model_folder), shard_rows=8, device="cpu"))
    return out


def run(folder: Path, model: Path, **options: Any) -> list[Result]:
    return search(SearchConfig(folder=folder, model=str(model), device="cpu", **options))


def test_search_equals_sorting_all_cosines(folder: Path, model_folder: Path) -> None:
    clips = sorted(folder.parent.glob("clips/*.wav"))
    example = str(clips[3])
    results = run(folder, model_folder, text=TEXTS, clip=(example,), k=39)
    assert [(r.kind, r.query) for r in results] == [("text", t) for t in TEXTS] + [("clip", example)]
    model = CLSP.from_pretrained(model_folder)
    good = [path for path in clips if path.name != "00007.wav"]
    plain, truth = (
        torch.cat([m.encode_text(TEXTS), m.encode_audio([example])]) @ m.encode_audio(good).T
        for m in (model, in_float64(model))
    )
    for row, result in enumerate(results):
        places = [list(map(str, good)).index(hit.audio) for hit in result.hits]
        scores = [hit.score for hit in result.hits]
        assert_as_exact(scores, plain[row, places], truth[row, places], size=len(good) ** 0.5)
        assert len(result.hits) == 39
        assert [hit.score for hit in result.hits] == sorted((h.score for h in result.hits), reverse=True)
        for hit in result.hits:
            assert hit.id == hit.audio
    best = results[2].hits[:2]
    assert {Path(hit.audio).name for hit in best} == {"00003.wav", "00039.wav"}
    assert_agrees(best[0].score, 1.0, count=8, dtype=torch.float32)
    top = run(folder, model_folder, text=TEXTS, k=5)
    assert [r.hits for r in top] == [r.hits[:5] for r in results[:2]]
    assert len(run(folder, model_folder, text=TEXTS, k=1000)[0].hits) == 39


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinity, when it interprets kernels
def test_kernels_search_all_shards_in_one_pass(
    folder: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel_device: torch.device,
) -> None:
    """On the CPU, with kernels in the interpreter: the search hands over its shards as on a card."""
    if kernel_device.type == "cuda":
        pytest.skip("the search is on the CPU, and kernels are compiled here: the tests below use the card")
    plain = run(folder, model_folder, text=TEXTS, k=9)
    monkeypatch.setattr(similarity, "_kernels", lambda *_: neighbours)
    by_kernels = run(folder, model_folder, text=TEXTS, k=9)
    for result, other in zip(plain, by_kernels, strict=True):
        assert [hit.audio for hit in result.hits] == [hit.audio for hit in other.hits]
    with pytest.raises(ValueError, match=INFINITY):
        run(with_infinity(folder, tmp_path), model_folder, text=TEXTS)


def test_both_devices_name_the_row_with_infinity(
    folder: Path, model_folder: Path, tmp_path: Path, each_device: torch.device
) -> None:
    settings = {"model": str(model_folder), "text": TEXTS, "device": each_device.type}
    with pytest.raises(ValueError, match=INFINITY):
        search(SearchConfig(folder=with_infinity(folder, tmp_path), **settings))


def with_infinity(folder: Path, target: Path) -> Path:
    """A copy of the folder with infinity in row 5 of the third shard."""
    poisoned = target / "poisoned"
    shutil.copytree(folder, poisoned)
    rows = np.load(poisoned / "shard-000002.npy")
    rows[5, 0] = np.inf
    np.save(poisoned / "shard-000002.npy", rows)
    return poisoned


@pytest.mark.usefixtures("no_tf32")
def test_both_devices_find_the_same(
    folder: Path, model_folder: Path, each_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    add = neighbours.Neighbours.add

    def recorded(self: Any, first_row: int, rows: torch.Tensor) -> None:
        calls.append(rows.device.type)
        add(self, first_row, rows)

    monkeypatch.setattr(neighbours.Neighbours, "add", recorded)
    settings = {"model": str(model_folder), "text": TEXTS, "k": 39}
    results = search(SearchConfig(folder=folder, device=each_device.type, **settings))
    expected = run(folder, model_folder, text=TEXTS, k=39)
    for result, other in zip(results, expected, strict=True):
        scores = {hit.id: hit.score for hit in other.hits}
        assert {hit.id for hit in result.hits} == scores.keys()
        values = [hit.score for hit in result.hits]
        assert values == sorted(values, reverse=True)
        # Embeddings of both devices differ by the roundings of the text tower.
        assert_agrees(
            values, [scores[hit.id] for hit in result.hits], count=1e3, dtype=np.float32, size=39**0.5
        )
    assert set(calls) == ({"cuda"} if each_device.type == "cuda" else set())


@pytest.mark.multiproc
def test_two_processes_search_their_shards(folder: Path, model_folder: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words += ["clsp_fast.search", str(folder), "--model", str(model_folder), "--text", *TEXTS]
    words += ["--k", "12", "--json", "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    shared = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    alone = run(folder, model_folder, text=TEXTS, k=12)
    assert len(shared) == len(alone)
    for result, other in zip(alone, shared, strict=True):
        assert [hit.audio for hit in result.hits] == [hit["audio"] for hit in other["hits"]]


def test_faiss_finds_the_same_when_it_is_exact(folder: Path, model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="the extra [faiss] is not installed")
    exact = run(folder, model_folder, text=TEXTS, k=6)
    file = tmp_path / "flat.index"
    for index in ("faiss:Flat", "faiss:IVF1,Flat"):
        for _ in range(2):
            results = run(folder, model_folder, text=TEXTS, k=6, index=index, index_file=file)
            assert [[h.audio for h in r.hits] for r in results] == [[h.audio for h in r.hits] for r in exact]
        file.unlink()
    assert run(folder, model_folder, text=TEXTS, k=6, index="faiss:HNSW32")[0].hits
    with pytest.raises(ValueError, match="faiss refuses Nonsense99"):
        run(folder, model_folder, text=TEXTS, index="faiss:Nonsense99")
    run(folder, model_folder, text=TEXTS, index="faiss:Flat", index_file=file)
    file.write_text("no index")
    with pytest.raises(ValueError, match=r"faiss refuses Flat, .*flat\.index"):
        run(folder, model_folder, text=TEXTS, index="faiss:Flat", index_file=file)
    import faiss

    faiss.write_index(faiss.IndexFlatIP(7), str(file))
    with pytest.raises(ValueError, match="is not the index of this folder"):
        run(folder, model_folder, text=TEXTS, index="faiss:Flat", index_file=file)


def test_an_index_of_other_embeddings_is_refused(folder: Path, model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="the extra [faiss] is not installed")
    file, source = tmp_path / "flat.index", str(folder.parent / "clips")
    flat: dict[str, Any] = {"text": TEXTS, "index": "faiss:Flat", "index_file": file}
    run(folder, model_folder, **flat)
    fix = r"remove it, and the same command builds it again, or give another --index-file"
    with pytest.raises(ValueError, match=rf"flat\.index was built as 'Flat', not 'HNSW32'; {fix}"):
        run(folder, model_folder, **flat | {"index": "faiss:HNSW32"})

    # The same list, embedded by another model of the same size, so that only the values differ.
    torch.manual_seed(7)
    model = CLSP(MODEL_PRESETS["tiny"], CLSP.from_pretrained(model_folder).tokenizer)
    model.save_pretrained(tmp_path / "model")
    embed(EmbedConfig(source=source, out=tmp_path / "out", model=str(tmp_path / "model"), device="cpu"))
    with pytest.raises(ValueError, match=rf"flat\.index was built from other embeddings .* now; {fix}"):
        run(tmp_path / "out", tmp_path / "model", **flat)

    # The same model and list, but the recordings have changed.
    replaced = tmp_path / "replaced"
    shutil.copytree(folder, replaced)
    run(replaced, model_folder, **flat)
    rows = np.load(replaced / "shard-000002.npy")
    np.save(replaced / "shard-000002.npy", rows[::-1])
    with pytest.raises(ValueError, match="other embeddings"):
        run(replaced, model_folder, **flat)

    label = tmp_path / "flat.index.json"
    for damage in (label.unlink, lambda: label.write_text("[]")):
        damage()
        with pytest.raises(ValueError, match=rf"flat\.index\.json does not say what .*{fix}"):
            run(folder, model_folder, **flat)
    file.unlink()
    assert run(folder, model_folder, **flat)[0].hits == run(folder, model_folder, **flat)[0].hits


def test_an_index_is_trained_on_no_more_shards_than_it_needs() -> None:
    class Unread:
        def __getitem__(self, part: Any) -> Any:
            raise AssertionError("was read")

    shards = [np.full((3, 2), i, np.float16) for i in range(3)]
    for count, expected in ((5, [0, 0, 0, 1, 1]), (6, [0, 0, 0, 1, 1, 1])):
        rows = command._first_rows([*shards[:2], Unread()], count)  # type: ignore[list-item]
        assert rows.dtype == np.float32
        assert rows[:, 0].tolist() == expected
    assert len(command._first_rows(shards, 100)) == 9


def test_without_faiss_the_extra_is_named(
    folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"clsp_fast\[faiss\]"):
        run(folder, model_folder, text=TEXTS, index="faiss:Flat")


def test_what_does_not_fit_is_named(
    folder: Path, model_folder: Path, tmp_path: Path, make_clips: MakeClips
) -> None:
    other = CLSP.from_pretrained(model_folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"was made with the model \w{16}\.\.\., this one is"):
        search(SearchConfig(folder=folder, text=TEXTS, device="cpu"), model=other)
    with pytest.raises(ValueError, match="give the same --model and --precision"):
        run(folder, model_folder, text=TEXTS, precision="tf32")
    with pytest.raises(FileNotFoundError, match=r"no index\.jsonl"):
        run(tmp_path, model_folder, text=TEXTS)
    with pytest.raises(command.AudioError, match=r"missing\.wav"):
        run(folder, model_folder, clip=(str(tmp_path / "missing.wav"),))
    poisoned = tmp_path / "poisoned"
    shutil.copytree(folder, poisoned)
    rows = np.load(poisoned / "shard-000002.npy")
    rows[5, 0] = np.nan
    np.save(poisoned / "shard-000002.npy", rows)
    with pytest.raises(ValueError, match=r"shard-000002\.npy.*infinity in row 5"):
        run(poisoned, model_folder, text=TEXTS)
    header, *lines = (poisoned / "index.jsonl").read_text().splitlines()
    (poisoned / "index.jsonl").write_text(
        "\n".join([header.replace('"frontend": "', '"frontend": "0'), *lines, ""])
    )
    with pytest.raises(ValueError, match="other features"):
        run(poisoned, model_folder, text=TEXTS)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.wav").write_text("no audio")
    embed(
        EmbedConfig(
            source=str(tmp_path / "bad"), out=tmp_path / "none", model=str(model_folder), device="cpu"
        )
    )
    assert len(Embeddings(tmp_path / "none")) == 0
    with pytest.raises(ValueError, match="a folder with embeddings"):
        run(tmp_path / "none", model_folder, text=TEXTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "text or clip must be at least one query"),
        ({"text": ("a",), "k": 0}, r"k must be in \[1, 1024\], got 0"),
        ({"text": ("a",), "k": 1025}, "got 1025"),
        ({"text": ("a",), "index": "hnsw"}, 'index must be "exact" or "faiss:'),
        ({"text": ("a",), "index": "faiss:"}, "index must be"),
        ({"text": ("a",), "index_file": Path("x")}, "index_file must be"),
        ({"text": ("a",), "window_s": 0.0}, "window_s must be"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(folder=Path("x"), **options)


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


EVIL = "</h2><script>alert(1)</script><img src=x onerror=alert(2)>\"'\x1b[2J\udce9"


def test_the_page_plays_every_answer_and_runs_no_script(tmp_path: Path, make_clips: MakeClips) -> None:
    (good,) = make_clips(tmp_path, 1)
    hits = [
        Hit(0.5, EVIL, str(good), 0.05, 0.1, None),
        Hit(0.25, "gone", f"{tmp_path}/{EVIL}.wav", 0.0, None, None),
    ]
    text = page([Result("text", EVIL, hits), Result("clip", str(good), [])])
    text.encode("utf-8")
    parsed = Page(text)
    assert {tag for tag, _ in parsed.tags} <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "ol",
        "li",
        "span",
        "p",
        "audio",
    }
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert "<script>alert(1)</script>" in parsed.text
    assert "\x1b" not in text
    assert "no player: " in parsed.text
    players = [attributes["src"] or "" for tag, attributes in parsed.tags if tag == "audio"]
    assert len(players) == 2
    for player, samples in zip(players, (1600, soundfile.info(good).frames), strict=True):
        kind, content = player.split(",")
        assert kind == "data:audio/wav;base64"
        wave, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
        assert (len(wave), rate) == (samples, 16000)
    whole, _ = soundfile.read(good)
    np.testing.assert_allclose(wave, whole, rtol=0, atol=2 * 2.0**-15)  # two steps of 16 bits
    (policy,) = [a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in (policy or "")
    assert "script" not in (policy or "")


@pytest.mark.timeout(600)
def test_a_browser_shows_the_page(
    tmp_path: Path, make_clips: MakeClips, open_in_browser: Callable[[Path], str]
) -> None:
    (good,) = make_clips(tmp_path, 1)
    file = tmp_path / "page.html"
    file.write_text(page([Result("text", EVIL, [Hit(0.5, EVIL, str(good), 0.0, None, None)])]))
    shown = open_in_browser(file)
    assert "<audio controls" in shown
    assert "<script>" not in shown


def test_the_table_sends_no_control_characters_to_a_terminal() -> None:
    text = table([Result("text", EVIL, [Hit(0.5, EVIL, EVIL, 1.0, 2.5, None)])])
    assert "\x1b" not in text
    assert "1-3.5 s" in text
    text.encode("utf-8")


def test_the_command_prints_and_writes(
    folder: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder), "--model", str(model_folder), "--device", "cpu", "--text", *TEXTS, "--k", "2"]
    command.main([*words, "--html", str(tmp_path / "page.html")])
    out = capsys.readouterr().out
    assert out.count("text: ") == 2
    assert out.count(".wav") == 4
    assert (tmp_path / "page.html").read_text().count("<audio") == 4
    command.main([*words, "--json"])
    first, second = capsys.readouterr().out.splitlines()
    longest = tmp_path / f"{'h' * 250}.html"  # a name can have 255 bytes
    command.main([*words, "--html", str(longest)])
    assert longest.read_text().count("<audio") == 4
    capsys.readouterr()
    assert json.loads(first)["query"] == TEXTS[0]
    assert len(json.loads(second)["hits"]) == 2
    for bad, message in ((["--model", "nowhere"], "no such folder"), (["--html", "/nowhere/x"], "nowhere")):
        with pytest.raises(SystemExit) as stop:
            command.main([*words, *bad])
        assert message in str(stop.value.code)
