"""Captions for recordings that have none: `python -m clsp_fast.caption SUBCOMMAND`.

`offline` needs no server: it measures recordings and describes them. If another subcommand is stopped, the
same command continues its work. The exit code is 0, or 3 if some clips could not be done. All exit codes are
listed in docs/captions.md.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from clsp_fast import console
from clsp_fast.checks import WrongValue

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


def _unchecked(config_class: type) -> type:
    """A subclass of a configuration that accepts all values. The metavars of positional arguments are their
    names in capitals.

    tyro reports an error of the original class with internal names. Therefore `_checked` checks the values.
    """
    import tyro

    fields: list[Any] = []
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            section = _unchecked(typing.cast(type, hint))
            default = section(**vars(typing.cast(Any, field).default_factory()))
            fields.append((field.name, section, dataclasses.field(default=default)))
        elif field.name in _required(config_class):
            fields.append((field.name, Annotated[hint, tyro.conf.arg(metavar=field.name.upper())]))
    return dataclasses.make_dataclass(
        config_class.__name__,
        fields,
        bases=(config_class,),
        namespace={"__post_init__": lambda self: None, "__doc__": config_class.__doc__},
        frozen=True,
        kw_only=True,
    )


def _checked(config_class: type, parsed: Any) -> Any:
    """The configuration with the values of an instance of `_unchecked(config_class)`.

    Raises:
        WrongValue: a value is wrong.
    """
    hints = typing.get_type_hints(config_class)
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(config_class)}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _checked(typing.cast(type, hints[name]), value)
    return config_class(**values)


def _with_metavars(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function for tyro. The metavars of positional arguments are their names in capitals."""
    import tyro

    @functools.wraps(function)
    def renamed(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    hints = typing.get_type_hints(function)
    for name in _required(function):
        hints[name] = Annotated[hints[name], tyro.conf.arg(metavar=name.upper())]
    renamed.__annotations__ = hints
    renamed.__dict__["__signature__"] = inspect.signature(function)
    del renamed.__dict__["__wrapped__"]  # tyro would read the annotations there
    return renamed


def _required(function: Callable[..., Any]) -> list[str]:
    """The parameters without a default. They are positional arguments of the subcommand."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty]


def _run(words: list[str]) -> int | None:
    """Parses the words and calls the subcommand's function. WrongValue names the option as it is typed."""
    import tyro

    options: dict[str, Callable[..., Any]] = {name: _description(name) for name in SUBCOMMANDS}
    config_class: type | None = None
    positional: list[str] = []
    if words and words[0] in SUBCOMMANDS:
        name = words[0]
        function = getattr(importlib.import_module(SUBCOMMANDS[name][0]), name)
        config_class = typing.get_type_hints(function).get("config")
        options[name] = _with_metavars(function) if config_class is None else _unchecked(config_class)
        positional = _required(config_class or function)
    try:
        result = tyro.extras.subcommand_cli_from_dict(
            options,
            args=words,
            prog="python -m clsp_fast.caption",
            description=__doc__,
            config=(tyro.conf.PositionalRequiredArgs,),
        )
        code: int | None = result if config_class is None else function(_checked(config_class, result))
    except WrongValue as error:
        name, must, rest = str(error).partition(" must ")
        option = name.upper() if name in positional else f"--{name.replace('_', '-')}"
        raise WrongValue(f"{option}{must}{rest}") from error
    return code


def _describe_os_error(error: OSError) -> str:
    """What is wrong with which file, and what to do."""
    from clsp_fast.storage.files import DiskFull

    if error.filename is None or isinstance(error, DiskFull):
        return str(error)
    fixes = {
        errno.ENOENT: "check the path",
        errno.EACCES: "change its permissions, or give another path",
        errno.EPERM: "change its permissions, or give another path",
        errno.EROFS: "give a path on another file system",
    }
    fix = fixes.get(error.errno or 0, "give another path")
    return f"{error.filename}: {error.strerror}; {fix}"


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    from clsp_fast.captioning.client import ServerError
    from clsp_fast.captioning.jobs import Stopped
    from clsp_fast.storage.files import FolderInUse

    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
    except WrongValue as error:
        print(f"clsp_fast.caption: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(f"clsp_fast.caption: {_describe_os_error(error)}")
    except (ValueError, ImportError, FolderInUse, ServerError) as error:
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
