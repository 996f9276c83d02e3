"""Values and sentences as a page shows them."""

from __future__ import annotations

import json
import re

MISSING = "–"
VALUE = r"[\w./+-]*\d(?:[\w./+-]*\w)?|cosine|linear|constant|all-linear"
FLAG = re.compile(
    r"seedbed [a-z]+(?: --[a-z]\w*(?: [\w./-]*\w)?)+"  # a whole command
    rf"|--[a-z]\w*(?: (?:{VALUE})(?![\w-]))?"  # or a flag, with its value where that cannot be a word of the sentence
)


def show(value: object) -> str:
    """A value in a table: numbers to four digits, thousands apart.

    >>> show(3.7738041), show(1631448), show(None), show(2e-05), show(["q", "v"])
    ('3.774', '1,631,448', '–', '2e-05', 'q, v')
    """
    match value:
        case None | "":
            return MISSING
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"
        case str():
            return value
        case list() | tuple():
            return ", ".join(map(show, value)) or MISSING
    return json.dumps(value, default=str)


def change(share: float | None) -> str:
    """A relative change, with its sign.

    >>> change(0.0312), change(-0.2), change(None)
    ('+3.1 %', '−20.0 %', '–')
    """
    return MISSING if share is None else f"{100 * share:+.1f} %".replace("-", "−")


def pieces(text: str) -> list[tuple[str, bool]]:
    """A sentence in pieces, each with whether it is typed: a flag, or a command.

    >>> pieces("Set --warmup_ratio 0.1, or less.")
    [('Set ', False), ('--warmup_ratio 0.1', True), (', or less.', False)]
    >>> [piece for piece, is_flag in pieces("--precision bf16, or --lr_schedule cosine; --data holds it") if is_flag]
    ['--precision bf16', '--lr_schedule cosine', '--data']
    """
    found, end = [], 0
    for flag in FLAG.finditer(text):
        found += [(text[end : flag.start()], False), (flag.group(), True)]
        end = flag.end()
    return [piece for piece in [*found, (text[end:], False)] if piece[0]]


def flags_to_copy(remedy: str) -> str:
    """The command that a remedy gives, or else its flags that come with a value, as words of a command.

    >>> flags_to_copy("Set --max_seq_len 512 with a smaller --batch_size, or pass --allow max_seq_len to keep it.")
    '--max_seq_len 512'
    >>> flags_to_copy("Ask again: seedbed generate --model runs/a --top_k 5.")
    'seedbed generate --model runs/a --top_k 5'
    """
    typed = [piece for piece, is_flag in pieces(remedy) if is_flag and " " in piece]
    commands = [piece for piece in typed if piece.startswith("seedbed")]
    return commands[0] if commands else " ".join(typed)
