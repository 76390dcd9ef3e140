"""Prints what the launchers would compile, as JSON lines: target, dtype, kernel -> keys of its compilations.

Each line holds the keys for three batches: rows, columns and label smoothing. They must not depend on these.
"""

from __future__ import annotations

import itertools
import json

from clsp_fast.kernels._launch import TARGETS
from clsp_fast.kernels.launches import NAMES, launches

BATCHES = ((300, 701, 0.1), (1, 1, 0.0), (304, 4096, 0.25))


def main() -> None:
    for target, dtype in itertools.product(TARGETS, NAMES):
        keys = [
            {
                name: sorted(launch.key for launch in compiled)
                for name, compiled in launches(target, dtype, *batch).items()
            }
            for batch in BATCHES
        ]
        print(json.dumps({"target": target, "dtype": dtype, "keys": keys}))


if __name__ == "__main__":
    main()
