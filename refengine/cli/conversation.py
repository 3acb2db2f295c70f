"""A conversation with a model that has a chat template."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from refengine.cli.answer import Answer
from refengine.cli.generation import Generation

if TYPE_CHECKING:
    from refengine.llm import LLM


class Conversation:
    """A system message, and turns of the user and the model.

    Attributes:
        system: the system message, ``None`` for the template's own.
        context_length: tokens that the model takes at most.
    """

    def __init__(self, llm: LLM, generation: Generation, system: str | None) -> None:
        self.system = system
        self.context_length = llm.model.spec.context_length
        self._llm, self._generation = llm, generation
        self._turns: list[dict[str, str]] = []

    def ask(self, text: str) -> Answer:
        """Write the answer to a message to stdout.

        The turn is kept as far as it came, and not at all where no text did.

        Raises:
            ContextLengthError: the conversation does not fit the context.
            TemplateError: the template refuses it.
            KeyboardInterrupt: the user stopped the answer.
        """
        question = {"role": "user", "content": text}
        instructions = [] if self.system is None else [{"role": "system", "content": self.system}]
        answer = Answer(self._llm.chat_prompt([*instructions, *self._turns, question]))
        try:
            answer.show(partial(self._generation.stream, self._llm, answer.prompt_ids))
        finally:
            if answer.text:
                self._turns += [question, {"role": "assistant", "content": answer.text}]
        return answer

    def clear(self) -> None:
        """Forget the turns."""
        self._turns = []
