"""The schema of a study: a recipe, the variants that change it, and seeds, in one YAML file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from nugget2d.config import Frozen
from nugget2d.errors import RecipeError
from nugget2d.training.plugins import load_plugins
from nugget2d.training.recipe import Recipe, read_mapping, validated

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
SHARED = ("data", "tokenizer", "seed", "out")


class Study(Frozen):
    """One question, and the trainings that answer it.

    Attributes:
        question: what the variants are to tell.
        base: the recipe that every variant changes; its path is relative to the study's own folder.
        seeds: every variant is trained once with each of them.
        windows: held-out windows that a trained variant is measured on.
        variants: name -> changes of the recipe: mappings are merged key by key, anything else (lists too) is replaced.
    """

    question: str
    base: str
    seeds: tuple[int, ...] = Field(min_length=1)
    windows: int = Field(default=200, ge=1)
    variants: dict[Name, dict[str, Any]] = Field(min_length=1)

    @model_validator(mode="after")
    def _comparable(self) -> "Study":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must differ from each other, got {list(self.seeds)}")
        for name, changes in self.variants.items():
            if shared := [key for key in SHARED if key in changes]:
                raise ValueError(
                    f"variant {name!r} changes `{shared[0]}`, which all variants share; set it in the recipe"
                )
        return self


@dataclass(frozen=True)
class Variant:
    """One training: a variant of a study with one of its seeds."""

    name: str
    seed: int
    recipe: Recipe

    def folder(self, out: Path) -> Path:
        """Where its results lie within those of the study."""
        return out / "variants" / f"{self.name}-{self.seed}"

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


def load_study(path: Path) -> tuple[Study, Path, list[Variant]]:
    """Read and check a study and the recipe of every variant.

    Returns:
        study: the record.
        home: the folder that paths in the recipes are relative to.
        variants: every variant with every seed, in order.

    Raises:
        RecipeError: a wrong key or value in the study, its recipe or a variant, a budget in minutes, or budgets that
            differ; the message names the variant and the remedy.
    """
    study = validated(Study, read_mapping(path), str(path))
    recipe_path = path.parent / study.base
    base = read_mapping(recipe_path)
    variants = []
    for name, changes in study.variants.items():
        where = f"{path}, variant {name!r}"
        recipe = validated(Recipe, merge(base, changes), where)
        if recipe.compress is None:
            raise RecipeError(f"{where}: missing key `compress`; a study compares compressors")
        try:
            load_plugins(recipe.compress)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
        variants += [Variant(name, seed, recipe.model_copy(update={"seed": seed})) for seed in study.seeds]
    for variant in variants:
        where = f"{path}, variant {variant.name!r}"
        stages = (variant.recipe.pretrain, variant.recipe.compress)
        if any(stage is not None and stage.tokens is None for stage in stages):
            raise RecipeError(f"{where}: variants need equal budgets; give `tokens` in place of `minutes`")
        if variant.tokens != variants[0].tokens:
            raise RecipeError(
                f"{where} trains on {variant.tokens:,} tokens, {variants[0].name!r} on {variants[0].tokens:,}; "
                "give all variants the same budget"
            )
    return study, recipe_path.parent, variants
