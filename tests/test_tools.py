"""Tools and thinking: what may be called, how a call fails, and loops of calls."""

from __future__ import annotations

import io
import json
import sys

import pytest
from tiny import tiny_model
from tiny_runs import run_command

from minimoe.config import GenerationSection
from minimoe.errors import UserError
from minimoe.generation import tools
from minimoe.generation.chat import Chat
from minimoe.generation.engine import Completion, Engine
from minimoe.generation.tools import Toolbox, answer_with_tools, with_tools
from minimoe.tokenizer import encode_chat, encode_conversation, encode_prompt

FUNCTIONS = '''
import time

def shout(text: str, times: int = 1) -> str:
    """Say it loudly.

    Args:
        text: what to say
        times: how often
    """
    return " ".join([text.upper()] * times)

def facts(name: str) -> dict:
    """What is known.

    Args:
        name: of whom
    """
    return {"name": name, "age": 7}

def sleeps() -> str:
    """Takes its time."""
    time.sleep(60)

def fails() -> str:
    """Goes wrong."""
    raise KeyError("not here")

def _private(x):
    return x
'''


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    box = Toolbox(str(path), seconds=1.0)
    yield box
    box.end()


def test_public_functions_are_tools_with_their_schema(functions):
    assert functions.names == ["shout", "facts", "sleeps", "fails"]
    schema = functions.schemas[0]["function"]
    assert schema["description"] == "Say it loudly."
    assert schema["parameters"]["properties"]["times"]["type"] == "integer"
    assert schema["parameters"]["required"] == ["text"]


def test_calls_give_texts_and_say_what_went_wrong(functions):
    assert functions.call("shout", {"text": "hi", "times": 2}) == "HI HI"
    assert json.loads(functions.call("facts", {"name": "Pip"})) == {"name": "Pip", "age": 7}
    assert functions.call("sleeps", {}) == "Error: took more than 1 s"
    assert "not here" in functions.call("fails", {})
    assert "unexpected keyword" in functions.call("shout", {"text": "hi", "loud": True})
    assert functions.call("absent", {}).startswith("Error: there is no tool absent; there is shout")
    assert functions.call("shout", {"text": "a" * 9000}).endswith("… (9,000 characters)")


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_commands_read_json_and_print_the_result(tmp_path, suffix):
    script = "import json, sys; print(json.load(sys.stdin)['a'] + 1)"
    listed = {
        "tools": [
            {"name": "next", "parameters": {"type": "object"}, "command": [sys.executable, "-c", script]},
            {"name": "broken", "command": [sys.executable, "-c", "raise SystemExit('no luck')"]},
            {"name": "absent", "command": ["/nowhere/at/all"]},
            {"name": "slow", "command": [sys.executable, "-c", "import time; time.sleep(60)"]},
        ]
    }
    path = tmp_path / f"tools{suffix}"
    path.write_text(json.dumps(listed))  # which is YAML, too
    box = Toolbox(str(path), seconds=5.0)
    assert box.call("next", {"a": 41}) == "42"
    assert box.call("broken", {}) == "Error: exit status 1: no luck"
    assert box.call("absent", {}) == "Error: No such file or directory"
    assert "command" not in json.dumps(box.schemas)
    assert Toolbox(str(path), seconds=0.2).call("slow", {}) == "Error: took more than 0.2 s"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.py", "x = 1", "no public function"),
        ("t.py", "def f(:", "invalid syntax"),
        ("t.py", "def f(x): return x", "docstring"),
        ("t.py", "import absent_module\ndef f() -> str:\n    'A.'", "absent_module"),
        ("t.yaml", "tools: []", "no tools"),
        ("t.yaml", "tools: [{name: f}]", "f has no command"),
        ("t.yaml", "tools: [{command: [ls]}]", "object with a name"),
        ("t.json", "[", "Expecting value"),
    ],
)
def test_what_is_no_tool_is_refused_with_the_reason(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        Toolbox(str(tmp_path / name))


def test_the_calculator_knows_arithmetic_alone():
    box = Toolbox("calculator")
    for expression, result in [("12 * (3 + 4)", "84"), ("7 / 2", "3.5"), ("-5 + 2", "-3"), ("17 // 5 % 2", "1")]:
        assert box.call("calculator", {"expression": expression}) == result
    for expression in ("__import__('os')", "2 ** 9", "'a' * 3", "1 +", "1/0", "9" * 300, "True + 1"):
        assert box.call("calculator", {"expression": expression}).startswith("Error: ")
    box.end()
    with pytest.raises(UserError, match="no such file"):
        Toolbox("calculators")


# ---- the loops ----


class Scripted:
    """An engine that says what it is told to, and remembers what it was asked."""

    def __init__(self, tokenizer, *answers: str) -> None:
        self.tokenizer, self.answers, self.asked = tokenizer, list(answers), []

    def generate(self, prompts, settings):
        self.asked.append([list(prompt) for prompt in prompts])
        return [self.complete() for _ in prompts]

    def complete(self) -> Completion:
        text = self.answers.pop(0)
        return Completion(text, tuple(self.tokenizer(text)["input_ids"]), "stop", 1, 0.1)


def call(expression: str) -> str:
    arguments = json.dumps({"expression": expression})
    return f'<tool_call>\n{{"name": "calculator", "arguments": {arguments}}}\n</tool_call>'


@pytest.fixture
def calculator():
    box = Toolbox("calculator")
    yield box
    box.end()


def test_an_answer_goes_on_with_the_results_of_its_calls(tiny_tokenizer, calculator):
    engine = Scripted(tiny_tokenizer, call("2+3"), "No sum.", call("5*4"), "It is 20.")
    asked = [[{"role": "user", "content": "(2 + 3) * 4?"}], [{"role": "user", "content": "Hello?"}]]
    (first, last), (second, other) = answer_with_tools(engine, asked, GenerationSection(), calculator)
    assert [m["role"] for m in first] == ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [m["content"] for m in first if m["role"] == "tool"] == ["5", "20"]
    assert last.text == "It is 20."
    assert [m["role"] for m in second] == ["system", "user", "assistant"]
    assert other.text == "No sum."
    assert [len(round_) for round_ in engine.asked] == [2, 1, 1]


def test_a_model_that_never_stops_calling_is_stopped(tiny_tokenizer, calculator, monkeypatch):
    monkeypatch.setattr(tools, "MAX_ROUNDS", 3)
    engine = Scripted(tiny_tokenizer, *[call("1+1")] * 9)
    ((messages, _),) = answer_with_tools(
        engine, [[{"role": "user", "content": "Go on."}]], GenerationSection(), calculator
    )
    assert sum(m["role"] == "tool" for m in messages) == 3
    assert messages[-1]["role"] == "assistant"


def test_tools_of_the_conversation_and_tools_beside_it_are_refused(calculator):
    with pytest.raises(UserError, match="tools of its own"):
        with_tools([{"role": "system", "content": "", "tools": calculator.schemas}], calculator)
    kept = with_tools([{"role": "system", "content": "Be brief."}], calculator)
    assert kept[0]["content"] == "Be brief."


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=1024, **ids).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_chat_calls_tools_and_goes_on(folder, calculator, capsys, monkeypatch):
    chat = Chat(Engine.from_pretrained(folder, "cpu"), GenerationSection(chat=True), toolbox=calculator)
    said = iter([call("6*7"), "It is 42."])

    class Session:
        def stream(self, conversation, settings):
            assert conversation[0]["tools"] == calculator.schemas
            self.completion = Scripted(chat._engine.tokenizer, next(said)).complete()
            yield self.completion.text

    chat._session = Session()
    chat.answer("What is 6 times 7?")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert "= 42" in capsys.readouterr().err


def test_the_commands_take_tools(folder, monkeypatch, capsys):
    words = ["generate", folder, "--tools", "calculator", "--prompt", "What is 2 + 3?", "max_new_tokens=4"]
    assert run_command(monkeypatch, *words, "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["messages"][0]["role"] == "assistant"
    assert run_command(monkeypatch, "generate", folder, "--tools", "nothing.py", "--prompt", "Hi") == 2
    assert "no such file" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/no_think\nHi\n/think\n"))
    assert run_command(monkeypatch, "chat", folder, "--tools", "calculator", "max_new_tokens=2") == 0
    assert "no thinking" in capsys.readouterr().err


# ---- thinking ----


def test_no_thinking_puts_an_empty_think_part_before_the_answer(tiny_tokenizer):
    asked = [{"role": "user", "content": "Hello?"}]
    plain, without = (tiny_tokenizer.decode(encode_prompt(tiny_tokenizer, asked, wanted)) for wanted in (None, False))
    assert without == plain + "<think>\n\n</think>\n\n"
    assert encode_prompt(tiny_tokenizer, asked, True) == encode_prompt(tiny_tokenizer, asked)


def test_after_no_think_an_empty_think_part_is_learned(tiny_tokenizer):
    row = [{"role": "user", "content": "Hello? /no_think"}, {"role": "assistant", "content": "Hello."}]
    ids, learned = encode_chat(tiny_tokenizer, row)
    answer = tiny_tokenizer.decode([token for token, flag in zip(ids, learned, strict=True) if flag])
    assert answer == "<think>\n\n</think>\n\nHello.<|im_end|>"
    row[0]["content"] = "Hello? /think"
    assert "<think>" not in tiny_tokenizer.decode(encode_conversation(tiny_tokenizer, row))


def test_a_template_without_thinking_refuses_to_be_told_of_it(tiny_tokenizer_dir):
    from minimoe.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="knows no enable_thinking"):
        encode_prompt(tokenizer, [{"role": "user", "content": "Hello?"}], False)
