"""The schema of a study: a recipe, the arms that change it, and seeds, in one YAML file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from nugget2d.config import Frozen
from nugget2d.errors import RecipeError
from nugget2d.training.recipe import Recipe, read_mapping, validated

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
SHARED = ("data", "tokenizer", "seed", "out")


class Study(Frozen):
    """One question, and the trainings that answer it.

    Attributes:
        question: what the arms are to tell.
        base: the recipe that every arm changes; its path is relative to the study's own folder.
        seeds: every arm is trained once with each of them.
        windows: held-out windows that a trained arm is measured on.
        arms: name -> changes of the recipe: mappings are merged key by key, anything else (lists too) is replaced.
    """

    question: str
    base: str
    seeds: tuple[int, ...] = Field(min_length=1)
    windows: int = Field(default=200, ge=1)
    arms: dict[Name, dict[str, Any]] = Field(min_length=1)

    @model_validator(mode="after")
    def _comparable(self) -> "Study":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must differ from each other, got {list(self.seeds)}")
        for name, changes in self.arms.items():
            if shared := [key for key in SHARED if key in changes]:
                raise ValueError(f"arm {name!r} changes `{shared[0]}`, which all arms share; set it in the recipe")
        return self


@dataclass(frozen=True)
class Arm:
    """One training: an arm of a study with one of its seeds."""

    name: str
    seed: int
    recipe: Recipe

    def folder(self, out: Path) -> Path:
        """Where its results lie within those of the study."""
        return out / "arms" / f"{self.name}-{self.seed}"

    @property
    def tokens(self) -> int:
        """The budget of all its stages."""
        return sum(stage.tokens or 0 for stage in (self.recipe.pretrain, self.recipe.compress) if stage is not None)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`: mappings are merged key by key, anything else (lists too) is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def load_study(path: Path) -> tuple[Study, Path, list[Arm]]:
    """Read and check a study and the recipe of every arm.

    Returns:
        study: the record.
        home: the folder that paths in the recipes are relative to.
        arms: every arm with every seed, in order.

    Raises:
        RecipeError: a wrong key or value in the study, its recipe or an arm, a budget in minutes, or budgets that
            differ; the message names the arm and the remedy.
    """
    study = validated(Study, read_mapping(path), str(path))
    recipe_path = path.parent / study.base
    base = read_mapping(recipe_path)
    arms = []
    for name, changes in study.arms.items():
        recipe = validated(Recipe, merge(base, changes), f"{path}, arm {name!r}")
        if recipe.compress is None:
            raise RecipeError(f"{path}, arm {name!r}: missing key `compress`; a study compares compressors")
        arms += [Arm(name, seed, recipe.model_copy(update={"seed": seed})) for seed in study.seeds]
    for arm in arms:
        stages = (arm.recipe.pretrain, arm.recipe.compress)
        if any(stage is not None and stage.tokens is None for stage in stages):
            raise RecipeError(f"{path}, arm {arm.name!r}: arms need equal budgets; give `tokens` in place of `minutes`")
        if arm.tokens != arms[0].tokens:
            raise RecipeError(
                f"{path}, arm {arm.name!r} trains on {arm.tokens:,} tokens, {arms[0].name!r} on {arms[0].tokens:,}; "
                "give all arms the same budget"
            )
    return study, recipe_path.parent, arms
