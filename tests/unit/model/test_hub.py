"""Models by name, from folders and from a small hub of our own that answers as the real one does."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from seedbed.errors import CheckpointError, ConfigError, MissingExtra, SeedbedError, StorageError
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder
from seedbed.model.hub import copy_pretrained, find_pretrained, new_folder, stored_types
from seedbed.model.weights import load_decoder, save_decoder
from seedbed.text.tokenizer import train_char

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    model = Decoder(
        from_scratch("llama", vocab_size=300, d_model=16, num_layers=1, num_heads=2, max_seq_len=16, d_ff=32)
    )
    save_decoder(model, folder, bos_token_id=None, eos_token_id=0)
    train_char(["abc"]).save(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "README.md").write_text("words")
    return folder


class Hub(BaseHTTPRequestHandler):
    """Serves every folder of `repositories`; `gated/model` wants its conditions accepted."""

    repositories: Path
    asked: set[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        name, what, rest = re.split("/(revision|tree|resolve)/", path) if path.count("/") > 1 else (path, "", "")
        folder = self.repositories / name
        if name == "gated/model":
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif not what or not folder.is_dir():
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif what == "resolve":
            file = rest.partition("/")[2]
            self.asked.add(file)
            self.answer(200, (folder / file).read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{name}-{file}"'})
        else:
            files = [(file.name, file.stat().st_size) for file in sorted(folder.iterdir())]
            siblings = [{"rfilename": name} for name, _ in files]
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in files]
            answer = tree if what == "tree" else {"id": name, "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(answer).encode(), {})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The class that answers; the library asks it instead of the real hub, and keeps files in a temporary cache."""
    from huggingface_hub import constants

    handler = type("OwnHub", (Hub,), {"repositories": tmp_path / "hub", "asked": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_folder_is_itself(model_folder: Path) -> None:
    assert find_pretrained(str(model_folder)) == model_folder


def test_a_hub_id_becomes_a_folder_without_pickles(model_folder: Path, hub: type[Hub]) -> None:
    shutil.copytree(model_folder, hub.repositories / "owner" / "name")
    found = find_pretrained("owner/name")
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in found.iterdir()} == expected == hub.asked
    weights = load_decoder(found).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_decoder(model_folder).state_dict().items())


def test_a_model_in_the_cache_needs_no_network(
    model_folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    shutil.copytree(model_folder, hub.repositories / "gpt2")
    found = find_pretrained("gpt2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_pretrained("gpt2") == found
    with pytest.raises(ConfigError, match=r"--base owner/other: .* the hub could not be asked"):
        find_pretrained("owner/other", "--base")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("owner/none", ConfigError, "no such folder here and no such model on the hub, or it is private"),
        ("gated/model", ConfigError, "conditions accepted"),
        ("owner/pickled", CheckpointError, "no safetensors on the hub.*from_pretrained"),
        ("owner/data", CheckpointError, "no config.json on the hub"),
    ],
)
def test_what_the_hub_has_not_is_named(
    name: str, error: type[SeedbedError], message: str, model_folder: Path, hub: type[Hub]
) -> None:
    pickled, data = hub.repositories / "owner" / "pickled", hub.repositories / "owner" / "data"
    shutil.copytree(model_folder, pickled)
    (pickled / "model.safetensors").unlink()
    data.mkdir()
    shutil.copy(model_folder / "model.safetensors", data)
    with pytest.raises(error, match=f"--model {name}: .*{message}"):
        find_pretrained(name)


def test_a_hub_that_does_not_answer_is_named(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert not hub.asked
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="the hub could not be asked"):
        find_pretrained("owner/name")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    gguf, other = tmp_path / "a.gguf", tmp_path / "a.txt"
    gguf.touch()
    other.touch()
    with pytest.raises(ConfigError, match=rf"seedbed import {gguf} --output FOLDER"):
        find_pretrained(str(gguf))
    with pytest.raises(ConfigError, match="is a file; expected a model folder"):
        find_pretrained(str(other))


@pytest.mark.parametrize("name", ["./runs/none", "a/b/c", "", "../x", "/none"])
def test_a_path_that_is_not_there_never_reaches_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="does not exist; expected a model folder, or a hub id"):
        find_pretrained(name)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"seedbed\[hub\]"):
        find_pretrained("owner/name")


def test_a_copy_holds_what_is_read_and_nothing_else(model_folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    copy_pretrained(model_folder, tmp_path / "copy", progress=lambda done, total: seen.append((done, total)))
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert copied == {name: (model_folder / name).read_bytes() for name in copied}
    assert copied.keys() == {path.name for path in model_folder.iterdir()} - {"pytorch_model.bin", "README.md"}
    assert seen[-1][0] == seen[-1][1] == sum(map(len, copied.values()))


def test_a_copy_may_change_the_type_of_the_weights(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "generation_config.json").write_text('{"eos_token_id": [0, 1], "temperature": 0.5}')
    copy_pretrained(model_folder, tmp_path / "copy", torch.bfloat16)
    assert list(stored_types(model_folder)) == ["F32"]
    assert list(stored_types(tmp_path / "copy")) == ["BF16"]
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (config["dtype"], config["eos_token_id"]) == ("bfloat16", 0)
    kept = (tmp_path / "copy" / "generation_config.json").read_text()
    assert kept == (model_folder / "generation_config.json").read_text()


def test_a_model_the_decoder_cannot_be_is_not_copied(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="model_type 't5'"):
        copy_pretrained(model_folder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(output) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    with (
        pytest.raises(StorageError, match=r"out: could not be written \(.*No space left"),
        new_folder(output) as folder,
    ):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")
    assert list(output.parent.iterdir()) == []
    output.mkdir()
    with new_folder(output) as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in output.iterdir()] == ["whole"]
    with pytest.raises(ConfigError, match="not an empty folder"), new_folder(output):
        pass
