"""A request on its way: its tokens, how many of them are in the cache, and the text they make."""

from __future__ import annotations

from dataclasses import replace

from refengine.ops import FloatArray
from refengine.request import FinishReason, Output, Request
from refengine.sampling import Sampled
from refengine.stopping import StopScanner
from refengine.tokenizer import StreamDecoder


class Sequence:
    """One sample of a request and what has become of it.

    Args:
        number: the sequence's number: its request's, plus ``sample``.
        request: what was asked.
        decoder: turns its tokens into text; ``None`` where nobody wants text.
        sample: which of the request's samples it is.

    Attributes:
        tokens: ids of prompt and output.
        computed: how many of these are in the KV cache.
        places: sequences that it stands for: all samples of a request until its prompt is computed.
        expected: positions that it is expected to take; ``None`` where nobody knows.
        looked_up: whether the prefix cache was asked for it.
        sampling: the request's, with a seed of this sample's own.
        prompt_logits: the logits kept so far, in order of position.
    """

    def __init__(self, number: int, request: Request, decoder: StreamDecoder | None, sample: int = 0) -> None:
        self.number, self.request, self.sample = number, request, sample
        self.tokens = list(request.prompt)
        self.computed = 0
        self.places = 1 if sample else request.samples
        more = request.expected_tokens
        self.expected = None if more is None else len(request.prompt) + more
        self.looked_up = False
        self.sampling = replace(request.sampling, seed=request.sampling.seed + sample)
        self.prompt_logits: list[FloatArray] = []
        self._decoder, self._scanner = decoder, StopScanner(request.stop)

    @property
    def request_number(self) -> int:
        """The request's number."""
        return self.number - self.sample

    @property
    def generated(self) -> int:
        """Tokens of output."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def first_logits(self) -> int:
        """The first token after which logits are wanted: the last known one, or where the request says."""
        wanted = self.request.logits_from
        return len(self.tokens) - 1 if wanted is None else wanted

    def fork(self, number: int, decoder: StreamDecoder | None) -> Sequence:
        """Another sample of the request, as far as this one."""
        child = Sequence(number, self.request, decoder, number - self.request_number)
        child.tokens, child.computed = list(self.tokens), self.computed
        return child

    def branch(
        self, number: int, decoder: StreamDecoder | None, token: int | None, seed: int | None
    ) -> Sequence:
        """Another request that goes on from here, with another last token or seed where these are given.

        Its text begins with what it generates itself.
        """
        child = Sequence(number, self.request, decoder)
        child.tokens, child.computed, child.places = list(self.tokens), self.computed, 1
        if token is not None:
            child.tokens[-1] = token
        child.sampling = self.sampling if seed is None else replace(self.sampling, seed=seed)
        return child

    def restart(self) -> None:
        """Forget what was computed, not what was generated."""
        self.computed = 0
        self.prompt_logits = []

    def accept(self, sampled: Sampled | None) -> Output:
        """Take a sampled token (none where no more may come); tells what to show and whether this ends it.

        Clauses: SMP-13, SMP-14.
        """
        if sampled is None:
            return self._end(None, "", "length")
        self.tokens.append(sampled.token)
        if sampled.token in self.request.stop_ids:
            return self._end(sampled, "", "stop")
        text, stopped = (
            self._scanner.push(self._decoder.push(sampled.token)) if self._decoder else ("", False)
        )
        if stopped:
            return Output(self.request_number, sampled, text, "stop", self.sample)
        if self.generated == self.request.max_tokens:
            return self._end(sampled, text, "length")
        return Output(self.request_number, sampled, text, sample=self.sample)

    def _end(self, sampled: Sampled | None, text: str, reason: FinishReason) -> Output:
        """The last output: with the text that was held back, unless a stop string ends that."""
        if self._decoder is not None:
            rest, stopped = self._scanner.push(self._decoder.finish())
            text += rest if stopped else rest + self._scanner.finish()
            reason = "stop" if stopped else reason
        return Output(self.request_number, sampled, text, reason, self.sample)
