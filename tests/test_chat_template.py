from __future__ import annotations

import threading
import time

import pytest

from minimoe import chat_template
from minimoe.errors import UserError

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FRAME = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% for i in range(99999999) %}x{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ 'a' * 50000000 }}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for %}",
    ],
)
def test_a_hostile_template_is_stopped(template, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(UserError, match="chat template"):
        chat_template.render(template, MESSAGES)
    assert time.monotonic() - started < 120  # most of it is the start of a process


def test_a_foreign_template_renders_on_any_thread_and_after_a_hostile_one(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1.0)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    loop = "{% if messages | length > 2 %}" + endless + "{% endif %}"
    results: list[chat_template.Rendered] = []
    thread = threading.Thread(target=lambda: results.append(chat_template.render(FRAME + loop, MESSAGES)))
    thread.start()
    thread.join()
    with pytest.raises(UserError, match="more than 1 s"):
        chat_template.render(FRAME + loop, MESSAGES * 2)
    results.append(chat_template.render(FRAME + loop, MESSAGES))
    assert results == [("[Hi][Hello]", [])] * 2


def test_the_process_gives_what_rendering_here_gives():
    commented = chat_template.CHAT_TEMPLATE + "{# not ours #}"
    here = chat_template.render(chat_template.CHAT_TEMPLATE, MESSAGES, add_generation_prompt=True)
    assert chat_template.render(commented, MESSAGES, add_generation_prompt=True) == here
    assert here[0][slice(*here[1][0])] == "Hello<|im_end|>"
