"""What a generator is told, as fields with our words, which a file of the user's can replace."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Self

from headwater.core.recipe import RecipeError, Spec
from headwater.modalities.text.docs import CorpusError

__all__ = ["Wording"]


class Wording(Spec):
    """Messages to a generator; subclasses say which, and check that each holds its places."""

    @classmethod
    def read(cls, path: Path | None) -> Self:
        """The wording of a TOML file with some of the fields; our own where there is no file.

        Raises:
            CorpusError: no such file, not TOML, an unknown field, or a place that is missing.
        """
        if path is None:
            return cls()
        try:
            return cls(**tomllib.loads(path.expanduser().read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecipeError) as error:
            raise CorpusError(f"prompts: {path} cannot be used: {error}") from error
