"""Compiles what the loss launches for positive pairs, for every way of stating a problem, without a card.

The interpreter runs kernels as Python. So it accepts types that the compiler refuses, and a variant that only
the interpreter has run may not compile. Each printed line is the JSON of one compiled variant: kernel,
constants, type of the label smoothing, registers and spills.

    python tests/loss_launches.py [TARGET]
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from typing import Any

import torch

from clsp_fast.contrastive import problem
from clsp_fast.kernels import budgets, grouping, launches, loss, loss_terms, positives
from clsp_fast.loss import contrastive_loss

MODULES = (grouping, positives, loss_terms, loss)
CLIPS, TEXTS, DEPTH = 300, 701, 512


def options() -> list[dict[str, Any]]:
    """Options of the loss that launch different variants of the kernels."""
    owner, weights = torch.zeros(TEXTS, dtype=torch.int64), torch.ones(TEXTS)
    owners = [{}, {"text_owner": owner}]
    kinds = [{}, {"kind": "sigmoid", "logit_bias": torch.zeros((), requires_grad=True)}]
    smoothing = [{}, {"label_smoothing": 0.1}]
    weighted = [
        {"text_owner": owner, "weights": weights.to(torch.float16)},
        {"text_owner": owner, "weights": weights.requires_grad_(), "label_smoothing": 0.1},
    ]
    cases = [a | b | c for a, b, c in itertools.product(owners, kinds, smoothing)] + weighted
    return [*cases, {"normalize": True}, {"normalize": True, "text_owner": owner, "label_smoothing": 0.1}]


def launch_all() -> None:
    """Computes the loss and its gradient with every option. Nothing runs, so results are undefined."""
    calls = [(arguments, torch.bfloat16, (True, True)) for arguments in options()]
    calls += [({}, torch.float32, learns) for learns in ((True, True), (True, False), (False, True))]
    for arguments, dtype, learns in calls:
        texts = TEXTS if "text_owner" in arguments else CLIPS
        audio, text = (
            torch.zeros(rows, DEPTH, dtype=dtype, requires_grad=needed)
            for rows, needed in zip((CLIPS, texts), learns, strict=True)
        )
        contrastive_loss(audio, text, torch.ones(()), implementation="triton", **arguments).backward()


def main(target: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # only so that the loss takes CPU tensors: triton is imported
    problem._require_on_device = lambda condition, message: None  # nothing has computed the condition
    recorded: dict[str, list[launches.Launch]] = {name: [] for name in launches.KERNELS}
    with launches._recorded(target, recorded):
        launch_all()
    for name in (name for module in MODULES for name in module.KERNELS):
        for launch in recorded[name]:
            measured = budgets._measure(launch)
            constants = {k: v for k, v in launch.constants.items() if isinstance(v, int | float)}
            smoothing = launch.source.signature.get("smoothing")
            line = {"kernel": name, "constants": constants, "smoothing": smoothing}
            print(
                json.dumps(line | {key: measured[key] for key in ("registers", "spills", "atomics")}),
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
