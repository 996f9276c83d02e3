"""A decoder made ready to write: weights laid out for few tokens at a time, keys and values kept.

B batch   T tokens of the prompts   N tokens added to a row   S slots of the cache   D d_model   V vocabulary
H query heads   K key-value heads   G query heads of each key-value head   E head_dim
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from seedbed import distributed
from seedbed.device import product_type
from seedbed.model.attention import RMSNorm, rotation
from seedbed.model.cuda_graph import Replays
from seedbed.model.decoder import AdaptedLinear, Block, Decoder, GeluMLP

# Kernels sum in another order for less than four rows, for sequences of another length modulo 16, and for sums of
# more than some 190 products. With four rows or more, lengths rounded up, and values summed part by part, a row's
# numbers are the same whatever is beside it and however many of its tokens are read at once: bit for bit in all
# families; only in reading prompts of more than some 500 tokens was one shape of grouped heads seen to differ in the
# last bit. Four rows are also faster than two.
LEAST_ROWS: Final = 4
ROUNDED_TO: Final = 32
SUMMED_AT_ONCE: Final = 128
USUAL_ROWS: Final = 16  # which the order of packed weights is chosen for

M = TypeVar("M", bound=nn.Module)
Linear = Callable[[Tensor], Tensor]  # (..., in) to (..., out)
Turn = tuple[Tensor, Tensor]  # what heads and their swapped halves are multiplied by, each (T, 1, E) or (B, N, 1, E)


class DecodingModel:
    """A `Decoder` for rows that grow by a few tokens at a time.

    Products run in `dtype`, the residual stream and the norms in float32, as under autocast. A row's tokens stand
    in the first slots of its cache, and nothing is computed from the other rows. To use inside
    `torch.inference_mode`.

        decoding = DecodingModel(model, torch.bfloat16)
        logits = decoding.read([[5, 6, 7], [8]], max_len=64)  # (2, V)
        logits = decoding.step(logits.argmax(-1, keepdim=True))  # (2, 1, V)

    Args:
        model: its adapters are added to the weights beside them; later changes of the weights are not seen.
        dtype: of weights and products; by default autocast's where it is on, else the model's.
    """

    @torch.inference_mode()
    def __init__(self, model: Decoder, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or product_type(model.embed_tokens.weight)
        head = model.embed_tokens.weight if model.lm_head is None else _weight(model.lm_head)
        self._model, self._config, self._dtype = model, model.config, dtype
        self._device = model.embed_tokens.weight.device
        self._blocks = [_DecodingBlock(_known(block, Block), dtype) for block in model.blocks]
        self._final_norm, self._head = _norm(model.final_norm, dtype), _pack(head.to(dtype), None)
        self._replays: Replays | None = None

    def read(self, prompts: Sequence[Sequence[int]], max_len: int) -> Tensor:
        """Begin with these prompts, of a token or more each.

        Args:
            prompts: B rows of token ids, of any lengths.
            max_len: slots of the cache: tokens of the longest row in the end, at most the positions of the model.

        Returns:
            (B, V) float32, the logits of what follows.
        """
        c, batch = self._config, len(prompts)
        self._lengths = [len(prompt) for prompt in prompts]
        self._make_room(batch, max_len)
        # Rows stand side by side, filled up after their ends, for attention alone: their own tokens never look there.
        width = _rounded(max(self._lengths))
        places = self._places(width)  # (P,)
        tokens = _filled_up(prompts, width, self._device).flatten()[places]
        positions = places % width
        x, turn = self._embed(tokens, positions), self._turn(positions)  # (P, D)
        q, k, v = (
            torch.zeros(batch, width, heads, c.head_dim, device=self._device)  # (B, T, H, E), (B, T, K, E) twice
            for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        )
        for layer, block in enumerate(self._blocks):
            for rows, new in zip((q, k, v), block.heads(x, turn), strict=True):
                rows.flatten(0, 1).index_copy_(0, places, new)
            self._keys[layer, :, :width] = k.transpose(1, 2).flatten(0, 1)
            self._values[layer, :, :width] = v.transpose(1, 2).flatten(0, 1)
            y = _attend_within(*(h.to(self._dtype) for h in (q, k, v)))  # (B, T, H * E)
            x = block.after(x, y.flatten(0, 1)[places])
        last = torch.tensor(self._lengths, device=self._device).cumsum(0) - 1
        return self._logits(_at_least(x[last]))[:batch]

    def _make_room(self, batch: int, max_len: int) -> None:
        """An empty cache, and the turns of its slots."""
        c, device = self._config, self._device
        self._max_len = max_len
        # One slot more than asked for: what is added beyond the others goes there.
        shape = (len(self._blocks), batch * c.num_kv_heads, _rounded(max_len + 1), c.head_dim)
        # Attention to few tokens is faster in float32 on a CPU.
        kept = torch.float32 if device.type == "cpu" else self._dtype
        self._keys = torch.zeros(shape, dtype=kept, device=device)
        self._values = torch.zeros(shape, dtype=kept, device=device)
        self._record_anew()
        positions = torch.arange(shape[2], device=device).clamp(max=c.max_seq_len - 1)  # (S,)
        cos, sin = (x[0, 0] for x in rotation(positions[None], c))  # (S, E/2)
        self._cos, self._sin = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]  # (S, 1, E)

    def repeat(self, times: int) -> None:
        """Go on with so many copies of the row that was read, which must be the only one."""
        assert len(self._lengths) == 1, f"{len(self._lengths)} rows"
        self._keys, self._values = (x.repeat(1, times, 1, 1) for x in (self._keys, self._values))
        self._record_anew()
        self._lengths *= times

    def step(self, tokens: Tensor) -> Tensor:
        """Add tokens to every row, (B, N), and give the logits of what follows each of them, (B, N, V) float32.

        A row may be given more than it has slots for; the logits after those mean nothing, and it must `forget` them.
        """
        rows, asked = tokens.shape
        tokens = F.pad(tokens, (0, self._added(rows, asked) - asked))
        longest = _rounded(min(max(self._lengths) + tokens.shape[1], self._max_len + 1))
        starts = torch.tensor(self._lengths, device=self._device)[:, None]
        self._lengths = [length + asked for length in self._lengths]
        if self._replays is not None:  # all slots are looked at, so that shapes stay
            every_slot = partial(self._pass, longest=self._keys.shape[2])
            return self._replays.run(every_slot, tokens, starts)[:, :asked]
        return self._pass(tokens, starts, longest)[:, :asked]

    def _places(self, width: int) -> Tensor:
        """Where tokens stand in rows of this width, one row after another; the last place is repeated to fill up."""
        lengths = torch.tensor(self._lengths)[:, None]
        places = (torch.arange(width) < lengths).flatten().nonzero().squeeze(1)  # (P,)
        places = torch.cat((places, places[-1:].expand(_rounded(len(places)) - len(places))))
        return places.to(self._device)

    def _record_anew(self) -> None:
        """Forget what was recorded on a GPU: the caches have moved."""
        self._replays = Replays() if self._device.type == "cuda" else None

    def _added(self, rows: int, asked: int) -> int:
        """How many tokens are read for each row: at least those asked for; on a GPU few different numbers of them."""
        if self._replays is not None and asked > 1:
            asked = -(-asked // LEAST_ROWS) * LEAST_ROWS
        return max(asked, -(-LEAST_ROWS // rows))

    def _pass(self, tokens: Tensor, starts: Tensor, longest: int) -> Tensor:
        """Tokens (B, N) into the slots from `starts` (B, 1) on, of which the first `longest` are seen: (B, N, V)."""
        c = self._config
        slots = starts + torch.arange(tokens.shape[1], device=self._device)  # (B, N)
        slots = slots.clamp(max=self._max_len)
        mask = self._mask(slots, longest)  # (B * K, N * G or more, S)
        rows = torch.arange(len(tokens) * c.num_kv_heads, device=self._device).view(-1, 1, c.num_kv_heads)
        places = (rows * self._keys.shape[2] + slots[..., None]).flatten()  # (B * N * K,), among all slots
        x = self._embed(tokens, slots.clamp(max=c.max_seq_len - 1))  # (B, N, D)
        turn = self._turn(slots)
        for block, keys, values in zip(self._blocks, self._keys, self._values, strict=True):
            q, k, v = block.heads(x, turn)  # (B, N, H, E), (B, N, K, E) twice
            keys.flatten(0, 1).index_copy_(0, places, k.flatten(0, 2).to(keys.dtype))
            values.flatten(0, 1).index_copy_(0, places, v.flatten(0, 2).to(keys.dtype))
            y = _attend_back(q.to(keys.dtype), keys[:, :longest], values[:, :longest], mask)  # (B, N, H * E)
            x = block.after(x, y.to(self._dtype))
        return self._logits(x)

    def forget(self, counts: Sequence[int]) -> None:
        """Take back so many of the newest tokens of each row, B of them."""
        self._lengths = [length - count for length, count in zip(self._lengths, counts, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        heads = self._config.num_kv_heads
        held = torch.tensor([row * heads + head for row in rows for head in range(heads)], device=self._device)
        self._keys, self._values = (x.index_select(1, held) for x in (self._keys, self._values))
        self._record_anew()
        self._lengths = [self._lengths[row] for row in rows]

    def _mask(self, slots: Tensor, longest: int) -> Tensor:
        """What each query head adds to its scores: 0 up to its own slot, (B, N), and -inf after it."""
        c = self._config
        seen = torch.arange(longest, device=self._device) <= slots[:, None, :, None, None]  # (B, 1, N, 1, S)
        mask = torch.zeros(seen.shape, dtype=self._keys.dtype, device=self._device).masked_fill_(~seen, float("-inf"))
        mask = mask.expand(-1, c.num_kv_heads, -1, c.num_heads // c.num_kv_heads, -1)  # (B, K, N, G, S)
        return _at_least(mask.flatten(2, 3).flatten(0, 1))

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self._model.embed_tokens(tokens).float()
        return x if self._model.embed_positions is None else x + self._model.embed_positions(positions)

    def _turn(self, positions: Tensor) -> Turn | None:
        if self._config.position == "learned":
            return None
        return self._cos[positions], self._sin[positions]

    def _logits(self, x: Tensor) -> Tensor:
        return self._head(self._final_norm(x)).float()


class Rereading:
    """What writes with a `Decoder` of which each process has a part: nothing is laid out, each pass reads rows anew.

    All processes use it at once and see the first one's logits, so that they write the same.
    """

    def __init__(self, model: Decoder) -> None:
        self._model, self._dtype = model, product_type(model.embed_tokens.weight)
        self._device = model.embed_tokens.weight.device
        self._rows: list[list[int]] = []

    def read(self, prompts: Sequence[Sequence[int]], max_len: int) -> Tensor:
        """As `DecodingModel.read`."""
        self._rows, self._max_len = [list(prompt) for prompt in prompts], max_len
        return self._logits(1)[:, 0]

    def step(self, tokens: Tensor) -> Tensor:
        """As `DecodingModel.step`."""
        self._rows = [[*row, *added] for row, added in zip(self._rows, tokens.tolist(), strict=True)]
        return self._logits(tokens.shape[1])

    def forget(self, counts: Sequence[int]) -> None:
        """Take back so many of the newest tokens of each row, B of them."""
        self._rows = [row[: len(row) - count] for row, count in zip(self._rows, counts, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._rows = [self._rows[row] for row in rows]

    def _logits(self, newest: int) -> Tensor:
        """(B, N, V) float32, of what follows each of the `newest` tokens."""
        lengths = torch.tensor([len(row) for row in self._rows], device=self._device)
        width = min(_rounded(int(lengths.max())), self._max_len)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden = self._model(_filled_up([row[:width] for row in self._rows], width, self._device))  # (B, T, D)
            asked = (lengths[:, None] - newest + torch.arange(newest, device=self._device)).clamp(max=width - 1)
            hidden = hidden.gather(1, asked[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, N, D)
            logits: Tensor = self._model.logits(hidden).float()
        return distributed.of_first(logits)


class _DecodingBlock:
    """A block's linear layers joined where they read the same, and laid out for few tokens."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        attention, mlp = _unwrapped(block.attention), _unwrapped(block.mlp)
        self._attention_norm, self._mlp_norm = _norm(block.attention_norm, dtype), _norm(block.mlp_norm, dtype)
        self._q_norm, self._k_norm = attention.q_norm, attention.k_norm
        self._normalises = isinstance(attention.q_norm, RMSNorm)
        self._qkv = _join([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self._out = _join([attention.o_proj], dtype)
        self._up = _join([mlp.up_proj] if isinstance(mlp, GeluMLP) else [mlp.gate_proj, mlp.up_proj], dtype)
        self._down = _join([mlp.down_proj], dtype)
        self._gelu, self._size = isinstance(mlp, GeluMLP), attention.head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._heads = [layer.out_features // self._size for layer in projections]

    def heads(self, x: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) to queries, keys and values, (..., H or K, E), float32, normalised and turned."""
        joined = self._qkv(self._attention_norm(x)).float()
        heads = joined.view(*x.shape[:-1], -1, self._size)  # (..., H + 2 K, E)
        queries, keys, values = self._heads
        if self._normalises:
            q, k, v = torch.split(heads, self._heads, dim=-2)
            heads = torch.cat((self._q_norm(q), self._k_norm(k), v), -2)
        looking, v = torch.split(heads, [queries + keys, values], dim=-2)
        if turn is not None:
            looking = _rotate(looking, turn)
        q, k = torch.split(looking, [queries, keys], dim=-2)
        return q, k, v

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """What attention saw, (..., H * E), goes into the residual stream, (..., D); then the MLP."""
        x = x + self._out(y)
        h = self._up(self._mlp_norm(x))
        if self._gelu:
            h = F.gelu(h, approximate="tanh")
        else:
            gate, h = h.chunk(2, -1)
            h = F.silu(gate) * h
        return x + self._down(h)


def _filled_up(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    """(B, T) tokens, with zeros after those of a short row."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def _rounded(length: int) -> int:
    return -(-length // ROUNDED_TO) * ROUNDED_TO


def _rotate(x: Tensor, turn: Turn) -> Tensor:
    """`seedbed.model.attention.rotate` in three calls: the halves of (..., H, E) are swapped."""
    return torch.addcmul(x * turn[0], x.roll(x.shape[-1] // 2, -1), turn[1])


def _attend_within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, H, E) and (B, T, K, E) twice, all of it new, to (B, T, H * E)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, E)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(2)


def _attend_back(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The heads (B, N, H, E) that share keys and values (B * K, S, E), which no kernel repeats, to (B, N, H * E)."""
    batch, added, heads, size = q.shape
    grouped = q.view(batch, added, len(k) // batch, -1, size).transpose(1, 2)  # (B, K, N, G, E)
    q = _at_least(grouped.reshape(len(k), -1, size))  # (B * K, N * G or more, E)
    scores = torch.baddbmm(mask, q, k.mT, alpha=size**-0.5)  # (B * K, N * G or more, S)
    shares = scores.softmax(-1)
    y = torch.bmm(shares[:, :, :SUMMED_AT_ONCE], v[:, :SUMMED_AT_ONCE])
    for first in range(SUMMED_AT_ONCE, k.shape[1], SUMMED_AT_ONCE):
        slots = slice(first, first + SUMMED_AT_ONCE)
        y.baddbmm_(shares[:, :, slots], v[:, slots])
    y = y[:, : added * heads * batch // len(k)]  # (B * K, N * G, E)
    return y.view(batch, -1, added, heads * batch // len(k) * size).transpose(1, 2).flatten(2)


def _at_least(x: Tensor) -> Tensor:
    """(..., rows, columns) with rows of zeros where there are too few."""
    missing = LEAST_ROWS - x.shape[-2]
    return x if missing <= 0 else F.pad(x, (0, 0, 0, missing))


def _norm(norm: nn.Module, dtype: torch.dtype) -> Linear:
    """The norm of float32, in float32, to the type of the products."""
    norm = _unwrapped(norm)
    assert isinstance(norm, nn.LayerNorm | RMSNorm)
    weight, shape, eps = norm.weight.float(), norm.weight.shape, norm.eps
    if isinstance(norm, nn.LayerNorm):
        bias = norm.bias.float()
        return lambda x: F.layer_norm(x, shape, weight, bias, eps).to(dtype)
    # x / sqrt(|x|^2 / D + eps) = sqrt(D) x / sqrt(|x|^2 + D eps): three kernels where torch's own takes seven.
    size, floor = shape[0], torch.tensor((shape[0] * eps) ** 0.5, device=weight.device)
    scaled = weight * size**0.5
    return lambda x: (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(floor) * scaled).to(dtype)


def _join(layers: Sequence[nn.Linear], dtype: torch.dtype) -> Linear:
    weight = torch.cat([_weight(layer).to(dtype) for layer in layers])  # (N * out, in)
    biases = [layer.bias.to(dtype) for layer in layers if layer.bias is not None]
    return _pack(weight, torch.cat(biases) if biases else None)


def _unwrapped(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)


def _known(module: nn.Module, kind: type[M]) -> M:
    """The module itself, also where torch.compile wrapped it; what is computed in another kind cannot be seen here."""
    module = _unwrapped(module)
    if not isinstance(module, kind):
        raise TypeError(f"to write, each {kind.__name__} must be seedbed's own, and one is a {type(module).__name__}")
    return module


def _weight(layer: nn.Module) -> Tensor:
    layer = _known(layer, nn.Linear)
    return layer.effective_weight() if isinstance(layer, AdaptedLinear) else layer.weight


def _pack(weight: Tensor, bias: Tensor | None) -> Linear:
    """The product with a weight (out, in); on a CPU in oneDNN's own order, at half the time for few tokens."""
    if weight.device.type != "cpu" or not _packs(weight.dtype):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, USUAL_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and multiplies this type."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype in supported:
        return bool(getattr(torch.ops.mkldnn, supported[dtype])())
    return dtype == torch.float32
