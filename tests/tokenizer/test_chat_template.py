"""Chat templates: rendered as Transformers does, and harmless whatever they hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

import refengine
from refengine.errors import RequestError, TemplateError
from refengine.tokenizer import ChatTemplate, Tokenizer
from refengine.tokenizer.chat_template import MAX_OUTPUT_CHARACTERS, MAX_SOURCE_CHARACTERS, RESERVED

HI = [{"role": "user", "content": "hi"}]

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' + tools | tojson }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user"
           and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- set content = '<think>\\n\\n</think>\\n\\n' + content %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
GEMMA3 = """
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
"""
DIALECT = """
{# a comment #}
  {% for message in messages %}
    {% if loop.index0 == 3 %}{% break %}{% endif %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% generation %}
{% set inner = 1 %}{{ message | tojson }} {{ message.content | tojson(ensure_ascii=True) }}
    {% endgeneration %}
{{ inner is defined }} {{ tools is none }} {{ documents is none }} {{ foo }} {{ ("<b>" ~ eos_token) }}
  {% endfor %}
{{ messages | tojson(indent=2) }}
{{ {'b': 1, 'a': [none, 1.5]} | tojson(sort_keys=true, separators=(',', ':')) }}
"""
TEMPLATES = {
    "Llama 3": LLAMA3,
    "Mistral": MISTRAL,
    "Qwen 3": QWEN3,
    "Gemma 3": GEMMA3,
    "the dialect": DIALECT,
}
CONVERSATIONS = {
    "one turn": HI,
    "three turns": [
        {"role": "user", "content": "  1 < 2 & 'x' \"y\"\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nÄ 漢 😀 \\n {{ messages }} {% if %}"},
        {"role": "user", "content": "\t\u2028</tool_response>"},
    ],
    "with a system prompt": [{"role": "system", "content": "Be brief."}, *HI],
    "in parts": [
        {"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]}
    ],
}


@pytest.fixture(scope="module")
def reference() -> Any:
    """A tokenizer of Transformers, for its ``apply_chat_template``."""
    return PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE()), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", [*TEMPLATES, "SmolLM2"])
def test_prompts_are_those_of_transformers(
    reference: Any, smollm2: Tokenizer, name: str, conversation: str, add_generation_prompt: bool
) -> None:
    """A template renders what Transformers renders, and fails where it fails, with the same words."""
    source = TEMPLATES.get(name) or smollm2.chat_template or ""
    messages = CONVERSATIONS[conversation]
    extra = {"enable_thinking": False} if name == "Qwen 3" else {}

    def ours() -> str:
        template = ChatTemplate(source, "<s>", "</s>")
        return template.render(messages, add_generation_prompt=add_generation_prompt, **extra)

    def theirs() -> str:
        prompt: str = reference.apply_chat_template(
            messages,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **extra,
        )
        return prompt

    prompt, refusal = _outcome(ours)
    expected, expected_refusal = _outcome(theirs)
    assert prompt == expected
    assert expected_refusal in refusal


def _outcome(render: Callable[[], str]) -> tuple[str | None, str]:
    try:
        return render(), ""
    except Exception as error:
        return None, str(error)


def test_the_clock_is_the_callers() -> None:
    """``strftime_now`` tells the time that the caller's clock shows."""
    template = ChatTemplate(
        "{{ strftime_now('%d %b %Y, %H:%M:%S.%f') }}", clock=lambda: datetime(2024, 2, 29, 1, 2, 3)
    )
    assert template.render(HI) == "29 Feb 2024, 01:02:03.000000"


def test_absent_special_tokens_are_empty() -> None:
    """Without BOS and EOS, templates that add them still work."""
    assert ChatTemplate("{{ bos_token + 'x' + eos_token }}").render(HI) == "x"


REFUSED = {
    "'a' * (2**22 + 1)": "writes more than",
    "range(10**9)": "Range too big",
    "''.__class__.__mro__[1].__subclasses__()": "unsafe",
    "cycler.__init__.__globals__.os.popen('id').read()": "unsafe",
    "joiner.__init__.__builtins__": "unsafe",
    "namespace.__init__.__globals__": "unsafe",
    "messages.append(1)": "unsafe",
    "messages[0].update(role='system')": "unsafe",
    "messages[0].__setitem__('role', 'x')": "unsafe",
    "1 / 0": "division by zero",
    "messages[7].role": "has no element 7",
    "bos_token.nothing.more": "has no attribute",
    "raise_exception('Roles must alternate!')": "Roles must alternate!",
    "undefined_function()": "'undefined_function' is undefined",
    "'a' | no_such_filter": "No filter named 'no_such_filter'",
    "'a' + 1": "can only concatenate str",
}
UNDEFINED = (
    *("''|attr('__class__')", "messages|map(attribute='__class__')|first", "'{0.__class__}'.format(1)"),
    *("lipsum.__globals__", "self.__init__", "raise_exception.__globals__", "strftime_now.__self__"),
)
HUGE = (
    *("'a' * 10**10", "'%1000000000d' % 1", "'a'.center(10**9)", "'a'.ljust(10**9)", "'a' * 10**5 * 10**5"),
    *("range(100000) | list | string * 1000", "'a' | indent(10**9, first=true)"),
)


@pytest.mark.parametrize("expression", REFUSED)
def test_what_is_not_allowed_fails(expression: str) -> None:
    """To leave the sandbox, to change the messages, or to be simply wrong is an error that says so."""
    with pytest.raises(TemplateError, match=REFUSED[expression]):
        ChatTemplate(f"{{{{ {expression} }}}}").render(HI)


@pytest.mark.parametrize("expression", UNDEFINED)
def test_internals_are_undefined(expression: str) -> None:
    """Where Jinja's sandbox answers with an undefined value, that is nothing."""
    assert ChatTemplate(f"[{{{{ {expression} }}}}]").render(HI) == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
@pytest.mark.parametrize("expression", HUGE)
def test_memory_is_bounded(expression: str) -> None:
    """A template that asks for more memory than its process may have fails."""
    with pytest.raises(TemplateError, match="needs more than 536870912 bytes of memory"):
        ChatTemplate(f"{{{{ {expression} }}}}").render(HI)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not limit open files")
def test_files_cannot_be_opened() -> None:
    """Even code that has left the sandbox can open no file: what Jinja itself would read is refused."""
    with pytest.raises(TemplateError, match="Too many open files"):
        ChatTemplate("{{ lipsum() }}").render(HI)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = 10 ** (10 ** 9) %}",
        "{% macro f(n) %}{% for i in range(99999) %}{{ f(n + 1) }}{% endfor %}{% endmacro %}{{ f(0) }}",
        "{{ 'a' * 10**8 }}",
    ],
)
def test_a_template_without_end_is_stopped(source: str) -> None:
    """A template that does not come to its end is stopped at the deadline, if not before."""
    started = psutil.Process().children()
    with pytest.raises(TemplateError, match=r"took longer than 1 s|recursion|writes more than|memory"):
        ChatTemplate(source, deadline=1.0).render(HI)
    assert psutil.Process().children() == started


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{", "unexpected 'end of template' (line 1)"),
        ("\n\n{% if %}", "Expected an expression, got 'end of statement block' (line 3)"),
        ("{% for x in messages %}", "Unexpected end of template"),
        ("{% generation %}", "Unexpected end of template"),
        ("{% include 'x' %}", "no loader for this environment"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "recursion"),
        ("{% if 1 %}" * 5000 + "{% endif %}" * 5000, "recursion"),
    ],
)
def test_a_wrong_template_says_what_is_wrong(source: str, message: str) -> None:
    """A template that is not Jinja fails with Jinja's message and the line."""
    with pytest.raises(TemplateError) as raised:
        ChatTemplate(source).render(HI)
    assert message in str(raised.value)


def test_sizes_are_bounded() -> None:
    """A template of too many characters is refused before it is compiled; so is too much output."""
    with pytest.raises(TemplateError, match=str(MAX_SOURCE_CHARACTERS)):
        ChatTemplate("x" * (MAX_SOURCE_CHARACTERS + 1))
    assert ChatTemplate("x" * MAX_SOURCE_CHARACTERS).render(HI) == "x" * MAX_SOURCE_CHARACTERS
    text = "😀" * MAX_OUTPUT_CHARACTERS
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([{"role": "user", "content": text}]) == text
    with pytest.raises(TemplateError, match=str(MAX_OUTPUT_CHARACTERS)):
        template.render([{"role": "user", "content": text + "!"}])


@pytest.mark.parametrize("name", sorted(RESERVED - {"messages", "add_generation_prompt"}))
def test_reserved_names_cannot_be_set(name: str) -> None:
    """A request's variables never take the place of what the template counts on."""
    with pytest.raises(RequestError, match=name):
        ChatTemplate("").render(HI, **{name: "x"})


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", float])
def test_variables_are_json(value: object) -> None:
    """A variable that is not a JSON value is refused: templates get no objects with methods of their own."""
    with pytest.raises(RequestError, match="JSON"):
        ChatTemplate("").render(HI, thing=value)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "at least one"),
        ("hi", "must be a list"),
        ({"role": "user", "content": "hi"}, "must be a list"),
        (None, "must be a list"),
        (["hi"], "message 0 must be an object"),
        ([*HI, {"role": "user"}], "message 1 must be an object"),
        ([{"content": "hi"}], "message 0 must be an object"),
        ([HI[0] | {"tool_calls": []}], "message 0 must be an object"),
        ([{"role": 1, "content": "hi"}], "role of message 0 must be a string"),
        ([{"role": "user", "content": None}], "content of message 0 must be a string"),
        ([{"role": "user", "content": 1}], "content of message 0 must be a string"),
        ([{"role": "user", "content": ["hi"]}], "content of message 0 must be a string"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "content of message 0 must be"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "content of message 0 must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of message 0 must be"),
    ],
)
def test_messages_have_one_form(messages: Any, problem: str) -> None:
    """Messages are turns of text with a role; anything else is refused with its place."""
    with pytest.raises(RequestError, match=problem):
        ChatTemplate("").render(messages)


def test_messages_may_hold_anything_that_is_text() -> None:
    """NUL, a lone surrogate and Jinja's own marks pass unchanged, in the content and in the role."""
    text = "\0 \ud800 {{ 1 }} {% raw %} \r\n"
    template = ChatTemplate("{{ messages[0].role + messages[0].content }}")
    assert template.render([{"role": text, "content": text}]) == text + text


def test_a_worker_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the interpreter, or without Jinja, the error says so."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
        with pytest.raises(TemplateError, match="No module named 'jinja2'"):
            ChatTemplate("").render(HI)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(TemplateError, match="cannot be started"):
        ChatTemplate("").render(HI)


def test_it_works_from_a_zip_archive(tmp_path: Path) -> None:
    """The worker finds refengine where its parent found it, in an archive too."""
    root = Path(refengine.__file__).parent
    archive = tmp_path / "refengine.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in [root / "__init__.py", root / "errors.py", *(root / "tokenizer").glob("*.py")]:
            file.write(path, path.relative_to(root.parent))
    code = (
        "import refengine; from refengine.tokenizer import ChatTemplate;"
        "messages = [{'role': 'user', 'content': 'hi'}];"
        "print(refengine.__file__, ChatTemplate('{{ messages[0].content }}').render(messages))"
    )
    packages = [path for path in sys.path if "site-packages" in path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(archive), *packages])}
    output = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=environment,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert output.stdout.split() == [str(archive / "refengine" / "__init__.py"), "hi"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_is_left_behind(stop: signal.Signals) -> None:
    """When the process that renders is interrupted, its worker goes too.

    When it is killed, the worker's own limit on processor time ends it.
    """
    code = """
        from refengine.tokenizer import ChatTemplate
        source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        ChatTemplate(source, deadline=1.0 if KILLED else 60.0).render([{"role": "user", "content": "hi"}])
    """
    script = textwrap.dedent(code).replace("KILLED", str(stop == signal.SIGKILL))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = psutil.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL)
    while not (workers := parent.children()):
        assert parent.poll() is None
        time.sleep(0.01)
    parent.send_signal(stop)
    parent.wait()
    psutil.wait_procs(workers, timeout=20)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
