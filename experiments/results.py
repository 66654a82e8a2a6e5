"""Results as JSON, written after every variant so that a long run can go on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


class Results:
    """The variants measured so far under one set of settings.

    Args:
      path: the JSON file.
      settings: what the figures depend on; a file of other settings is not gone on with.
      resume: keep what the file has.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool):
        self.path, self.settings = path, dict(settings)
        self.variants: list[dict[str, Any]] = []
        if resume and path.exists():
            self._load()

    def has(self, name: str) -> bool:
        return any(variant["name"] == name for variant in self.variants)

    def add(self, variant: Mapping[str, Any]) -> None:
        self.variants.append(dict(variant))
        self.write()

    def write(self, **more: Any) -> None:
        write_json(self.path, {**self.settings, "variants": self.variants, **more})

    def _load(self) -> None:
        try:
            saved = json.loads(self.path.read_text())
            variants = list(saved["variants"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`resume`: {self.path} is no results file ({error}); delete it or pass --noresume"
            ) from None
        if any(saved.get(key) != value for key, value in self.settings.items()):
            raise ValueError(
                f"`resume`: {self.path} was made with other settings; choose another --out or pass --noresume"
            )
        self.variants = variants
