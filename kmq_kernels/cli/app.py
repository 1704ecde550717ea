"""`kmq`: the three stages and their parts from the command line."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__
from . import bench, checkpoint, show, training

app = typer.Typer(add_completion=False, no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """K-means quantization of BERT-family models."""


for command in (
    training.run, show.report, checkpoint.quantize, checkpoint.verify, training.finetune, training.evaluate, show.inspect,
    bench.bench,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Runs the command line: a mistake of the user ends in one sentence and its exit code, Ctrl-C in 130."""
    from safetensors import SafetensorError

    from ..checkpoint import LeadFailed, RankDied

    try:
        code = app(standalone_mode=False)  # typer gives Ctrl-C back as exit code 130
    except typer.Exit as request:
        code = request.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (ValueError, TypeError, OSError, ImportError, SafetensorError, LeadFailed, RankDied) as error:
        if not isinstance(error, LeadFailed):  # rank 0 has said it
            print(f"kmq: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except Exception as error:  # click's usage errors know how to show themselves
        if not hasattr(error, "show"):
            raise
        error.show()
        code = getattr(error, "exit_code", 2)
    if code == 130:
        print("\nkmq: interrupted; what was finished is kept, and the same command goes on from there", file=sys.stderr)
    sys.exit(code)
