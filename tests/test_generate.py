"""`minimoe generate`: where prompts come from and what is printed."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch

from minimoe import MiniMoeConfig, MiniMoeForCausalLM
from minimoe.config import GenerationSection
from minimoe.errors import UserError
from minimoe.generation.decode import DecodeBatch
from minimoe.generation.engine import Engine
from minimoe.generation.generate import read_prompts, run

SETTINGS = GenerationSection(temperature=0, max_new_tokens=6)
CHAT = GenerationSection(temperature=0, max_new_tokens=90, chat=True)


@pytest.fixture(scope="module")
def model_dir(tiny_tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    config = MiniMoeConfig(
        vocab_size=448,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        moe_intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    folder = tmp_path_factory.mktemp("model")
    MiniMoeForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(model_dir):
    """What the engine says to two prompts."""
    engine = Engine.from_pretrained(model_dir, "cpu")
    return [completion.text for completion in engine.generate(["The cat", "A boat"], SETTINGS)]


def test_one_prompt_streams_and_statistics_go_to_standard_error(model_dir, texts, capsys):
    run(model_dir, ["The cat"], SETTINGS, device="cpu")
    out, err = capsys.readouterr()
    assert out == f"The cat{texts[0]}\n"
    assert "6 tokens" in err
    assert "tokens/s, length limit" in err


def test_a_chat_answer_is_printed_without_its_question(model_dir, capsys):
    run(model_dir, ["The cat"], SETTINGS.model_copy(update={"chat": True}), device="cpu")
    expected = Engine.from_pretrained(model_dir, "cpu").generate([[{"role": "user", "content": "The cat"}]], SETTINGS)
    assert capsys.readouterr().out == expected[0].text + "\n"


def test_several_prompts_are_all_printed_in_order(model_dir, texts, capsys):
    run(model_dir, ["The cat", "A boat"], SETTINGS, device="cpu")
    out, err = capsys.readouterr()
    assert out == f"--- 1/2 ---\nThe cat{texts[0]}\n--- 2/2 ---\nA boat{texts[1]}\n"
    assert "2 completions, 12 tokens" in err


def test_json_output_is_one_object_a_prompt(model_dir, texts, capsys):
    run(model_dir, ["The cat", "A boat"], SETTINGS, json_output=True, device="cpu")
    # Split at newlines only: the text may hold other characters that str.splitlines takes for line ends.
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [row["prompt"] for row in rows] == ["The cat", "A boat"]
    assert [row["text"] for row in rows] == texts
    for row in rows:
        assert list(row) == [
            "prompt",
            "text",
            "finish_reason",
            "prompt_tokens",
            "new_tokens",
            "tokens_per_second",
        ]
        assert (row["finish_reason"], row["new_tokens"]) == ("length", 6)
        assert row["tokens_per_second"] > 0


def test_a_prompt_is_refused_before_anything_is_printed(model_dir, capsys):
    with pytest.raises(UserError, match="context"):
        run(model_dir, ["cat " * 200], SETTINGS, device="cpu")
    assert capsys.readouterr().out == ""


def test_prompts_come_from_the_option_a_file_or_standard_input(tmp_path):
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_bytes("\ufefffirst\r\n\nsecond line\u2028same\n".encode())
    messages = [{"role": "user", "content": "hi"}]
    rows.write_text(json.dumps({"prompt": "a\nb"}) + "\n\n" + json.dumps({"messages": messages}) + "\n")
    assert read_prompts("", None, None) == [""]
    assert read_prompts("hi", None, io.StringIO("ignored")) == ["hi"]
    assert read_prompts(None, text, None) == ["first", "second line\u2028same"]
    assert read_prompts(None, rows, None) == ["a\nb", messages]
    assert read_prompts(None, None, io.StringIO("two\nlines\n")) == ["two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "empty"),
        ("p.txt", "hi".encode("utf-16"), "convert it: iconv -f UTF-16 -t UTF-8"),
        ("p.txt", b"caf\xe9", "iconv -f ITS_ENCODING -t UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', r"malformed JSON[\s\S]*p\.jsonl:2"),
        ("p.jsonl", b'{"text": "a"}\n', r"neither[\s\S]*p\.jsonl:1"),
        ("p.jsonl", b'{"prompt": 3}\n', "neither"),
        ("p.jsonl", b"[1]\n", "neither"),
        ("p.jsonl", b'{"messages": []}\n', "neither"),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}\n', r"message 1: content is missing[\s\S]*p\.jsonl:1"),
        ("p.json", b'[{"prompt": "a"}, {"prompt": 3}]', r"neither[\s\S]*p\.json, item 2"),
        ("p.md", b"# A title", r"unknown kind of prompt file: .*p\.md"),
    ],
)
def test_a_broken_prompt_file_is_refused_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(None, tmp_path / name, None)
    assert caught.match(message) or pytest.fail(str(caught.value))


def test_a_missing_or_ambiguous_origin_is_refused(tmp_path):
    with pytest.raises(UserError, match="not found"):
        read_prompts(None, tmp_path / "none.txt", None)
    with pytest.raises(UserError, match="not readable"):
        read_prompts(None, tmp_path, None)
    with pytest.raises(UserError, match="both"):
        read_prompts("a", tmp_path / "none.txt", None)
    with pytest.raises(UserError, match="standard input is empty"):
        read_prompts(None, None, io.StringIO("\n"))
    with pytest.raises(UserError, match="no prompt"):
        read_prompts(None, None, None)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="int8 weights need oneDNN")
@pytest.mark.parametrize("prompts", [["The cat"], ["The cat", "A boat"]])
@pytest.mark.parametrize("json_output", [False, True])
def test_int8_weights_come_with_what_they_cost(model_dir, capsys, prompts, json_output):
    run(model_dir, prompts, SETTINGS.model_copy(update={"weights": "int8"}), device="cpu", json_output=json_output)
    engine = Engine.from_pretrained(model_dir, "cpu")
    completion = engine.generate(prompts, SETTINGS.model_copy(update={"weights": "int8"}))[0]
    ids = [*engine.encode(prompts[0]), *completion.token_ids]
    remark = (
        f"int8 weights: {engine.int8_cost(ids):.5f} nats/token of loss more than exact ones on these {len(ids)} tokens"
    )
    assert capsys.readouterr().err.count(remark) == 1
    run(model_dir, prompts, SETTINGS, device="cpu", json_output=json_output)
    assert "int8" not in capsys.readouterr().err


def test_impossible_int8_weights_are_refused_before_anything_is_printed(model_dir, capsys, monkeypatch):
    monkeypatch.setattr("minimoe.generation.engine.why_not_packed", lambda model: "the model is on mars")
    with pytest.raises(UserError, match="the model is on mars") as refusal:
        run(model_dir, ["The cat"], SETTINGS.model_copy(update={"weights": "int8"}), device="cpu")
    assert "weights=exact" in refusal.value.fix
    assert capsys.readouterr().out == ""


def test_prompts_in_json_and_messages_in_every_form_are_read(tmp_path):
    call = {"name": "f", "arguments": {"x": 1}}
    rows = [
        {"prompt": "a"},
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "r"},
            ],
            "system": "s",
        },
    ]
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    assert read_prompts(None, tmp_path / "p.json", None) == [
        "a",
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "r"},
        ],
    ]


WRITTEN = '<think>\nhm\n</think>\n\nSee.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.fixture
def saying(tiny_tokenizer, monkeypatch):
    """Every model says WRITTEN."""
    ids = tiny_tokenizer(f"{WRITTEN}<|im_end|>")["input_ids"]
    steps = iter(ids)
    monkeypatch.setattr(DecodeBatch, "step", lambda self: [next(steps)])
    return ids


@pytest.mark.usefixtures("saying")
def test_think_parts_and_calls_are_shown(model_dir, capsys):
    run(model_dir, ["hi"], CHAT, device="cpu")
    assert capsys.readouterr().out == f"{WRITTEN}\n"


@pytest.mark.usefixtures("saying")
def test_json_output_has_think_parts_and_calls_apart(model_dir, capsys):
    run(model_dir, ["hi"], CHAT, json_output=True, device="cpu")
    row = json.loads(capsys.readouterr().out)
    assert row["text"] == WRITTEN
    assert (row["reasoning_content"], row["content"]) == ("hm", "See.")
    assert row["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


@pytest.mark.usefixtures("saying")
def test_on_a_terminal_think_parts_and_calls_are_dim(model_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run(model_dir, ["hi"], CHAT, device="cpu")
    shown = capsys.readouterr().out
    assert "\x1b[2m<think>\nhm\n</think>\x1b[22m\n\nSee.\n\x1b[2m<tool_call>" in shown
