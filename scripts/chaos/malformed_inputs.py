"""Malformed input for every command, generated: configs, rows, command lines and model folders.

A case is a command line and the files it reads, wrong by construction. `malformed.py` runs it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import strategies as st

MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "moe_intermediate_size": 32}
DATA = {"train": "{root}/data.jsonl", "cache_dir": "{root}/cache", "sequence_length": 32, "num_processes": 1}
TRAIN = {"max_steps": 1, "batch_size": 2, "device": "cpu"}
CONFIGS: dict[str, dict[str, Any]] = {
    "pretrain": {"output_dir": "out", "tokenizer": "{root}/model", "model": MODEL, "data": DATA, "train": TRAIN},
    "preview": {"output_dir": "out", "tokenizer": "{root}/model", "model": MODEL, "data": DATA, "train": TRAIN},
    "sft": {
        "output_dir": "out",
        "init_from": "{root}/model",
        "data": DATA | {"train": "{root}/chats.jsonl"},
        "train": TRAIN,
    },
    "tokenizer": {"output_dir": "out", "data": DATA},
}
GOOD_ROW = {"text": "the cat sat on the mat and looked at the moon"}
GOOD_CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello cat"}]}


@dataclass(frozen=True)
class Case:
    """A command line; `{root}` in it and in texts stands for the workspace. Files are made in an empty folder."""

    words: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)


# ---- configs

_NOT_NUMBERS = ["abc", [], {}, True, float("nan"), float("inf"), "", [1, 2], {"a": 1}]
_NO_COUNT = [*_NOT_NUMBERS, -1, 0, 1.5, -(10**40)]
_NO_FOLDER = ["", "a\0b", "~no-such-user/x", "{root}/data.jsonl", [], {"a": 1}, 1.5, True]
_NO_INPUT = ["", "missing/folder/here", "x" * 5000, "a\0b", "~no-such-user/x", "/dev/null/x", [], {"a": 1}, 1.5, True]
_NO_CHOICE = ["abc", "", 5, [], {}, True, None, "Auto "]
_COUNTS = (
    "data.max_documents data.sequence_length data.num_processes train.max_steps train.batch_size "
    "train.micro_batch_size train.log_every train.eval_every train.save_every train.keep_last train.sample_tokens"
).split()
_REALS = "optimizer.lr optimizer.adamw_lr optimizer.eps train.max_grad_norm schedule.decay_fraction".split()
_CHOICES = "optimizer.name schedule.name train.precision train.device logging.online data.on_bad_rows".split()
_SHAPES = [*MODEL, "num_experts", "num_experts_per_tok", "vocab_size", "max_position_embeddings"]
_JUNK_LINES = [
    "\tseed: 1", "a: &a [1]\nb: *a", "? [a]\n: b", "x: !!python/object/apply:os.system [ls]", "---\na: 1",
    "seed: 1\nseed: 2", "%YAML 9", "x: {", "seed: [", "- a", "x: !!binary z", "'", '"\\0": 1', "\x07", "seed:",
    "seed: no", "seed: 2001-99-99", "seed: !!int x", "x: !!float ''", "optimizer: {lr: ._}", "5: 3", "null: 1", "~",
    "optimizer:", "schedule: 5", "logging: {run_name: ../../x}", "seed: 0x" + "f" * 9999, "seed: " + "9" * 9999,
    "a: &a [x,x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "<<: {seed: 1", "<<: 5", "{}", "[]: 1", "data: {train: x}",
]  # fmt: skip


def _wrong(keys: list[str], values: list[Any]) -> st.SearchStrategy[tuple[str, Any]]:
    return st.tuples(st.sampled_from(keys), st.sampled_from(values))


wrong_values = st.one_of(
    _wrong(_COUNTS, _NO_COUNT),
    _wrong(_REALS, [*_NOT_NUMBERS, -1, 0, None]),
    _wrong(_CHOICES, _NO_CHOICE),
    _wrong([f"model.{key}" for key in _SHAPES], [*_NO_COUNT, None, 10**15, "32"]),
    _wrong(["output_dir", "data.cache_dir"], _NO_FOLDER),
    _wrong(["output_dir"], ["/"]),
    _wrong(["tokenizer", "data.train"], _NO_INPUT),
    _wrong(["seed"], [-1, 1.5, 2**63, 10**40, *_NOT_NUMBERS]),
    _wrong(["optimizer", "schedule", "train", "data", "model", "logging"], [None, 5, "abc", [], [1], True]),
    _wrong(["train.epochs"], [1, -1, 0]),
)
unknown_keys = st.tuples(
    st.sampled_from(["", "data.", "train.", "optimizer.", "model."]),
    st.text("abcdefghij_", min_size=1, max_size=8).map(lambda name: f"x{name}"),
).map("".join)


@st.composite
def configs(draw: st.DrawFn) -> Case:
    """A config with one mistake: a wrong value, an unknown or missing key, or text that is no such YAML."""
    command = draw(st.sampled_from(sorted(CONFIGS)))
    values = json.loads(json.dumps(CONFIGS[command]))
    mistake = draw(st.sampled_from(["value", "value", "value", "override", "key", "missing", "junk", "cut", "bytes"]))
    overrides: list[str] = []
    if mistake in ("value", "override"):
        key, value = draw(wrong_values)
        if mistake == "override":
            overrides = [f"{key}={value if isinstance(value, str) and chr(0) not in value else json.dumps(value)}"]
            hypothesis.assume(value != "")  # `key=` is null, which some keys may be
        else:
            _set(values, key, value)
    elif mistake == "key":
        _set(values, draw(unknown_keys), 1)
    elif mistake == "missing":
        del values[draw(st.sampled_from(sorted(values)))]
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
    text = text.replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf")
    content = text.encode()
    if mistake == "junk":
        content += draw(st.sampled_from(_JUNK_LINES)).encode() + b"\n"
    elif mistake == "cut":  # the last section is required and closes with the last bracket
        content = content[: draw(st.integers(0, len(content) - 3))]
    elif mistake == "bytes":
        content = draw(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda s: s.encode("utf-8"))))
    return Case((command, "config.yaml", *overrides), {"config.yaml": content})


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value


# ---- data

bad_texts = st.sampled_from([None, 5, 1.5, True, [], {}, ["a"], {"a": "b"}, "\ud800"])
_U, _A = GOOD_CHAT["messages"]
bad_turns: st.SearchStrategy[Any] = st.sampled_from(
    [
        [], [_A], [_U, _U], [_U, _A, _A], ["x"], [None], [5], [[]], [{}], [{"role": "user"}], [{"content": "x"}],
        [_U, _A | {"content": None}], [_U, _A | {"content": 5}], [_U, _A | {"content": [{"type": "image"}]}],
        [_U, _A | {"tool_calls": 5}], [_U, _A | {"tool_calls": [5]}], [_U, _A | {"tool_calls": "{"}],
        [_U, _A | {"reasoning_content": 5}], [_U | {"role": "boss"}], [_U | {"role": 5}], [_U | {"role": None}],
        [_U, _U | {"role": "system"}], [_U | {"content": "\ud800"}], [_U, {"role": "tool", "content": "x"}],
        None, 5, "x",
    ]
)  # fmt: skip


@st.composite
def bad_lines(draw: st.DrawFn) -> bytes:
    """A line of JSON lines that is no usable row."""
    row = draw(
        st.one_of(
            bad_texts.map(lambda value: {"text": value}),
            bad_turns.map(lambda turns: {"messages": turns}),
            bad_turns.map(lambda turns: {"conversations": turns}),
            bad_texts.map(lambda value: {"instruction": "a", "output": value}),
            bad_texts.map(lambda value: {"prompt": value, "completion": "b"}),
            st.sampled_from([[], 5, "x", None, {}, {"txet": "a"}]),
        )
    )
    line = json.dumps(row).encode()
    kind = draw(st.sampled_from(["row", "row", "row", "cut", "utf8", "junk", "deep", "digits"]))
    if kind == "cut":
        line = json.dumps(GOOD_ROW).encode()[: draw(st.integers(1, 30))]
    elif kind == "utf8":
        line = b'{"text": "' + draw(st.binary(max_size=9)).replace(b"\n", b"") + b'\xff"}'
    elif kind == "junk":
        line = b"<" + draw(st.binary(max_size=40)).replace(b"\n", b"")
    elif kind == "deep":
        line = b"[" * draw(st.sampled_from([1, 100, 100_000]))
    elif kind == "digits":
        line = b'{"text": ' + b"1" * 10_000 + b"}"
    return line


@st.composite
def rows(draw: st.DrawFn) -> Case:
    """A data file with a mistake in it, read by one of the commands."""
    command = draw(st.sampled_from(["pretrain", "preview", "tokenizer", "evaluate", "sft"]))
    good = json.dumps(GOOD_CHAT if command == "sft" else GOOD_ROW).encode()
    name = draw(st.sampled_from(["d.jsonl"] * 6 + ["d.json", "d.txt", "d.csv", "d.parquet", "d.jsonl.gz", "d.x"]))
    junk = draw(st.binary(max_size=99))
    if name == "d.jsonl":
        before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        content = b"\n".join([good] * before + [draw(bad_lines())] + [good] * after) + b"\n"
    elif name == "d.txt":
        content = draw(st.sampled_from([b"", b" \n\n", junk + b"\xff\n"]))
    elif name == "d.csv":
        content = draw(st.sampled_from([b"", b"text\n", b"other\na\n", b"text\na,b\n", b'text\n"a\n', b"text\n\xff\n"]))
    else:
        content = b"[" + junk
    if command == "evaluate":
        return Case(("evaluate", "{root}/model", "--device", "cpu", "--data", name), {name: content})
    values = CONFIGS[command] | {"data": DATA | {"train": name}}
    return Case((command, "config.yaml"), {"config.yaml": json.dumps(values).encode(), name: content})


# ---- command lines and model folders

_SETTINGS = {
    "max_new_tokens": _NO_COUNT,
    "temperature": [*_NOT_NUMBERS, -1, 1e-320],
    "top_k": [*_NOT_NUMBERS, -1, 1.5],
    "top_p": [*_NOT_NUMBERS, 0, -1, 1.1],
    "min_p": [*_NOT_NUMBERS, -1, 2],
    "repetition_penalty": [*_NOT_NUMBERS, 0, -1, 1e300],
    "seed": [*_NOT_NUMBERS, -1, 2**63],
    "batch_size": _NO_COUNT,
    "stop": [5, {}, [5], True],
}
bad_settings = st.sampled_from(sorted(_SETTINGS)).flatmap(
    lambda key: st.sampled_from(_SETTINGS[key]).map(lambda value: (key, json.dumps(value)))
)
GENERATE = ("generate", "{root}/model", "--device", "cpu")
_COMMAND_LINES = [
    (), ("pretrian",), ("--no-such-option",), ("pretrain",), ("generate",), ("evaluate",), ("chat", "missing"),
    GENERATE, (*GENERATE, "--prompt"), (*GENERATE, "--prompt", "x", "--top-k"), (*GENERATE, "--chat", "--prompt", ""),
    (*GENERATE, "--prompt", "x", "top_k=1", "top_k=2"), (*GENERATE, "--prompt", "x", "--top-k", "1", "top_k=1"),
    (*GENERATE, "--prompt", "x", "--top-k", "--temperature", "1"), (*GENERATE, "--prompt", "cat " * 500),
    (*GENERATE, "--prompt", "x", "--file", "y"), (*GENERATE, "--file", "missing"), (*GENERATE, "--file", "/dev/null"),
    (*GENERATE, "--prompt", "x", "--config", "missing"), (*GENERATE, "--prompt", "\udcff"),
    (*GENERATE[:2], "--prompt", "x", "--device", "abacus"), (*GENERATE[:2], "--prompt", "x", "--device", "meta"),
    ("evaluate", "{root}/model", "--data", "missing"), ("evaluate", "{root}/data.jsonl", "--data", "{root}/data.jsonl"),
    ("evaluate", "{root}/model", "--data", "{root}/data.jsonl", "--batch-size", "0"),
    ("evaluate", "{root}/model", "--data", "{root}/data.jsonl", "--sequence-length", "4000"),
    ("preview", "/dev/zero"), ("preview", "/"), ("preview", "x" * 5000), ("generate", "x" * 5000, "--prompt", "x"),
]  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn) -> Case:
    """A command line that means nothing, or a decoding setting that cannot be."""
    kind = draw(st.sampled_from(["setting", "flag", "unknown", "word", "line", "line"]))
    prompt = (*GENERATE, "--prompt", "the cat")
    if kind == "line":
        return Case(draw(st.sampled_from(_COMMAND_LINES)))
    if kind == "word":  # a setting has a "="; a word with a dash first is an option
        word = draw(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="=-\0"), min_size=1, max_size=9)
        )
        return Case((*prompt, word))
    key, value = draw(bad_settings)
    if kind == "unknown":
        key = draw(unknown_keys).replace(".", "")
    if kind == "flag" and key != "stop":  # after --stop any value is a text to stop at
        return Case((*prompt, f"--{key.replace('_', '-')}={value}"))
    return Case((*prompt, f"{key}={value}"))


_NO_SIZE: list[Any] = [-1, 0, 1.5, "x", None, [], 10**12, 10**400, float("nan")]
_BAD_ARCHITECTURE: list[tuple[str, Any]] = [
    *((key, value) for key in _SHAPES for value in _NO_SIZE),
    ("model_type", "nope"), ("model_type", []), ("model_type", None), ("rope_parameters", []), ("rope_theta", "x"),
    ("rope_parameters", {"rope_type": "yarn"}), ("rope_parameters", {"rope_theta": 0}), ("eos_token_id", ["a"]),
    ("eos_token_id", 10**20), ("pad_token_id", -5), ("dtype", "evil"), ("num_labels", 10**9), ("unknown_key", 1),
    ("hidden_act", "gelu"), ("eval_dispatch", "x"), ("tie_word_embeddings", "yes"), ("rms_norm_eps", float("nan")),
]  # fmt: skip
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@st.composite
def model_folders(draw: st.DrawFn) -> Case:
    """A copy of the model with one file cut, replaced, linked elsewhere or missing a sense.

    Files that end in `@` hold the target of a link.
    """
    kind = draw(st.sampled_from(["value", "value", "cut", "junk", "link", "index", "prompts"]))
    name = draw(st.sampled_from(MODEL_FILES))
    words, files = (*GENERATE[2:], "--prompt", "x", "max_new_tokens=1"), {}
    if kind == "value":
        key, value = draw(st.sampled_from(_BAD_ARCHITECTURE))
        files = {"model/config.json+": json.dumps({key: value}).encode()}
    elif kind == "cut":
        files = {f"model/{name}-": str(draw(st.floats(0, 0.99))).encode()}
    elif kind == "junk":
        files = {f"model/{name}": b"\xff" + draw(st.binary(max_size=99))}
    elif kind == "link":
        files = {
            f"model/{name}@": draw(st.sampled_from([b"{root}/model/", b"../../model/", b"missing/"])) + name.encode()
        }
    elif kind == "index":
        target = draw(
            st.sampled_from(["../x.safetensors", "/etc/passwd", "evil.bin", "", 5, None, "missing.safetensors"])
        )
        index = draw(
            st.sampled_from([{"weight_map": {"model.embed_tokens.weight": target}}, {}, [], {"weight_map": 5}])
        )
        files = {"model/model.safetensors!": b"", "model/model.safetensors.index.json": json.dumps(index).encode()}
    else:
        line = draw(
            st.sampled_from([b"{", b"[]", b"{}", b'{"prompt": 5}', b'{"messages": [5]}', b'{"prompt": "\\ud800"}'])
        )
        return Case(("generate", "{root}/model", "--file", "p.jsonl"), {"p.jsonl": line + b"\n"})
    return Case(("generate", "model", *words), files)


STRATEGIES = {"configs": configs(), "rows": rows(), "command_lines": command_lines(), "model_folders": model_folders()}
