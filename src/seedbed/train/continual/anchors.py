"""Ways to hold a model near what it was: by its weights (L2-SP, EWC) or by its predictions.

B batch   T tokens   D d_model   V vocabulary   N tokens of a batch   n tokens of one chunk
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from seedbed.data.batches import Batch
from seedbed.data.rows import NO_TARGET
from seedbed.device import Precision, autocast
from seedbed.evaluate import without_dropout
from seedbed.loss import chunk_tokens, linear_cross_entropy, linear_kl_divergence
from seedbed.model.decoder import Decoder
from seedbed.sampling import draw, uniform_rows

PIECE: Final = 2**20  # weights; on a CPU whole parameters take three times as long


class WeightAnchor:
    """The penalty  strength / 2 · Σ importance · (w - old)²  over the trainable weights w of a model.

    Without an importance it counts 1 for every weight: L2-SP (Li et al., 2018). With the diagonal of the Fisher
    information it is elastic weight consolidation, EWC (Kirkpatrick et al., 2017): at strength 1, about the nats a
    token that the old text has lost.

    It costs memory for the old weights and for their importance.
    """

    def __init__(
        self,
        model: nn.Module,
        old: Mapping[str, Tensor],
        strength: float,
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        """
        Args:
            model: on its device; parameters that are frozen now are left out.
            old: what each trainable parameter is held to, under the names of `model.named_parameters()`. Not copied
                where type and device are right, unless it is the parameter itself.
            strength: 0 or more.
            importance: a number for each weight of `old`, 0 or more.
        """
        self.strength = strength
        self._held: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                one = torch.ones((), device=parameter.device).expand_as(parameter)  # takes no memory
                weight = one if importance is None else _beside(parameter, name, importance)
                self._held.append((parameter, _beside(parameter, name, old), weight))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add  strength · importance · (w - old)  to the gradients there are, once an update.

        After all backward passes and the unscaling, before the clipping.
        """
        for parameter, old, importance in self._held:
            if parameter.grad is not None:
                for gradient, w, w_old, weight in _pieces(parameter.grad, parameter, old, importance):
                    gradient.addcmul_(w - w_old, weight, value=self.strength)


class PredictionAnchor:
    """The penalty  strength · Σ KL(old || new)  in nats over the targets of a batch.

    The old model's predictions on the new text are the soft targets of learning without forgetting (Li and Hoiem,
    2016), here at temperature 1. It costs one more forward pass and twice the head's work for every micro-batch, and
    memory for one more model.
    """

    def __init__(
        self, model: Decoder, old: Decoder, strength: float, device: torch.device, precision: Precision
    ) -> None:
        """
        Args:
            model: the one being trained.
            old: another with the same vocabulary; it is moved to `device`, frozen and put in evaluation mode.
            strength: 0 or more.
            device: where batches are.
            precision: of the old model's products.
        """
        self.model, self.old, self.strength = model, old.to(device).requires_grad_(False).eval(), strength
        self.device, self.precision = device, precision

    def __call__(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The penalty, differentiable.

        Args:
            hidden: (B, T, D), what the model being trained gave for `batch`.
            batch: on the device.
        """
        with autocast(self.device, self.precision):
            with torch.no_grad():
                old_hidden = self.old(batch.input_ids, batch.position_ids, batch.segment_ids)  # (B, T, D)
            divergence = linear_kl_divergence(
                hidden.flatten(0, 1),  # (N, D)
                self.model.head_weight(),
                old_hidden.flatten(0, 1),  # (N, D)
                self.old.head_weight(),
                batch.labels.flatten(),  # (N,)
            )
        return self.strength * divergence


def diagonal_fisher(
    model: Decoder,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    precision: Precision,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of each trainable parameter, per target, by its name, float32.

    F = E_y [(d log p(y | text) / dw)²], with y drawn from the model's own predictions at every place that has a
    target: labels of the text would make it the empirical Fisher, which is another matrix (Kunstner et al., 2019).
    One draw a place. Given the text, the gradients of the drawn labels have mean zero and are independent, so
    products of two have mean zero too, and the square of a batch's summed gradient has the sum of its tokens'
    Fisher as its expectation: one backward pass a batch, whatever its size. More batches make less noise.

    For a small move d of the weights  ½ Σ F d²  is the expected rise in nats a token, as far as the diagonal goes.
    It takes memory for the gradients and for the result.

    Args:
        model: on `device`. Its mode is restored; its gradients are not touched.
        batches: read once. Their labels say only where there is a target.
        device: where to compute.
        precision: of the products.
        seed: 0 or more. The draws of a batch follow from it and the batch's number.
        progress: called after each batch with the number of targets so far.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    fisher = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in trainable.items()}
    targets = 0
    with without_dropout(model):
        for number, batch in enumerate(batches):
            targets += int((batch.labels != NO_TARGET).sum())
            nats = _drawn_nats(model, batch.to(device), precision, seed, number)
            gradients = torch.autograd.grad(nats, list(trainable.values()))
            for total, gradient in zip(fisher.values(), gradients, strict=True):
                total.addcmul_(gradient, gradient)
            if progress:
                progress(targets)
    assert targets, "there is nothing to predict"
    return {name: total.div_(targets) for name, total in fisher.items()}


def _beside(parameter: nn.Parameter, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """What belongs to a parameter: float32, on its device, and not its own memory, which training changes."""
    assert name in tensors, f"nothing given for {name}"
    tensor = tensors[name].detach()
    assert tensor.shape == parameter.shape, f"{name}: {tuple(tensor.shape)} for {tuple(parameter.shape)}"
    return tensor.to(parameter.device, torch.float32, copy=tensor.data_ptr() == parameter.data_ptr())


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of some rows of tensors of one shape, so that what is made of them stays in the cache."""
    rows = max(1, PIECE * len(tensors[0]) // tensors[0].numel())
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def _drawn_nats(model: Decoder, batch: Batch, precision: Precision, seed: int, number: int) -> Tensor:
    """Nats of labels that the model draws itself, summed over the targets of a batch, differentiable."""
    with autocast(batch.labels.device, precision):
        hidden = model(batch.input_ids, batch.position_ids, batch.segment_ids).flatten(0, 1)  # (N, D)
        weight, labels = model.head_weight(), batch.labels.flatten()
        [uniform] = uniform_rows(seed, [number], len(labels)).to(labels.device)  # (N,)
        return linear_cross_entropy(hidden, weight, _drawn(hidden, weight, labels, uniform))


@torch.no_grad()
def _drawn(hidden: Tensor, weight: Tensor, labels: Tensor, uniform: Tensor) -> Tensor:
    """A token from softmax(hidden @ weight.T) at each place of `labels` with a target, (N,); -100 elsewhere."""
    drawn = torch.full_like(labels, NO_TARGET)
    targets = (labels != NO_TARGET).nonzero().squeeze(1)
    for rows in torch.split(targets, chunk_tokens(len(weight), weight.device.type)):
        logits = (hidden[rows] @ weight.T).float()  # (n, V)
        drawn[rows] = draw(logits, uniform[rows])
    return drawn
