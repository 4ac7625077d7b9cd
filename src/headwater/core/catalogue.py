"""The catalogue: one entry per method, read without importing any method.

Headwater's own entries are in ``catalogue.toml``. Another package adds its methods by an entry point in the
group ``headwater.catalogue`` whose value names a package that ships a ``catalogue.toml`` of the same form.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from headwater.core.recipe import Recipe

__all__ = ["Catalogue", "CatalogueError", "Entry", "Evidence"]

STAGES = ("corpora", "pretrain", "efficient", "domain", "adapt", "continual", "align", "compose", "diagnose")
_GROUP = "headwater.catalogue"  # of entry points
CostClass = Literal["closed form", "minutes", "hours", "days"]
Kind = Literal["method", "reference"]


class CatalogueError(ValueError):
    """An entry that is malformed, or an id that no entry has."""


@dataclass(frozen=True)
class Entry:
    """One method of the catalogue.

    Attributes:
        id: what the user types; unique.
        number: place in the founding list; 0 for references and methods of other packages.
        stage: where in a model's life it belongs.
        title: the paper's title.
        short: the name people use.
        year: of publication.
        authors: as the paper lists them; "et al." allowed.
        arxiv: arXiv id, or "".
        doi: DOI, or "".
        summary: what it does and when to reach for it, one or two sentences.
        modality: kinds of data it works on.
        needs: what the user must have.
        gives: what it leaves behind.
        cost: order of magnitude at the scale users run it.
        module: import path of the method file.
        recipe: name of the recipe class in it.
        kind: ``method``, or ``reference`` for the baselines every comparison holds.
    """

    id: str
    stage: str
    title: str
    short: str
    summary: str
    modality: tuple[str, ...]
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    cost: CostClass
    module: str
    recipe: str
    number: int = 0
    year: int = 0
    authors: tuple[str, ...] = ()
    arxiv: str = ""
    doi: str = ""
    kind: Kind = "method"

    def recipe_class(self) -> type[Recipe]:
        """Import the method and return its recipe class."""
        cls: type[Recipe] = getattr(importlib.import_module(self.module), self.recipe)
        return cls

    @property
    def claim_module(self) -> str:
        """Import path of the claim: ``<package>.claims.<id>``."""
        return f"{self.module.split('.')[0]}.claims.{self.id}"

    @cached_property
    def source(self) -> Path:
        """The method file, found without importing it."""
        return _module_path(self.module)

    @cached_property
    def docstring(self) -> str:
        """The method file's docstring: its equation, source and differences."""
        return ast.get_docstring(ast.parse(self.source.read_text(encoding="utf-8"))) or ""

    def code_hash(self) -> str:
        """Hash of the method file and its claim file; a verdict under another hash is stale."""
        import hashlib

        digest = hashlib.sha256(self.source.read_bytes())
        claim = _module_path(self.claim_module)
        if claim.exists():
            digest.update(claim.read_bytes())
        return digest.hexdigest()[:16]

    def evidence(self) -> list[Evidence]:
        """Published verdicts of this method's claim, smallest scale first."""
        import json

        order = {"smoke": 0, "small": 1, "full": 2}
        found = []
        for directory in _evidence_directories():
            for path in directory.glob(f"{self.id}.*.json"):
                data = json.loads(path.read_text(encoding="utf-8"))
                found.append(Evidence(data["scale"], data["verdict"], data, data["code_hash"] != self.code_hash()))
            if found:
                break
        return sorted(found, key=lambda evidence: order.get(evidence.scale, 9))

    def bibtex(self) -> str:
        """A BibTeX entry of the paper."""
        first = re.sub(r"\W", "", self.authors[0].split()[-1].lower()) if self.authors else "anonymous"
        lines = [
            f"@misc{{{first}{self.year}{self.id.replace('_', '')},",
            f"  title = {{{self.title}}},",
            f"  author = {{{' and '.join(self.authors)}}},",
            f"  year = {{{self.year}}},",
        ]
        if self.arxiv:
            lines += [f"  eprint = {{{self.arxiv}}},", "  archivePrefix = {arXiv},"]
        if self.doi:
            lines.append(f"  doi = {{{self.doi}}},")
        return "\n".join([*lines, "}"])

    def to_dict(self) -> dict[str, Any]:  # Any: JSON data
        """Plain JSON data, with the claim's status."""
        status = [{"scale": e.scale, "verdict": e.verdict, "stale": e.stale} for e in self.evidence()]
        return {**asdict(self), "claim": status}


@dataclass(frozen=True)
class Evidence:
    """A published verdict: ``evidence/<id>.<scale>.json``.

    Attributes:
        scale: ``smoke``, ``small`` or ``full``.
        verdict: ``holds``, ``does not hold`` or ``inconclusive``.
        data: the whole verdict.
        stale: the method or its claim changed since.
    """

    scale: str
    verdict: str
    data: dict[str, Any]  # Any: JSON data
    stale: bool


class Catalogue(Mapping[str, Entry]):
    """All entries by id, in the order of stages and numbers."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        order = sorted(entries.values(), key=lambda e: (STAGES.index(e.stage), e.kind == "method", e.number, e.id))
        self._entries = {entry.id: entry for entry in order}

    @classmethod
    @cache
    def load(cls) -> Catalogue:
        """Headwater's entries and those of every installed package that adds some.

        Raises:
            CatalogueError: a malformed entry, or an id that two packages claim.
        """
        # Imported here because `headwater --help`, which imports this module, needs neither and would wait for both.
        import tomllib
        from importlib import resources

        entries: dict[str, Entry] = {}
        for package in ("headwater", *_other_packages()):
            text = resources.files(package).joinpath("catalogue.toml").read_text(encoding="utf-8")
            for id, data in tomllib.loads(text).items():
                if id in entries:
                    raise CatalogueError(f"{package}: method id {id!r} is taken by {entries[id].module}")
                entries[id] = parse_entry(id, data)
        return cls(entries)

    def __getitem__(self, id: str) -> Entry:
        if id not in self._entries:
            close = difflib.get_close_matches(id, self._entries, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else " `headwater methods` lists them."
            raise CatalogueError(f"no method {id!r}.{hint}")
        return self._entries[id]

    def __contains__(self, id: object) -> bool:
        return id in self._entries

    def __iter__(self) -> Any:  # Any: an iterator of str
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def recipe_class(self, id: str) -> type[Recipe]:
        """Import and return the recipe class of a method."""
        return self[id].recipe_class()

    @property
    def methods(self) -> list[Entry]:
        """The entries that are methods of the founding list or of other packages, without the references."""
        return [entry for entry in self.values() if entry.kind == "method"]

    def search(self, words: str) -> list[Entry]:
        """Entries ranked by BM25 over their fields and docstrings; those that match no word are left out."""
        import bm25s

        entries = list(self.values())
        texts = [
            " ".join(
                [e.id, e.short, e.title, e.summary, e.stage, *e.modality, *e.needs, *e.gives, *e.authors, e.docstring]
            )
            for e in entries
        ]
        index = bm25s.BM25()
        corpus, query = [_words(text) for text in texts], _words(words)
        if not query:
            raise CatalogueError(f"nothing to search for in {words!r}; give at least one word")
        index.index(corpus, show_progress=False)
        known = [word for word in query if any(word in document for document in corpus)]
        if not known:
            return []
        ranked, scores = index.retrieve([known], k=len(entries), show_progress=False)
        return [entries[i] for i, score in zip(ranked[0], scores[0], strict=True) if score > 0]


def parse_entry(id: str, data: Mapping[str, Any]) -> Entry:  # Any: TOML data
    """Check one TOML table and build its entry.

    Raises:
        CatalogueError: names the id, the field and what is wrong with it.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", id):
        raise CatalogueError(f"method id {id!r} must be lower-case letters, digits and '_', beginning with a letter")
    known = {field.name: field for field in fields(Entry)} | {}
    unknown = sorted(set(data) - set(known) | ({"id"} & set(data)))
    if unknown:
        raise CatalogueError(f"catalogue entry {id!r}: unknown field {unknown[0]!r}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    try:
        entry = Entry(id=id, **values)
    except TypeError as error:
        raise CatalogueError(f"catalogue entry {id!r}: {error}") from None
    for name, allowed in (("stage", STAGES), ("cost", get_args(CostClass)), ("kind", get_args(Kind))):
        if getattr(entry, name) not in allowed:
            raise CatalogueError(
                f"catalogue entry {id!r}: {name} must be one of {', '.join(allowed)}; got {getattr(entry, name)!r}"
            )
    return entry


def _words(text: str) -> list[str]:
    # Plural and gerund endings cut by hand: a stemmer is one dependency too many for a hundred entries.
    return [re.sub(r"(ing|s)$", "", word) if len(word) > 4 else word for word in re.findall(r"[a-z0-9]+", text.lower())]


def _module_path(module: str) -> Path:
    """Path of a module's file, found from its top package so that no package in between is imported."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise CatalogueError(f"package {top!r} of module {module!r} is not installed")
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*rest).with_suffix(".py")


def _other_packages() -> list[str]:
    """Packages that installed distributions name in our group of entry points."""
    if not _may_be_announced(_GROUP):
        return []
    from importlib import metadata

    return [point.value for point in metadata.entry_points(group=_GROUP)]


def _may_be_announced(group: str) -> bool:
    """Whether a distribution may have entry points in ``group``.

    Told from the files that ``importlib.metadata`` would read, because its import is a quarter of the time of
    `headwater methods`; where it would look elsewhere, in an archive or through a finder, the answer is yes.
    """
    if any(hasattr(finder, "find_distributions") for finder in sys.meta_path if finder is not PathFinder):
        return True
    return any(
        place.is_file()
        or any(group in file.read_text("utf-8") for file in place.glob("*-[iI][nN][fF][oO]/entry_points.txt"))
        for place in map(Path, sys.path)
    )


def _evidence_directories() -> list[Path]:
    # In a wheel the verdicts lie inside the package; in a checkout at its root.
    package = Path(__file__).resolve().parents[1]
    return [path for path in (package / "evidence", package.parents[1] / "evidence") if path.is_dir()]
