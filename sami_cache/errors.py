"""The errors this library raises on purpose.

Every message says where, what was expected, what was found, and how to mend it; the command line prints the message
alone and exits with `exit_code`.
"""


class SamiCacheError(Exception):
    """Something outside the program is not as it must be: an argument, a file, a cache, a disk."""

    exit_code = 2


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
