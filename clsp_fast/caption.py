"""Captions for recordings that have none: `python -m clsp_fast.caption SUBCOMMAND`.

`offline` needs no server: it measures recordings and describes them. If another subcommand is stopped, the
same command continues its work. The exit code is 0, or 3 if some clips could not be done. All exit codes are
listed in docs/captions.md.
"""

from __future__ import annotations

import importlib
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from clsp_fast import console

SUBCOMMANDS = {
    "offline": (
        "clsp_fast.captioning.offline",
        "Measures recordings and describes them, without a server.",
    ),
    "tags": (
        "clsp_fast.captioning.tags",
        "Describes recordings by the tags of their manifest, without hearing them.",
    ),
    "generate": (
        "clsp_fast.captioning.generate",
        "Asks an audio language model for candidate captions of each clip.",
    ),
    "verify": (
        "clsp_fast.captioning.verify",
        "Asks a language model whether candidates hold what a caption must not hold.",
    ),
    "filter": (
        "clsp_fast.captioning.filter",
        "Keeps the candidates that break no rule, and writes a manifest that training reads.",
    ),
    "judge": (
        "clsp_fast.captioning.judge",
        "Lets an audio language model score captions, or compare those of two manifests.",
    ),
    "report": (
        "clsp_fast.captioning.report",
        "Says what was kept and dropped by which rule, how long the captions are, and what they cost.",
    ),
}
"""Name -> the module with a function of this name, and what it does, in one line. The function returns the
exit code or None. Its options are its parameters, or the fields of a dataclass if it has only `config`."""


def _description(name: str) -> Callable[[], None]:
    """Stands for a subcommand that is only listed, so that its module is not imported."""

    def described() -> None:
        pass

    described.__doc__ = SUBCOMMANDS[name][1]
    return described


def _run(words: list[str]) -> int | None:
    """Parses the words and calls the subcommand's function."""
    import tyro

    options: dict[str, Callable[..., Any]] = {name: _description(name) for name in SUBCOMMANDS}
    config_class: type | None = None
    if words and words[0] in SUBCOMMANDS:
        name = words[0]
        function = getattr(importlib.import_module(SUBCOMMANDS[name][0]), name)
        config_class = typing.get_type_hints(function).get("config")
        options[name] = function if config_class is None else config_class
    result = tyro.extras.subcommand_cli_from_dict(
        options,
        args=words,
        prog="python -m clsp_fast.caption",
        description=__doc__,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    code: int | None = result if config_class is None else function(result)
    return code


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    from clsp_fast.captioning.client import ServerError
    from clsp_fast.captioning.jobs import Stopped
    from clsp_fast.storage.files import FolderInUse

    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
    except (OSError, ValueError, ImportError, FolderInUse, ServerError) as error:
        sys.exit(f"clsp_fast.caption: {error}")
    except Stopped as stopped:
        print(f"clsp_fast.caption: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        print("clsp_fast.caption: stopped by SIGINT; the same command continues the work", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
