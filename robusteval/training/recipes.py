"""Recipes: named training settings as data, one TOML file each in `robusteval/recipes/`; the file name is the name."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robusteval.catalog import resource_folder
from robusteval.errors import unknown


@dataclass(frozen=True)
class Recipe:
    """``settings`` is a tree for `TrainConfig`; ``notes`` say where it deviates from the code of its source."""

    title: str = ""
    notes: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def recipe_files() -> dict[str, Path]:
    """Return recipe name -> file."""
    return {path.stem: path for path in sorted(resource_folder("recipes").glob("*.toml"))}


def load_recipe(name: str) -> Recipe:
    """Return the recipe called ``name``; raise `UsageError` with the nearest name if there is none."""
    files = recipe_files()
    if name not in files:
        raise unknown("recipe", name, files)
    tree = tomllib.loads(files[name].read_text(encoding="utf-8"))
    return Recipe(tree.pop("title"), tree.pop("notes").strip(), tree)


def describe_recipes() -> dict[str, str]:
    """Return recipe name -> title."""
    return {name: load_recipe(name).title for name in recipe_files()}
