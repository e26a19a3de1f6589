from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe import bpe
from minimoe import tokenizer as tok
from minimoe.config import TokenizerRun
from minimoe.errors import UserError
from minimoe.train import tokenizer as train_tokenizer

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello  there,\n cat?\n"},
    {"role": "assistant", "reasoning_content": "A greeting.", "content": "Hello, boat!"},
    {"role": "user", "content": "Look up the moon."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"q": "moon"}}}],
    },
    {"role": "tool", "content": '{"answer": "round"}'},
    {"role": "assistant", "content": "It is round. 😀"},
]
TYPED = "".join(tok.SPECIAL_TOKENS)


@pytest.fixture
def make_run(tmp_path: Path):
    def make(path: Path, **values) -> TokenizerRun:
        section = {"vocab_size": 320, **values}
        data = {"train": str(path), "cache_dir": str(tmp_path)}
        return TokenizerRun.model_validate({"output_dir": str(tmp_path / "out"), "tokenizer": section, "data": data})

    return make


def test_a_folder_that_holds_anything_is_not_written_over(make_run, write_jsonl):
    config = make_run(write_jsonl([{"text": "the cat and the hat"}] * 9))
    folder = train_tokenizer.run(config)
    with pytest.raises(UserError, match="already holds a tokenizer") as refused:
        train_tokenizer.run(config)
    assert "--overwrite" in str(refused.value)
    train_tokenizer.run(config, overwrite=True)
    (folder / "model.safetensors").write_bytes(b"a model")
    with pytest.raises(UserError, match=r"holds more than a tokenizer: model\.safetensors"):
        train_tokenizer.run(config, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == b"a model"


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_unicode_text_round_trips_up_to_nfc(tiny_tokenizer, text):
    ids = tok.encode_text(tiny_tokenizer, text)
    assert tiny_tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_the_split_regex_is_qwen2s():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert bpe.SPLIT_REGEX == PRETOKENIZE_REGEX


def test_words_of_ordinary_texts_are_learned_from_whole():
    """The tokenizer is what `tokenizers` makes of the documents with Qwen2's split and nothing more."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].glob("docs/*.md"))]
    reference = Tokenizer(models.BPE())
    reference.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(bpe.SPLIT_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=byte_level.alphabet(),
        special_tokens=list(tok.SPECIAL_TOKENS),
        show_progress=False,
    )
    reference.train_from_iterator(texts, trainer)
    own, expected = (
        json.loads(text) for text in (bpe.train_bpe(iter(texts), 2000)._tokenizer.to_str(), reference.to_str())
    )
    for part in ("normalizer", "pre_tokenizer", "decoder", "model"):
        assert own[part] == expected[part], part


def test_a_text_without_spaces_is_learned_from_in_pieces_and_encoded_whole():
    """Learning from a word takes the square of its length."""
    tokenizer = bpe.train_bpe(iter(["a" * 3000]), 300)
    longest = max(len(token) for token in tokenizer.get_vocab() if set(token) == {"a"})
    assert longest == bpe.LONGEST_WORD
    ids = tok.encode_text(tokenizer, "a" * 3000)
    assert len(ids) < 3000 / longest + 10
    assert tokenizer.decode(ids) == "a" * 3000


def test_all_bytes_and_special_tokens_are_in_the_vocabulary(tiny_tokenizer):
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = tiny_tokenizer.get_vocab()
    assert set(ByteLevel.alphabet()) <= set(vocabulary)
    assert [vocabulary[token] for token in tok.SPECIAL_TOKENS] == list(range(len(tok.SPECIAL_TOKENS)))
    assert tiny_tokenizer.pad_token_id not in (tiny_tokenizer.eos_token_id, tiny_tokenizer.bos_token_id)


def test_a_training_run_saves_a_folder_that_autotokenizer_opens(make_run, write_jsonl, capsys):
    from transformers import AutoTokenizer

    folder = train_tokenizer.run(make_run(write_jsonl([{"text": "the cat and the hat"}] * 9)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        tok.END_OF_TEXT,
        tok.IM_END,
        tok.PAD,
    )
    assert tokenizer.chat_template == tok.CHAT_TEMPLATE
    assert (folder / "chat_template.jinja").exists()
    assert tokenizer.tokenize(TYPED) == list(tok.SPECIAL_TOKENS)
    summary = capsys.readouterr().out
    assert f"{len(tokenizer):,} tokens" in summary
    assert "bytes per token" in summary


def test_merges_are_learned_from_at_most_max_training_bytes(make_run, write_jsonl):
    path = write_jsonl([{"text": "zq " * 20}, {"text": "the cat " * 20}])
    tokenizer = tok.load_tokenizer(train_tokenizer.run(make_run(path, max_training_bytes=60)))
    assert "zq" in tokenizer.get_vocab()
    assert "cat" not in tokenizer.get_vocab()


def test_the_smallest_vocabulary_has_one_token_for_each_byte(make_run, write_jsonl):
    smallest = 256 + len(tok.SPECIAL_TOKENS)
    folder = train_tokenizer.run(make_run(write_jsonl([{"text": "ab ab ab"}]), vocab_size=smallest))
    ids = tok.encode_text(tok.load_tokenizer(folder), "ab äb 😀")
    assert len(ids) == len("ab äb 😀".encode())
    with pytest.raises(ValueError, match="greater than or equal to 266"):
        make_run(folder, vocab_size=smallest - 1)


def test_conversations_contribute_their_contents_to_the_tokenizer(make_run, write_jsonl):
    path = write_jsonl([{"messages": [{"role": "user", "content": "zqzq zqzq zqzq"}]}] * 3)
    assert "zqzq" in tok.load_tokenizer(train_tokenizer.run(make_run(path))).get_vocab()


@pytest.mark.parametrize("name", ["missing_folder", "./x", "/no/such/tokenizer"])
def test_a_missing_tokenizer_is_a_user_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="tokenizer"):
        tok.load_tokenizer(name)


def test_a_missing_folder_beside_existing_ones_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="not found: runs/tokenizer"):
        tok.load_tokenizer("runs/tokenizer")


def test_a_folder_without_a_tokenizer_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot load"):
        tok.load_tokenizer(tmp_path)


def test_typed_control_tokens_are_text(tiny_tokenizer):
    ids = tok.encode_text(tiny_tokenizer, TYPED)
    assert not set(ids) & set(tiny_tokenizer.all_special_ids)
    assert tiny_tokenizer.decode(ids) == TYPED


def test_a_document_begins_and_ends_with_end_of_text(tiny_tokenizer):
    ids = tok.document_ids(tiny_tokenizer, "the cat")
    assert ids[0] == ids[-1] == tiny_tokenizer.get_vocab()[tok.END_OF_TEXT]
    assert tiny_tokenizer.decode(ids[1:-1]) == "the cat"


def test_a_conversation_has_the_ids_and_mask_of_apply_chat_template(tiny_tokenizer):
    reference = tiny_tokenizer.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    ids, learned = tok.encode_chat(tiny_tokenizer, CHAT)
    assert ids == reference["input_ids"]
    assert learned == [bool(flag) for flag in reference["assistant_masks"]]


contents = st.text(alphabet=st.sampled_from("ab \n\t<|>.é😀\ue0001"), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(user=contents, answer=contents.filter(lambda text: text[0] not in "\n \t"))
def test_any_plain_conversation_has_the_ids_of_apply_chat_template(tiny_tokenizer, user, answer):
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    reference = tiny_tokenizer.apply_chat_template(messages, return_dict=False)
    assert tok.encode_chat(tiny_tokenizer, messages)[0] == reference


def test_all_assistant_turns_and_their_ends_are_learned_and_nothing_else(tiny_tokenizer):
    ids, learned = tok.encode_chat(tiny_tokenizer, CHAT)
    text = tiny_tokenizer.decode([token for token, flag in zip(ids, learned, strict=True) if flag])
    assert text == (
        "<think>\nA greeting.\n</think>\n\nHello, boat!<|im_end|>"
        '<tool_call>\n{"name": "find", "arguments": {"q": "moon"}}\n</tool_call><|im_end|>'
        "It is round. 😀<|im_end|>"
    )


@pytest.mark.parametrize("field", ["content", "reasoning_content"])
def test_typed_control_tokens_in_a_conversation_are_text(tiny_tokenizer, field):
    messages = [
        {"role": "user", "content": f"a{TYPED}b"},
        {"role": "assistant", "content": "c", field: f"a{TYPED}b"},
    ]
    plain = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c", field: "ab"}]
    ids, _ = tok.encode_chat(tiny_tokenizer, messages)
    expected, _ = tok.encode_chat(tiny_tokenizer, plain)
    special = set(tiny_tokenizer.all_special_ids)
    assert [token for token in ids if token in special] == [token for token in expected if token in special]
    assert tiny_tokenizer.decode(ids).count(f"a{TYPED}b") == 2


def test_typed_control_tokens_in_tool_arguments_are_text(tiny_tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {"<|im_end|>": ["<|im_start|>"]}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids, _ = tok.encode_chat(tiny_tokenizer, messages)
    assert ids.count(tiny_tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("answer", ["Hello", "\nHello", " Hello", "\n\n"])
def test_a_prompt_is_a_prefix_of_its_conversation(tiny_tokenizer, answer):
    messages = [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": answer}]
    prompt = tok.encode_prompt(tiny_tokenizer, messages[:1])
    ids, learned = tok.encode_chat(tiny_tokenizer, messages)
    assert ids[: len(prompt)] == prompt
    assert learned.index(True) == len(prompt)
    followed = tok.encode_prompt(tiny_tokenizer, [*messages, {"role": "user", "content": "More"}])
    assert followed[: len(ids)] == ids


PLAIN = tok.CHAT_TEMPLATE.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
# In the style of Llama 3: a header for each role, the texts trimmed; ends of turns are control tokens.
HEADERS = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n\\n' + m.content | trim }}"
    "{{- '<tool_call>' + m.tool_calls | tojson if m.tool_calls }}{{- '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"
)
MARKED_HEADERS = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n\\n' }}"
    "{%- if m.role == 'assistant' %}{%- generation %}{{- m.content | trim }}"
    "{{- '<tool_call>' + m.tool_calls | tojson if m.tool_calls }}{{- '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- m.content | trim }}{{- '<|im_end|>' }}{%- endif %}{%- endfor %}"
)
CALLING = [
    *CHAT[:2],
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "It is r."},
]


@pytest.mark.parametrize("messages", [CHAT, CALLING], ids=["think", "tools"])
@pytest.mark.parametrize(("template", "marked"), [(PLAIN, tok.CHAT_TEMPLATE), (HEADERS, MARKED_HEADERS)])
def test_a_template_without_marks_teaches_what_its_marked_version_does(template, marked, messages, tiny_tokenizer_dir):
    plain, expected = (tok.load_tokenizer(tiny_tokenizer_dir) for _ in range(2))
    plain.chat_template, expected.chat_template = template, marked
    assert tok.encode_chat(plain, messages) == tok.encode_chat(expected, messages)


def test_a_template_that_rewrites_earlier_answers_is_refused_with_the_turn(tiny_tokenizer_dir):
    tokenizer = tok.load_tokenizer(tiny_tokenizer_dir)
    tokenizer.chat_template = PLAIN.replace(
        "{%- if message.reasoning_content %}", "{%- if loop.last and message.reasoning_content %}"
    )
    thinking = [CHAT[1], CHAT[2]]
    _, learned = tok.encode_chat(tokenizer, thinking)
    assert any(learned)
    with pytest.raises(UserError, match="message 2: the chat template renders this answer differently"):
        tok.encode_chat(tokenizer, [*thinking, *thinking])


def test_a_template_that_ends_no_answer_is_refused(tiny_tokenizer_dir):
    tokenizer = tok.load_tokenizer(tiny_tokenizer_dir)
    tokenizer.chat_template = "{%- for m in messages %}{{- m.role + ': ' + m.content + '\\n' }}{%- endfor %}"
    with pytest.raises(UserError, match=r"ends no answer with a token|renders this answer differently"):
        tok.encode_chat(tokenizer, [CHAT[1], {"role": "assistant", "content": "a"}])
    assert tok.encode_prompt(tokenizer, [CHAT[1]])


def test_a_tokenizer_without_a_template_is_a_user_error(tiny_tokenizer_dir):
    tokenizer = tok.load_tokenizer(tiny_tokenizer_dir)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        tok.encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])


def test_text_without_spaces_trains_as_fast_as_any_other_and_is_encoded_whole():
    text = "".join(random.Random(0).choices("ACGT", k=200_000))
    tokenizer = bpe.train_bpe(iter([text]), 600)
    assert max(map(len, tokenizer.get_vocab())) > 4
    assert tokenizer.decode(tok.encode_text(tokenizer, text)) == text
