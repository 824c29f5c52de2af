"""What training costs: measured for a model at hand, computed for the sizes that need many GPUs.

    python benchmarks/training_cost.py --out benchmarks/results/training-cost.json

Measured: steps of autoencoding on evenly drawn tokens, each way in a process of its own: the largest resident set, the
bytes kept from the forward to the backward pass (weights left out), and the time per token. Computed:
`nugget2d.training.arithmetic`, for LMs of Llama's shapes.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from nugget2d import Nugget2D
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.training.arithmetic import GIB, SHAPES, training_cost, training_flops
from nugget2d.training.corpus import Pack
from nugget2d.training.recipe import CompressStage
from nugget2d.training.tasks import CompressTask

WAYS: dict[str, dict[str, bool]] = {
    "as it is": {},
    "checkpoint_activations": {"checkpoint_activations": True},
}
CAPACITY = 80 * GIB
FLOPS = 4e14  # of one GPU in bfloat16: 40 % of the peak of an H100, an assumption


def main() -> None:
    """Measure every way in a process of its own, compute, print two tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=10)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    if options.out is None:
        parser.error("give --out")
    measured = [measured_apart(way) for way in WAYS]
    computed = [row for name in SHAPES for row in compute(name, options.tokens, options.ratio)]
    for rows in (measured, computed):
        print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]), end="\n\n")
    settings = {key: getattr(options, key) for key in ("model", "tokens", "window", "ratio", "steps")}
    write_report(options.out, settings | {"measured": measured, "computed": computed})


def measured_apart(way: str) -> dict[str, Any]:
    """`measure`, in a new process: a process's largest resident set never shrinks."""
    command = [sys.executable, *sys.argv, "--way", way]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Metrics of one way to train."""
    torch.set_num_threads(1)
    model = Nugget2D.from_pretrained(options.model)
    model.lm.set_attn_implementation("eager")
    stage = CompressStage.model_validate(
        {
            "tokens": 1, "batch_tokens": options.tokens, "optim": {"lr": 1e-3},
            "ratios": {"start": [options.ratio] * 2, "end": [options.ratio] * 2},
            "phases": [{"objectives": {"uniform": 1}, "windows": {options.window: 1}}],
        } | WAYS[options.way]
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "train.bin"
        np.zeros(options.window, dtype=np.uint16).tofile(pack)  # objective "uniform" draws its own tokens
        (pack.parent / "done").write_text("uint16")
        task = CompressTask(model, stage, Pack(pack), Pack(pack))
        optimizer = torch.optim.AdamW(task.groups(), fused=True)
        seconds = []
        for number in range(options.steps + 1):
            started = time.perf_counter()
            _loss(task, number).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        kept = kept_bytes(task)
    return {
        "way": options.way,
        "peak_rss_mib": round(peak / 2**20),
        "kept_mib": round(kept / 2**20, 1),
        "us_per_token": round(1e6 * statistics.median(seconds[1:]) / options.tokens, 1),
    }


def _loss(task: CompressTask, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    with torch.autocast("cpu", torch.bfloat16):
        return task.loss(0.0, generator, generator)[0]


def kept_bytes(task: CompressTask) -> int:
    """Bytes of all distinct tensors that autograd holds after a forward pass, without weights."""
    weights = {parameter.data_ptr() for parameter in task.module.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss(task, 0)
    return sum(kept.values())


def compute(name: str, tokens: int, ratio: float) -> list[dict[str, Any]]:
    """Rows for one shape: adapters and copies, with and without checkpointing."""
    rows = []
    for adapters in ("lora", "copies"):
        for checkpoint in (False, True):
            cost = training_cost(SHAPES[name], adapters, tokens=tokens, ratio=ratio, checkpoint=checkpoint)
            gpus = cost.gpus(CAPACITY)
            operations = training_flops(SHAPES[name], adapters, checkpoint=checkpoint)
            rows.append(
                {
                    "lm": name,
                    "adapters": adapters,
                    "checkpoint": "yes" if checkpoint else "no",
                    "frozen_gib": round(cost.weights / GIB, 1),
                    "trained_gib": round(cost.states / GIB, 1),
                    "gathered_gib": round(cost.gathered / GIB, 1),
                    "activations_gib": round(cost.activations / GIB, 1),
                    "nuggets_mib": round(cost.nuggets / 2**20, 1),
                    "gpu_us_per_token": round(1e6 * operations / FLOPS, 1),
                    "gpus": gpus or "none",
                    "per_gpu_gib": round(cost.per_gpu(gpus) / GIB, 1) if gpus else "-",
                }
            )
    return rows


if __name__ == "__main__":
    main()
