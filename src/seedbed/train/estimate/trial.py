"""A few moments of a run's own work, timed and weighed on one block of each kind that its model has.

A model does the same in every block of a kind, so one of them, with the run's width, rows and precision, tells what
all of them take. No weights are needed: those here are all alike.

B rows   T tokens   D d_model   V vocabulary
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from seedbed.config import Config
from seedbed.data.batches import Batch
from seedbed.data.rows import NO_TARGET
from seedbed.device import Precision, autocast, empty_cache, is_out_of_memory
from seedbed.freeze import freeze
from seedbed.lora import add_adapter
from seedbed.loss import linear_cross_entropy, token_losses
from seedbed.lowbit import NF4Weight
from seedbed.model.attention import Rotation, rotation
from seedbed.model.config import DecoderConfig
from seedbed.model.decoder import Block, Decoder
from seedbed.model.decoding import DecodingModel
from seedbed.model.documents import Mask
from seedbed.optim import build_optimizer, optimizer_tensors
from seedbed.train.finetune import hold_frozen, make_adapter

FIRST_FLOPS = 2e9
"""Of the first try, which tells how much more there is time for."""
TRIES = 5
FEWEST_TOKENS = 32
BEYOND_CACHES = 2**24
"""Weights that are enough to time an update on, or the writing of a token."""


@dataclass(frozen=True)
class Kind:
    """Blocks that train the same parameters and pass on, or do not pass on, a gradient to their input."""

    block: Block
    """One of them."""
    count: int
    carries: bool
    """Whether something before them learns, so that their input needs a gradient."""

    @property
    def learns(self) -> bool:
        """Whether there is a backward pass at all."""
        return self.carries or any(parameter.requires_grad for parameter in self.block.parameters())


@dataclass(frozen=True)
class BlockCost:
    """What one block of a kind takes, on all rows of a micro-batch."""

    seconds: float  # forward and backward
    forward_seconds: float  # without gradients
    kept_bytes: float  # from its forward to its backward pass
    working_bytes: float  # beyond that and its gradients, while its backward pass runs
    weight_bytes: int
    cast_bytes: int  # copies of its weights in the type of the products, kept for the backward pass


@dataclass(frozen=True)
class Costs:
    """What the parts of a model take, on all rows of a micro-batch; blocks in the order of their kinds."""

    blocks: Sequence[BlockCost]
    ends: BlockCost
    """Embedding, final norm, head and loss; its bytes are what the loss does not hold."""
    token_seconds: float
    """One token of a text that the whole model writes."""
    update_seconds: float  # for a weight
    state_bytes: float  # of the optimizer, for a weight


def outline(config: Config, shape: DecoderConfig) -> Decoder:
    """The model of a run, its adapters in it and its frozen parts frozen, without memory for any weight."""
    with torch.device("meta"):
        model = Decoder(shape)
        if config.with_lora:
            add_adapter(model, make_adapter(shape, config.adapt))
    if not config.with_lora:
        freeze(model, config.adapt.freeze, config.adapt.last_blocks)
    return model


def kinds_of(model: Decoder) -> list[Kind]:
    """The kinds of a model's blocks, in their first ones' order."""
    embeddings = [model.embed_tokens, model.embed_positions]
    carries = any(part.weight.requires_grad for part in embeddings if part is not None)
    kinds: dict[tuple[object, ...], Kind] = {}
    for block in model.blocks:
        assert isinstance(block, Block)
        trained = tuple((name, parameter.requires_grad) for name, parameter in block.named_parameters())
        alike = kinds.setdefault((carries, *trained), Kind(block, 0, carries))
        kinds[carries, *trained] = Kind(alike.block, alike.count + 1, carries)
        carries = carries or any(requires for _, requires in trained)
    return list(kinds.values())


def block_flops(kind: Kind, width: float, *, training: bool) -> float:
    """FLOPs on one row of `width` tokens: 2 for each weight and pass, and what attention does with half of the row.

    A forward pass makes the products once, a backward pass once more for the input and once for each trained weight.
    """
    matrices = [(p.numel(), p.requires_grad) for p in kind.block.parameters() if p.dim() >= 2]
    size, trained = sum(n for n, _ in matrices), sum(n for n, learnt in matrices if learnt)
    attention = kind.block.attention
    looking = 4 * attention.q_proj.out_features * width / 2
    if not training or not kind.learns:
        return width * (2 * size + looking)
    back = trained + (size if kind.carries or trained else 0)
    return width * (2 * size + 2 * back + 3 * looking)


def head_flops(model: Decoder, targets: float, *, training: bool) -> float:
    """FLOPs of the output head for this number of targets."""
    passes = 1 if not training else 3 if head_learns(model) else 2
    return 2 * passes * targets * model.config.vocab_size * model.config.d_model


def head_learns(model: Decoder) -> bool:
    """Whether the output head gets gradients, its own or an adapter's."""
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    return any(parameter.requires_grad for parameter in head.parameters())


def try_out(
    model: Decoder, config: Config, batch: Batch, device: torch.device, precision: Precision, seconds: float
) -> Costs:
    """Time and weigh the parts of `model`, an `outline`, on `batch`, in about this many seconds.

    Random states, and all that lives outside, are as before.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(0)
        kinds = kinds_of(model)
        sample = _with_weights(model, kinds, config, device)
        trial = _Trial(sample, config.training.gradient_checkpointing, batch.to(device), precision)
        share = seconds / (2 * len(kinds) + 3)
        blocks = [
            trial.block(Kind(block, kind.count, kind.carries), 2 * share) for block, kind in _pairs(sample, kinds)
        ]
        ends = trial.ends(2 * share)
        token_seconds = trial.token_seconds(model, share / 20)
        update_seconds, state_bytes = _time_update(sample, config, share)
    return Costs(blocks, ends, token_seconds, update_seconds, state_bytes)


def _pairs(sample: Decoder, kinds: Sequence[Kind]) -> Iterator[tuple[Block, Kind]]:
    for block, kind in zip(sample.blocks, kinds, strict=True):
        assert isinstance(block, Block)
        yield block, kind


def _with_weights(model: Decoder, kinds: Sequence[Kind], config: Config, device: torch.device) -> Decoder:
    """`model` with one block of each kind, and the same number for all of its weights."""
    with _only(model, [kind.block for kind in kinds]):
        sample = _materialized(model, device)
    if config.with_lora:
        hold_frozen(sample, config, device)
    return sample.train()


@contextmanager
def _only(model: Decoder, blocks: Sequence[Block]) -> Iterator[None]:
    """`model` has just these blocks for a while."""
    whole, model.blocks = model.blocks, nn.ModuleList(blocks)
    try:
        yield
    finally:
        model.blocks = whole


@torch.no_grad()
def _materialized(model: Decoder, device: torch.device) -> Decoder:
    sample = copy.deepcopy(model).to_empty(device=device)
    for parameter in sample.parameters():
        parameter.fill_(0.01)
    return sample


class _Trial:
    """A model with weights and a batch, on their device."""

    def __init__(self, model: Decoder, checkpointing: bool, batch: Batch, precision: Precision) -> None:
        self.model, self.checkpointing, self.batch, self.precision = model, checkpointing, batch, precision
        self.device = batch.input_ids.device
        self.rows, self.width = batch.input_ids.shape
        self.share = max(1e-3, float((batch.labels != NO_TARGET).float().mean()))  # of the places that are predicted

    def block(self, kind: Kind, seconds: float) -> BlockCost:
        """What a block takes, forward and backward, forward alone, and for one token."""

        def flops(rows: int, width: int) -> float:
            return rows * block_flops(kind, width, training=True)

        back, piece = self.pace(flops, lambda piece: self._block_pass(kind, piece), seconds * 2 / 3)
        forward, _ = self.pace(flops, lambda piece: self._block_pass(kind, piece, training=False), seconds / 3)
        kept, working = self._weigh_block(kind, piece)
        scale = self.rows * self.width / piece.input_ids.numel()
        return BlockCost(
            back,
            forward,
            kept * scale,
            working * scale,
            sum(map(tensor_bytes, kind.block.parameters())),
            self.cast_bytes(kind.block) if kind.learns else 0,
        )

    def ends(self, seconds: float) -> BlockCost:
        """What comes before and after the blocks."""

        def flops(rows: int, width: int) -> float:
            return head_flops(self.model, rows * width * self.share, training=True)

        back, _ = self.pace(flops, self._ends_pass, seconds * 2 / 3)
        forward, _ = self.pace(flops, lambda piece: self._ends_pass(piece, training=False), seconds / 3)
        outside = [p for name, p in self.model.named_parameters() if not name.startswith("blocks.")]
        hidden = 4 * self.rows * self.width * self.model.config.d_model
        return BlockCost(
            back,
            forward,
            3 * hidden,  # the embedded tokens, the normalised ones, and the loss's gradient for them
            0.0,
            sum(map(tensor_bytes, outside)),
            2 * self.model.config.vocab_size * self.model.config.d_model if self.precision != "fp32" else 0,
        )

    def token_seconds(self, whole: Decoder, seconds: float) -> float:
        """Writing a token reads all weights once: the time that some blocks take, for those of the whole model."""
        block = self.model.blocks[0]
        assert isinstance(block, Block)
        copies = max(1, min(len(whole.blocks), BEYOND_CACHES // _size(block)))
        with _only(self.model, [block] * copies), autocast(self.device, self.precision):
            decoding = DecodingModel(self.model)
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)

        @torch.inference_mode()
        def write() -> None:
            decoding.step(token).sort(descending=True)
            decoding.forget([1])

        with torch.inference_mode():
            decoding.read([[0]], max_len=2)
        write()
        tried = _size(self.model) - _size(self.model.blocks) + copies * _size(block)
        return _median_seconds(write, self.device, seconds) * _size(whole) / tried

    def cast_bytes(self, block: Block) -> int:
        """What autocast makes of a block's frozen float32 matrices; layers that learn cast theirs again."""
        if self.precision == "fp32":
            return 0
        frozen = [p for p in block.parameters() if p.dim() >= 2 and not p.requires_grad]
        return sum(2 * p.numel() for p in frozen if p.dtype == torch.float32 and not isinstance(p, NF4Weight))

    def piece(self, rows: int, width: int) -> Batch:
        """The first rows of the batch, and the first tokens of them."""
        b = self.batch
        segments = None if b.segment_ids is None else b.segment_ids[:rows, :width]
        return Batch(b.input_ids[:rows, :width], b.labels[:rows, :width], b.position_ids[:rows, :width], segments)

    def affordable(self, flops: Callable[[int, int], float], limit: float) -> Batch:
        """As many whole rows as `limit` allows; part of one, where one is too much."""
        rows = int(limit // flops(1, self.width))
        if rows >= 1:
            return self.piece(min(rows, self.rows), self.width)
        width = int(self.width * limit / flops(1, self.width)) // 8 * 8
        return self.piece(1, min(self.width, max(FEWEST_TOKENS, width)))

    def pace(
        self, flops: Callable[[int, int], float], prepare: Callable[[Batch], Callable[[], None]], seconds: float
    ) -> tuple[float, Batch]:
        """Seconds of this work on the whole batch, and the piece of it that there was time for."""
        small = self.affordable(flops, FIRST_FLOPS)
        work = prepare(small)
        work()  # what only the first time takes
        first = _seconds(work, self.device)
        done, whole = flops(*small.input_ids.shape), flops(self.rows, self.width)
        limit = max(done / first * seconds / 3, 4 * done)
        while (piece := self.affordable(flops, limit)).input_ids.numel() > small.input_ids.numel():
            try:
                middle = _median_seconds(prepare(piece), self.device, seconds)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            empty_cache(self.device)
            limit = flops(*piece.input_ids.shape) / 2  # a run takes fewer rows at once then, too
        else:
            return _median_seconds(work, self.device, seconds - first) * whole / done, small
        tried = flops(*piece.input_ids.shape)
        # A part of what work takes, such as its passes over the weights, does not grow with the rows.
        slope = min(max((middle - first) / (tried - done), middle / tried / 3), middle / tried)
        return middle + slope * (whole - tried), piece

    def _block_pass(self, kind: Kind, piece: Batch, *, training: bool = True) -> Callable[[], None]:
        """One block, forward and backward; without `training`, forward as validation does it."""
        x, turn, mask = self._block_inputs(piece)
        gradient = torch.randn_like(x)

        def train() -> None:
            y = self._forward(kind, x.detach().requires_grad_(kind.carries), turn, mask)
            if y.requires_grad:
                y.backward(gradient)  # type: ignore[no-untyped-call]
            kind.block.zero_grad(set_to_none=True)

        def validate() -> None:
            with torch.no_grad(), autocast(self.device, self.precision):
                kind.block(x, turn, mask)

        return train if training else validate

    def _block_inputs(self, piece: Batch) -> tuple[Tensor, Rotation | None, Mask | None]:
        """Hidden states for a block, and the rotation and the mask that the decoder gives it with them."""
        rows, width = piece.input_ids.shape
        shape = self.model.config
        x = torch.randn(rows, width, shape.d_model, device=self.device)  # (B, T, D)
        turn = None if shape.position == "learned" else rotation(piece.position_ids, shape)
        with autocast(self.device, self.precision):
            return x, turn, self.model.mask(piece.segment_ids)

    def _forward(self, kind: Kind, x: Tensor, turn: Rotation | None, mask: Mask | None) -> Tensor:
        with autocast(self.device, self.precision):
            if self.checkpointing:
                return checkpoint(kind.block, x, turn, mask, use_reentrant=False)  # type: ignore[no-any-return]
            return kind.block(x, turn, mask)  # type: ignore[no-any-return]

    def _weigh_block(self, kind: Kind, piece: Batch) -> tuple[float, float]:
        """Bytes that a block's forward pass leaves, and how many more its backward pass needs beside gradients."""
        x, turn, mask = self._block_inputs(piece)
        x.requires_grad_(kind.carries)
        known = [
            x,
            *kind.block.parameters(),
            *(mask if isinstance(mask, tuple) else (mask,) if mask is not None else ()),
            *(turn or ()),
        ]
        with LiveBytes(known) as live:
            y = self._forward(kind, x, turn, mask)
            kept = live.now
            live.peak = kept
            if y.requires_grad:
                y.backward(torch.empty_like(y))  # type: ignore[no-untyped-call]
            gradients = sum(p.grad.nbytes for p in kind.block.parameters() if p.grad is not None)
            working = live.peak - kept - gradients
        kind.block.zero_grad(set_to_none=True)
        del y
        cast = 0 if self.checkpointing or not kind.learns else self.cast_bytes(kind.block)
        return max(0.0, kept - cast), max(0.0, working)

    def _ends_pass(self, piece: Batch, *, training: bool = True) -> Callable[[], None]:
        """Embedding, final norm and loss, with a gradient arriving where the blocks would be."""
        model = self.model
        labels = piece.labels.flatten()

        def embedded() -> Tensor:
            x: Tensor = model.embed_tokens(piece.input_ids)  # (B, T, D)
            return x if model.embed_positions is None else x + model.embed_positions(piece.position_ids)

        def train() -> None:
            x = embedded()
            with autocast(self.device, self.precision):
                hidden = model.final_norm(x if x.requires_grad else x.requires_grad_())
                linear_cross_entropy(hidden.flatten(0, 1), model.head_weight(), labels).backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)

        def validate() -> None:
            with torch.no_grad(), autocast(self.device, self.precision):
                token_losses(model.final_norm(embedded()).flatten(0, 1), model.head_weight(), labels)

        return train if training else validate


def _time_update(sample: Decoder, config: Config, seconds: float) -> tuple[float, float]:
    """Seconds and bytes of optimizer state for one trained weight, gradients clipped as in a run."""
    trained = [p for block in sample.blocks for p in block.parameters() if p.requires_grad]
    trained = trained or [p for p in sample.parameters() if p.requires_grad]
    size = sum(p.numel() for p in trained)
    copies = max(1, min(sample.config.num_layers, BEYOND_CACHES // size))
    parts = nn.ParameterList(p.detach().clone() for _ in range(copies) for p in trained)
    optimizer = build_optimizer(parts, config.training)

    def update() -> None:
        nn.utils.clip_grad_norm_(parts, config.training.max_grad_norm or math.inf)
        optimizer.step()

    for parameter in parts:
        parameter.grad = torch.full_like(parameter, 1e-3)
    update()
    state = sum(map(tensor_bytes, optimizer_tensors(parts, optimizer).values()))
    return _median_seconds(update, trained[0].device, seconds) / (size * copies), state / (size * copies)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that come into being inside and are still there."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: dict[int, Any] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known if not isinstance(tensor, NF4Weight)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, NF4Weight):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._known:
            return

        def gone(_reference: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _size(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def tensor_bytes(tensor: Tensor) -> int:
    """What a tensor takes in memory, one in four bits too."""
    return tensor.packed_bytes() if isinstance(tensor, NF4Weight) else tensor.nbytes


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    _wait_for(device)
    began = time.perf_counter()
    work()
    _wait_for(device)
    return max(time.perf_counter() - began, 1e-7)


def _median_seconds(work: Callable[[], None], device: torch.device, seconds: float) -> float:
    """The middle of a few tries, as many as there is time for and at least one."""
    tries: list[float] = []
    while not tries or (len(tries) < TRIES and sum(tries) < seconds):
        tries.append(_seconds(work, device))
    return statistics.median(tries)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
