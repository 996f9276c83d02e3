"""A server on loopback that speaks the protocol of OpenAI's chat completions, and misbehaves as it is told."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-4fb1c2d3e5"


@dataclass(frozen=True)
class Answer:
    """What the server does with a request."""

    body: str | dict[str, Any]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False
    """Close the connection in the middle of the body."""


def say(text: str) -> Answer:
    """A completion with this text, of 100 tokens read and 2 written."""
    message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    return Answer(
        {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [message], "usage": usage}
    )


def refuse(status: int, message: str = "no", **headers: str) -> Answer:
    """An error as OpenAI words it."""
    return Answer({"error": {"message": message}}, status, {name.replace("_", "-"): v for name, v in headers.items()})


Behaviour = Callable[[int, str], Answer]
"""The number of the request, from 0, and its prompt."""


class JudgeServer(ThreadingHTTPServer):
    """Counts and keeps what it is asked."""

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.models: list[str] = []
        self.prompts: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.times: list[float] = []
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_GET(self) -> None:
        """The list of models, or nothing of the kind."""
        models = self.server.models
        body = json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in models]}).encode()
        self.send_response(200 if models else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.prompts)
            server.bodies.append(body)
            server.prompts.append(body["messages"][-1]["content"])
            server.keys.add(self.headers["Authorization"])
            server.times.append(time.monotonic())
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        answer = server.behaviour(number, server.prompts[number])
        time.sleep(answer.delay)
        with server.lock:
            server.at_once -= 1
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        is_json = isinstance(answer.body, dict)
        content = (json.dumps(answer.body) if is_json else str(answer.body)).encode()
        self.send_response(answer.status)
        kind = "application/json" if is_json else "text/html"
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if answer.cut:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[JudgeServer]:
    """A server as long as the block lasts."""
    server = JudgeServer(behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
