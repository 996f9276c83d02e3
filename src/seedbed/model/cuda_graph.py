"""A pass that is made again and again, recorded once and launched whole.

Python takes longer to launch the hundreds of small kernels of one token than a GPU takes to run them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

CALLS_BEFORE: Final = 2  # in which libraries choose their kernels, and shapes that do not come again cost nothing


class Replays:
    """Recordings of one function of tensors on a GPU, a CUDA graph for each of their shapes that comes again.

    All else that the function reads must stay where it is in memory, and nothing in it may wait for the GPU.
    """

    def __init__(self) -> None:
        self._calls: Counter[tuple[torch.Size, ...]] = Counter()
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}

    def run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`."""
        shapes = tuple(x.shape for x in inputs)
        self._calls[shapes] += 1
        if self._calls[shapes] <= CALLS_BEFORE:
            return function(*inputs)
        if shapes not in self._recordings:
            self._recordings[shapes] = _Recording(function, inputs)
        return self._recordings[shapes].replay(inputs)


class _Recording:
    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that saves, may use the GPU meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = function(*self._inputs)

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()  # which the next replay writes over
