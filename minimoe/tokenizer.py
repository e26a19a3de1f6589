"""Loading a tokenizer, and the only places where text becomes token ids.

Three rules hold everywhere:
- Text that somebody typed is never a control token: `<|im_end|>` in a document or message is encoded as text.
- `<|endoftext|>` begins and ends every pretraining document, so every byte of text is predicted from
  something and a model can generate from nothing. It is not the padding token: nobody masks it by accident.
- A conversation is encoded by one function for training and for prompting, so the ids of a prompt are a
  prefix of the ids of the conversation it was cut from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimoe.chat_template import CHAT_TEMPLATE, render
from minimoe.conversation import Message
from minimoe.errors import UserError
from minimoe.folder import check_folder
from minimoe.hub import reachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SPECIAL_TOKENS = (END_OF_TEXT, PAD, IM_START, IM_END, *TAGS)


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerBase:
    """Open a tokenizer folder, or download one by its hub name.

    Raises:
        UserError: neither exists, or the folder holds no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = Path(os.path.expanduser(path_or_name))
    local = folder.exists()
    name = str(path_or_name)
    # "runs/tokenizer" looks like a hub name (owner/name): where its parent is a folder here, a folder is what was
    # meant, and asking the hub without a network would only take a minute to fail.
    is_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if not local and (is_path or (folder.parent.name and folder.parent.is_dir())):
        raise UserError(f"tokenizer folder not found: {name}", fix="train one with `minimoe tokenizer CONFIG.yaml`")
    if local and not folder.is_dir():
        raise UserError(f"tokenizer folder is a file: {name}", fix="give the folder that holds tokenizer.json")
    if local:
        check_folder(folder)
    on_disk = local or not reachable("model", name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if local else name, local_files_only=on_disk, trust_remote_code=False
        )
        tokenizer(["a"], verbose=False)  # settings of a wrong type show only now
        return tokenizer
    except Exception as error:  # OSError, ValueError, KeyError, and Rust's plain Exception
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot load tokenizer {name!r}: {reason}",
            fix="give a folder with tokenizer.json, or a hub name that can be reached",
        ) from None


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Give the tokenizer `chatml` or the template in a file, and check that it renders; None leaves what it has.

    Raises:
        UserError: there is no such file, it does not render, or the tokenizer lacks ChatML's tokens.
    """
    if choice is None:
        return
    if choice == "chatml":
        missing = [token for token in (IM_START, IM_END) if token not in tokenizer.get_vocab()]
        if missing:
            raise UserError(
                f"chat_template chatml needs the token {missing[0]}, which the tokenizer lacks: no answer could end",
                fix="give the path of a template with the tokenizer's own tokens",
            )
        tokenizer.chat_template, tokenizer.eos_token = CHAT_TEMPLATE, IM_END
    else:
        try:
            tokenizer.chat_template = Path(os.path.expanduser(choice)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read chat_template {choice}: {error}", fix="give chatml or a file") from None
    encode_prompt(tokenizer, [{"role": "user", "content": "?"}])


def boundary_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that begins and ends a pretraining document: `<|endoftext|>` or its foreign equivalent."""
    for token_id in (tokenizer.bos_token_id, tokenizer.get_vocab().get(END_OF_TEXT), tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UserError("the tokenizer has neither a bos nor an eos token", fix="use one trained by `minimoe tokenizer`")


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of typed texts, with no control tokens whatever they contain."""
    return _tokenize(tokenizer, texts, split_special_tokens=True) if texts else []


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a typed text, with no control tokens whatever it contains."""
    return encode_texts(tokenizer, [text])[0]


def document_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a pretraining document, boundary token at both ends."""
    boundary = boundary_id(tokenizer)
    return [boundary, *encode_text(tokenizer, text), boundary]


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them SFT learns: every assistant turn, its `<|im_end|>` included.

    Raises:
        UserError: the tokenizer has no chat template, or one that does not tell what the assistant says.
    """
    return _encode_rendered(tokenizer, messages, add_generation_prompt=False, learn=True)


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation, for templates with or without generation marks."""
    return _encode_rendered(tokenizer, messages, add_generation_prompt=False)[0]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], enable_thinking: bool | None = None
) -> list[int]:
    """Ids of a conversation up to the point where the assistant speaks next.

    Args:
        enable_thinking: passed on to the chat template; None passes nothing.

    Raises:
        UserError: the template asks for no such thing, or cannot render the conversation.
    """
    more: dict[str, Any] = {}
    if enable_thinking is not None:
        if "enable_thinking" not in _chat_template(tokenizer):
            raise UserError(
                "the tokenizer's chat template knows no enable_thinking",
                where="generation.enable_thinking",
                fix="leave it out, or give the tokenizer chat_template: chatml",
            )
        more = {"enable_thinking": enable_thinking}
    return _encode_rendered(tokenizer, messages, add_generation_prompt=True, more=more)[0]


def _encode_rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    learn: bool = False,
    more: dict[str, Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Render the template, cut it into pieces, encode each piece.

    Cuts are made at both ends of an assistant turn, because that is where a prompt ends when generating
    (merging the template's newline with a newline the assistant starts with would give a token no prompt
    has), and inside every control token that a message spells out, so that it is not one any more. Elsewhere
    the ids are those of `apply_chat_template`. Example: "hi<|im_end|>" is encoded as "...hi<" and
    "|im_end|>...".
    """
    template = _chat_template(tokenizer)
    messages, tools = _as_templates_know_them(template, messages)
    generated = [message.pop("token_ids", None) for message in messages if message["role"] == "assistant"]
    cut = _unused_character([*messages, *tools])
    control = re.compile(
        "|".join(re.escape(token) for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True))
    )
    safe = [
        {key: value if key == "role" else _defuse(value, control, cut) for key, value in message.items()}
        for message in messages
    ]
    variables = tokenizer.special_tokens_map | ({"tools": _defuse(tools, control, cut)} if tools else {}) | (more or {})
    text, spans = render(template, safe, add_generation_prompt=add_generation_prompt, **variables)
    if learn and not re.search(r"{%-?\s*generation\s*-?%}", template):
        spans = _spans_by_prefixes(tokenizer, template, safe, variables, text)
    turns = [message.get("learned", True) for message in messages if message["role"] == "assistant"]
    if not all(turns) and len(turns) != len(spans):
        raise UserError("the chat template does not tell the assistant's turns apart, and one is not to be learned")
    learned_spans = [span for span, learned in zip(spans, turns, strict=True) if learned] if not all(turns) else spans
    # Where spans are turns, those that the model generated are taken as they are.
    own = dict(zip((start for start, _ in spans), generated, strict=True)) if len(generated) == len(spans) else {}
    edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
    pieces: list[str] = []
    learned_pieces: list[bool] = []
    own_pieces: dict[int, list[int]] = {}  # by the piece that they replace
    for start, stop in pairwise(edges):
        inside = any(left <= start < right for left, right in learned_spans)
        if ids := own.get(start):
            own_pieces[len(pieces)] = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
            pieces.append(cut)
            learned_pieces.append(inside)
            continue
        for piece in filter(None, text[start:stop].split(cut)):
            pieces.append(piece)
            learned_pieces.append(inside)
    if not pieces:
        return [], []
    encoded = _tokenize(tokenizer, pieces, split_special_tokens=False)
    for number, own_ids in own_pieces.items():
        encoded[number] = own_ids
    ids = [token for piece in encoded for token in piece]
    learned = [flag for piece, flag in zip(encoded, learned_pieces, strict=True) for _ in piece]
    return ids, learned


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], split_special_tokens: bool) -> list[list[int]]:
    try:
        return tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    except TypeError:  # the tokenizer's word for text that has no UTF-8
        raise UserError("the text is not valid Unicode: it holds half a surrogate pair", fix="correct it") from None


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template or not isinstance(template, str):
        raise UserError("the tokenizer has no chat template", fix="use a tokenizer trained by `minimoe tokenizer`")
    return template


def _spans_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[Message], variables: dict[str, Any], text: str
) -> list[tuple[int, int]]:
    """What the assistant says, for a template without `{% generation %}` marks: an answer is what its turn adds to the
    prompt before it, up to the token that ends it.

    Raises:
        UserError: that is not exact, as the template renders a turn differently once another follows (Qwen3's leaves
            out the think parts of earlier turns), or as it ends no answer.
    """
    fix = "give a tokenizer whose template has {% generation %} marks, or conversations of one answer each"
    ends = tuple(tokenizer.get_added_vocab())
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, _ = render(template, messages[:number], add_generation_prompt=True, **variables)
        through, _ = render(template, messages[: number + 1], add_generation_prompt=False, **variables)
        if not (through.startswith(prompt) and text.startswith(through)):
            raise UserError(
                f"message {number + 1}: the chat template renders this answer differently once it is followed by "
                "another turn, so that its tokens cannot be told",
                fix=fix,
            )
        through = through.rstrip()
        if not ends or not through.endswith(ends) or len(through) <= len(prompt):
            raise UserError(
                f"message {number + 1}: the chat template ends no answer with a token that a model could learn to end "
                "it with",
                fix=fix,
            )
        spans.append((len(prompt), len(through)))
    return spans


def _as_templates_know_them(template: str, messages: Sequence[Message]) -> tuple[list[Message], list[dict[str, Any]]]:
    """Messages and tools as templates read them, where this one reads them.

    Raises:
        UserError: it has no place for something that the conversation has.
    """
    messages, tools = [dict(message) for message in messages], []
    if messages and "tools" in messages[0]:
        tools = messages[0].pop("tools")
        messages = messages if messages[0]["content"] else messages[1:]
    for message in messages:
        if message.get("reasoning_content") and "reasoning_content" not in template:
            thought = message.pop("reasoning_content")
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    for key, given in (("tools", tools), ("tool_calls", any(message.get("tool_calls") for message in messages))):
        if given and not re.search(rf"\b{key}\b", template):
            raise UserError(
                f"the conversation has {key}, and the tokenizer's chat template has no place for them",
                fix="give one that has, such as chat_template: chatml, or remove them from the data",
            )
    return messages, tools


def _unused_character(messages: Sequence[Any]) -> str:
    """A private-use character that occurs nowhere in the messages."""
    text = repr(messages)  # repr escapes private-use characters, so look for the escape as well
    return next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in text and repr(c)[1:-1] not in text)


def _defuse(value: Any, control: re.Pattern[str], cut: str) -> Any:
    """`value` with `cut` put after the first character of every control token spelled out in it."""
    if isinstance(value, str):
        return control.sub(lambda match: match[0][0] + cut + match[0][1:], value) if control.pattern else value
    if isinstance(value, list):
        return [_defuse(item, control, cut) for item in value]
    if isinstance(value, dict):
        return {_defuse(key, control, cut): _defuse(item, control, cut) for key, item in value.items()}
    return value
