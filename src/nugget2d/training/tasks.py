"""What the loop trains: a language model from scratch, or a compressor."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nugget2d.config import SelectionName
from nugget2d.evaluation.held_out import held_out_figures
from nugget2d.model import Nugget2D
from nugget2d.modeling.hooks import inputs_of
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Encoded
from nugget2d.modeling.selection import count_nuggets
from nugget2d.streaming.layout import Layout
from nugget2d.training.activations import offloaded, recomputed
from nugget2d.training.corpus import Pack
from nugget2d.training.lookup import lookup_keys, lookup_loss, voice_loss
from nugget2d.training.objectives import (
    Contexts,
    continue_loss,
    distill_loss,
    lm_loss,
    reconstruct_loss,
    stream_loss,
)
from nugget2d.training.readout import readout_loss
from nugget2d.training.recipe import CompressStage, Objective, PretrainStage
from nugget2d.training.schedule import choose, sample_ratio

GOING_ON = {"continue": continue_loss, "distill": distill_loss}


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

    def __init__(self, model: Nugget2D, stage: CompressStage, train: Pack, held_out: Pack) -> None:
        """Train `model` on `train`."""
        self.model, self.stage, self.train, self.held_out = model, stage, train, held_out
        self.module: nn.Module = model
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
        """Loss of one micro-batch under an objective drawn from the phase."""
        stage, phase = self.stage, self.stage.phase(progress)
        length = choose(phase.windows, shared)
        selection: SelectionName = choose(phase.selections or {stage.selection: 1.0}, shared)
        ratio = sample_ratio(progress, stage.ratios, shared)
        objective: Objective = choose(phase.objectives, shared)
        segments = int(torch.randint(1, phase.segments + 1, (1,), generator=shared))
        if objective == "stream":
            return self._streamed(progress, ratio, selection, shared, own)
        if objective == "lm":
            return self._plain(progress, segments * length, own)
        going_on = objective in GOING_ON
        after = stage.target if going_on else 0
        ids = self._draw((segments if going_on else 1) * length + after, own)
        ratios = [sample_ratio(progress, stage.ratios, own) if stage.mixed_ratios else ratio for _ in ids]
        counts = [count_nuggets([length], one)[0] for one in ratios]
        if objective == "uniform":
            ids = torch.randint(len(self.model.tokenizer), ids.shape, generator=own).to(ids.device)
        with self._activations():
            if going_on:
                loss = GOING_ON[objective](self.model, Contexts(ids, segments, length, counts, selection, own))
            else:
                loss, encoded = reconstruct_loss(self.model, ids, counts, selection, own)
                if stage.readout:
                    loss = loss + stage.readout * readout_loss(self.model, encoded, ids)
        return loss, {f"loss_{objective}": float(loss.detach())}

    def _plain(self, progress: float, length: int, own: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        ids = self._draw(length, own)
        layout = Layout(tau=0, chunk=length - 1, views=1)
        with self._activations(), self._heard() as heard:
            loss = lm_loss(self.model, ids)
            lookup, figures = self._lookup(progress, heard, ids[:, :-1], layout, None, own)
        return loss + lookup, {"loss_lm": float(loss.detach())} | figures

    def _streamed(
        self, progress: float, ratio: float, selection: SelectionName, shared: torch.Generator, own: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        streams = self.stage.streams
        reach = None if streams.reach is None else choose(streams.reach, shared)
        layout = streams.layout(choose(streams.tau, shared), choose(streams.chunk, shared), reach)
        if streams.ratio is not None:
            ratio = choose(streams.ratio, shared)
        count = count_nuggets([layout.chunk], ratio)[0]
        ids = self._draw(layout.length, own)
        with self._activations(), self._heard() as heard:
            loss, encoded = stream_loss(self.model, ids, layout, count, selection, own)
            # only nuggets share out tokens over their heads
            memory = encoded if self.stage.memory == "nuggets" else None
            lookup, figures = self._lookup(progress, heard, ids, layout, memory, own)
        return loss + lookup, {"loss_stream": float(loss.detach())} | figures

    @contextmanager
    def _heard(self) -> Iterator[list[Tensor]]:
        """Within the block, collect what `lookup_loss` is about, if the stage wants it."""
        if not self.stage.lookup:
            yield []
            return
        with inputs_of(lookup_keys(self.model)) as heard:
            yield heard

    def _lookup(
        self,
        progress: float,
        heard: list[Tensor],
        ids: Tensor,
        layout: Layout,
        encoded: Encoded | None,
        own: torch.Generator,
    ) -> tuple[Tensor | float, dict[str, float]]:
        """The weighted losses of one reading, whose weight falls to a fifth by the end of the run."""
        if not heard:
            return 0.0, {}
        # the last call: before its first use, `rotation` tries the LM out; the losses call the same module themselves
        inputs = heard[-1]
        losses = {"loss_lookup": lookup_loss(self.model, inputs, ids, layout, encoded, own)}
        if encoded is not None and progress >= self.stage.voice_from:
            losses["loss_voice"] = voice_loss(self.model, inputs, layout, encoded)
        weight = self.stage.lookup * (1 - 0.8 * progress)
        return weight * sum(losses.values()), {name: float(loss.detach()) for name, loss in losses.items()}

    @contextmanager
    def _activations(self) -> Iterator[None]:
        """A context in which the stage's wishes for activations hold."""
        with ExitStack() as wishes:
            if self.stage.offload_activations:
                wishes.enter_context(offloaded())
            if self.stage.checkpoint_activations:
                wishes.enter_context(recomputed(self.model.parameters_by_role))
            yield

    def _draw(self, length: int, generator: torch.Generator) -> Tensor:
        ids = self.train.windows(max(1, self.stage.batch_tokens // length), length, generator)
        return ids.to(self.model.device)

    def evaluate(self) -> dict[str, Any]:
        """Figures on held-out windows, see `held_out_figures`."""
        stage = self.stage
        windows = self.held_out.spread(stage.evaluate_windows, stage.longest_window + stage.target)
        return held_out_figures(self.model, windows, stage.longest_window, (4, 10, 20))
