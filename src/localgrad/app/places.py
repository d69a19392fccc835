"""Where a run's files lay: the absolute paths of what its recipe names by relative ones.

Recipes have paths as people typed them, so that they stay portable. A run keeps beside its recipe where those were, in
a file of its own; so it goes on, and is evaluated, from another working directory. What is where the recipe says, from
where one is now, is taken first: a project that was moved as a whole takes its own data along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from localgrad.app.recipe import Recipe, flat, overlay
from localgrad.errors import DataError, RecipeError, RunFolderError
from localgrad.rules import NAMED_DATA
from localgrad.training.folder import RunFolder, is_sound, read_text, say
from localgrad.training.loading import DEFAULT_ROOT, existing_path
from localgrad.training.saved import RUN_FORMAT

Places = Mapping[str, str]
"""Absolute paths, by dotted key of a recipe."""

_FILE = "places.json"
_ROOT, _REFERENCE = "data.root", "execution.health_reference"
_IMAGES = ("data.name", "data.train_data", "data.val_data", "data.test_data")


def found_places(recipe: Recipe) -> Places:
    """Where what a recipe names by relative paths is, as far as it is there from the working directory."""
    return {key: str(path.absolute()) for key, path in _relative(recipe).items() if path.exists()}


def _relative(recipe: Recipe) -> dict[str, Path]:
    """The relative paths of a recipe: as they are found, or else as they stand there."""
    values, data = flat(recipe.to_dict()), recipe.method.data
    root = None if data.root is None else Path(data.root)
    paths = {_REFERENCE: values.get(_REFERENCE)}
    if data.name in NAMED_DATA:
        paths[_ROOT] = data.root or (None if data.name == "digits" else str(DEFAULT_ROOT))  # those come with a library
    else:
        named = {key: values.get(key) for key in _IMAGES}
        paths |= {key: str(existing_path(name, root) or name) for key, name in named.items() if name}
        paths[_ROOT] = data.root
    found = {key: Path(text).expanduser() for key, text in paths.items() if text}
    return {key: path for key, path in found.items() if not path.is_absolute()}


def located(recipe: Recipe, places: Places) -> Recipe:
    """A recipe that names by its absolute path what isn't there by the relative one."""
    here = found_places(recipe)
    moved = {key: place for key, place in places.items() if key not in here and Path(place).exists()}
    return Recipe.from_dict(overlay(recipe.to_dict(), moved)) if moved else recipe


def with_paths_of(recipe: Recipe, typed: Recipe) -> Recipe:
    """A recipe with paths as they are in another one."""
    values = flat(typed.to_dict())
    return Recipe.from_dict(overlay(recipe.to_dict(), {key: values.get(key) for key in (*_IMAGES, _ROOT, _REFERENCE)}))


def are_elsewhere(recipe: Recipe, places: Places) -> bool:
    """Whether images are found by a relative path in another place than where they were."""
    here = found_places(recipe)
    known = here.keys() & places.keys() - {_REFERENCE}
    return any(os.path.realpath(here[key]) != os.path.realpath(places[key]) for key in known)


@contextmanager
def telling_places(recipe: Recipe, places: Places, kind: type[DataError | RecipeError]) -> Iterator[None]:
    """A region whose errors about images, or about the reference, name the places where they were and aren't now."""
    try:
        yield
    except kind as error:
        prefix = "data." if isinstance(error, DataError) else "execution."
        taken = {**flat(located(recipe, places).to_dict()), **found_places(recipe)}
        others = [place for key, place in places.items() if key.startswith(prefix) and taken.get(key) != place]
        if not others:
            raise
        raise type(error)(f"{error} When the run was made, it was {', '.join(dict.fromkeys(others))}.") from error


def read_places(path: Path, own: Recipe, recipe: Recipe) -> Places:
    """What a run folder keeps, of those paths that a recipe has as the run's own has them; older runs keep nothing."""
    if not (path / _FILE).exists() and is_sound(path, _FILE) is None:
        return {}
    try:
        values = json.loads(read_text(path, _FILE))["paths"]
        kept = {str(key): str(place) for key, place in values.items() if key in (*_IMAGES, _ROOT, _REFERENCE)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RunFolderError):
        say(f"{path / _FILE}: missing or damaged; relative paths are looked for from here alone.")
        return {}
    before, after = flat(own.to_dict()), flat(recipe.to_dict())
    return {key: place for key, place in kept.items() if before.get(key) == after.get(key)}


def write_places(folder: RunFolder, recipe: Recipe, known: Places) -> None:
    """Keep where a recipe's files are: as they are found now, or else as they are known to have been."""
    places = {**known, **found_places(recipe)}
    if places or (folder.path / _FILE).exists():
        folder.write_json(_FILE, {"format": RUN_FORMAT, "paths": places})
