"""Plugins of compressor training: `compress.plugins` in a recipe names classes by import path.

    plugins:
      - {use: "package.module:Class", weight: 0.5, ...own options}

A plugin is a frozen record whose fields are its options. It may change the model before training (`prepare`), bring
another kind of memory (`memory`), and, as an `AuxiliaryLoss`, add to the loss of some objectives.
"""

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from nugget2d.config import Frozen
from nugget2d.errors import RecipeError
from nugget2d.model import Nugget2D
from nugget2d.modeling.network import Encoded
from nugget2d.streaming.layout import Layout
from nugget2d.training.corpus import Pack
from nugget2d.training.recipe import CompressStage, Objective, PluginSpec, validated


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What an objective has just computed its loss from.

    Attributes:
        model: which is trained.
        ids: (B, n) tokens, as they were read.
        layout: which tokens saw which: the views of a stream, or one view of everything.
        encoded: the nuggets that were read, a row for each segment; None where there were none, or the objective
            (continue, distill) does not hand them on.
        progress: of the run, 0 to 1.
        generator: of this micro-batch, for further draws.
    """

    model: Nugget2D
    ids: Tensor
    layout: Layout
    encoded: Encoded | None
    progress: float
    generator: torch.Generator


class Plugin(Frozen):
    """An addition to the training of a compressor; a subclass overrides what it needs.

    Attributes:
        memory: the class that is trained in place of `Nugget2D`. What it makes cannot be saved.
    """

    memory: ClassVar[type[Nugget2D] | None] = None

    def check(self, stage: CompressStage) -> None:
        """Refuse a stage that this cannot be added to.

        Raises:
            RecipeError: with the remedy.
        """

    def prepare(self, model: Nugget2D, text: Pack) -> Nugget2D:
        """The model to train, before its first step; `text` is what it will be trained on."""
        return model


class AuxiliaryLoss(Plugin):
    """A weighted loss beside that of some objectives. It may read weights outside of any layer's forward pass.

    Attributes:
        objectives: which ones.
        weight: factor on the sum of its losses.
    """

    objectives: ClassVar[tuple[Objective, ...]]
    weight: float = Field(gt=0)

    def weight_at(self, progress: float) -> float:
        """The weight at a point of the run, 0 to 1."""
        return self.weight

    def watch(self, model: Nugget2D) -> AbstractContextManager[Any]:
        """A context around the forward pass of the objective; `losses` gets what it yields."""
        return nullcontext()

    @abstractmethod
    def losses(self, batch: MicroBatch, watched: Any) -> dict[str, Tensor]:
        """The losses of a micro-batch by their names in the log; none where it has nothing to learn from.

        Which names there are must follow from objective and progress: processes share out the micro-batches of a step.
        """


def load_plugins(stage: CompressStage) -> list[Plugin]:
    """The plugins of a stage, in its order.

    Raises:
        RecipeError: one cannot be imported, has a wrong option, does not fit the stage, or several bring a memory.
    """
    plugins = [_load(spec) for spec in stage.plugins]
    for plugin in plugins:
        plugin.check(stage)
    brought = [type(plugin).__name__ for plugin in plugins if plugin.memory is not None]
    if len(brought) > 1:
        raise RecipeError(f"{' and '.join(brought)} each bring a memory: keep one of them in `compress.plugins`")
    if brought and (stage.init is not None or stage.memory != "nuggets"):
        raise RecipeError(f"{brought[0]} brings a memory of its own: remove `compress.memory` and `compress.init`")
    return plugins


def memory_of(plugins: Sequence[Plugin]) -> type[Nugget2D] | None:
    """The class that one of the plugins brings."""
    return next((plugin.memory for plugin in plugins if plugin.memory is not None), None)


def _load(spec: PluginSpec) -> Plugin:
    module, _, name = spec.use.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise RecipeError(
            f"cannot import plugin {spec.use!r} ({error}): put the folder that holds {module.partition('.')[0]!r} on "
            "the Python path, e.g. run `python -m nugget2d train` from that folder"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Plugin)):
        raise RecipeError(f"plugin {spec.use!r} is no subclass of nugget2d.training.plugins.Plugin; correct `use`")
    return validated(found, spec.options, f"plugin {spec.use!r}")
