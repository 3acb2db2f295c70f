"""``refengine chat``: a conversation in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from refengine.cli.answer import Answer
from refengine.cli.conversation import Conversation
from refengine.cli.errors import report
from refengine.cli.figures import amount
from refengine.cli.generation import Generation
from refengine.cli.lines import Lines
from refengine.cli.loading import EngineOptions
from refengine.cli.options import (
    engine_options,
    generation_options,
    memory_option,
    model_argument,
    system_option,
    verbose_option,
)
from refengine.cli.sections import SectionedCommand
from refengine.cli.statistics import print_statistics, statistics_of
from refengine.cli.terminal import aside, say
from refengine.errors import ContextLengthError, RefengineError, RequestError

if TYPE_CHECKING:
    from refengine.llm import LLM

HELP = '''\
  /system TEXT   set the system message; without TEXT, show it
  /clear         forget the conversation, but not the system message
  /help          show this
  /bye           leave; so does Ctrl-D
  """            begin and end a message of several lines, or one that begins with /
  Ctrl-C         stop the answer; at the prompt, leave'''

NO_ROOM = "/clear begins a new conversation."


@click.command(cls=SectionedCommand)
@model_argument
@system_option
@generation_options
@engine_options
@memory_option(
    "--no-prefix-cache",
    "prefix_cache",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Compute the conversation so far anew at every turn, instead of keeping its blocks.",
)
@verbose_option
def chat(
    model: str,
    system: str | None,
    generation: Generation,
    engine: EngineOptions,
    prefix_cache: bool,
    verbose: bool,
) -> None:
    '''Converse with a model.

    The model must have a chat template. A message is a line, or several between """ and """. /help lists the
    commands. Ctrl-C stops an answer.

    \b
    Examples:
      refengine chat smollm2
      refengine chat smollm2 --system "Answer in rhymes." --temp 0.8
    '''
    converse(model, system, generation, engine, verbose, prefix_cache=prefix_cache)


def converse(
    model: str,
    system: str | None,
    generation: Generation,
    engine: EngineOptions,
    verbose: bool,
    *,
    prefix_cache: bool = True,
) -> None:
    """Load a model and converse until the user leaves.

    Every turn begins with the conversation so far: with the prefix cache, only what is new is computed.
    """
    llm, load_s = engine.adjusted(prefix_cache=prefix_cache).load(model)
    if llm.tokenizer.chat_template is None:
        raise RequestError(
            f"{model} has no chat template: it continues a text, but does not converse\n"
            f'Give it a text: refengine run {model} "Once upon a time"'
        )
    lines = Lines()
    if lines.interactive:
        aside(f"{model}, {llm.model.spec.context_length:,} tokens of context. /help lists the commands.")
    conversation = Conversation(llm, generation, system)
    while (entry := lines.read()) is not None:
        if entry.text.startswith("/") and not entry.quoted:
            if not _obey(entry.text, conversation):
                break
        elif entry.text.strip() and (answer := _ask(entry.text, conversation, lines.interactive)) and verbose:
            print_statistics(statistics_of([answer], load_s, _cached_tokens(llm)))


def _cached_tokens(llm: LLM) -> int:
    """Tokens of the last prompt that the prefix cache had."""
    admissions = (event.fields for event in reversed(llm.engine.recorder.events) if event.kind == "admit")
    cached = next(admissions, {}).get("cached")
    return cached if isinstance(cached, int) else 0


def _ask(text: str, conversation: Conversation, interactive: bool) -> Answer | None:
    """Answer a message; with a person at the other end, a failed or stopped answer is not the end."""
    try:
        answer = conversation.ask(text)
    except KeyboardInterrupt:
        if not interactive:
            raise
        say()
        aside("Stopped.")
        return None
    except RefengineError as error:
        if not interactive:
            raise
        report(error, str(error))
        if isinstance(error, ContextLengthError):
            say(NO_ROOM)
        return None
    if answer.finish_reason == "length":
        aside(_why_cut(answer, conversation.context_length))
    return answer


def _why_cut(answer: Answer, context_length: int) -> str:
    if len(answer.prompt_ids) + len(answer.sampled) >= context_length:
        return f"Cut: the context of {context_length:,} tokens is full. {NO_ROOM}"
    return f"Cut after {amount(len(answer.sampled), 'token')}, as --max-tokens asks."


def _obey(command: str, conversation: Conversation) -> bool:
    """Carry out a command; tells whether the conversation goes on."""
    name, _, argument = command.partition(" ")
    argument = argument.strip()
    if name == "/bye":
        return False
    if name == "/clear":
        conversation.clear()
        aside("The conversation is forgotten.")
    elif name == "/system" and argument:
        conversation.system = argument
        aside("The system message is set.")
    elif name == "/system":
        aside(conversation.system or "There is no system message.")
    elif name == "/help":
        say(HELP)
    else:
        say(f'There is no command {name}. /help lists them; """ begins a message that starts with /.')
    return True
