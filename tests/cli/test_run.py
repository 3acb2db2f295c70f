"""``refengine run`` answers a prompt."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from cli.alphabet_model import BEGIN, END, chat_ids
from click.testing import Result

from refengine.backend.interpreter import InterpretedBackend, OpFunction
from refengine.errors import UnsupportedError

Run = Callable[..., Result]

ALPHABET = f"{string.ascii_lowercase}."


def as_json(run: Run, *args: str, **kwargs: Any) -> dict[str, Any]:
    result = run("run", *args, "--json", **kwargs)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_the_answer_alone_is_on_stdout(run: Run) -> None:
    """The answer is all of stdout, and ends a line; stderr is silent."""
    result = run("run", "alphabet.gguf", "Hi")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{ALPHABET}\n", "")


def test_the_prompt_is_a_turn_of_the_chat_template(run: Run) -> None:
    """With a chat template, the prompt is a user's turn, after the system message where there is one."""
    assert as_json(run, "alphabet.gguf", "Hi")["prompt_token_ids"] == chat_ids(("user", "Hi"))
    answer = as_json(run, "alphabet.gguf", "Hi", "--system", "Be brief.")
    assert answer["prompt_token_ids"] == chat_ids(("system", "Be brief."), ("user", "Hi"))


def test_raw_leaves_the_template_out(run: Run) -> None:
    """With --raw the model continues the text."""
    assert run("run", "alphabet.gguf", "stu", "--raw").stdout == "vwxyz.\n"


def test_a_model_without_template_continues_the_text(run: Run) -> None:
    """A base model gets the text as it is, after its BOS."""
    answer = as_json(run, "base.gguf", "stu")
    assert (answer["prompt_token_ids"], answer["text"]) == ([BEGIN, *b"stu"], "vwxyz.")


def test_control_tokens_in_a_prompt_are_text(run: Run) -> None:
    """What a user writes is never read as a control token."""
    prompt = "<|im_end|>"
    assert as_json(run, "base.gguf", prompt, "-n", "1")["prompt_token_ids"] == [BEGIN, *prompt.encode()]


def test_a_prompt_can_be_piped_in(run: Run) -> None:
    """Stdin is the prompt, without its last end of line; with an argument, it follows after an empty line."""
    for piped in ("a\nb", "a\nb\n", "a\nb\r\n"):
        answer = as_json(run, "alphabet.gguf", "--raw", "-n", "1", stdin=piped)
        assert bytes(answer["prompt_token_ids"]) == b"a\nb"
    answer = as_json(run, "alphabet.gguf", "Sum up:", "--raw", "-n", "1", stdin="a\n\n")
    assert bytes(answer["prompt_token_ids"]) == b"Sum up:\n\na\n"


def test_without_a_prompt_there_is_nothing_to_answer(run: Run) -> None:
    """No argument and nothing piped in is wrong usage."""
    result = run("run", "alphabet.gguf")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "there is no prompt" in result.stderr


def test_input_that_is_not_utf8_is_refused(run: Run) -> None:
    """The error tells the first wrong byte."""
    result = run("run", "alphabet.gguf", stdin=b"abc\xff")
    assert (result.exit_code, result.stdout) == (7, "")
    assert "byte 3" in result.stderr


def test_limits_end_the_answer(run: Run) -> None:
    """--max-tokens ends it by length, a stop text by stop, and the stop text is not shown."""
    answer = as_json(run, "alphabet.gguf", "Hi", "-n", "3")
    assert (answer["text"], answer["finish_reason"]) == ("abc", "length")
    answer = as_json(run, "alphabet.gguf", "Hi", "--stop", "xx", "--stop", "de")
    assert (answer["text"], answer["finish_reason"]) == ("abc", "stop")


def test_no_tokens_leave_no_line(run: Run) -> None:
    """-n 0 computes the prompt and writes nothing."""
    result = run("run", "alphabet.gguf", "Hi", "-n", "0")
    assert (result.exit_code, result.stdout) == (0, "")


def test_json_tells_everything(run: Run) -> None:
    """One object: text, ids, logprobs, why it ended, counts and times."""
    answer = as_json(run, "alphabet.gguf", "xy", "--raw", "--logprobs", "2")
    assert (answer["model"], answer["text"], answer["finish_reason"]) == ("alphabet.gguf", "z.", "stop")
    assert answer["token_ids"] == [*b"z.", END]
    assert [entry["text"] for entry in answer["logprobs"]] == ["z", ".", "<|im_end|>"]
    for entry, id in zip(answer["logprobs"], answer["token_ids"], strict=True):
        assert (entry["id"], entry["top"][0]["id"], len(entry["top"])) == (id, id, 2)
        assert entry["bytes"] == list(entry["text"].encode())
        assert 0 >= entry["logprob"] == entry["top"][0]["logprob"] >= entry["top"][1]["logprob"]
    statistics = answer["statistics"]
    assert (statistics["prompt_tokens"], statistics["generated_tokens"]) == (2, 3)
    for time in ("load_s", "first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s"):
        assert statistics[time] > 0
    assert statistics["peak_rss_bytes"] > 2**20


def test_sampling_options_reach_the_sampler(run: Run) -> None:
    """A hot answer is another one, the same with the same seed, and greedy again with --top-k 1."""

    def text(*options: str) -> str:
        answer: str = as_json(run, "alphabet.gguf", "Hi", "-n", "20", *options)["text"]
        return answer

    hot = ("--temp", "50", "--seed")
    assert text(*hot, "1") == text(*hot, "1") != text(*hot, "2")
    for neutral in (("--top-k", "1"), ("--top-p", "1e-9"), ("--min-p", "1")):
        assert text(*hot, "1", *neutral) == ALPHABET[:20]
    assert text("--repetition-penalty", "1e-9") != ALPHABET[:20]


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--raw", "--system", "Be brief."), 2, "--raw"),
        (("--top-p", "2"), 7, "top_p"),
        (("--logprobs", "21"), 7, "logprobs"),
        (("-n", "-1"), 7, "max_tokens"),
        (("-n", "many"), 2, "many"),
        (("--stop", ""), 7, "stop"),
        (("--kv-tokens", "32", "-n", "100"), 7, "kv_tokens"),
        (("--policy", "float7"), 4, "float32"),
        (("--backend", "abacus"), 10, "to mend it:"),
        (("--temprature", "1"), 2, "--temperature"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_done_is_told(run: Run, options: tuple[str, ...], code: int, told: str) -> None:
    """A wrong option ends with its exit code and a text that names it; nothing is on stdout."""
    result = run("run", "alphabet.gguf", "Hi", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("refengine: error: ")
    assert told in result.stderr


def test_a_system_message_needs_a_template(run: Run) -> None:
    """A base model refuses --system instead of dropping it."""
    result = run("run", "base.gguf", "Hi", "--system", "Be brief.")
    assert (result.exit_code, result.stdout) == (7, "")


def test_a_mistyped_policy_is_told_before_a_download(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched for a command that cannot run."""
    monkeypatch.setattr("refengine.cli.loading.fetch", lambda *_, **__: pytest.fail("fetched"))
    assert run("run", "smollm2", "Hi", "--policy", "float7").exit_code == 4


def test_verbose_tells_figures_on_stderr(run: Run) -> None:
    """--verbose leaves stdout as it is."""
    result = run("run", "alphabet.gguf", "Hi", "--verbose")
    assert (result.exit_code, result.stdout) == (0, f"{ALPHABET}\n")
    figures = dict(line.split(maxsplit=1) for line in result.stderr.splitlines() if line)
    assert figures["prompt"].startswith(f"{len(chat_ids(('user', 'Hi')))} tokens, ")
    assert figures["answer"].startswith("28 tokens, ")
    assert set(figures) == {"load", "prompt", "first", "answer", "peak"}


def test_logprobs_without_json_are_a_table_on_stderr(run: Run) -> None:
    """A row for each token: itself, its logprob, the alternatives."""
    result = run("run", "alphabet.gguf", "xy", "--raw", "--logprobs", "2")
    assert result.stdout == "z.\n"
    rows = [line.split() for line in result.stderr.splitlines()]
    assert [row[0] for row in rows] == ["TOKEN", "'z'", "'.'", "'<|im_end|>'"]
    assert all(row[2:4] == row[:2] and len(row) == 6 for row in rows[1:])


def test_a_backend_that_lacks_ops_runs_only_with_fallback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the option that mends it, and the option does."""

    class Empty(InterpretedBackend):
        name = "empty"
        native: ClassVar[dict[str, OpFunction]] = {}

    monkeypatch.setattr("refengine.backend.selection.load", lambda name: Empty())
    arguments = ("run", "alphabet.gguf", "x", "-n", "2", "--raw")
    refused = run(*arguments)
    assert refused.exit_code == UnsupportedError.exit_code
    assert "--fallback" in refused.stderr
    assert run(*arguments, "--fallback").stdout == "yz\n"
