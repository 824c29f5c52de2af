"""Training tasks: a language model from scratch, and a compressor."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nugget2d.config import SelectionName
from nugget2d.evaluation.held_out import held_out_metrics
from nugget2d.model import Nugget2D
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Encoded
from nugget2d.modeling.selection import count_nuggets
from nugget2d.streaming.layout import Layout
from nugget2d.training.activations import offloaded, recomputed
from nugget2d.training.corpus import Pack
from nugget2d.training.objectives import (
    Contexts,
    continue_loss,
    distill_loss,
    lm_loss,
    reconstruct_loss,
    stream_loss,
)
from nugget2d.training.plugins import AuxiliaryLoss, MicroBatch, Plugin
from nugget2d.training.recipe import CompressStage, Objective, PretrainStage
from nugget2d.training.schedule import choose, sample_ratio

CONTINUATIONS = {"continue": continue_loss, "distill": distill_loss}

# of an objective: its loss; the tokens that were read, how, and the nuggets (see `MicroBatch`)
_Computed = tuple[Tensor, Tensor, Layout, Encoded | None]


class PretrainTask:
    """Next-token prediction on random windows."""

    name = "pretrain"

    def __init__(self, lm: PreTrainedModel, stage: PretrainStage, train: Pack, held_out: Pack) -> None:
        """Train `lm` on `train`."""
        self.module, self.stage = lm, stage
        self.train, self.held_out = train, held_out

    def groups(self) -> list[dict[str, Any]]:
        """One group, all weights."""
        return [{"params": list(self.module.parameters()), "lr": self.stage.optim.lr}]

    def loss(self, progress: float, shared: torch.Generator, own: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of a batch of windows."""
        stage = self.stage
        ids = self.train.windows(max(1, stage.batch_tokens // stage.window), stage.window, own)
        return self._loss(ids), {}

    def evaluate(self) -> dict[str, Any]:
        """Loss on held-out windows."""
        windows = self.held_out.spread(self.stage.evaluate_windows, self.stage.window)
        losses = [float(self._loss(ids)) * len(ids) for ids in windows.split(32)]
        return {"lm_loss": round(sum(losses) / len(windows), 4)}

    def _loss(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.module.device)
        logits = self.module(input_ids=ids[:, :-1], use_cache=False).logits
        return token_losses(logits, ids[:, 1:]).mean()


class CompressTask:
    """Autoencoding + continuation + streams + plain LM; one objective, length, ratio and policy for each step."""

    name = "compress"

    def __init__(
        self, model: Nugget2D, stage: CompressStage, train: Pack, held_out: Pack, plugins: Sequence[Plugin] = ()
    ) -> None:
        """Train `model`, which the plugins have prepared, on `train`; their losses come on top of the objectives'."""
        self.model, self.stage, self.train, self.held_out = model, stage, train, held_out
        self.module: nn.Module = model
        self.auxiliary = [plugin for plugin in plugins if isinstance(plugin, AuxiliaryLoss)]
        # frozen: no straight-through term then, and none of its gradients in the norm that clipping looks at
        model.scorer.requires_grad_(stage.optim.scorer_lr > 0)

    def groups(self) -> list[dict[str, Any]]:
        """The scorer has its own, lower rate: nothing restrains the scale of its scores."""
        roles, optim = self.model.parameters_by_role, self.stage.optim
        main = [*roles.encoder_parameters(), *roles.decoder_parameters(), *self.model.small_parameters()]
        return [
            {"params": main, "lr": optim.lr},
            {"params": list(self.model.scorer.parameters()), "lr": optim.scorer_lr},
        ]

    def loss(self, progress: float, shared: torch.Generator, own: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of one micro-batch under an objective drawn from the phase, and of the plugins that add to it."""
        stage, phase = self.stage, self.stage.phase(progress)
        length = choose(phase.windows, shared)
        selection: SelectionName = choose(phase.selections or {stage.selection: 1.0}, shared)
        ratio = sample_ratio(progress, stage.ratios, shared)
        objective: Objective = choose(phase.objectives, shared)
        segments = int(torch.randint(1, phase.segments + 1, (1,), generator=shared))
        auxiliary = [one for one in self.auxiliary if objective in one.objectives]
        with self._activations(), ExitStack() as watching:
            watched = [watching.enter_context(one.watch(self.model)) for one in auxiliary]
            if objective == "stream":
                loss, ids, layout, encoded = self._streamed(ratio, selection, shared, own)
            elif objective == "lm":
                loss, ids, layout, encoded = self._plain(segments * length, own)
            else:
                loss, ids, layout, encoded = self._windows(objective, progress, ratio, segments, length, selection, own)
            batch = MicroBatch(self.model, ids, layout, encoded, progress, own)
            metrics = {f"loss_{objective}": float(loss.detach())}
            for one, seen in zip(auxiliary, watched, strict=True):
                losses = one.losses(batch, seen)
                loss = loss + one.weight_at(progress) * sum(losses.values())
                metrics |= {f"loss_{name}": float(value.detach()) for name, value in losses.items()}
        return loss, metrics

    def _windows(
        self,
        objective: Objective,
        progress: float,
        ratio: float,
        segments: int,
        length: int,
        selection: SelectionName,
        own: torch.Generator,
    ) -> _Computed:
        stage, continuation = self.stage, CONTINUATIONS.get(objective)
        ids = self._draw(segments * length + stage.target if continuation else length, own)
        ratios = [sample_ratio(progress, stage.ratios, own) if stage.mixed_ratios else ratio for _ in ids]
        counts = [count_nuggets([length], one)[0] for one in ratios]
        if objective == "uniform":
            ids = torch.randint(len(self.model.tokenizer), ids.shape, generator=own).to(ids.device)
        layout = Layout(recent_window=0, chunk=ids.shape[1], steps=1)
        if continuation:
            loss = continuation(self.model, Contexts(ids, segments, length, counts, selection, own))
            return loss, ids, layout, None
        loss, encoded = reconstruct_loss(self.model, ids, counts, selection, own)
        return loss, ids, layout, encoded

    def _plain(self, length: int, own: torch.Generator) -> _Computed:
        ids = self._draw(length, own)
        return lm_loss(self.model, ids), ids[:, :-1], Layout(recent_window=0, chunk=length - 1, steps=1), None

    def _streamed(
        self, ratio: float, selection: SelectionName, shared: torch.Generator, own: torch.Generator
    ) -> _Computed:
        streams = self.stage.streams
        visible = None if streams.visible_segments is None else choose(streams.visible_segments, shared)
        layout = streams.layout(choose(streams.recent_window, shared), choose(streams.chunk, shared), visible)
        if streams.ratio is not None:
            ratio = choose(streams.ratio, shared)
        count = count_nuggets([layout.chunk], ratio)[0]
        ids = self._draw(layout.length, own)
        loss, encoded = stream_loss(self.model, ids, layout, count, selection, own)
        return loss, ids, layout, encoded

    @contextmanager
    def _activations(self) -> Iterator[None]:
        """A context in which activations are kept as the stage says."""
        with ExitStack() as stack:
            if self.stage.offload_activations:
                stack.enter_context(offloaded())
            if self.stage.checkpoint_activations:
                stack.enter_context(recomputed(self.model.parameters_by_role))
            yield

    def _draw(self, length: int, generator: torch.Generator) -> Tensor:
        ids = self.train.windows(max(1, self.stage.batch_tokens // length), length, generator)
        return ids.to(self.model.device)

    def evaluate(self) -> dict[str, Any]:
        """Metrics on held-out windows, see `held_out_metrics`."""
        stage = self.stage
        windows = self.held_out.spread(stage.evaluate_windows, stage.longest_window + stage.target)
        return held_out_metrics(self.model, windows, stage.longest_window, (4, 10, 20))
