"""Runs the numerical tests with the code paths of other processors.

`make test-machines` runs the whole matrix, and `make test` a part of it. PyTorch, MKL, oneDNN and our engine
choose code by the processor's instruction sets. Environment variables restrict them to older sets, so one
machine can stand for many. Each row of the matrix is one run of pytest. A failing row does not stop the
others. A row is skipped, with a message, if this processor lacks its instruction sets.

    python tests/machines.py [--part] [--jobs 2] [--only aten=avx2 ...] [-- arguments of pytest]
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from clsp_fast import _C

HERE = Path(__file__).parent
# All files whose tests compare floating-point results. test_numerics.py finds files that are missing here.
FILES = [
    "test_audio.py",
    "captioning/test_measure.py",
    "data/test_augment.py",
    "test_batches.py",
    "captioning/test_labels.py",
    "captioning/test_offline.py",
    "training/test_checkpoint.py",
    "sndfile/test_containers.py",
    "sndfile/test_mp3.py",
    "sndfile/test_ogg.py",
    "test_convert.py",
    "test_embed.py",
    "contrastive/test_engine.py",
    "test_engine_similarity.py",
    "test_evaluate.py",
    "evaluation/test_figures.py",
    "evaluation/test_voices.py",
    "demo/test_human.py",
    "test_export.py",
    "test_features.py",
    "test_flac.py",
    "towers/test_front.py",
    "storage/test_model_folder.py",
    "contrastive/test_gather.py",
    "test_kernel_contrastive.py",
    "test_kernel_loss.py",
    "test_kernel_loss_terms.py",
    "test_kernel_positives.py",
    "test_kernel_neighbours.py",
    "test_kernel_rank.py",
    "test_kernel_tables.py",
    "test_lhotse.py",
    "test_loss.py",
    "test_metrics.py",
    "test_model.py",
    "contrastive/test_negatives.py",
    "test_numerics.py",
    "towers/test_layers.py",
    "training/test_optim.py",
    "test_parity.py",
    "test_precision.py",
    "contrastive/test_positives.py",
    "test_resample.py",
    "towers/test_roberta.py",
    "training/test_scaled_adam.py",
    "test_score.py",
    "test_search.py",
    "test_similarity.py",
    "training/test_step.py",
    "contrastive/test_sums.py",
    "contrastive/test_triton_positives.py",
    "test_train.py",
    "towers/test_zipformer.py",
]
# Files that `make test` runs: towers, step and loss, whose results differ most between processors.
PART_FILES = [
    "towers/test_front.py",
    "test_loss.py",
    "test_model.py",
    "contrastive/test_negatives.py",
    "towers/test_layers.py",
    "contrastive/test_positives.py",
    "towers/test_roberta.py",
    "training/test_scaled_adam.py",
    "training/test_step.py",
    "towers/test_zipformer.py",
]
# Tests that take long, or that start processes with threads of their own.
LEFT_OUT = "not slow and not multiproc and not alone and not gpu and not fuzz"
# Tests of memory are left out, because each instruction set loads other pages of the libraries.
NO_MEMORY = "not memory"
SETS = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class Row:
    """A processor whose code paths are taken.

    Attributes:
        aten: instruction set of PyTorch's operators; PyTorch calls the baseline "default".
        simd: instruction set of our engine.
        threads: threads of PyTorch, MKL and our engine.
        other: further environment variables, which restrict MKL or oneDNN.
    """

    aten: str
    simd: str
    threads: int
    other: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [f"aten={self.aten}", f"simd={self.simd}", f"threads={self.threads}"]
        return " ".join(words + [f"{k}={v}" for k, v in self.other.items()])

    @property
    def environment(self) -> dict[str, str]:
        return {
            "ATEN_CPU_CAPABILITY": "default" if self.aten == "baseline" else self.aten,
            "CLSP_SIMD": self.simd,
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            # If threads waited in a loop and there were more of them than cores, they would delay the others.
            "OMP_WAIT_POLICY": "passive",
            **self.other,
        }

    def lacking(self) -> str:
        """An instruction set of the row that this processor lacks, or ""."""
        return next((s for s in (self.aten, self.simd) if s not in _C.instruction_sets()), "")


MATRIX = [
    *(Row(aten, simd, threads) for aten, simd, threads in itertools.product(SETS, SETS, (1, 2, 3))),
    # MKL without AVX and with AVX2, then the same for oneDNN.
    Row("baseline", "baseline", 2, {"MKL_CBWR": "COMPATIBLE"}),
    Row("avx2", "avx2", 2, {"MKL_CBWR": "AVX2"}),
    Row("baseline", "baseline", 2, {"DNNL_MAX_CPU_ISA": "SSE41"}),
    Row("avx2", "avx2", 2, {"DNNL_MAX_CPU_ISA": "AVX2"}),
]
PART = [
    Row("baseline", "baseline", 1, {"MKL_CBWR": "COMPATIBLE", "DNNL_MAX_CPU_ISA": "SSE41"}),
    Row("avx2", "avx2", 3, {"MKL_CBWR": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}),
]


def run(row: Row, files: list[str], arguments: list[str]) -> tuple[str, float]:
    """Runs the tests of a row. Returns the outcome in words, and the seconds."""
    if lacking := row.lacking():
        return f"skipped: this processor has no {lacking}", 0.0
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-m", LEFT_OUT, "-k", NO_MEMORY, *arguments]
    paths = [str(HERE / name) for name in files]
    settings = os.environ | row.environment
    done = subprocess.run(
        command + paths, cwd=HERE.parent, env=settings, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        print(done.stdout, done.stderr, sep="\n", flush=True)
    last = done.stdout.strip().splitlines()[-1:]
    outcome = "passed" if done.returncode == 0 else f"FAILED ({last[0] if last else done.returncode})"
    return outcome, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Runs the numerical tests with the code paths of other processors."
    )
    parser.add_argument("--part", action="store_true", help="the rows and files that `make test` runs")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name has all of these words")
    parser.add_argument("--jobs", default="2", help="processes of pytest")
    parser.add_argument("arguments", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    rows = [r for r in (PART if options.part else MATRIX) if set(options.only) <= set(r.name.split())]
    files = PART_FILES if options.part else FILES
    arguments = ["-n", options.jobs, *options.arguments] if options.jobs != "0" else options.arguments
    results = []
    for row in rows:
        results.append((row.name, *run(row, files, arguments)))
        print(f"{results[-1][0]}: {results[-1][1]}, {results[-1][2]:.0f} s", flush=True)
    width = max((len(name) for name, *_ in results), default=0)
    print(f"\n{'machine':{width}}  seconds  outcome")
    for name, outcome, seconds in results:
        print(f"{name:{width}}  {seconds:7.0f}  {outcome}")
    return int(any(outcome.startswith("FAILED") for _, outcome, _ in results) or not results)


if __name__ == "__main__":
    sys.exit(main())
