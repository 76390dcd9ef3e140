"""Prints what the launchers would compile, as JSON lines: target, dtype, kernel -> keys of its compilations.

Each line holds the keys for three pairs of sizes. They must not depend on the sizes.
"""

from __future__ import annotations

import itertools
import json

from clsp_fast.kernels._launch import TARGETS
from clsp_fast.kernels.launches import NAMES, launches

SIZES = ((300, 701), (1, 1), (304, 4096))


def main() -> None:
    for target, dtype in itertools.product(TARGETS, NAMES):
        keys = [
            {
                name: sorted(launch.key for launch in compiled)
                for name, compiled in launches(target, dtype, *sizes).items()
            }
            for sizes in SIZES
        ]
        print(json.dumps({"target": target, "dtype": dtype, "keys": keys}))


if __name__ == "__main__":
    main()
