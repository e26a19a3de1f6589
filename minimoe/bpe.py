"""Training of a byte-level BPE tokenizer with `tokenizers`: NFC, exactly Qwen2's split regex (llama.cpp knows a
pre-tokenizer by its hash) and all 256 bytes in the alphabet, so any UTF-8 text round-trips up to NFC.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from minimoe.chat_template import CHAT_TEMPLATE
from minimoe.tokenizer import END_OF_TEXT, IM_END, IM_START, PAD, SPECIAL_TOKENS, TAGS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Qwen2's split regex, to the letter.
SPLIT_REGEX = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# Characters. Without spaces or commas (Chinese, DNA) a word is as long as its document, and learning merges from it
# takes the square of its length. Words of other texts are shorter, so that nothing changes for them.
LONGEST_WORD = 256


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Learn merges from texts; `vocab_size` counts the bytes and the special tokens too."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    backend: Tokenizer = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(SPLIT_REGEX), behavior="isolated")
    pieces = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_WORD}}}"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pieces, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=IM_END,
        pad_token=PAD,
        extra_special_tokens=[IM_START, *TAGS],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
