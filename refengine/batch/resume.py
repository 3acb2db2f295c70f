"""What of a batch is done already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refengine.batch.answer import is_fault, system_fingerprint
from refengine.batch.input_file import InputFile
from refengine.batch.output_file import OutputFile, Written
from refengine.batch.row import ID_PREFIX, Row, custom_id_key
from refengine.errors import RequestError

FORCE = "choose another output, or take --force to keep these rows and answer what is missing"


@dataclass
class Resumption:
    """What an output holds of an input.

    Attributes:
        done: bool ``[rows]``: which rows of the input are answered.
        failed: how many of these with an error.
        again: rows of the output that tell an error and are to be tried again.
        foreign: rows of the output that answer none of the input, which ``--force`` allows.
        fingerprints: of the models that answered.
    """

    done: NDArray[np.bool_]
    failed: int = 0
    again: int = 0
    foreign: int = 0
    fingerprints: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        """Rows of the input that are answered."""
        return int(self.done.sum())

    def check_model(self, fingerprint: str) -> None:
        """Refuse to go on with another model.

        Raises:
            RequestError: rows were answered by another model, or in another precision.
        """
        if others := self.fingerprints - {fingerprint}:
            raise RequestError(
                f"the output has answers of another model, precision or backend (system_fingerprint "
                f"{min(others)}, here {fingerprint}): {FORCE}"
            )


def resume(
    source: InputFile, outputs: Sequence[OutputFile], *, force: bool = False, retry: bool = False
) -> Resumption:
    """Find which rows are answered, and then cut off rows that were written in part.

    Every whole row counts, an error as well, for the row of the input with its ``custom_id``; errors of lines
    without one by their ``id``.

    Args:
        source: the input.
        outputs: the output, and the file of errors where it is another.
        force: allow rows that answer no row of the input, that answer one as it was before, or twice.
        retry: let errors not count; for `forget_errors` to remove. Their rows in the input may have changed
            since, to be mended.

    Raises:
        RequestError: an output is no batch's, or has rows that only ``force`` would allow.
    """
    found = Resumption(np.zeros(len(source), np.bool_))
    for output in outputs:
        for written in output.rows():
            if retry and _is_to_be_tried_again(source, written.row):
                found.again += 1
            else:
                _count(source, output.path, written, found, force)
    for output in outputs:
        output.cut_torn_row()
    return found


def pending(source: InputFile, found: Resumption) -> Iterator[Row]:
    """The rows that have no answer yet, in order.

    Raises:
        RequestError: the input changed since it was first read.
    """
    return (row for number, row in source.rows() if not found.done[number])


def forget_errors(source: InputFile, outputs: Sequence[OutputFile]) -> None:
    """Remove the errors that ``resume`` was told not to count, just before they are tried again.

    Raises:
        OutputError: there is no room to write an output anew; it is as it was.
    """
    for output in outputs:
        if any(_is_to_be_tried_again(source, written.row) for written in output.rows()):
            output.remove(lambda row: _is_to_be_tried_again(source, row))


def _is_to_be_tried_again(source: InputFile, row: Mapping[str, Any]) -> bool:
    """Whether a row of an output tells an error, of the input or of a line without a custom_id."""
    if not is_fault(row):
        return False
    custom_id = row["custom_id"]
    return not isinstance(custom_id, str) or source.find(custom_id_key(custom_id)) is not None


def _count(source: InputFile, path: Path, written: Written, found: Resumption, force: bool) -> None:
    row, where = written.row, f"line {written.line} of {path}"
    custom_id, digest = row["custom_id"], _digest(str(row["id"]))
    number = source.find(custom_id_key(custom_id) if isinstance(custom_id, str) else digest)
    if not force:
        if number is None:
            raise RequestError(f"{where} (custom_id {custom_id!r}) answers no row of {source.path}: {FORCE}")
        if found.done[number]:
            raise RequestError(f"{where} answers custom_id {custom_id!r} a second time: {FORCE}")
        if not source.says(number, digest):
            raise RequestError(
                f"{where} answers custom_id {custom_id!r}, but line {source.lines[number]} of {source.path} "
                f"asks something else by now: {FORCE}"
            )
    if number is None:
        found.foreign += 1
    elif not found.done[number]:
        found.done[number] = True
        found.failed += is_fault(row)
        if (fingerprint := system_fingerprint(row)) is not None:
            found.fingerprints.add(fingerprint)


def _digest(id: str) -> bytes:
    """The digest in an id; one of no row where it holds none."""
    try:
        digest = bytes.fromhex(id.removeprefix(ID_PREFIX))
    except ValueError:
        return bytes(16)
    return digest if len(digest) == 16 else bytes(16)
