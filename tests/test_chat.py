"""The terminal chat, driven through standard input."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from minimoe import MiniMoeConfig, MiniMoeForCausalLM
from minimoe.config import GenerationSection
from minimoe.errors import UserError
from minimoe.generation.chat import Chat
from minimoe.generation.decode import DecodeBatch
from minimoe.generation.engine import Engine

SETTINGS = GenerationSection(temperature=0, max_new_tokens=6)
CONTEXT = 96


@pytest.fixture(scope="module")
def engine(tiny_tokenizer) -> Engine:
    torch.manual_seed(0)
    config = MiniMoeConfig(
        vocab_size=448,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        moe_intermediate_size=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
    )
    return Engine(MiniMoeForCausalLM(config), tiny_tokenizer)


@pytest.fixture
def say(engine, monkeypatch, capsys):
    """Feed lines to a chat; returns it with what it printed."""

    def talk(*lines: str, system: str | None = None, settings: GenerationSection = SETTINGS) -> tuple[Chat, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        chat = Chat(engine, settings, system)
        chat.loop()
        return chat, *capsys.readouterr()

    return talk


def answers(engine: Engine, *messages: str, system: str | None = None) -> list[str]:
    """The same conversation without a cache."""
    conversation = [{"role": "system", "content": system}] if system else []
    for message in messages:
        conversation.append({"role": "user", "content": message})
        completion = engine.generate([conversation], SETTINGS)[0]
        given = {} if completion.cut else {"token_ids": completion.token_ids}
        conversation.append({"role": "assistant", "content": completion.text} | given)
    return [turn["content"] for turn in conversation if turn["role"] == "assistant"]


def test_several_turns_answer_as_if_nothing_were_cached(engine, say):
    chat, out, err = say("Hello", "", "And then?", system="Be kind")
    expected = answers(engine, "Hello", "And then?", system="Be kind")
    assert out == "".join(f"{answer}\n" for answer in expected)
    assert [message["role"] for message in chat.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert err.count("tokens/s") == 2


def test_the_next_prompt_has_what_was_generated_token_for_token(engine, say):
    chat, _, _ = say("Hello", "And then?")
    first = engine.encode(chat.messages[:1])
    generated = chat.messages[1]["token_ids"]
    prompt = engine.encode(chat.messages[:3])
    assert prompt[: len(first) + len(generated)] == first + generated


def test_reset_forgets_and_exit_leaves(engine, say):
    chat, out, err = say("Hello", "/reset", "Why?", "/exit", "never read", system="Be kind")
    assert out.endswith(answers(engine, "Why?", system="Be kind")[0] + "\n")
    assert [message["content"] for message in chat.messages[:2]] == ["Be kind", "Why?"]
    assert "conversation forgotten" in err


def test_help_and_unknown_commands_are_not_sent_to_the_model(say):
    chat, out, err = say("/help", "/rest")
    assert (out, chat.messages) == ("", [])
    assert "Ctrl-D" in err
    assert "unknown command /rest" in err


def test_a_line_that_is_not_utf8_is_named_and_the_chat_goes_on(engine, say):
    chat, _, err = say("Hello", b"caf\xe9".decode("utf-8", "surrogateescape"), "And then?")
    assert err.count("not valid UTF-8") == 1
    assert "context" not in err
    assert [message["content"] for message in chat.messages if message["role"] == "user"] == ["Hello", "And then?"]


def test_a_full_context_drops_the_oldest_turns_and_says_so(engine, say):
    chat, _, err = say("first", *["The cat said hello to the boat"] * 5, system="Be kind")
    assert "the context of 96 tokens is full: the oldest turn dropped" in err
    assert chat.messages[0] == {"role": "system", "content": "Be kind"}
    assert chat.messages[1]["role"] == "user"
    assert "first" not in [message["content"] for message in chat.messages]
    assert err.count("tokens/s") == 6


def test_a_message_longer_than_the_context_is_refused_and_the_chat_goes_on(say):
    chat, out, err = say("cat " * 200, "Hello")
    assert "the model's context is 96 tokens" in err
    assert chat.messages[0]["content"] == "Hello"
    assert out.count("\n") >= 1


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(engine, monkeypatch, capsys):
    chat = Chat(engine, SETTINGS)
    write = sys.stdout.write
    written = []

    def interrupted_write(text: str) -> int:
        written.append(text)
        if len(written) == 2:
            raise KeyboardInterrupt
        return write(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", interrupted_write)
        chat.answer("Hello")
    assert "stopped" in capsys.readouterr().err
    assert chat.messages[1]["content"]
    chat.answer("Go on")
    continued = engine.generate([chat.messages[:3]], SETTINGS)[0].text
    assert chat.messages[3]["content"] == continued


def test_an_interrupt_before_the_first_token_leaves_no_turn(engine, monkeypatch):
    chat = Chat(engine, SETTINGS)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DecodeBatch, "step", interrupt)
        chat.answer("Hello")
    assert chat.messages == []
    chat.answer("Hello")
    assert chat.messages[1]["content"] == engine.generate([chat.messages[:1]], SETTINGS)[0].text


def test_a_tokenizer_without_chat_template_is_refused_at_once(engine, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="chat template"):
        Chat(engine, SETTINGS)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="int8 weights need oneDNN")
def test_int8_weights_tell_their_cost_once(say):
    _, _, err = say("Hello", "And then?", settings=SETTINGS.model_copy(update={"weights": "int8"}))
    assert err.count("tokens/s") == 2
    assert err.count("int8 weights: ") == 1


def test_impossible_int8_weights_are_refused_before_the_first_message(engine, monkeypatch):
    monkeypatch.setattr("minimoe.generation.engine.why_not_packed", lambda model: "the model is on mars")
    with pytest.raises(UserError, match="the model is on mars"):
        Chat(engine, SETTINGS.model_copy(update={"weights": "int8"}))
