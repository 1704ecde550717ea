"""`kmq`: the three stages and their parts from the command line."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer

from .. import __version__
from ..files import stopped_in
from . import bench, checkpoint, compare, run, show, training
from .command import Command, Group
from .messages import listening, note

app = typer.Typer(cls=Group, add_completion=False, no_args_is_help=True)

REFUSED, USAGE, NOT_WRITTEN, INTERRUPTED = 1, 2, 3, 130
GOES_ON = ("run", "quantize")  # commands that go on where they were interrupted


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """K-means quantization of BERT-family models.

    Exit codes of all commands: 0 done, 1 refused, 2 usage, 3 the output cannot be written, 4 a rank died, 5 damaged files,
    130 interrupted.
    """


for command in (
    run.run, training.finetune, training.evaluate, checkpoint.quantize, checkpoint.verify, bench.bench, compare.compare,
    show.inspect, show.report,
):  # fmt: skip
    app.command(cls=Command)(command)


def main() -> None:
    """Runs the command line: a mistake of the user ends in one sentence and its exit code, Ctrl-C in 130."""
    Command.current = None
    with listening(not {"-v", "--verbose"}.isdisjoint(sys.argv)):
        sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        code = app(prog_name="kmq", standalone_mode=False)  # typer gives Ctrl-C back as an exit code
        sys.stdout.flush()
    except typer.Exit as request:
        code = request.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _refused(error)
    if code == INTERRUPTED:
        name = None if Command.current is None else Command.current.name
        kept = "; what was finished is kept, and the same command goes on from there" if name in GOES_ON else ""
        if name == "finetune" and Command.values.get("out") is not None and stopped_in(Command.values["out"]):
            kept = "; its last checkpoint is kept, and the same command with --resume goes on from there"
        print(f"\nkmq: interrupted{kept}", file=sys.stderr)
    return int(code or 0)


def _refused(error: Exception) -> int:
    """Says what is wrong, in the words of the command line, and gives the exit code."""
    command = Command.current
    if hasattr(error, "format_message"):  # a usage error of typer
        more = f"; kmq {command.name} --help shows its options" if command is not None else "; kmq --help shows the commands"
        note(error.format_message().rstrip(".") + more)
        return getattr(error, "exit_code", USAGE)
    known: tuple[Any, ...] = (ValueError, TypeError, OSError, ImportError)
    if "safetensors" in sys.modules:
        known += (sys.modules["safetensors"].SafetensorError,)
    if "kmq_kernels.checkpoint" in sys.modules:
        from ..checkpoint import LeadFailed, RankDied

        known += (LeadFailed, RankDied)
        if isinstance(error, LeadFailed):  # rank 0 has said it
            return error.exit_code
    if not isinstance(error, known):
        raise error
    if isinstance(error, OSError) and (code := _not_written(error)):
        return code
    note(command.in_words_of_the_caller(str(error)) if command is not None else str(error))
    return getattr(error, "exit_code", REFUSED)


def _not_written(error: OSError) -> int:
    """Says that the output cannot be written, where that is what happened."""
    out = Command.values.get("out")
    if out is None or error.errno is None:
        return 0
    place = os.path.realpath(os.path.dirname(os.path.abspath(out)))
    inside = error.filename is not None and os.path.realpath(os.fsdecode(error.filename)).startswith(place)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and not inside:
        return 0
    note(f"{out}: cannot be written: {error.strerror}")
    return NOT_WRITTEN
