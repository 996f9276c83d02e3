"""When a pass is recorded; what the graph itself does needs a GPU (test_decoding.py)."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from seedbed.model import cuda_graph
from seedbed.model.cuda_graph import CALLS_BEFORE, Replays


class Graph:
    """Stands for a CUDA graph; counts how often it is launched."""

    launches = 0

    def replay(self) -> None:
        Graph.launches += 1


def test_shapes_that_come_again_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(Graph, "launches", 0)
    seen: list[Tensor] = []

    def double(x: Tensor) -> Tensor:
        seen.append(x)
        return 2 * x

    replays = Replays()
    for number in range(5):
        replays.run(double, torch.full((3,), float(number)))
    replays.run(double, torch.zeros(4))  # comes once
    assert len(seen) == CALLS_BEFORE + 1 + 1
    assert Graph.launches == 5 - CALLS_BEFORE
    [recording] = replays._recordings.values()
    assert isinstance(recording, cuda_graph._Recording)
    assert seen[CALLS_BEFORE].tolist() == [4.0] * 3, "what is replayed reads the newest inputs"
