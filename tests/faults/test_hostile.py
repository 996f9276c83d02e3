"""Files made to run code when they are loaded: nothing in them is executed, and the refusal is one of ours."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import seedbed
from seedbed.checkpoint import MANIFEST, load_model, newest_intact
from seedbed.cli.app import run
from seedbed.errors import CheckpointError, SeedbedError
from tests.faults.test_bad_input import copy_model

ROOT = Path(seedbed.__file__).parent

# What the code of the package itself never does


FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile", "zipfile"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "torch.jit.load",
    "torch.hub.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "np.save", "shutil.unpack_archive",
}  # fmt: skip
FORBIDDEN_KEYWORDS = {("trust_remote_code", True), ("allow_pickle", True), ("shell", True), ("weights_only", False)}


def sins(tree: ast.AST) -> list[str]:
    """Everything in a module that could run what a file says."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in FORBIDDEN_CALLS else []
            if name == "yaml.load" and not any(word.arg == "Loader" for word in node.keywords):
                found.append(name)
            for word in node.keywords:
                if isinstance(word.value, ast.Constant) and (word.arg, word.value.value) in FORBIDDEN_KEYWORDS:
                    found.append(f"{name}({word.arg})")
    return found


def test_the_code_has_no_way_to_run_a_file() -> None:
    for path in ROOT.rglob("*.py"):
        assert not sins(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "torch.load(path)", "eval(text)", "yaml.load(text)",
        "np.load(path, allow_pickle=True)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(line, shell=True)", "import tarfile",
    ],
)  # fmt: skip
def test_each_way_would_be_seen(code: str) -> None:
    assert sins(ast.parse(code))


# Payloads


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Touch(canary))


def torch_zip(canary: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": Touch(canary)}, stream)
    return stream.getvalue()


def torch_legacy(canary: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": Touch(canary)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def zip_slip(canary: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(f"../../../../../../../..{canary}", "out")
        archive.writestr("data.pkl", pickled(canary))
    return stream.getvalue()


def tar_slip(canary: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in (f"../../../../../../../..{canary}", "link", "weights.pkl", "weights.pkl"):
            data = pickled(canary)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if name == "link":
                member.type, member.linkname, member.size, data = tarfile.SYMTYPE, str(canary.parent), 0, b""
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def zip_bomb(_canary: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"\0" * 200_000_000)
    return stream.getvalue()


MAKERS: dict[str, Callable[[Path], bytes]] = {
    maker.__name__: maker for maker in (pickled, torch_zip, torch_legacy, zip_slip, tar_slip, zip_bomb)
}
READ = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
NOT_READ = (
    "pytorch_model.bin", "rng_state.pth", "optimizer.pt", "scheduler.pt", "training_args.bin", ".metadata",
    "trainer_state.pkl", "modeling_llama.py", "sitecustomize.py", "__init__.py", "model.pt", "special.npy",
)  # fmt: skip


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path) -> Path:
    """A model folder of another program."""
    return copy_model(tiny_run, tmp_path / "model")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def use(folder: Path) -> int:
    """Exit code of everything that loads a model, the worst of them."""
    words = ["--model", str(folder)]
    text = folder.parent / "text.txt"
    text.write_text("Some words to be measured on. " * 20)
    return max(
        run(["generate", *words, "--prompt", "The", "--max_new_tokens", "2", "--greedy"]),
        run(["evaluate", *words, "--data", str(text), "--max_seq_len", "16"]),
    )


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", READ)
def test_a_payload_instead_of_a_file(name: str, maker: str, folder: Path, canary: Path) -> None:
    (folder / name).write_bytes(MAKERS[maker](canary))
    assert use(folder) == 4
    assert not canary.exists()


LINKED = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "chat_template.jinja")


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_folder(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would copy whatever it leads to into what is saved or shown."""
    outside = folder.parent / "outside"
    (folder / name).rename(outside) if (folder / name).exists() else outside.write_text("a secret")
    (folder / name).symlink_to(outside)
    assert use(folder) == 4
    assert f"{name} is a link out of its folder" in capsys.readouterr().err


def test_links_that_stay_inside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to("elsewhere")
    assert use(folder) == 0


def test_the_links_of_the_hubs_cache(folder: Path) -> None:
    snapshot, blobs = folder.parent / "hub/snapshots/0123", folder.parent / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert use(snapshot) == 0


@pytest.mark.parametrize("name", LINKED)
def test_a_pipe_instead_of_a_file(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert use(folder) == 4
    said = capsys.readouterr().err
    assert f"{name} is not a file" in said or (name == "config.json" and "holds no model" in said)


@pytest.mark.parametrize("name", NOT_READ)
def test_a_payload_beside_the_files(name: str, folder: Path, canary: Path) -> None:
    """It is not looked at: the model is used as if it was not there."""
    before = set(sys.modules)
    code = f"import os\nos.mkdir({str(canary)!r})\n".encode()
    (folder / name).write_bytes(code if name.endswith(".py") else pickled(canary))
    assert use(folder) == 0
    assert not canary.exists()
    assert not any(
        getattr(sys.modules[new], "__file__", None) == str(folder / name) for new in set(sys.modules) - before
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_only_a_payload(name: str, folder: Path, canary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(torch_zip(canary))
    assert use(folder) == 4
    assert name in capsys.readouterr().err and not canary.exists()


REMOTE = {
    "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", None]},
    "_attn_implementation_internal": "evil/kernel",
    "custom_pipelines": {"x": {"impl": "evil.Pipeline"}},
    "torch_dtype": "evil.dtype",
    "quantization_config": {"quant_method": "evil", "modules_to_not_convert": ["__import__('os')"]},
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("key", REMOTE)
def test_a_setting_that_names_code(name: str, key: str, folder: Path, canary: Path) -> None:
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, key: REMOTE[key]}))
    assert use(folder) in (0, 2, 4)
    assert not canary.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("field", ["pre_tokenizer", "normalizer", "decoder", "post_processor", "model"])
def test_a_tokenizer_with_hooks(field: str, folder: Path, canary: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content[field] = {"type": "Python", "module": "evil", "object": "Hook", "code": f"os.mkdir({str(canary)!r})"}
    path.write_text(json.dumps(content))
    assert use(folder) == 4
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [{canary}]",
        "model: !!python/object/apply:os.mkdir [{canary}]",
        "data: !!python/name:os.system",
        "!!python/object/new:os.mkdir [{canary}]",
        "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\ndata: [*c, *c, *c, *c]",
        "[" * 50_000,
        "data: " + "{a: " * 20_000,
        "2001-99-99",
        "? [a, b]\n: c",
    ],
)
def test_a_config_that_is_a_program(text: str, tmp_path: Path, canary: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text.format(canary=canary) if "{canary}" in text else text)
    assert run(["pretrain", "--config", str(config), "--output", str(tmp_path / "run")]) == 2
    assert run(["sweep", str(config)]) == 2
    assert not canary.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "seedbed/../../secret", "..", "model.safetensors/../../secret", "\0"]
)
def test_a_manifest_that_leads_out_of_its_folder(name: str, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    whole = tmp_path / "checkpoints/step-6"
    shutil.copytree(tiny_run / "checkpoints/step-6", whole)
    path = whole / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    path.unlink()
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        load_model(whole)
    assert newest_intact(whole.parent)[0] is None


@pytest.mark.parametrize(
    "manifest",
    ["", "{}", "[]", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"size": 1e400, "sha256": 1}}}',
     '{"files": {"config.json": {"size": NaN, "sha256": ""}}}', "[" * 100_000, "\ufeff{}", '{"files": null}'],
)  # fmt: skip
def test_a_manifest_that_is_none(manifest: str, tiny_run: Path, tmp_path: Path) -> None:
    whole = tmp_path / "checkpoints/step-6"
    shutil.copytree(tiny_run / "checkpoints/step-6", whole)
    (whole / MANIFEST).unlink()
    (whole / MANIFEST).write_text(manifest, encoding="utf-8")
    newest, remarks = newest_intact(whole.parent)
    assert newest is None and len(remarks) == 1
    assert run(["verify", str(whole)]) == 4


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{% if 1 %}" * 200 + "{% endif %}" * 200,
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ],
)
def test_a_chat_template_that_is_a_program(
    source: str, folder: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seedbed.text.sandbox.SECONDS", 0.3)
    (folder / "chat_template.jinja").write_text(source.replace("CANARY", str(canary)))
    assert run(["generate", "--model", str(folder), "--chat", "--prompt", "Hi", "--max_new_tokens", "2"]) in (2, 3)
    assert not canary.exists()


def test_yaml_that_python_would_run(tmp_path: Path) -> None:
    """The payloads above are real: Python's unsafe loader does run one."""
    canary = tmp_path / "proof"
    yaml.unsafe_load(f"!!python/object/apply:os.mkdir [{canary}]")
    assert canary.is_dir()
    pickle.loads(pickled(tmp_path / "other"))  # noqa: S301  to see that it would run
    assert (tmp_path / "other").is_dir()
    assert issubclass(CheckpointError, SeedbedError)
