"""Every error refengine raises on purpose, as one tree.

::

    RefengineError                      exit code
    ├── FormatError                     3   a model file that breaks its format, with the byte offset
    ├── UnsupportedError                4   well-formed, but not something refengine implements
    ├── ModelNotFoundError              5   no such model name or path
    ├── DownloadError                   6   the network, the registry or the disk refused
    │   └── IntegrityError              6   what arrived is not what was promised (SHA-256, size)
    ├── RequestError                    7   a request that can never be served as asked
    │   ├── ContextLengthError          7   prompt plus output exceed the context or the KV memory
    │   └── TokenIdError                7   a token id outside the vocabulary
    ├── TemplateError                   8   a chat template failed, ran too long or wrote too much
    ├── NumericalError                  9   NaN or infinity where the model's arithmetic forbids it
    ├── BackendError                    10  always says: state, what is available, why, how to mend it
    │   ├── UnknownBackendError         10
    │   ├── BackendNotInstalledError    10
    │   └── BackendFailedError          10
    ├── OutputError                     13  a file cannot be written: it exists, or the disk is full
    └── MemoryManagerError              11  the allocator's contract
        ├── MemoryLimitError            11  a model does not fit the memory it may take
        ├── OutOfBlocksError            11  no free KV block is left
        ├── BlockStateError             11  a block released twice, or used while free
        └── SequenceStateError          11  a sequence forked after its end, or begun twice

The exit code is what the command line returns for the class; 1 is an error of another kind (a bug),
2 a wrong command line, 12 findings of the conformance suite or of a replay, 130 an interrupt, 141 a closed
pipe.
"""

from __future__ import annotations

from os import PathLike


class RefengineError(Exception):
    """Base of every error refengine raises on purpose; its text says what to do."""

    exit_code = 1


class FormatError(RefengineError):
    """A model file breaks its format.

    Attributes:
        path: the file, where known.
        offset: byte offset in the file of the field that is wrong, or ``None`` where no single byte is.
    """

    exit_code = 3

    def __init__(
        self, message: str, *, path: str | PathLike[str] | None = None, offset: int | None = None
    ) -> None:
        self.path = path
        self.offset = offset
        where = "".join(
            [
                f" at byte {offset}" if offset is not None else "",
                f" in {path}" if path is not None else "",
            ]
        )
        super().__init__(f"{message}{f' ({where.strip()})' if where else ''}")


class UnsupportedError(RefengineError):
    """The input is well-formed, but refengine does not implement what it asks for."""

    exit_code = 4


class ModelNotFoundError(RefengineError):
    """No model of this name or path; the text lists near matches."""

    exit_code = 5


class DownloadError(RefengineError):
    """A download failed; nothing half-made is left behind."""

    exit_code = 6


class IntegrityError(DownloadError):
    """A downloaded file is not the one that was promised."""


class RequestError(RefengineError, ValueError):
    """A request can never be served as asked."""

    exit_code = 7


class ContextLengthError(RequestError):
    """Prompt and output do not fit the model's context."""


class TokenIdError(RequestError):
    """A token id lies outside the vocabulary."""


class TemplateError(RefengineError):
    """A chat template failed, ran too long or wrote too much."""

    exit_code = 8


class NumericalError(RefengineError):
    """NaN or infinity in weights or logits."""

    exit_code = 9


class BackendError(RefengineError):
    """A backend cannot be used.

    The text always has four parts: the state, what is available, why, and the command that mends it.
    """

    exit_code = 10

    def __init__(self, *, state: str, available: str, why: str, mend: str) -> None:
        self.state, self.available, self.why, self.mend = state, available, why, mend
        super().__init__(f"{state}\n  available: {available}\n  why: {why}\n  to mend it: {mend}")


class UnknownBackendError(BackendError):
    """No backend of this name is registered."""


class BackendNotInstalledError(BackendError):
    """The backend is known, but its packages are not installed."""


class BackendFailedError(BackendError):
    """The backend is installed, but failed to load or to start."""


class OutputError(RefengineError):
    """A file cannot be written; nothing half-made is left behind, and an older one is as it was.

    A file that grows by lines, as a journal does, keeps those that are whole.
    """

    exit_code = 13


class MemoryManagerError(RefengineError):
    """The memory manager's contract was broken, or its memory is used up."""

    exit_code = 11


class MemoryLimitError(MemoryManagerError):
    """A model does not fit the memory it may take.

    Attributes:
        needed: bytes that would do.
    """

    def __init__(self, message: str, *, needed: int) -> None:
        self.needed = needed
        super().__init__(message)


class OutOfBlocksError(MemoryManagerError):
    """No free KV block is left."""


class BlockStateError(MemoryManagerError):
    """A block was released twice, or used while free."""


class SequenceStateError(MemoryManagerError):
    """A sequence was forked after its end, or begun twice."""
