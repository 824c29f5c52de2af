"""The training loop: steps, mixed precision, checkpoints, resume, log, evaluation, progress.

Whatever is trained is a `Task`. Every micro-batch draws from a generator seeded by (seed, step, micro-batch), so that a
run resumed from a checkpoint goes on exactly as if it had never stopped.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from nugget2d.files import atomic_write
from nugget2d.training.plot import plot_log
from nugget2d.training.recipe import Stage
from nugget2d.training.schedule import learning_rate_factor


class Task(Protocol):
    """Something with weights, a loss and an evaluation."""

    name: str

    @property
    def stage(self) -> Stage:
        """Budget, batch size, optimizer."""

    @property
    def module(self) -> nn.Module:
        """All weights, for checkpoints."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for AdamW, each with its peak `lr`."""

    def loss(self, progress: float, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of one fresh micro-batch, and figures for the log."""

    def evaluate(self) -> dict[str, Any]:
        """Figures on held-out text."""


def fit(task: Task, folder: Path, *, seed: int, save_minutes: float, fresh: bool) -> None:
    """Train `task` to the end of its budget, from the checkpoint in `folder` if there is one.

    Writes checkpoint.pt (atomically), log.jsonl and loss.png into `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(task, folder, seed)
    if fresh:
        run.clear()
    else:
        run.resume()
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]:,.0f} tokens/s  loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        line = bar.add_task(task.name, total=1.0, rate=0.0, loss=0.0)
        bar.update(line, completed=run.progress)
        saved = time.monotonic()
        for record in run.steps():
            bar.update(line, completed=run.progress, rate=record["tokens_per_s"], loss=record["loss"])
            if "held_out" in record:
                console.print(f"{task.name} step {record['step']}: loss {record['loss']:.3f}  {record['held_out']}")
            if time.monotonic() - saved > save_minutes * 60:
                run.save()
                saved = time.monotonic()
    run.save()
    plot_log(folder / "log.jsonl", folder / "loss.png")


class _Run:
    """The state of one stage: weights, optimizer, and how far it has come."""

    def __init__(self, task: Task, folder: Path, seed: int) -> None:
        self.task, self.folder, self.seed = task, folder, seed
        device = next(task.module.parameters()).device
        self.device = device.type
        optim = task.stage.optim
        self.optimizer = torch.optim.AdamW(
            task.groups(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
        )
        for group in self.optimizer.param_groups:
            group["peak"] = group["lr"]
        self.step, self.elapsed = 0, 0.0
        per_step = task.stage.batch_tokens * task.stage.accumulate
        self.total = None if task.stage.tokens is None else max(1, round(task.stage.tokens / per_step))

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end of the budget."""
        if self.total is not None:
            return self.step / self.total
        return min(1.0, self.elapsed / (60.0 * (self.task.stage.minutes or 1.0)))

    def steps(self) -> Iterator[dict[str, Any]]:
        """Optimizer steps until the budget is spent; yields the record that was logged for each."""
        log = self.folder / "log.jsonl"
        stage = self.task.stage
        with log.open("a", encoding="utf-8") as file:
            while self.progress < 1.0:
                started = time.monotonic()
                record = self._step()
                seconds = time.monotonic() - started
                self.step += 1
                self.elapsed += seconds
                record |= {
                    "step": self.step,
                    "tokens": self.step * stage.batch_tokens * stage.accumulate,
                    "minutes": round(self.elapsed / 60, 3),
                    "tokens_per_s": stage.batch_tokens * stage.accumulate / seconds,
                }
                if self.step % stage.evaluate_every == 0 or self.progress >= 1.0:
                    record["held_out"] = self._evaluate()
                file.write(json.dumps(record) + "\n")
                file.flush()
                yield record

    def _step(self) -> dict[str, Any]:
        stage, module = self.task.stage, self.task.module
        module.train()
        factor = learning_rate_factor(self.step, self.progress, stage.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        figures: dict[str, float] = {}
        for micro in range(stage.accumulate):
            generator = torch.Generator().manual_seed(hash((self.seed, self.step, micro)) & 0x7FFF_FFFF_FFFF)
            with torch.autocast(self.device, torch.bfloat16):
                loss, parts = self.task.loss(self.progress, generator)
            (loss / stage.accumulate).backward()
            for key, value in parts.items():
                figures[key] = figures.get(key, 0.0) + value / stage.accumulate
            figures["loss"] = figures.get("loss", 0.0) + float(loss.detach()) / stage.accumulate
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, stage.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {key: round(value, 5) for key, value in figures.items()} | {
            "lr": stage.optim.lr * factor,
            "grad_norm": round(float(norm), 4),
        }

    def _evaluate(self) -> dict[str, Any]:
        self.task.module.eval()
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16):
            return self.task.evaluate()

    def save(self) -> None:
        """Write the checkpoint; an interrupted write leaves the one before it."""
        state = {
            "module": self.task.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        with atomic_write(self.folder / "checkpoint.pt") as file:
            torch.save(state, file)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one; log lines after it are dropped."""
        path, log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        if not path.is_file():
            self.clear()
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.task.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
        log.write_text("".join(lines[: self.step]), encoding="utf-8")

    def clear(self) -> None:
        """Forget an earlier run in this folder."""
        for name in ("checkpoint.pt", "log.jsonl", "loss.png"):
            (self.folder / name).unlink(missing_ok=True)
