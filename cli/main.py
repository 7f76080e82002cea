"""The command line: parse, call a stage, show progress, translate errors. No logic lives here.

Exit codes: 0 done; 1 damage or difference found; 2 could not do it; 3 the disk is full; 4 another process of the job ended;
130 and 143 interrupted (Ctrl-C, SIGTERM), with a state that the same command continues.
"""

import signal
import sys
import traceback

import typer

import sami_cache
from cli import (
    cache_commands,
    cluster_commands,
    demo_commands,
    evaluate_commands,
    export_commands,
    finetune_commands,
    inspect_command,
    join_commands,
    probe_command,
    segment_commands,
    train_commands,
)
from sami_cache.errors import Interrupted, SamiCacheError
from sami_cache.peers import PeerError, leave, this_rank, under_torchrun

app = typer.Typer(
    name="sami-cache",
    help="Distil big vision encoders from a cache of their features that proves its own integrity.",
    epilog="Exit codes: 0 done, 1 damage or difference found, 2 could not do it, 3 disk full, 130/143 interrupted (resumable).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_commands.register(app)
cluster_commands.register(app)
inspect_command.register(app)
join_commands.register(app)
train_commands.register(app)
segment_commands.register(app)
finetune_commands.register(app)
evaluate_commands.register(app)
probe_command.register(app)
export_commands.register(app)
demo_commands.register(app)


def _version(value: bool) -> None:
    if value:
        typer.echo(sami_cache.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Entry point of `sami-cache`."""
    # A stage that holds something handles signals itself; outside of it there is nothing to finish.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _run()
    except SystemExit as end:
        if under_torchrun():
            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _run() -> None:
    try:
        app()
    except PeerError as error:
        sys.exit(error.exit_code)
    except Interrupted as error:
        sys.exit(_fail(str(error), error.exit_code))
    except SamiCacheError as error:
        sys.exit(_fail(_of_this_rank(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted.", 130))
    except OSError as error:
        sys.exit(_fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 2))
    except Exception as error:
        # Exit code 1 means damage, which a crash of ours must not claim.
        traceback.print_exc()
        bug = "this is a bug in sami-cache, not in your data; please report it with the lines above."
        sys.exit(_fail(f"{_of_this_rank(error)}: {bug}" if under_torchrun() else bug, 2))


def _of_this_rank(error: Exception) -> str:
    """What an error says; of one process of several also which one it is, and how far it came."""
    text = str(error) if isinstance(error, SamiCacheError) else f"{type(error).__name__}: {error}"
    said = ". ".join([text.removesuffix("."), *getattr(error, "__notes__", [])])
    return f"{this_rank()}: {said}" if under_torchrun() else str(error)


def _interrupt(number: int, frame: object) -> None:
    raise SystemExit(
        _fail("interrupted with nothing in hand; run the same command again to go on (train: with --resume).", 128 + number)
    )


def _fail(message: str, code: int) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the end is near, and is to be explained
    print(f"sami-cache: {message}", file=sys.stderr, flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # what is stuck now may be killed
    return code


if __name__ == "__main__":
    main()
