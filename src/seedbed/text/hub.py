"""Files of a model on Hugging Face's hub, by its id; needs the extra `hub`. Nothing pickled is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from seedbed.errors import ConfigError, MissingExtra

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def download(name: str, patterns: Sequence[str], what: str) -> Path:
    """The folder that holds the files of a hub id, fetched unless the hub's cache has them.

    Args:
        name: `gpt2`, or `owner/name`.
        patterns: which files, such as `*.json`.
        what: what the name was given to; begins every message.

    Raises:
        ConfigError: no such model, private, its conditions not accepted, or the hub cannot be asked.
        MissingExtra: without the library.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise MissingExtra(f"{what} {name}: there is no such folder here, and models from the hub", "hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise ConfigError(
            f"{what} {name}: its authors want their conditions accepted; do so on its page on the hub, "
            "then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{what} {name}: there is no such folder here and no such model on the hub, or it is private; "
            "check the name, and for a private one log in with `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{what} {name}: there is no such folder here, and the hub could not be asked ({reason}); "
            "check the network, or give a local folder"
        ) from None
