"""`python -m cli.torchrun` is torchrun, with the same options; but how a job ended takes it one line instead of forty."""

import logging
import sys


def main() -> None:
    """Run torchrun; exit with the code of the process that ended first (128 + the signal's number where one ended it)."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # what ends the launcher is raised besides
    try:
        run(parse_args(sys.argv[1:]))
    except SignalException as stopped:  # the processes got it too, and have said what there is to say
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"exit code {failure.exitcode}" if failure.exitcode >= 0 else f"signal {failure.signal_name()}"
        print(f"torchrun: rank {rank} (pid {failure.pid}) ended first, by {how}", file=sys.stderr, flush=True)
        sys.exit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)


if __name__ == "__main__":
    main()
