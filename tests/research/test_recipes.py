"""The recipes that made `nano`, and that of the studies: valid, and their plug-ins are found."""

from pathlib import Path

import pytest

from nugget2d.training.plugins import load_plugins
from nugget2d.training.recipe import load_recipe

RECIPES = sorted((Path(__file__).parent.parent.parent / "research" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.compress is not None
    assert len(load_plugins(recipe.compress)) == len(recipe.compress.plugins)
    # results lie in the checkout's own runs/, text beside the checkout
    root = path.parent.parent.parent
    assert (path.parent / recipe.out).resolve().parent == root / "runs"
    for source in recipe.data.train:
        assert (path.parent / source.path).resolve().is_relative_to(root.parent / "shared")
