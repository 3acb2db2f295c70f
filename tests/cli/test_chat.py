"""``refengine chat`` converses, with input piped in and with a model made of paper."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result

from refengine.cli.conversation import Conversation
from refengine.cli.generation import Generation
from refengine.errors import TemplateError
from refengine.request import Output
from refengine.sampling import Sampled, SamplingParams

Run = Callable[..., Result]

ALPHABET = f"{string.ascii_lowercase}."


class PaperModel:
    """Answers every conversation with the same texts, then does what ``afterwards`` does."""

    model = SimpleNamespace(spec=SimpleNamespace(context_length=100))

    def __init__(self, *texts: str, afterwards: BaseException | None = None) -> None:
        self.texts, self.afterwards = texts, afterwards
        self.asked: list[list[dict[str, str]]] = []
        self.closed = 0

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        self.asked.append([*messages])
        return [1, 2, 3]

    def stream(self, prompt: list[int], **_: Any) -> Iterator[Output]:
        try:
            for number, text in enumerate(self.texts):
                yield Output(0, Sampled(number, -1.0), text)
            if self.afterwards:
                raise self.afterwards
            yield Output(0, None, "", "stop")
        finally:
            self.closed += 1


def converse(model: PaperModel, system: str | None = None) -> Conversation:
    return Conversation(model, Generation(None, (), SamplingParams()), system)  # type: ignore[arg-type]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_every_turn_is_sent_with_those_before(capsys: pytest.CaptureFixture[str]) -> None:
    """The model sees the system message, then the turns in order; the answer goes to stdout."""
    model = PaperModel("Well", ", hello")
    conversation = converse(model, "Be kind.")
    conversation.ask("One")
    conversation.ask("Two")
    system = {"role": "system", "content": "Be kind."}
    assert model.asked[-1] == [system, user("One"), assistant("Well, hello"), user("Two")]
    assert capsys.readouterr() == ("Well, hello\n" * 2, "")


def test_clear_forgets_the_turns_and_keeps_the_system_message() -> None:
    """After /clear, a conversation begins anew under the same system message."""
    model = PaperModel("Yes")
    conversation = converse(model, "Be kind.")
    conversation.ask("One")
    conversation.clear()
    conversation.ask("Two")
    assert model.asked[-1] == [{"role": "system", "content": "Be kind."}, user("Two")]


def test_a_stopped_answer_stays_as_far_as_it_came() -> None:
    """What the user read is part of the conversation, and the request was aborted."""
    model = PaperModel("Once", " upon", afterwards=KeyboardInterrupt())
    conversation = converse(model)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("A story")
    assert model.closed == 1
    model.afterwards = None
    conversation.ask("Go on")
    assert model.asked[-1] == [user("A story"), assistant("Once upon"), user("Go on")]


def test_an_answer_without_text_leaves_no_turn() -> None:
    """After a failure nothing is kept, so that turns of user and model still alternate."""
    model = PaperModel(afterwards=TemplateError("no"))
    conversation = converse(model)
    with pytest.raises(TemplateError):
        conversation.ask("One")
    model.afterwards = None
    conversation.ask("Two")
    assert model.asked[-1] == [user("Two")]


def test_a_conversation_can_be_piped_in(run: Run) -> None:
    """Each line is a message; answers alone are on stdout, and the end of the input is the end."""
    result = run("chat", "alphabet.gguf", stdin="Hi\nAgain")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{ALPHABET}\n" * 2, "")


def test_empty_lines_are_no_messages(run: Run) -> None:
    """Nothing is answered to nothing."""
    assert run("chat", "alphabet.gguf", stdin="\n  \n").stdout == ""


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/help", "/system TEXT"),
        ("/system", "There is no system message."),
        ("/system Rhyme.\n/system", "Rhyme."),
        ("/clear", "forgotten"),
        ("/nonsense", "no command /nonsense"),
    ],
)
def test_commands_speak_on_stderr(run: Run, command: str, told: str) -> None:
    """A command is no message, and what it says is not on stdout."""
    result = run("chat", "alphabet.gguf", stdin=f"{command}\n")
    assert (result.exit_code, result.stdout) == (0, "")
    assert told in result.stderr


def test_bye_leaves(run: Run) -> None:
    """What follows /bye is not read."""
    assert run("chat", "alphabet.gguf", stdin="/bye\nHi\n").stdout == ""


@pytest.mark.parametrize("message", ['"""One\nTwo"""', '"""\nOne\nTwo\n"""', '"""One\nTwo'])
def test_quotes_hold_lines_together(run: Run, message: str) -> None:
    """Lines between quotes are one message; so are those after quotes that nothing closes."""
    result = run("chat", "alphabet.gguf", "--verbose", stdin=f"{message}\n")
    prompt = len("user\nOne\nTwo") + len("assistant\n") + 4  # with three control tokens and an end of line
    assert result.stdout == f"{ALPHABET}\n"
    assert f"prompt        {prompt} tokens" in result.stderr


def test_a_quoted_slash_is_no_command(run: Run) -> None:
    """Between quotes, text that begins with a slash is a message."""
    assert run("chat", "alphabet.gguf", stdin='"""/bye"""\n').stdout == f"{ALPHABET}\n"


def test_a_limit_is_told(run: Run) -> None:
    """An answer cut by --max-tokens says so."""
    result = run("chat", "alphabet.gguf", "-n", "1", stdin="Hi\n")
    assert (result.stdout, result.stderr) == ("a\n", "Cut after 1 token, as --max-tokens asks.\n")


def test_a_full_context_is_told(run: Run) -> None:
    """An answer that fills the context says so and what to do; the next message cannot be answered."""
    result = run("chat", "short.gguf", stdin="Hi\nAgain\n")
    assert result.exit_code == 7
    assert result.stdout.startswith("0123456789012")
    full, error = result.stderr.splitlines()
    assert full == "Cut: the context of 64 tokens is full. /clear begins a new conversation."
    assert error.startswith("refengine: error: the prompt has ")


def test_a_base_model_does_not_converse(run: Run) -> None:
    """Without a chat template the error says what to do instead."""
    result = run("chat", "base.gguf", stdin="Hi\n")
    assert (result.exit_code, result.stdout) == (7, "")
    assert 'refengine run base.gguf "' in result.stderr
