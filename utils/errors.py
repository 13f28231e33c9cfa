"""What can go wrong, and the exit status each kind of failure has.

A message says place, value, what is allowed and, if there is one, the way out. Scripts print it as one line.
"""

import errno

OUT_OF_RESOURCES = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.ENOMEM, errno.EMFILE}
)
"""Numbers of an OSError that say nothing about the input: disk or memory is exhausted or broken."""


OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "Insufficient memory", "ALLOC_FAILED")
"""Words of PyTorch, OpenCV and cuDNN: only some raise a MemoryError, or a class that all their versions have."""


class SuiteError(ValueError):
    """A failure the user can act on; printed as one `error: …` line, never as a traceback."""

    exit_status = 2


class InputError(SuiteError):
    """A flag, or a file named by a flag, that cannot be used."""


class CfgError(InputError):
    """A Darknet cfg that is malformed or describes an impossible network."""


class WeightsError(InputError):
    """A .weights or .pt file that does not fit its cfg, or is damaged or foreign."""


class DataError(InputError):
    """A .data, .names or list file, image or label that cannot be used."""


class CheckpointError(SuiteError):
    """A run's own checkpoints cannot be resumed."""

    exit_status = 3


class NumericsError(SuiteError):
    """NaN or infinity where a finite number is needed."""

    exit_status = 4


class Interrupted(SuiteError):  # noqa: N818 - not an error
    """A signal ended the work at a place from which it can go on; the exit status is the shell's, 128 + signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


class ResourceError(SuiteError, OSError):
    """Disk or memory is exhausted. An OSError too, so that what can do without a file need not know who wrote it."""

    exit_status = 5


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether memory, of a GPU or of the machine, did not suffice."""
    return isinstance(failure, MemoryError) or any(words in str(failure) for words in OUT_OF_MEMORY)


class InfeasibleError(SuiteError):
    """A plan that cannot be carried out, or an equivalence that does not hold."""

    exit_status = 6
