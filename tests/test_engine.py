"""The engine against `model.generate` and against decoding everything at once."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from minimoe import MiniMoeConfig, MiniMoeForCausalLM
from minimoe.config import GenerationSection
from minimoe.errors import UserError
from minimoe.generation.cache import PreallocatedCache, PreallocatedLayer
from minimoe.generation.engine import Engine
from minimoe.generation.text import Detokenizer, StopFilter
from minimoe.tokenizer import TAGS, encode_text

CONTEXT = 128
SHAPE = {
    "vocab_size": 448,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "initializer_range": 0.5,  # large, so that greedy text varies and ties are far away
}
PROMPTS = ["The cat", "Once upon a time there was a small boat", "", "What is 3 + 4?", "Grüße aus"]
GREEDY = GenerationSection(temperature=0, max_new_tokens=24, batch_size=8)
SAMPLED = GenerationSection(temperature=1.0, top_p=0.9, max_new_tokens=24, batch_size=8)


def visible(tokenizer, ids) -> str:
    """The text with its tags of think parts and calls, without the other special tokens."""
    hidden = set(tokenizer.all_special_tokens) - set(TAGS)
    return tokenizer.decode([token for token in ids if tokenizer.convert_ids_to_tokens(int(token)) not in hidden])


@pytest.fixture(scope="module")
def engine(tiny_tokenizer) -> Engine:
    torch.manual_seed(0)
    model = MiniMoeForCausalLM(MiniMoeConfig(**SHAPE))
    return without_end(Engine(model, tiny_tokenizer))


@pytest.fixture(scope="module")
def qwen_engine(tiny_tokenizer) -> Engine:
    torch.manual_seed(0)
    return without_end(Engine(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, norm_topk_prob=True)), tiny_tokenizer))


@pytest.fixture
def model_dir(engine, tiny_tokenizer, tmp_path):
    engine.model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def without_end(engine: Engine) -> Engine:
    """Random weights would often end after a few tokens."""
    engine.model.generation_config.eos_token_id = None
    engine.end_ids = frozenset()
    return engine


def reference(engine: Engine, ids: list[int], **kwargs) -> list[int]:
    """`model.generate` of one prompt alone."""
    with torch.inference_mode():
        output = engine.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            do_sample=False,
            pad_token_id=0,
            **kwargs,
        )
    return output[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer of the SentencePiece kind: a word's space is in its token, and a text's first is not shown."""
    words = "Zara wanted a boat"
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([words] * 10 + ["b < > / s"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("split", range(1, 4))
def test_a_completion_joins_its_prompt_with_its_space(split, sentencepiece):
    ids = encode_text(sentencepiece, "Zara wanted a boat")
    detokenizer = Detokenizer(sentencepiece, after=ids[split - 1 : split])
    completion = "".join(detokenizer.push(token) for token in ids[split:]) + detokenizer.flush()
    assert sentencepiece.decode(ids[:split]) + completion == "Zara wanted a boat"


@pytest.mark.parametrize("text", ["a</s>b", "a </s> b", "<s>Zara", "Zara  wanted"])
def test_control_tokens_that_are_typed_are_text_for_every_kind_of_tokenizer(text, sentencepiece):
    ids = encode_text(sentencepiece, text)
    assert not {sentencepiece.bos_token_id, sentencepiece.eos_token_id} & set(ids)
    assert sentencepiece.decode(ids) == text


@pytest.mark.parametrize("which", ["engine", "qwen_engine"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_batches_equal_generate_of_each_prompt_alone(which, penalty, request):
    engine = request.getfixturevalue(which)
    settings = GREEDY.model_copy(update={"repetition_penalty": penalty})
    completions = engine.generate(PROMPTS, settings)  # one batch, so all but one prompt are padded
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = engine.encode(prompt)
        expected = reference(engine, ids, max_new_tokens=24, repetition_penalty=penalty)
        assert list(completion.token_ids) == expected
        assert completion.text == visible(engine.tokenizer, expected)
        assert (completion.finish_reason, completion.prompt_tokens, completion.new_tokens) == (
            "length",
            len(ids),
            24,
        )


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED])
def test_a_completion_does_not_depend_on_its_batch(engine, settings):
    together = engine.generate(PROMPTS, settings)
    by_two = engine.generate(PROMPTS[::-1], settings.model_copy(update={"batch_size": 2}))[::-1]
    alone = [engine.generate([prompt], settings)[0] for prompt in PROMPTS]
    ids = [[completion.token_ids for completion in group] for group in (together, by_two, alone)]
    assert ids[0] == ids[1] == ids[2]


def test_equal_prompts_get_different_samples_and_a_seed_repeats_them(engine):
    first = engine.generate(["The cat"] * 4, SAMPLED)
    again = engine.generate(["The cat"] * 4, SAMPLED)
    other = engine.generate(["The cat"] * 4, SAMPLED.model_copy(update={"seed": 1}))
    texts = [[completion.text for completion in group] for group in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 4


def test_rows_that_finish_early_leave_the_others_unchanged(engine):
    free = engine.generate(PROMPTS, GREEDY)
    ends = frozenset(completion.token_ids[5] for completion in free[:3])
    engine.end_ids = ends
    try:
        completions = engine.generate(PROMPTS, GREEDY)
    finally:
        engine.end_ids = frozenset()
    for unlimited, completion in zip(free, completions, strict=True):
        end = next((i + 1 for i, token in enumerate(unlimited.token_ids) if token in ends), 24)
        assert completion.token_ids == unlimited.token_ids[:end]
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] in ends else "length")


def test_end_tokens_of_generation_config_tokenizer_and_document_boundary_all_end(tiny_tokenizer):
    model = MiniMoeForCausalLM(MiniMoeConfig(**SHAPE))
    model.generation_config.eos_token_id = [300, 301]
    tokenizer_ends = {tiny_tokenizer.eos_token_id, tiny_tokenizer.bos_token_id}
    assert Engine(model, tiny_tokenizer).end_ids == {300, 301} | tokenizer_ends


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_adds_up_to_the_completion(engine, settings, prompt):
    pieces = list(engine.stream(prompt, settings))
    assert "".join(pieces) == engine.generate([prompt], settings)[0].text
    assert len(pieces) > 3


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED])
def test_a_stop_string_cuts_text_and_stream_at_its_first_occurrence(engine, settings):
    full = engine.generate(["The cat"], settings)[0].text
    stop = full[12:15]
    stopped = engine.generate(["The cat"], settings.model_copy(update={"stop": (stop, "never there")}))[0]
    assert stopped.text == full[: full.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.new_tokens < 24
    assert "".join(engine.stream("The cat", settings.model_copy(update={"stop": (stop,)}))) == stopped.text


def test_a_control_token_works_as_stop_string(engine):
    settings = GREEDY.model_copy(update={"stop": ("<|im_end|>",)})
    row = engine._row([1], settings)
    row.push(engine.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert row.completion().finish_reason == "stop"


@pytest.mark.parametrize("text", ["plain text", "naïve 日本語 😀👩‍👧 Grüße", "mark \ufffd inside", "\ufffd"])
def test_pieces_never_split_a_character(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tiny_tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_pieces_of_arbitrary_bytes_add_up_to_the_full_decoding(tiny_tokenizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(len(tiny_tokenizer), (12,), generator=generator).tolist()
        detokenizer = Detokenizer(tiny_tokenizer)
        text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
        assert text == visible(tiny_tokenizer, ids)


def test_text_that_may_begin_a_stop_string_is_held_back():
    stops = StopFilter(["world", "woods"])
    pieces = [stops.push(piece) for piece in ("a wo", "nder ", "wo", "o", "ds more")]
    assert pieces == ["a ", "wonder ", "", "", ""]
    assert stops.stopped
    assert stops.flush() == ""
    unstopped = StopFilter(["world"])
    assert unstopped.push("a wor") + unstopped.flush() == "a wor"


def test_prompt_and_answer_are_clamped_to_the_context(engine):
    settings = GREEDY.model_copy(update={"max_new_tokens": 10**9})
    completion = engine.generate(["The cat"], settings)[0]
    assert completion.prompt_tokens + completion.new_tokens == CONTEXT
    assert completion.finish_reason == "length"


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(engine):
    with pytest.raises(UserError, match=r"the prompt has \d{3} tokens, the model's context is 128 tokens"):
        engine.generate(["cat " * 200], GREEDY)


def test_an_empty_prompt_starts_from_the_document_token_or_is_refused(engine):
    assert engine.encode("") == [engine.tokenizer.bos_token_id]
    with pytest.raises(UserError, match="empty"):
        engine.encode(" ", chat=True)


def test_nan_weights_are_an_error_not_a_token(tiny_tokenizer):
    model = MiniMoeForCausalLM(MiniMoeConfig(**SHAPE))
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match="NaN"):
        Engine(model, tiny_tokenizer).generate(["The cat"], GREEDY)


def test_a_session_computes_only_new_tokens_and_answers_as_if_it_had_computed_all(engine):
    session, messages, previous = engine.session(), [], 0
    settings = GREEDY.model_copy(update={"max_new_tokens": 6})
    for text in ("Hello there", "And then?", "Why?"):
        messages.append({"role": "user", "content": text})
        answer = "".join(session.stream(messages, settings))
        assert session.completion is not None
        assert session.completion.token_ids == engine.generate([messages], settings)[0].token_ids
        # The answer's text may be other tokens when encoded again, but the last prompt is not computed twice.
        assert session.reused_tokens >= previous
        previous = session.completion.prompt_tokens
        messages.append({"role": "assistant", "content": answer})


def test_a_session_survives_a_rewritten_past_and_an_interrupt(engine):
    session = engine.session()
    first = [{"role": "user", "content": "Hello there my friend"}]
    next(session.stream(first, GREEDY))  # interrupted after one piece
    session._cache.layers[0].length += 1  # as if within a forward pass: the first layer is ahead
    second = [{"role": "user", "content": "Hello there, moon"}]
    "".join(session.stream(second, GREEDY))
    assert session.completion.token_ids == engine.generate([second], GREEDY)[0].token_ids
    assert session.reused_tokens > 0


def test_the_cache_writes_in_place_grows_and_crops():
    cache = PreallocatedCache(MiniMoeConfig(**SHAPE), capacity=4)
    states = torch.randn(2, 2, 131, 8)
    layer = cache.layers[1]
    assert isinstance(layer, PreallocatedLayer)
    pointers = []
    for start, end in ((0, 3), (3, 128), (128, 131)):
        keys, values = cache.update(states[:, :, start:end], -states[:, :, start:end], 1)
        assert torch.equal(keys, states[:, :, :end])
        assert torch.equal(values, -states[:, :, :end])
        pointers.append(keys.data_ptr())
    assert pointers[0] == pointers[1] != pointers[2]
    cache.crop(-5)
    assert (layer.get_seq_length(), layer.get_mask_sizes(2)) == (126, (128, 0))
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(cache.update(states[1:, :, 126:127], states[1:, :, 126:127], 1)[0], states[1:, :, :127])


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_folder_or_a_run_folder_opens(engine, model_dir, tmp_path, nested):
    folder = model_dir
    if nested:
        folder = tmp_path / "run"
        shutil.copytree(model_dir, folder / "final")
    opened = without_end(Engine.from_pretrained(folder, device="cpu"))
    assert opened.generate(["The cat"], GREEDY)[0].token_ids == engine.generate(["The cat"], GREEDY)[0].token_ids


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="not found"):
        Engine.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"neither config\.json"):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched", "truncated", "pickle", "config"])
def test_damaged_weights_are_refused_instead_of_randomised(model_dir, damage):
    weights = model_dir / "model.safetensors"
    tensors = load_file(weights)
    if damage == "missing":
        del tensors["model.norm.weight"]
    elif damage == "unexpected":
        tensors["model.extra"] = torch.zeros(1)
    elif damage == "mismatched":
        tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, weights, metadata={"format": "pt"})
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "pickle":
        weights.unlink()
        torch.save(tensors, model_dir / "pytorch_model.bin")
    elif damage == "config":
        (model_dir / "config.json").write_text("{}")
    with pytest.raises(UserError):
        Engine.from_pretrained(model_dir, device="cpu")


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers(tiny_tokenizer):
    model = MiniMoeForCausalLM(MiniMoeConfig(**{**SHAPE, "vocab_size": 64}))
    with pytest.raises(UserError, match=rf"{len(tiny_tokenizer)} tokens.*64 rows"):
        Engine(model, tiny_tokenizer)
