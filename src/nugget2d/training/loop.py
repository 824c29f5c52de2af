"""The training loop: steps, mixed precision, checkpoints, resume, log, evaluation, progress.

Whatever is trained is a `Task`. Every micro-batch draws from a generator seeded by (seed, step, micro-batch), so that a
run resumed from a checkpoint continues exactly as if it had never stopped. Several processes share out the
micro-batches of each step: a run is the same run on any number of them.
"""

import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nugget2d.errors import RecipeError
from nugget2d.files import atomic_write
from nugget2d.modeling.precision import mixed_precision
from nugget2d.training.plot import plot_log
from nugget2d.training.recipe import Stage
from nugget2d.training.schedule import learning_rate_factor
from nugget2d.training.spread import Spread, part, whole


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

    def loss(self, progress: float, shared: torch.Generator, own: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of one fresh micro-batch, and metrics for the log.

        What the micro-batches of a step have in common is drawn from `shared`: which metrics there are, and which
        parts of the model run, for sharded processes must run them together. The rest is drawn from `own`.
        """

    def evaluate(self) -> dict[str, Any]:
        """Metrics on held-out text."""


def fit(task: Task, spread: Spread, folder: Path, *, seed: int, save_minutes: float, fresh: bool) -> None:
    """Train `task`, whose module is spread by `spread`, to the end of its budget.

    Resumes from the checkpoint in `folder` if there is one. Writes checkpoint.pt (atomically), log.jsonl and loss.png
    into `folder`; the first process does.

    Raises:
        RecipeError: the micro-batches of a step cannot be shared out evenly over the processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run, first = _Run(task, spread, folder, seed), spread.processes.first
    if fresh:
        run.clear()
    else:
        run.resume()
    console = Console(stderr=True, quiet=not first)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]:,.0f} tokens/s  loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=console, disable=not (first and console.is_terminal)) as bar:
        line = bar.add_task(task.name, total=1.0, rate=0.0, loss=0.0)
        bar.update(line, completed=run.progress)
        saved = run.elapsed
        for record in run.steps():
            bar.update(line, completed=run.progress, rate=record["tokens_per_s"], loss=record["loss"])
            if "held_out" in record:
                console.print(f"{task.name} step {record['step']}: loss {record['loss']:.3f}  {record['held_out']}")
            if run.elapsed - saved > save_minutes * 60:
                run.save()
                saved = run.elapsed
    run.save()
    if first:
        plot_log(folder / "log.jsonl", folder / "loss.png")


class _Run:
    """The state of one stage: weights, optimizer, and how far it has come."""

    def __init__(self, task: Task, spread: Spread, folder: Path, seed: int) -> None:
        self.task, self.spread, self.folder, self.seed = task, spread, folder, seed
        self.processes = spread.processes
        self.device = self.processes.device.type
        optim, accumulate = task.stage.optim, task.stage.accumulate
        if accumulate % self.processes.count:
            raise RecipeError(
                f"{self.processes.count} processes cannot share out `{task.name}.accumulate: {accumulate}` evenly; "
                "make it a multiple of their number, and `batch_tokens` smaller in proportion"
            )
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
        log = self.folder / "log.jsonl" if self.processes.first else Path(os.devnull)
        stage = self.task.stage
        with log.open("a", encoding="utf-8") as file:
            while self.progress < 1.0:
                started = time.monotonic()
                record = self._step()
                # one clock for all: budget and checkpoints go by it
                seconds = self.processes.mean({"seconds": time.monotonic() - started})["seconds"]
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
        metrics: dict[str, float] = {}
        mine = range(self.processes.rank, stage.accumulate, self.processes.count)
        for micro in mine:
            shared = self._generator(0)
            own = self._generator(micro) if micro else shared
            with mixed_precision(self.device):
                loss, parts = self.spread.run(partial(self.task.loss, self.progress, shared, own))
            (loss / len(mine)).backward()
            for key, value in (parts | {"loss": float(loss.detach())}).items():
                metrics[key] = metrics.get(key, 0.0) + value / len(mine)
        metrics = self.processes.mean(metrics)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.spread.average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, stage.optim.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {key: round(value, 5) for key, value in metrics.items()} | {
            "lr": stage.optim.lr * factor,
            "grad_norm": round(float(norm), 4),
        }

    def _generator(self, micro: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.seed, self.step, micro)) & 0x7FFF_FFFF_FFFF)

    def _evaluate(self) -> dict[str, Any]:
        self.task.module.eval()
        with torch.no_grad(), mixed_precision(self.device):
            return self.spread.run(self.task.evaluate)

    def save(self) -> None:
        """Write the checkpoint; an interrupted write leaves the one before it."""
        state = {
            # as they are, not detached: tied weights are known by being the same object
            "module": whole(self.task.module.state_dict(keep_vars=True), self.processes),
            "optimizer": whole(self.optimizer.state_dict(), self.processes),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        if not self.processes.first:
            return
        with atomic_write(self.folder / "checkpoint.pt") as file:
            torch.save(state, file)

    def resume(self) -> None:
        """Resume from the checkpoint, if there is one; log lines after it are dropped."""
        path, log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        if not path.is_file():
            self.clear()
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        spread = self.task.module.state_dict()
        self.task.module.load_state_dict({name: part(one, spread[name]) for name, one in state["module"].items()})
        self.optimizer.load_state_dict(self._own_part(state["optimizer"]))
        self.step, self.elapsed = state["step"], state["elapsed"]
        if not self.processes.first:
            return
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
        log.write_text("".join(lines[: self.step]), encoding="utf-8")

    def _own_part(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of the optimizer for this process's parts; only moments have the shape of their weight."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept = {
            number: {key: part(one, parameters[number]) if one.dim() else one for key, one in record.items()}
            for number, record in state["state"].items()
        }
        return state | {"state": kept}

    def clear(self) -> None:
        """Forget an earlier run in this folder."""
        if not self.processes.first:
            return
        for name in ("checkpoint.pt", "log.jsonl", "loss.png"):
            (self.folder / name).unlink(missing_ok=True)
