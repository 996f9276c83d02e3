"""What a run needs, looked at before any run starts, as far as that goes without torch, the network or a whole text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from seedbed.config import TRAINED_HERE, Config
from seedbed.data.named import NAMED
from seedbed.data.sources import find_files, open_source
from seedbed.data.streaming import is_remote
from seedbed.errors import CheckpointError, ConfigError, DataError
from seedbed.model.shape import ASSUMED_VOCAB, decoder_config
from seedbed.text.hub import HUB_ID

HowToRead = tuple[str, str, str]
"""Column of the text in tables, rule for documents, format."""

Look = Callable[[str, str, HowToRead | None], str | None]


def unfit_inputs(config: Config, look: Look) -> Iterator[str]:
    """Texts and folders that are not there, texts that are none, sizes of a new model that contradict each other.

    `look` is `unfit_text`, or remembers what that said.
    """
    data = config.data
    reading = (data.text_column, data.document, data.format)
    texts = (
        ("--data", data.data, None if data.streaming else reading),
        ("--val_data", data.val_data, reading),
        ("--general_data", config.keeping.general_data, ("text", "auto", "auto")),
    )
    yield from (said for flag, text, how in texts if text is not None and (said := look(flag, text, how)))
    if data.tokenizer is not None and data.tokenizer not in TRAINED_HERE:
        yield from _missing_folder("--tokenizer", data.tokenizer)
    if config.regime == "scratch":
        try:
            decoder_config(config.model, data, data.vocab_size or ASSUMED_VOCAB)
        except (ConfigError, CheckpointError) as error:
            yield from str(error).splitlines()
    else:
        yield from _missing_folder("--model", config.model.model)


def unfit_text(flag: str, text: str, reading: HowToRead | None) -> str | None:
    """Why a text cannot be opened, or, without a reading, because it is streamed, be found; None where it can.

    What comes over the network is not looked at.
    """
    if (text in NAMED and not Path(text).exists()) or (reading is None and is_remote(text)):
        return None
    try:
        if reading is None:
            find_files(text, flag)
        else:
            column, document, form = reading
            open_source(text, text_column=column, document=document, format=form, flag=flag)
    except (ConfigError, DataError) as error:
        return str(error)
    return None


def _missing_folder(flag: str, name: str) -> Iterator[str]:
    """A name that is no folder and cannot be the hub's; whether the hub has it, the run will see."""
    path = Path(name)
    may_be_on_the_hub = HUB_ID.fullmatch(name) and path.parts[0] != "runs" and not path.is_file()
    if not path.is_dir() and not may_be_on_the_hub:
        yield f"{flag} {name}: there is no such folder; expected one of a model or a run, or a hub id (owner/name)"
