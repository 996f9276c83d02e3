"""Text to tokens and back: tokenizers. Nothing here imports torch."""

from __future__ import annotations

from seedbed.text.tokenizer import Tokenizer, bytes_per_token, train_bpe, train_char

__all__ = ["Tokenizer", "bytes_per_token", "train_bpe", "train_char"]
