"""Renders a chat template, in the process that `refengine.tokenizer.chat_template` starts for it."""

from __future__ import annotations

import codecs
import json
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2.debug
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def main() -> None:
    """Reads a request, and writes a list: ``{"text": ...}`` or ``{"error": ...}`` for each of "variables"."""
    request = json.load(sys.stdin)
    codecs.lookup("unicode-escape")  # as jinja2.debug above: loaded now, since no file can be opened later
    limit_process(request["address_space_bytes"], request["seconds"])
    sys.stdout.write(f"[{','.join(reply(request, variables) for variables in request['variables'])}]")


def reply(request: dict[str, Any], variables: dict[str, Any]) -> str:
    """What to write of one rendering, as JSON."""
    try:
        text = render(
            request["source"],
            variables,
            now=datetime.fromisoformat(request["now"]),
            max_output_characters=request["max_output_characters"],
        )
        return json.dumps({"text": text})
    except jinja2.TemplateSyntaxError as error:
        return json.dumps({"error": f"{error.message} (line {error.lineno})"})
    except jinja2.TemplateError as error:
        return json.dumps({"error": str(error)})
    except MemoryError:
        return json.dumps({"error": f"it needs more than {request['address_space_bytes']} bytes of memory"})
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


def limit_process(address_space_bytes: int, seconds: float) -> None:
    """Bounds this process's memory and processor time, and keeps it from opening files, where possible.

    The limit in time is for the case that nobody is left to kill the process.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, limit in (
        ("RLIMIT_AS", address_space_bytes),
        ("RLIMIT_CPU", int(seconds) + 1),
        ("RLIMIT_NOFILE", 0),
        ("RLIMIT_CORE", 0),
    ):
        try:
            resource.setrlimit(getattr(resource, name), (limit, limit))
        except (OSError, ValueError):  # macOS knows the address-space limit, but does not let it be set
            continue


def render(source: str, variables: dict[str, Any], *, now: datetime, max_output_characters: int) -> str:
    """Renders a template with what Transformers gives to chat templates.

    Raises:
        jinja2.TemplateError: the template is wrong, calls ``raise_exception``, or writes too much.
        Exception: whatever else an expression of the template raises.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    output, length = [], 0
    for chunk in environment.from_string(source).generate(variables):
        output.append(chunk)
        length += len(chunk)
        if length > max_output_characters:
            raise jinja2.TemplateError(f"it writes more than {max_output_characters} characters")
    return "".join(output)


class Generation(Extension):
    """``{% generation %}`` marks the assistant's words, for training; here, it only shows them."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag's body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models see it, where Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message: str) -> NoReturn:
    """How a template refuses a conversation."""
    raise jinja2.TemplateError(message)
