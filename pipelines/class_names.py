"""Names of the classes of a segmentation, from files that people have."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sami_cache.data.class_masks import MaskedPictures
from sami_cache.errors import SamiCacheError, one_line
from sami_cache.steps import prepared

_LAYOUT = "a name a line, or JSON or YAML with names by index or a list of names, alone or under `classes` or `names`"


def read_class_names(path: Path, first: int = 0) -> dict[int, str]:
    """Names by index. A name a line, or a list: the first one is that of index `first`.

    JSON and YAML (.json, .yaml, .yml) may name them by index. Raises SamiCacheError, with what was expected, for anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SamiCacheError(f"--classes {path}: cannot be read ({one_line(error, 120)}): expected {_LAYOUT}") from error
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        return _listed([line.strip() for line in text.splitlines() if line.strip()], first)
    content = _parse(path, text)
    if isinstance(content, Mapping):
        content = next((content[key] for key in ("classes", "names") if key in content), content)
    if isinstance(content, list):
        return _listed(content, first)
    if not isinstance(content, Mapping):
        raise SamiCacheError(f"--classes {path}: found {one_line(content, 40)!r}: expected {_LAYOUT}")
    try:
        return {int(index): one_line(name) for index, name in content.items()}
    except (TypeError, ValueError) as error:
        raise SamiCacheError(f"--classes {path}: an index is no number ({one_line(error, 80)}): expected {_LAYOUT}") from error


def find_class_names(pictures: MaskedPictures, threads: int | None) -> dict[int, str]:
    """All indices that occur in the masks, each its own name."""
    found: set[int] = set()
    jobs = ((number,) for number in range(len(pictures)))
    for indices in prepared(lambda number: np.unique(pictures.mask(number)).tolist(), jobs, threads=threads):
        found.update(indices)
    return {index: str(index) for index in sorted(found)}


def _listed(names: list[Any], first: int) -> dict[int, str]:
    return {index: one_line(name) for index, name in enumerate(names, first)}


def _parse(path: Path, text: str) -> Any:
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise SamiCacheError(f"--classes {path}: not JSON ({one_line(error, 120)}): expected {_LAYOUT}") from error
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SamiCacheError(f"--classes {path}: not YAML ({one_line(error, 120)}): expected {_LAYOUT}") from error
