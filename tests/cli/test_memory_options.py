"""Options for memory: amounts, limits, the report, several samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

import refengine
import refengine.errors
from refengine.cli.commands import refengine as commands
from refengine.cli.sizes import size
from refengine.config import EngineConfig

Run = Callable[..., Result]

HOT = ("--temp", "50", "--seed", "3")


def as_json(run: Run, *args: str, **kwargs: Any) -> dict[str, Any]:
    result = run("run", *args, "--json", **kwargs)
    assert (result.exit_code, result.stderr) == (0, "")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 * 1024**3),
        ("2G", 2_000_000_000),
        ("2GB", 2_000_000_000),
        ("500M", 500_000_000),
        ("1.5GiB", 3 * 2**29),
        ("0.1 kib", 102),
        (" 64 mIb ", 64 * 2**20),
        ("1ti", 2**40),
        (".5k", 500),
        ("67108864", 67_108_864),
        ("0", 0),
        ("12b", 12),
    ],
)
def test_an_amount_is_read_as_written(text: str, expected: int) -> None:
    """GiB is binary, GB and G are decimal, and a number alone is bytes."""
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "2X", "-1", "1e9", "2 GiB 3", "1,5G", "nan", "٣GB"])
def test_what_is_no_amount_is_told_with_examples(text: str) -> None:
    """The error shows how amounts are written."""
    with pytest.raises(click.BadParameter, match="2GiB"):
        size(text)


def test_a_wrong_amount_is_wrong_usage(run: Run) -> None:
    """It names the option."""
    result = run("run", "alphabet.gguf", "Hi", "--memory", "2X")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--memory" in result.stderr
    assert "2GiB" in result.stderr


@pytest.mark.parametrize("command", ["run", "chat", "logits"])
def test_the_options_reach_the_engine(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Every option is a field of the engine's config; an engine for one answer has one sequence."""
    asked: list[EngineConfig] = []

    def load(*_: object, config: EngineConfig, **__: object) -> None:
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("refengine.llm.load", load)
    options = """--memory 1GiB --kv-dtype float16 --weight-cache 3MB --reserve 64 --token-budget 96
                 --kv-tokens 320 --check --policy float64 --fallback""".split()  # noqa: SIM905
    result = run(command, "alphabet.gguf", *options, stdin="Hi\n")
    assert (result.exit_code, len(asked)) == (130, 1)
    assert asked[0] == EngineConfig(
        policy="float64",
        kv_dtype="float16",
        token_budget=96,
        max_sequences=1,
        logit_rows=64 if command == "logits" else None,
        kv_tokens=320,
        memory=2**30,
        weight_cache=3_000_000,
        reserve=64,
        prefix_cache=command == "chat",
        check=True,
        fallback=True,
    )


def test_the_help_groups_the_options(run: Run) -> None:
    """Options that belong together stand under one heading; arguments are in the usage line alone."""
    text = run("run", "--help").stdout
    blocks = {block.split(":")[0]: block for block in text.split("\n\n") if not block.startswith(" ")}
    assert "--temperature" in blocks["Answer"]
    for option in ("--memory", "--kv-dtype", "--weight-cache", "--reserve", "--check", "--flight-recorder"):
        assert option in blocks["Memory"]
        assert option not in blocks["Options"]
    assert "MODEL" not in blocks["Options"]


def test_a_limit_that_is_too_small_is_told_before_loading(run: Run) -> None:
    """The error says what would do, and what would need less; nothing is on stdout."""
    result = run("run", "alphabet.gguf", "Hi", "--memory", "1MB")
    assert (result.exit_code, result.stdout) == (11, "")
    assert "needed" in result.stderr
    assert "--token-budget" in result.stderr


def test_answers_do_not_depend_on_what_may_be_held(run: Run) -> None:
    """Under a limit, with weights decoded as they are used and books verified, the answer is the same."""
    plain = as_json(run, "alphabet.gguf", "Hi", "--logprobs", "2")
    for options in (["--memory", "80MB"], ["--weight-cache", "0"], ["--reserve", "64", "--check"]):
        answer = as_json(run, "alphabet.gguf", "Hi", "--logprobs", "2", *options)
        assert (answer["text"], answer["logprobs"]) == (plain["text"], plain["logprobs"])


def test_the_report_compares_plan_and_measurement(run: Run) -> None:
    """Planned bytes are measured bytes, purpose by purpose, and everything goes back at the end."""
    result = run("run", "alphabet.gguf", "Hi", "--memory-report")
    assert result.stdout == "abcdefghijklmnopqrstuvwxyz.\n"
    lines = {line.split("  ")[0]: line for line in result.stderr.splitlines()}
    for purpose in ("weights, decoded", "weights, as stored", "arena", "logits", "KV cache", "engine"):
        assert "equal" in lines[purpose]
    assert lines["KV cache"].endswith(" 0 B")
    for name in ("process (RSS)", "blocks", "sharing", "waste", "fragmentation", "layers", "requests"):
        assert name in lines


@pytest.mark.parametrize(
    "options", [[], ["--kv-dtype", "float16"], ["--kv-dtype", "int8"], ["--weight-cache", "0"]]
)
@pytest.mark.parametrize(("prompt", "tokens"), [("Hi", 1), ("Hi", 20), ("x" * 300, 5)])
def test_the_report_in_json(run: Run, options: list[str], prompt: str, tokens: int) -> None:
    """The plan's bytes are the peak's, whatever the prompt, the answer and the precision."""
    answer = as_json(
        run, "digits.gguf", prompt, "-n", f"{tokens}", "--memory-report", "--token-budget", "64", *options
    )
    memory = answer["memory"]
    assert set(memory["difference"].values()) == {0}
    peak = memory["peak"]
    assert peak["engine"] == sum(peak[name] for name in ("weights", "mapped", "arena", "logits", "kv_cache"))
    assert memory["now"]["kv_cache"] == 0
    if tokens > 1:
        fullest = memory["fullest"]
        assert sum(fullest["requests"].values()) > 0
        assert sum(fullest["kv"]["blocks_in_use"]) > 0


def test_samples_come_one_after_another(run: Run) -> None:
    """Each under a heading; JSON lists what single runs with the next seeds give."""
    result = run("run", "alphabet.gguf", "Hi", "--samples", "2", "-n", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "--- 1 of 2 ---\nabc\n--- 2 of 2 ---\nabc\n"
    several = as_json(run, "alphabet.gguf", "Hi", *HOT, "--samples", "3", "-n", "12")
    assert "text" not in several
    singles = [
        as_json(run, "alphabet.gguf", "Hi", "--temp", "50", "--seed", str(3 + i), "-n", "12")
        for i in range(3)
    ]
    for sample, single in zip(several["samples"], singles, strict=True):
        assert sample == {name: single[name] for name in sample}
    assert several["statistics"]["generated_tokens"] == sum(len(s["token_ids"]) for s in several["samples"])
    assert len({s["text"] for s in several["samples"]}) == 3


def test_samples_share_the_prompt(run: Run) -> None:
    """Three samples of a long prompt hold its blocks once, less than was planned for three."""
    answer = as_json(run, "digits.gguf", "x" * 400, "--samples", "3", "-n", "4", "--memory-report")
    kv = answer["memory"]["fullest"]["kv"]
    assert kv["sharing_ratio"] > 2.5
    assert sum(kv["shared_blocks"]) > 20
    assert answer["memory"]["difference"]["kv_cache"] < 0


@pytest.mark.parametrize("samples", ["0", "-1", "many"])
def test_a_wrong_number_of_samples(run: Run, samples: str) -> None:
    """At least one answer is wanted."""
    assert run("run", "alphabet.gguf", "Hi", "--samples", samples).exit_code == 2


def test_sample_many(models: Path) -> None:
    """The samples in order; each ends for a reason of its own, and is what ``generate`` with its seed gives."""
    llm = refengine.load(str(models / "alphabet.gguf"))
    options: dict[str, Any] = {"temperature": 3.0, "max_tokens": 24}
    samples = llm.sample_many("stu", 6, seed=5, **options)
    assert samples == [llm.generate("stu", seed=5 + i, **options) for i in range(6)]
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    assert llm.generate("stu", max_tokens=3).text == "vwx"
    assert llm.engine.memory().current.kv_cache == 0
    with pytest.raises(refengine.errors.RequestError, match="samples"):
        llm.sample_many("stu", 17, max_tokens=1)


def test_a_stream_of_samples_names_each(models: Path) -> None:
    """Outputs of all samples come, each with its number, until all have ended; closing aborts them all."""
    llm = refengine.load(str(models / "alphabet.gguf"))
    outputs = list(llm.stream("stu", samples=3))
    texts = ["".join(o.text for o in outputs if o.sample == i) for i in range(3)]
    assert texts == ["vwxyz."] * 3
    stream = llm.stream("stu", samples=3)
    next(stream)
    stream.close()
    assert not llm.engine.has_work
    assert llm.engine.memory().current.kv_cache == 0


def test_a_second_turn_computes_only_what_is_new(run: Run) -> None:
    """In a chat, blocks of the conversation so far are kept; with --no-prefix-cache they are not."""
    turns = "A first question of some length.\nAnd a second.\n"
    kept = run("chat", "alphabet.gguf", "--verbose", stdin=turns)
    anew = run("chat", "alphabet.gguf", "--verbose", "--no-prefix-cache", stdin=turns)
    assert kept.stdout == anew.stdout
    first, second = [line for line in kept.stderr.splitlines() if line.startswith("prompt")]
    assert "kept" not in first
    assert "64 of them kept from before" in second
    assert "kept" not in anew.stderr


def test_options_of_memory_have_the_library_s_defaults() -> None:
    """What is not said on the command line is what ``EngineConfig`` says."""
    command = commands.get_command(click.Context(commands), "run")
    assert command is not None
    defaults = command.make_context("run", ["a model"]).params
    for name in (
        "kv_dtype",
        "token_budget",
        "kv_tokens",
        "memory",
        "weight_cache",
        "reserve",
        "check",
        "fallback",
    ):
        assert defaults[name] == getattr(EngineConfig(), name), name
