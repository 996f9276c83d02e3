"""A judge behind any address that speaks OpenAI's protocol: a provider's, or vLLM's, Ollama's and llama.cpp's here."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from seedbed import distributed
from seedbed.errors import ConfigError, JudgeError, MissingExtra
from seedbed.judge.ask import SHOWN, OnReply, Reply, Request

if TYPE_CHECKING:
    from openai import AsyncOpenAI

KEY_VARIABLES: Final = ("SEEDBED_JUDGE_KEY", "OPENAI_API_KEY")
NO_KEY: Final = "none"  # servers of one's own ask for no key, and the library for some
ONLY_MODEL: Final = "default"
GIVE_UP_AFTER: Final = 5  # requests in a row that failed after all their retries

HINTS: Final = {
    401: f"the key is missing or wrong; put it into the environment variable {KEY_VARIABLES[0]}",
    403: "the key may not use this model; look at its rights, or choose another --judge_model",
    404: "no such model or address; look at --judge_model, and at the path of --judge_url, which often ends in /v1",
}
"""Answers by status after which it is no use to ask on, and what to do."""


def _key_from_environment() -> str:
    return next((key for name in KEY_VARIABLES if (key := os.environ.get(name, "").strip())), "")


def served_model(url: str, timeout: float) -> str:
    """The first model that the server at `url` lists; `default` where it lists none, as servers of one model do."""
    _require_library()
    from openai import OpenAI, OpenAIError

    with OpenAI(base_url=url, api_key=_key_from_environment() or NO_KEY, timeout=timeout, max_retries=0) as client:
        try:
            return next((model.id for model in client.models.list()), ONLY_MODEL)
        except (OpenAIError, AttributeError, TypeError, ValueError):
            return ONLY_MODEL  # what is wrong with the address is said when it is asked


@dataclass(frozen=True)
class Endpoint:
    """A model at an address. Its key comes from the environment and is neither kept nor shown."""

    url: str
    model: str
    concurrency: int = 4
    """Requests at once."""
    timeout: float = 60.0
    """Seconds to wait for a reply."""
    retries: int = 5
    """After 408, 409, 429, 5xx, a time-out or a connection that was cut: after half a second, twice as long each time
    to at most eight, a random part of a quarter less; or when `Retry-After` says, up to two minutes."""
    temperature: float = 0.0
    key: str = field(default_factory=_key_from_environment, repr=False)
    say: Callable[[str], None] = field(default=lambda _line: None, repr=False, compare=False)
    """Told of every request that is repeated."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--judge_url {self.url}: expected an address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                f"--judge_url holds more than an address; a key goes into the environment variable {KEY_VARIABLES[0]}"
            )
        _require_library()

    @property
    def name(self) -> str:
        return self.model

    @property
    def remedy(self) -> str:
        return (
            f"See that a server runs at {self.url}, that this address is whole (often it ends in /v1), and that it "
            f"serves --judge_model {self.model}"
        )

    @property
    def identity(self) -> str:
        return f"{self.model} at temperature {self.temperature:g}"

    def ask(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """See `Judge.ask`; of several processes the first one asks.

        Raises:
            JudgeError: a reply that says that no request will be answered, or too many failures in a row.
        """

        def ask() -> list[tuple[int, dict[str, Any]]]:
            replies: list[tuple[int, dict[str, Any]]] = []

            def keep(place: int, reply: Reply) -> None:
                on_reply(place, reply)
                replies.append((place, asdict(reply)))

            with _retries_told(self.say):
                asyncio.run(self._ask(requests, keep))
            return replies

        replies = distributed.on_first(ask)
        if not distributed.is_first():
            for place, fields in replies:
                on_reply(place, Reply(**fields))

    async def _ask(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        from openai import AsyncOpenAI

        waiting = iter(enumerate(requests))
        failures = _Failures(self)
        async with AsyncOpenAI(
            base_url=self.url, api_key=self.key or NO_KEY, timeout=self.timeout, max_retries=self.retries
        ) as client:
            await asyncio.gather(
                *(self._work(client, waiting, failures, on_reply) for _ in range(min(self.concurrency, len(requests))))
            )

    async def _work(
        self, client: AsyncOpenAI, waiting: Iterator[tuple[int, Request]], failures: _Failures, on_reply: OnReply
    ) -> None:
        """Take one request after another from those that all workers share."""
        for place, request in waiting:
            reply = await self._reply(client, request)
            on_reply(place, reply)
            failures.count(reply)

    async def _reply(self, client: AsyncOpenAI, request: Request) -> Reply:
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        try:
            completion = await client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": request.prompt}],
                temperature=self.temperature,
            )
        except APIStatusError as error:
            if error.status_code in HINTS:
                raise JudgeError(self._refused(error.status_code, HINTS[error.status_code], error.message)) from None
            return Reply(None, error=self._clean(error.message))
        except APITimeoutError:
            return Reply(None, error=f"no reply within {self.timeout:g} seconds; give a higher --judge_timeout")
        except APIConnectionError as error:
            return Reply(None, error=f"no connection, or it was cut ({self._clean(str(error.__cause__ or error))})")
        except (OpenAIError, ValueError) as error:
            return Reply(None, error=f"the reply is not of this protocol ({self._clean(str(error))})")
        return self._read(completion)

    def _read(self, completion: Any) -> Reply:
        """The text and the usage of a completion, which may be anything that the server chose to send."""
        try:
            text = completion.choices[0].message.content
        except (AttributeError, IndexError, TypeError):
            return Reply(None, error="the reply is not of this protocol: it has no message")
        usage = getattr(completion, "usage", None)
        spent = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        prompt, written = (count if isinstance(count, int) else 0 for count in spent)
        return Reply(self._without_key(str(text or "")), prompt, written)

    def _refused(self, status: int, hint: str, message: str) -> str:
        return f"--judge_url {self.url} answers {status}: {hint} ({self._clean(message)})"

    def _clean(self, message: str) -> str:
        return self._without_key(" ".join(message.split()))[:SHOWN]

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


@contextmanager
def _retries_told(say: Callable[[str], None]) -> Iterator[None]:
    """The library tells of a request that it repeats in its log alone."""
    logger, handler = logging.getLogger("openai._base_client"), logging.Handler()
    level = logger.level

    def tell(record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            say(f"The judge did not answer. {record.getMessage()}")

    handler.emit = tell  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


@dataclass
class _Failures:
    """How many requests in a row failed."""

    judge: Endpoint
    in_a_row: int = 0

    def count(self, reply: Reply) -> None:
        """Take a reply into account.

        Raises:
            JudgeError: too many of them are failures.
        """
        self.in_a_row = 0 if reply.error is None else self.in_a_row + 1
        if self.in_a_row >= GIVE_UP_AFTER:
            raise JudgeError(
                f"the judge {self.judge.model} does not answer any more: {reply.error}. {self.judge.remedy}. "
                "What was scored before is kept: the same command goes on from there"
            )


def _require_library() -> None:
    try:
        import openai  # noqa: F401
    except ImportError:
        raise MissingExtra("Judges behind an address", "judge") from None
