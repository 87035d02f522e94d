"""A word-level CLIP tokenizer for the captions of the shapes world."""

from collections import Counter
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

MAX_LENGTH = 12
START, END = "<|startoftext|>", "<|endoftext|>"


def _merges(words: set[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges that join every word into one token.

    Ties are broken alphabetically, so that the result is always the same, unlike with the `tokenizers` trainer.
    """
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while pairs := Counter(pair for parts in split.values() for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            split[word] = merged
    return merges


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Build CLIP's byte-level BPE with one token per word of the captions; other words are split into characters."""
    characters = sorted(ByteLevel.alphabet())
    merges = _merges({word for caption in captions for word in caption.split()})
    tokens = [*characters, *(c + "</w>" for c in characters), *dict.fromkeys(a + b for a, b in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    )
