"""How a model does on human speech from sources that it was not trained on, against Praat.

    python -m bench.voice_transfer prepare FOLDER --packages PACKAGES --demo CORPUS --held-out VOICE ...
    python -m clsp_fast.train FOLDER/human.json
    python -m bench.voice_transfer evaluate FOLDER/run/model FOLDER

`prepare` makes the corpus of `make human` without the held-out voices, and adds the training clips of a demo
corpus. A name that ends in "/" means all voices whose names begin with it, such as tuxpaint/. F0, syllable
rate and HNR of the held-out clips are Praat's (praat-parselmouth), not the captioner's. The sex of the game's
actors and of festvox-ru is known from the file names, that of the others is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from bench.voice_accuracy import measure_with_praat, syllables_per_s
from clsp_fast import audio, demo
from clsp_fast.config import TRAIN_PRESETS, DataConfig, TrainConfig
from clsp_fast.data.manifest import read_manifest
from clsp_fast.demo import human
from clsp_fast.evaluation import figures, voices
from clsp_fast.evaluation.tasks import tasks_from_prompts
from clsp_fast.model import CLSP


def prepare(folder: Path, packages: Path, corpus: Path, held_out: tuple[str, ...]) -> None:
    """Writes the manifests, the prompts, and a recipe for training."""
    folder = folder.absolute()
    config = human.HumanConfig(recordings=packages, held_out=held_out)
    made = human.prepare(folder / "human", config)
    print(human.describe(made))
    lines = [line for manifest in (made.train, corpus / "train.jsonl") for line in with_paths(manifest)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (folder / "test.jsonl").open("w") as file:
        for line in with_paths(made.test):
            praat = measure_with_praat(audio.load(line["audio"]))
            values = {"syllables_per_s": syllables_per_s(praat)}
            values["voiced"] = min(1.0, praat["voiced_s"] / max(praat["speech_s"], 0.1))
            values |= {key: praat[key] for key in ("f0_hz", "hnr_db") if key in praat}
            kept = {key: value for key, value in line["tags"].items() if key not in ("f0_hz", "hnr_db")}
            line["tags"] = kept | {key: f"{value:.4g}" for key, value in values.items()}
            file.write(json.dumps(line) + "\n")
    (folder / "prompts.json").write_text(json.dumps(demo.prompts()))
    recipe: TrainConfig = TRAIN_PRESETS["human"]
    data = dataclasses.replace(
        recipe.data,
        human=False,
        manifest=folder / "train.jsonl",
        validation=corpus.absolute() / "validation.jsonl",
        test=corpus.absolute() / "test.jsonl",
        zeroshot=folder / "prompts.json",
    )
    recipe = dataclasses.replace(recipe, data=data, run=folder / "run")
    (folder / "human.json").write_text(json.dumps(recipe.to_dict(), indent=1))
    print(f"python -m clsp_fast.train {folder / 'human.json'}")


def with_paths(manifest: Path) -> list[dict]:
    """The lines of a manifest, with absolute paths."""
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    return [line | {"audio": str(manifest.absolute().parent / line["audio"])} for line in lines]


def evaluate(model: str, folder: Path) -> None:
    """Prints the figures of the held-out clips."""
    clips = read_manifest(folder / "test.jsonl").clips
    tasks = tasks_from_prompts(demo.prompts())
    features = figures.features_for(DataConfig())
    result = voices.evaluate_voices(CLSP.from_pretrained(model), clips, features, tasks)
    print(voices.table(result["voices"], measured_by="Praat"))


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("folder", type=Path)
    first.add_argument("--packages", type=Path, required=True)
    first.add_argument("--demo", type=Path, required=True)
    first.add_argument("--held-out", nargs="+", required=True)
    second = commands.add_parser("evaluate")
    second.add_argument("model")
    second.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.folder, arguments.packages, arguments.demo, tuple(arguments.held_out))
    else:
        evaluate(arguments.model, arguments.folder)


if __name__ == "__main__":
    main()
