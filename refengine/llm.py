"""The Python API: a model by name, and text out of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refengine import loader
from refengine.config import EngineConfig
from refengine.engine import Engine
from refengine.engine_plan import choose_backend
from refengine.errors import ContextLengthError, RefengineError, RequestError
from refengine.memory import FlightRecorder
from refengine.memory.heap import trim_heap
from refengine.models import Model, build
from refengine.ops import FloatArray
from refengine.request import FinishReason, Output, Request
from refengine.sampling import Sampled, SamplingParams
from refengine.tokenizer import ChatTemplate, Renderer, Tokenizer, build_tokenizer, chat_prompts

if TYPE_CHECKING:
    from refengine.engine_journal import EngineJournal

Prompt = str | Sequence[int]
"""Text, or token ids."""

Message = Mapping[str, Any]
"""``{"role": "user", "content": "…"}``."""


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    Attributes:
        text: what was generated, without the stop string that ended it.
        tokens: the sampled tokens, with logprobs where asked for.
        finish_reason: ``stop``, ``length`` or ``abort``.
        prompt_tokens: ids of the prompt as the model saw it.
    """

    text: str
    tokens: tuple[Sampled, ...]
    finish_reason: FinishReason
    prompt_tokens: tuple[int, ...]


def load(
    name: str,
    *,
    backend: str = "auto",
    config: EngineConfig | None = None,
    progress: loader.Progress | None = None,
    on_limit: Callable[[FlightRecorder, str], None] | None = None,
    journal: EngineJournal | None = None,
    chat: bool = False,
) -> LLM:
    """Load a model.

    Args:
        name: a name in the catalogue (``smollm2``), a path to a GGUF file, or ``owner/repo[:quant]`` on the
            hub; fetched on first use, verified and cached.
        backend: a backend's name, or ``auto`` for the fastest that can run this model here.
        config: limits of the engine.
        progress: told of a download's progress.
        on_limit: called with the engine's flight recorder and the reason when a limit of memory is hit.
        journal: where the engine writes down what it does; ``None`` for nowhere.
        chat: whether a conversation follows at once: the process that renders its prompt then starts beside
            the engine, where the model has a chat template.

    Raises:
        ModelNotFoundError, DownloadError, FormatError, UnsupportedError, BackendError, MemoryLimitError: see
            ``refengine.errors``.
    """
    checkpoint = loader.open(name, progress=progress)
    tokenizer = build_tokenizer(checkpoint.metadata)
    model = build(checkpoint)
    tokens, rows = tokenizer.vocabulary_size, model.spec.vocabulary_size
    if tokens != rows:
        raise checkpoint.metadata.error(
            "tokenizer.ggml.tokens", f"has {tokens} entries, but the embedding has {rows} rows"
        )
    trim_heap()
    with ExitStack() as undone:
        renderer = Renderer() if chat and tokenizer.chat_template is not None else None
        if renderer is not None:
            undone.callback(renderer.close)
        chosen = choose_backend(backend, model, config or EngineConfig())
        engine = Engine(model, chosen, config, tokenizer, on_limit=on_limit, journal=journal)
        undone.pop_all()
    return LLM(model, tokenizer, engine, renderer)


class LLM:
    """A model with its tokenizer and an engine; ``renderer`` renders the first conversations."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, engine: Engine, renderer: Renderer | None = None
    ) -> None:
        self.model, self.tokenizer, self.engine = model, tokenizer, engine
        self._renderer = renderer
        self._outputs: dict[int, deque[Output]] = {}

    def generate(self, prompt: Prompt, *, max_tokens: int | None = None, stop: Sequence[str] = (),
                 **sampling: Any) -> Completion:  # fmt: skip
        """Continue a prompt.

        Args:
            prompt: text (special tokens in it are text), or token ids.
            max_tokens: how many tokens to generate at most; ``None`` for as many as the context holds.
            stop: strings that end the output.
            sampling: fields of ``SamplingParams``; greedy by default.

        Raises:
            ContextLengthError: prompt and output do not fit the context.
            RequestError: a parameter out of range.
        """
        return self.generate_many([prompt], max_tokens=max_tokens, stop=stop, **sampling)[0]

    def generate_many(self, prompts: Sequence[Prompt], *, max_tokens: int | None = None,
                      stop: Sequence[str] = (), **sampling: Any) -> list[Completion]:  # fmt: skip
        """Continue several prompts at once; each gets what it would get alone."""
        requests = [self._request(self._ids(p), max_tokens, stop, sampling) for p in prompts]
        numbers: list[int] = []
        try:
            numbers += map(self._submit, requests)
            pairs = zip(numbers, requests, strict=True)
            return [each for number, request in pairs for each in self._complete(number, request)]
        finally:
            for number in numbers:
                self._forget(number)

    def sample_many(self, prompt: Prompt, samples: int, *, max_tokens: int | None = None,
                    stop: Sequence[str] = (), **sampling: Any) -> list[Completion]:  # fmt: skip
        """Continue a prompt several times; sample ``i`` is drawn with the seed plus ``i``.

        The prompt is computed once, and its part of the KV cache held once.

        Raises:
            ContextLengthError: prompt and output do not fit the context.
            RequestError: a parameter out of range, or more samples than ``max_sequences`` of the engine.
        """
        request = self._request(self._ids(prompt), max_tokens, stop, sampling, samples)
        return self._complete(self._submit(request), request)

    def stream(self, prompt: Prompt, *, max_tokens: int | None = None, stop: Sequence[str] = (),
               samples: int = 1, **sampling: Any) -> Generator[Output]:  # fmt: skip
        """Continue a prompt, token by token.

        The request begins with the first token asked for; closing the iterator aborts it. Of several samples
        the tokens come in turn, and each output tells its ``sample``.
        """
        request = self._request(self._ids(prompt), max_tokens, stop, sampling, samples)
        return self._run(request)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation under the model's chat template, ready for the answer.

        Names of control tokens in the messages are text: only the template can write such tokens.

        Raises:
            RequestError: the model has no chat template, or the messages are malformed.
            TemplateError: the template failed.
        """
        (ids,) = self.chat_prompts([messages])
        if isinstance(ids, RefengineError):
            raise ids
        return ids

    def chat_prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int] | RefengineError]:
        """The same for several, in about the time of one; an error stands in its conversation's place.

        Raises:
            RequestError: the model has no chat template, or messages are malformed.
        """
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            raise RequestError("this model has no chat template: give it text to continue instead")
        template = ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
        renderer, self._renderer = self._renderer, None
        try:
            return chat_prompts(tokenizer, template, conversations, renderer)
        finally:
            if renderer is not None:
                renderer.close()

    def logits(self, prompt: Prompt, *, first: int = 0) -> FloatArray:
        """Logits ``[tokens - first, vocabulary]`` after each token of a prompt from ``first`` on."""
        return self.engine.prompt_logits(self._ids(prompt), first)

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _request(
        self,
        ids: Sequence[int],
        max_tokens: int | None,
        stop: Sequence[str],
        sampling: Mapping[str, Any],
        samples: int = 1,
    ) -> Request:
        if isinstance(stop, str):
            stop = (stop,)
        if max_tokens is None:
            max_tokens = self.engine.context_length - len(ids)
            if max_tokens < 1:
                raise ContextLengthError(
                    f"the prompt has {len(ids)} tokens, and there is room for {self.engine.context_length}: "
                    "shorten the prompt"
                )
        unknown = set(sampling) - set(SamplingParams.__dataclass_fields__)
        if unknown:
            raise RequestError(
                f"unknown sampling parameter {', '.join(sorted(unknown))}; "
                f"there are {', '.join(SamplingParams.__dataclass_fields__)}"
            )
        end_ids = frozenset(self.tokenizer.end_ids)
        return Request(
            tuple(ids), max_tokens, SamplingParams(**sampling), end_ids, tuple(stop), samples=samples
        )

    def _run(self, request: Request) -> Generator[Output]:
        yield from self._follow(self._submit(request), request.samples)

    def _submit(self, request: Request) -> int:
        number = self.engine.submit(request)
        self._outputs[number] = deque()
        return number

    def _complete(self, number: int, request: Request) -> list[Completion]:
        """The samples of a request, in order."""
        samples: list[list[Output]] = [[] for _ in range(request.samples)]
        for output in self._follow(number, request.samples):
            samples[output.sample].append(output)
        return [
            Completion(
                "".join(output.text for output in outputs),
                tuple(output.sampled for output in outputs if output.sampled),
                outputs[-1].finish_reason or "abort",
                request.prompt,
            )
            for outputs in samples
        ]

    def _follow(self, number: int, samples: int) -> Generator[Output]:
        """The outputs of a request until all its samples have ended; the engine steps for all requests."""
        mine = self._outputs[number]
        try:
            while samples:
                while not mine:
                    for output in self.engine.step():
                        if output.request in self._outputs:
                            self._outputs[output.request].append(output)
                output = mine.popleft()
                if output.error is not None:
                    raise output.error
                samples -= output.finish_reason is not None
                yield output
        finally:
            self._forget(number)

    def _forget(self, number: int) -> None:
        """Drop a request, finished or not."""
        self._outputs.pop(number, None)
        self.engine.abort(number)
