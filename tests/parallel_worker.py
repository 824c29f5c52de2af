"""What torchrun starts in test_parallel.py: one training after the other, each given as RECIPE:OUT."""

import sys

import torch

from nugget2d.cli.app import app
from nugget2d.modeling import precision
from nugget2d.training.processes import together

torch.set_num_threads(1)
# in bfloat16, sums in another order would soon be another curve
precision.has_fast_bfloat16 = lambda device: False

with together():  # once for all: a second meeting at the same place would find the addresses of the first
    for run in sys.argv[1:]:
        recipe, out = run.split(":")
        app(["train", recipe, "--out", out], standalone_mode=False)
