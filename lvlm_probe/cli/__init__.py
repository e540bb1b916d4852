"""The command line: ``lvlm-probe demo | record | explain | evaluate | report | methods | families | verify |
inspect | plan | import | meter | study``.

Results go to standard output (``--json``: nothing but JSON), progress and notes to standard error. Exit codes:

    0    done
    1    the answer is no: ``verify`` found a difference beyond the tolerance, or another model
    2    it cannot be done as asked: a wrong path, option, image, trace or model; the sentence says which
    3    something unexpected; ``--debug`` shows the traceback
    130  stopped with Ctrl-C; what was finished is kept

torch and transformers are imported inside the commands that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, Any

import typer

from lvlm_probe.cli.demo import demo
from lvlm_probe.cli.evaluate import evaluate, report
from lvlm_probe.cli.explain import explain
from lvlm_probe.cli.families import families
from lvlm_probe.cli.import_ import import_
from lvlm_probe.cli.inspect import inspect, verify
from lvlm_probe.cli.meter import meter
from lvlm_probe.cli.methods import methods
from lvlm_probe.cli.plan import plan
from lvlm_probe.cli.record import record
from lvlm_probe.cli.shared.terminal import guard_streams, note, safe
from lvlm_probe.cli.study import study_app
from lvlm_probe.cli.study_datasets import datasets, peek
from lvlm_probe.errors import ProbeError

__all__ = ["app", "main"]

app = typer.Typer(
    name="lvlm-probe",
    help="Which image regions made a vision-language model say these words?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start with:  lvlm-probe demo",
)


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
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere on the line.")] = False,
) -> None:
    """Which image regions made a vision-language model say these words?"""


for _command in (demo, record, explain, evaluate, report, methods, families, verify, inspect, plan):
    app.command(no_args_is_help=_command not in (demo, methods, families))(_command)
app.command(name="import", no_args_is_help=True)(import_)
app.command(no_args_is_help=True)(meter)
app.add_typer(study_app, name="study")
study_app.command()(datasets)
study_app.command(no_args_is_help=True)(peek)


def main() -> None:
    """Entry point of the ``lvlm-probe`` script: runs a command and ends every failure in a sentence."""
    guard_streams()
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if debug and not arguments:
        arguments = ["--help"]
    try:
        code = _run(arguments)
        sys.stdout.flush()
        raise SystemExit(code)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        _forget_output()
        raise SystemExit(1) from None
    except ProbeError as error:
        if debug:
            raise
        _end(str(error), 2)
    except Exception as error:
        if debug:
            raise
        _end(f"something unexpected happened, {type(error).__name__}: {error}. `--debug` shows where.", 3)


def _run(arguments: list[str]) -> int:
    """The exit code of a command; an error on the command line is shown with what stands there made safe."""
    try:
        return int(app(args=arguments, prog_name="lvlm-probe", standalone_mode=False) or 0)
    except typer.Abort:
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own errors, which typer may bring a copy of
            raise
        _show_usage(error)
        return int(error.exit_code)  # type: ignore[attr-defined]


def _show_usage(error: Any) -> None:
    from typer.rich_utils import rich_format_error

    error.message = safe(error.message)
    for name in ("option_name", "param_hint"):
        if isinstance(getattr(error, name, None), str):
            setattr(error, name, safe(getattr(error, name)))
    rich_format_error(error)


def _end(sentence: str, code: int) -> None:
    with contextlib.suppress(OSError):  # standard error is closed: there is nobody to tell
        note(sentence, kind="error")
    raise SystemExit(code) from None


def _forget_output() -> None:
    """The reader (head, less) has gone; without this, Python complains once more when it flushes at exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream of a test has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
