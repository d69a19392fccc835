"""What ``python -m research.architecture`` counts, and what this version may not have."""

from __future__ import annotations

from pathlib import Path

import pytest

import release
from research import architecture


@pytest.fixture(scope="module")
def now() -> architecture.Architecture:
    return architecture.count(architecture.SOURCE, frames=False)


def test_no_name_is_defined_twice_but_verbs(now: architecture.Architecture) -> None:
    assert now.named_twice == {}


def test_no_two_files_have_the_same_name(now: architecture.Architecture) -> None:
    assert now.files_named_twice == {}


def test_what_goes_with_what_is_said_in_one_table(now: architecture.Architecture) -> None:
    assert set(now.places_of_exclusions) == set(architecture.SAID_BY_HAND)


def test_data_has_a_type(now: architecture.Architecture) -> None:
    assert now.loose < 30


ONE = '''
def one(x, *, y):
    """Doc: leave one of them out."""
    raise ValueError(f"{x} doesn't go with {y}; leave {y} out.")


class Twice:
    pass
'''

OTHER = """
from typing import Any
x: dict[str, Any] = {}

class Twice:
    def long(self):
        return 1
"""

NOUN = """
def _refuse():
    pass

def _noun():
    pass
"""

FILES = {"__init__.py": "", "a.py": ONE, "b/a.py": OTHER, "b/c.py": NOUN, "d.py": NOUN, "reproduce/e.py": ONE}


def test_each_figure_is_that_of_the_files(tmp_path: Path) -> None:
    for name, text in FILES.items():
        path = tmp_path / "localgrad" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = architecture.count(tmp_path, frames=False)
    assert found.lines == {"__init__.py": 0, "a.py": 5, "b/a.py": 5, "b/c.py": 4, "d.py": 4}
    assert found.all_lines == sum(len(FILES[name].splitlines()) for name in found.lines)
    assert found.named_twice == {"Twice": ["a.py", "b/a.py"], "_noun": ["b/c.py", "d.py"]}
    assert found.files_named_twice == {"a.py": ["a.py", "b/a.py"]}
    assert (found.loose, found.longest.name, found.longest.lines) == (1, "one", 3)
    assert [each.num_parameters for each in found.functions if each.name in ("one", "Twice.long")] == [2, 1]
    assert found.places_of_exclusions == ["a.py: one"], "a docstring is no error"
    assert found.figures()["names defined twice"] == "2\nTwice\n_noun"
    with pytest.raises(FileNotFoundError, match="give the folder src"):
        architecture.count(tmp_path / "localgrad")


@pytest.mark.heavy
def test_frames_lead_from_the_verb_to_the_objective() -> None:
    frames = architecture.count_frames(architecture.SOURCE)
    assert frames[0] == "cli.py train"
    assert frames[-1] == "the objective forward"
    assert "local_module.py forward" in frames


def test_every_extra_is_used_by_the_release_check() -> None:
    assert release.BY_EXTRA.keys() == {"", *release.EXTRAS}
