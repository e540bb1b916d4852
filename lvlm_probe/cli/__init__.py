"""The command line, ``lvlm-probe``. A command is one file, named as the command, and found by itself.

``cli/NAME.py`` holds a function NAME, whose docstring is the command's help and shows an example. A name that Python
keeps for itself has an underscore behind it (``import_``). A folder is a group of commands, ``HELP`` in its
``__init__`` says of what. A module may set ``RUNS_BARE`` (without arguments the command does its work instead of
showing its help) and ``HELP`` (in place of the docstring). ``shared/`` holds what commands are made of.

Results go to standard output (``--json``: nothing but JSON), progress and notes to standard error (``--quiet``: errors
alone; ``--verbose``: what is logged too). Exit codes:

    0    done
    1    the answer is no: ``verify`` found a difference beyond the tolerance, or another model; ``doctor`` something
         that does not work
    2    it cannot be done as asked: a wrong path, option, image, trace or model; the sentence says which
    3    something unexpected; ``--debug`` shows the traceback
    130  stopped with Ctrl-C; what was finished is kept

torch and transformers are imported inside the commands that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
import typer.core

from lvlm_probe.cli.shared.options import spelled_out
from lvlm_probe.cli.shared.terminal import guard_streams, note, safe, set_verbosity
from lvlm_probe.errors import ProbeError
from lvlm_probe.files import causes

__all__ = ["app", "main"]

_ROAD = ("demo", "doctor", "record", "explain", "evaluate", "sanity", "report")
"""What a newcomer reads first in the list of commands; the others follow in the order of the alphabet."""

_ANYWHERE = {
    "--quiet": logging.ERROR,
    "-q": logging.ERROR,
    "--verbose": logging.INFO,
    "-v": logging.INFO,
    "-vv": logging.DEBUG,
    "--debug": logging.WARNING,
}
"""Options of every command, which may stand anywhere on the line, and the level of logging that each asks for."""

_WRITTEN = ("out", "page")
"""Parameters of commands that name what is written."""

_NARROWEST = 10
"""Columns below which nothing can be read; a terminal that does not know its width says 0."""

app = typer.Typer(
    name="lvlm-probe",
    help="Which image regions made a vision-language model say these words?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start with:  lvlm-probe demo",
)


class _Command(typer.core.TyperCommand):
    """A command whose help leaves its words the room: a flag is said to take nothing, a number to be N."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)
        for one in params:
            if one.param_type_name == "option" and one.metavar is None:
                limits = getattr(one, "type", one)  # typer 0.29 has an option's limits beside its default
                known = (one.default, getattr(limits, "min", None), getattr(limits, "max", None))
                kind = type(next((value for value in known if value is not None), ""))
                one.metavar = "" if one.is_flag else {int: "N", float: "X"}.get(kind)
        return params

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(args)
        rest: list[str] = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:  # completion
            _check_paths({one: ctx.params.get(one.name) for one in self.params}, words)
        return rest


def _check_paths(given: dict[Any, Any], words: list[str]) -> None:
    """Look at the paths on a command line before anything is done.

    Raises:
        ProbeError: one is an empty text, as a shell makes of a variable that is not set; or a file that is to be
            written is one that is to be read.
    """
    empty = "" in words or any(word.startswith("--") and word.endswith("=") for word in words)
    here = "." in words or any(word.startswith("--") and word.endswith("=.") for word in words)
    files: list[tuple[Any, Path]] = []
    for one, value in given.items():
        for path in value if isinstance(value, list | tuple) else [value]:
            # Before typer 0.29 paths are texts here.
            if not isinstance(path, Path) and getattr(getattr(one, "type", None), "name", "") != "path":
                continue
            if path is not None and empty and not here and Path(path) == Path():
                raise ProbeError(f"{_named(one)} is an empty text: name a path (the working directory is .)")
            if path is not None and os.path.isfile(path):
                files.append((one, Path(path)))
    for one, path in files:
        if one.name in _WRITTEN and any(path.samefile(other) for by, other in files if by.name not in _WRITTEN):
            raise ProbeError(f"{_named(one)} {path} is a file that this command reads: name another one")


def _named(one: Any) -> str:
    return str(one.opts[0] if one.param_type_name == "option" else one.metavar or one.name.upper())


def _version(wanted: bool) -> None:
    if wanted:
        from lvlm_probe._version import __version__

        typer.echo(f"lvlm-probe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results and errors.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what this package and the libraries below log; -vv: all.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks. These three may stand anywhere on the line.")
    ] = False,
) -> None:
    """Which image regions made a vision-language model say these words?"""


def _add_commands(group: typer.Typer, package: ModuleType) -> None:
    """Add the command of every module of a package, and the group of every package in it."""
    found = {item.name.rstrip("_"): item for item in pkgutil.iter_modules(package.__path__) if item.name != "shared"}
    for name in sorted(found, key=lambda name: (_ROAD.index(name) if name in _ROAD else len(_ROAD), name)):
        module = importlib.import_module(f"{package.__name__}.{found[name].name}")
        if found[name].ispkg:
            below = typer.Typer(help=module.HELP, no_args_is_help=True)
            _add_commands(below, module)
            group.add_typer(below, name=name)
        else:
            bare = getattr(module, "RUNS_BARE", False)
            add = group.command(name=name, cls=_Command, no_args_is_help=not bare, help=getattr(module, "HELP", None))
            add(spelled_out(getattr(module, found[name].name)))


_add_commands(app, sys.modules[__name__])


def main() -> None:
    """Entry point of the ``lvlm-probe`` script: runs a command and ends every failure in a sentence."""
    arguments, debug, level = _taken_out(sys.argv[1:])
    set_verbosity(level)
    guard_streams()
    if (columns := os.environ.get("COLUMNS", "")).isdigit() and int(columns) < _NARROWEST:
        del os.environ["COLUMNS"]
    try:
        code = _run(arguments)
        sys.stdout.flush()
        raise SystemExit(code)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        _forget_output(sys.stdout, sys.stderr)
        raise SystemExit(1) from None
    except ProbeError as error:
        if debug:
            raise
        _end(str(error), 2)
    except OSError as error:
        if debug:
            raise
        if error.errno in (None, errno.ENOENT, errno.ENOTDIR):  # no fault of a disk's
            _unexpected(error)
        _forget_output(sys.stdout)
        named = "" if error.filename is None else f"{error.filename}: "
        _end(named + "; ".join(causes(error)), 2)
    except Exception as error:
        if debug:
            raise
        _unexpected(error)


def _taken_out(given: list[str]) -> tuple[list[str], bool, int]:
    """The command line without what may stand anywhere on it: whether to debug, and the level of logging."""
    end = given.index("--") if "--" in given else len(given)
    said = [word for word in given[:end] if word in _ANYWHERE]
    rest = [word for word in given[:end] if word not in _ANYWHERE] + given[end:]
    level = min((_ANYWHERE[word] for word in said if word != "--debug"), default=logging.WARNING)
    return rest or (["--help"] if said else []), "--debug" in said, level


@functools.cache
def _command_line() -> Any:
    """The commands as they are parsed; made once, as typer reads the signature of every command for it."""
    return typer.main.get_command(app)


def _run(arguments: list[str]) -> int:
    """The exit code of a command; an error on the command line is shown with what stands there made safe."""
    try:
        return int(_command_line()(args=arguments, prog_name="lvlm-probe", standalone_mode=False) or 0)
    except typer.Abort:
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own errors, which typer may bring a copy of
            raise
        _show_usage(error)
        return int(error.exit_code)  # type: ignore[attr-defined]


def _show_usage(error: Any) -> None:
    from typer.rich_utils import rich_format_error

    error.message = safe(error.message) + _without_server(error)
    for name in ("option_name", "param_hint"):
        if isinstance(getattr(error, name, None), str):
            setattr(error, name, safe(getattr(error, name)))
    rich_format_error(error)


def _without_server(error: Any) -> str:
    """The way out where a command was given a server that does not take one; else empty."""
    context = getattr(error, "ctx", None)
    if getattr(error, "option_name", None) != "--server" or context is None or context.parent is None:
        return ""
    group = context.find_root().command
    taking = [name for name, one in group.commands.items() if any("--server" in param.opts for param in one.params)]
    if context.parent.command is not group:
        return f". A {context.parent.info_name} names its servers in its file: models: {{NAME: {{server: URL}}}}"
    loads = any(param.name == "model" for param in context.command.params)
    why = "needs the model itself" if loads else "has no use for a server: leave it out"
    return f". {context.info_name} {why}. Commands that take a server: {', '.join(sorted(taking))}"


def _unexpected(error: Exception) -> None:
    _end(f"something unexpected happened, {type(error).__name__}: {error}. `--debug` shows where.", 3)


def _end(sentence: str, code: int) -> None:
    with contextlib.suppress(OSError):  # standard error is closed: there is nobody to tell
        note(sentence, kind="error")
    raise SystemExit(code) from None


def _forget_output(*streams: Any) -> None:
    """The reader (head, less) has gone; without this, Python complains once more when it flushes at exit."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # a stream of a test has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
