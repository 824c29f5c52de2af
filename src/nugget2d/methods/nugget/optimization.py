"""Gradient steps on the nuggets of one text, starting from the encoder's output.

The weights do not change; the keys and values of each segment minimize two losses. Reconstruction: cross-entropy of the
segment's tokens. Continuation: divergence from what the LM predicts after the text itself, on sampled continuations.
With the first loss only, continuation from the memory gets worse; with both, it improves (research/LOG.md).
The states at every step are those that would be stored (rounded to int8 or bfloat16, with a straight-through gradient),
so the accuracy at which a segment stops is that of the stored states.

At accuracy 1 under teacher forcing every token is the greedy choice given the true tokens before it, so greedy decoding
reconstructs the segment exactly. Below 1, tokens after the first error may differ as well.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nugget2d.inference.continuations import sample_continuations
from nugget2d.inference.placement import segment_nuggets
from nugget2d.memory.states import States, StoreDtype
from nugget2d.methods.nugget.encoding import SegmentResult, logits_limit, measure, pad
from nugget2d.modeling.cache import Nuggets
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Network

# Adam's step, in units of a segment's typical state (research/LOG.md has the trials).
STEP = 0.06
# Weight of the continuation loss; continuations that are sampled (one is used in each step), and their length in
# tokens.
CONTINUATION = 1.0
CONTINUATIONS = 8
CONTINUATION_TOKENS = 48


def optimize_limit(model: Network) -> int:
    """Tokens of a batch: fewer than elsewhere, as activations of all layers and the continuations' logits are kept."""
    return max(1, logits_limit(model) // 4)


def optimize(
    model: Network, results: Sequence[SegmentResult], steps: int, target: float
) -> Generator[None, None, list[SegmentResult]]:
    """Measured results, those below `target` after at most `steps` gradient steps; no accuracy is lower than before.

    It pauses after each step.
    """
    measured = measure(model, results)
    rows = [row for row, result in enumerate(measured) if result.accuracy < target]
    if rows:
        with torch.enable_grad():
            descent = _Descent(model, [measured[row] for row in rows])
        optimized = yield from descent.run(steps, target)
        for row, result in zip(rows, measure(model, optimized), strict=True):
            if result.accuracy >= measured[row].accuracy:
                measured[row] = result
    return measured


class _Descent:
    """Adam on the states of a batch of segments; each has its own scale, stops by itself, and keeps its best states."""

    def __init__(self, model: Network, results: Sequence[SegmentResult]) -> None:
        """Start from the states of `results`."""
        self.model = model
        self.results = results
        self.store: StoreDtype = results[0].memory.dtype
        self.ids = pad([result.segment.ids for result in results], model.device)  # (B, n)
        self.lengths = torch.tensor([len(result.segment.ids) for result in results], device=model.device)
        nuggets = segment_nuggets(model, [(result.memory, 0) for result in results])
        self.valid = nuggets.valid
        self.samples = sample_continuations(
            model, [result.segment.ids for result in results], CONTINUATIONS, CONTINUATION_TOKENS
        )
        # keys of all layers, then values: (B, heads, K, head_dim) each
        self.start = [states.float() for states in (*nuggets.keys, *nuggets.values)]
        self.scale = self._scale()
        self.change = [torch.zeros_like(states, requires_grad=True) for states in self.start]
        self.best = [states.clone() for states in self.start]
        self.best_accuracy = torch.full_like(self.lengths, -1, dtype=torch.float32)
        self.best_loss = torch.full_like(self.best_accuracy, torch.inf)

    @torch.enable_grad()  # not while it pauses
    def run(self, steps: int, target: float) -> Generator[None, None, list[SegmentResult]]:
        """The results with the best states: those of highest accuracy, then lowest loss."""
        optimizer = torch.optim.Adam(self.change, lr=STEP)
        rows = torch.arange(len(self.results), device=self.model.device)
        for step in range(steps + 1):
            states = [
                _as_stored(start[rows] + self.scale[rows] * change[rows], self.store)
                for start, change in zip(self.start, self.change, strict=True)
            ]
            loss, accuracy = self._reconstruction(rows, states)
            self._remember(rows, states, loss.detach(), accuracy)
            active = accuracy < target
            if step == steps or not bool(active.any()):
                break
            divergence = self._continuation(rows, states, step % CONTINUATIONS)
            # only the gradients of the states are computed, not those of the weights
            gradients = torch.autograd.grad((loss + CONTINUATION * divergence)[active].sum(), self.change)
            for change, gradient in zip(self.change, gradients, strict=True):
                change.grad = gradient
            optimizer.step()
            rows = rows[active]
            yield
        return [self._result(row) for row in range(len(self.results))]

    def _scale(self) -> Tensor:
        """(B, 1, 1, 1) typical size of a segment's states: the geometric mean, over layers, of their root mean square.

        In many models some dimensions of the keys are huge and would dominate an arithmetic mean.
        """
        counts = torch.tensor([result.count for result in self.results], device=self.model.device)
        logs = []
        for states in self.start:
            numbers = counts * states.shape[1] * states.shape[3]  # padding is zero and not counted
            logs.append((states.square().sum((1, 2, 3)) / numbers).clamp(min=1e-12).log() / 2)
        return torch.stack(logs).mean(0).exp()[:, None, None, None]

    def _nuggets(self, rows: Tensor, states: Sequence[Tensor]) -> Nuggets:
        layers = len(states) // 2
        typed = [layer.to(self.model.lm.dtype) for layer in states]
        return Nuggets(typed[:layers], typed[layers:], None if self.valid is None else self.valid[rows])

    def _reconstruction(self, rows: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(b,) mean loss of each segment's tokens, in nats, and (b,) their accuracy."""
        ids, lengths = self.ids[rows], self.lengths[rows]
        logits = self.model.decode(self._nuggets(rows, states), ids[:, :-1], prompt="reconstruct")
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        loss = (token_losses(logits, ids) * real).sum(1) / lengths
        return loss, ((logits.argmax(-1) == ids) & real).sum(1) / lengths

    def _continuation(self, rows: Tensor, states: Sequence[Tensor], sample: int) -> Tensor:
        """(b,) Kullback-Leibler divergence from the LM's distribution after the text, in nats per token."""
        ids, expected = self.samples.ids[sample, rows], self.samples.expected[sample, rows]
        nuggets = self._nuggets(rows, states)
        logits = self.model.decode(nuggets, ids[:, :-1], prompt="continue", start=self.lengths[rows])
        return (expected.exp() * (expected - logits.float().log_softmax(-1))).sum(-1).mean(1)

    @torch.no_grad()
    def _remember(self, rows: Tensor, states: Sequence[Tensor], loss: Tensor, accuracy: Tensor) -> None:
        same = accuracy == self.best_accuracy[rows]
        better = (accuracy > self.best_accuracy[rows]) | (same & (loss < self.best_loss[rows]))
        chosen = rows[better]
        self.best_accuracy[chosen], self.best_loss[chosen] = accuracy[better], loss[better]
        for best, layer in zip(self.best, states, strict=True):
            best[chosen] = layer[better]

    def _result(self, row: int) -> SegmentResult:
        result = self.results[row]
        own = slice(self.best[0].shape[2] - result.count, None)
        states = [States.store(layer[row, :, own].cpu().clone(), self.store) for layer in self.best]
        layers = len(states) // 2
        memory = result.memory.with_states(states[:layers], states[layers:])
        return replace(result, memory=memory)


def _as_stored(states: Tensor, store: StoreDtype) -> Tensor:
    """The values as a memory would restore them, with the gradient of `states`."""
    exact = states.detach()
    return states + (States.store(exact, store).restore() - exact)
