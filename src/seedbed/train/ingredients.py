"""What `scratch.py`, `finetune.py` and `continual/prepare.py` bring to a job; `build.py` does the rest for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seedbed import distributed
from seedbed.checkpoint import require_space
from seedbed.config import Config
from seedbed.data import Reading
from seedbed.data.rows import Rows
from seedbed.errors import ConfigError
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Adapter, Decoder
from seedbed.text.template import CHATML_TOKENS, Template, find_template
from seedbed.text.tokenizer import Tokenizer
from seedbed.train.corpus import Corpus, Texts
from seedbed.train.job import NOTHING_TO_KEEP, Keeping
from seedbed.train.resume import Start


@dataclass(frozen=True)
class Prepared:
    """All of a run that needs no weights."""

    config: Config
    """With all that was found out written into it."""
    shape: DecoderConfig
    """Of the model before new tokens were added."""
    texts: Texts
    base_tokenizer: Tokenizer
    """As the pretrained model came with it; from scratch, as it was trained or named."""
    reading: Reading
    corpus: Corpus
    adapter: Adapter | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """With new tokens and the template."""
        return self.reading.tokenizer


@dataclass(frozen=True)
class Ingredients:
    """A prepared run and its model, which is on the CPU."""

    prepared: Prepared
    model: Decoder
    rows: Rows
    """What is trained on: those of the corpus, and what is replayed beside them."""
    keeping: Keeping = NOTHING_TO_KEEP


def saved_tokenizer(start: Start | None) -> Tokenizer | None:
    """The tokenizer of the run that goes on, if it got as far as having one."""
    if start is None:
        return None
    folder = start.checkpoint or start.run.path / "tokenizer"
    is_there = distributed.on_first(lambda: (folder / "tokenizer.json").exists())
    return Tokenizer.load(folder) if is_there else None


def template_for(config: Config, texts: Texts, tokenizer: Tokenizer) -> Template | None:
    """How the conversations among `texts` become tokens; None for plain texts.

    Raises:
        ConfigError: a flag that is for conversations, with plain texts; or no such template.
    """
    if not texts.are_conversations:
        given = [name for name in ("chat_template", "train_on_prompt") if config.is_typed(name)]
        if given:
            why = f"is for conversations, and {texts.train.name} is plain text; leave it out, or give --format"
            raise ConfigError([f"--{name} {why}" for name in given])
        return None
    return find_template(tokenizer, config.data.chat_template, texts.train.format)


def reading_of(config: Config, texts: Texts, tokenizer: Tokenizer) -> Reading:
    """How `texts` become tokens: with the template, and with the tokens that it needs and the options add."""
    tokenizer = with_template(tokenizer, template_for(config, texts, tokenizer), config.adapt.add_tokens)
    template = template_for(config, texts, tokenizer)  # under the tokenizer that knows its tokens
    return Reading(tokenizer, template, config.data.train_on_prompt)


def with_template(tokenizer: Tokenizer, template: Template | None, more: Sequence[str]) -> Tokenizer:
    """The tokenizer with `more` tokens, those that the template needs, and the template itself."""
    if template is not None and (needed := template.new_tokens):
        ends = CHATML_TOKENS[-1] if CHATML_TOKENS[-1] in needed else None
        tokenizer = tokenizer.with_tokens(needed, eos_token=ends)
    if new := [token for token in dict.fromkeys(more) if token not in tokenizer.special_tokens]:
        tokenizer = tokenizer.with_tokens(new, special=False)
    if template is None:
        return tokenizer
    if template.source != tokenizer.chat_template:
        tokenizer = tokenizer.with_chat_template(template.source)
    # Whatever token ends a document: an answer ends with the template's own, and there generation has to stop.
    end = Template(tokenizer, template.name, template.source).end_id
    return tokenizer if end is None else tokenizer.with_stop(end)


def require_room(run: Path, parameters: int, trained: int, *, adapter: bool) -> None:
    """Raise StorageError when the first checkpoint would not fit: float32 weights, two moments of what is trained."""
    weights = trained if adapter else parameters
    require_space(run, 4 * weights + 8 * trained)
