"""Batches: a file of requests in, a file of answers out, in OpenAI's batch format.

Source: OpenAI API reference, "Batch": *the request input object* and *the request output object*
(https://platform.openai.com/docs/api-reference/batch/request-input, …/request-output); the bodies are those
of *Create chat completion* and *Create completion* there.
"""

from refengine.batch.answer import Teller
from refengine.batch.answering import BatchRun, Tally
from refengine.batch.body import Prepared, prepare
from refengine.batch.fingerprint import fingerprint
from refengine.batch.input_file import InputFile
from refengine.batch.output_file import OutputFile
from refengine.batch.read_ahead import ReadAhead
from refengine.batch.resume import Resumption, forget_errors, pending, resume
from refengine.batch.row import Fault, Row, parse_row

__all__ = [
    "BatchRun",
    "Fault",
    "InputFile",
    "OutputFile",
    "Prepared",
    "ReadAhead",
    "Resumption",
    "Row",
    "Tally",
    "Teller",
    "fingerprint",
    "forget_errors",
    "parse_row",
    "pending",
    "prepare",
    "resume",
]
