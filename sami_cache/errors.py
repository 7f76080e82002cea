"""The errors this library raises on purpose.

Every message says where, what was expected, what was found, and how to mend it; the command line prints the message
alone and exits with `exit_code`.
"""


class SamiCacheError(Exception):
    """Something outside the program is not as it must be: an argument, a file, a cache, a disk."""

    exit_code = 2


def one_line(text: object, limit: int = 300) -> str:
    """Text from a file that others made, fit to be part of a message: printable, on one line, of bounded length."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text)[:limit])
    return shown if len(str(text)) <= limit else f"{shown}..."


class ImageError(SamiCacheError):
    """One image cannot be used. The message is the reason that the commit record keeps."""


class IdentityError(SamiCacheError):
    """What is asked for differs from what the cache or checkpoint was made with."""


class DamageError(SamiCacheError):
    """Bytes on disk are not the bytes that were committed."""

    exit_code = 1


class DiskFullError(SamiCacheError):
    """The disk cannot hold what is to be written."""

    exit_code = 3


class StoreError(SamiCacheError):
    """An object store refuses, or does not answer in time. It says nothing about what is stored there."""


class Interrupted(BaseException):
    """A signal stopped the run. `exit_code` is 128 + the signal's number: 143 for SIGTERM, 130 for Ctrl-C.

    Like KeyboardInterrupt no `Exception`: it strikes anywhere, also where every error means that a file is damaged. (And not a
    KeyboardInterrupt, which click turns into one exit code.)
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
