"""From a reference in a recipe to documents: builtin corpora, local files, Hub data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from headwater.core.recipe import CorpusRef, DataRef
from headwater.modalities.text.debris import annotated_docstrings
from headwater.modalities.text.docs import CorpusError, Document, read_documents
from headwater.modalities.text.docstrings import GENERAL, docstring_corpus

__all__ = ["open_corpus", "open_grouped", "open_labelled"]

GENERAL_CHARS = 3_000_000


def open_corpus(ref: CorpusRef, *, role: str) -> Iterator[Document]:
    """Read the documents that ``ref`` names, lazily.

    Builtins: ``headwater:general`` (3 million characters of docstrings of numpy, pandas, scikit-learn, scipy and the
    standard library), ``headwater:PACKAGE`` (docstrings of any installed package, e.g. ``headwater:networkx``),
    ``headwater:debris`` (300 docstrings with planted web debris and, in the column ``program``, what removes it).

    Args:
        ref: the corpus.
        role: what to call it in errors, e.g. ``domain``.

    Raises:
        CorpusError: nothing there; see ``read_documents``.
    """
    if ref.kind != "builtin":
        yield from read_documents(
            str(ref.path) if ref.kind == "local" else ref.name,
            text_field=ref.text_field,
            config=ref.config,
            split=ref.split,
            limit_documents=ref.limit_documents,
            limit_chars=ref.limit_chars,
            role=role,
        )
        return
    name = ref.name.removeprefix("headwater:")
    if name == "debris":
        yield from annotated_docstrings()[: ref.limit_documents]
        return
    packages, limit = (GENERAL, ref.limit_chars or GENERAL_CHARS) if name == "general" else ((name,), ref.limit_chars)
    try:
        yield from docstring_corpus(packages, limit_chars=limit)[: ref.limit_documents]
    except CorpusError as error:
        raise CorpusError(f"{role}: {error}") from None


def open_labelled(ref: DataRef, *, role: str) -> tuple[list[str], list[str]]:
    """Texts and their labels.

    Builtin: ``headwater:networkx-subpackages``, docstrings of networkx labelled by the module they come from (the
    ten largest, two levels deep); ``headwater:PACKAGE-subpackages`` likewise.

    Raises:
        CorpusError: nothing there, or no such column.
    """
    if ref.kind == "builtin":
        package, dash, what = ref.name.removeprefix("headwater:").partition("-")
        if not dash or what != "subpackages":
            raise CorpusError(f"{role}: no builtin task {ref.name!r}; there is 'headwater:PACKAGE-subpackages'")
        # Two levels below the package, since most packages keep nearly everything in one sub-package.
        found = [(d.text, ".".join(d.meta["module"].split(".")[1:3])) for d in docstring_corpus((package,))]
        largest = {label for label, _ in Counter(label for _, label in found).most_common(10)}
        texts, labels = [t for t, label in found if label in largest], [label for _, label in found if label in largest]
        return texts[: ref.limit], labels[: ref.limit]
    texts, (labels,) = _columns(ref, (ref.label_field,), role)
    return texts, labels


def open_grouped(ref: DataRef, group_field: str, *, role: str) -> tuple[list[str], list[str], list[str]]:
    """Texts, their labels, and what another column says of each, such as where a text comes from.

    Raises:
        CorpusError: nothing there, no such column, or a builtin, which has no columns.
    """
    if ref.kind == "builtin":
        raise CorpusError(f"{role}: {ref.name!r} has no column {group_field!r}; name a file or a Hub data set")
    texts, (labels, groups) = _columns(ref, (ref.label_field, group_field), role)
    return texts, labels, groups


def _columns(ref: DataRef, fields: tuple[str, ...], role: str) -> tuple[list[str], list[list[str]]]:
    source = str(ref.path) if ref.kind == "local" else ref.name
    texts: list[str] = []
    columns: list[list[str]] = [[] for _ in fields]
    documents = read_documents(
        source, text_field=ref.input_field, config=ref.config, split=ref.split, limit_documents=ref.limit, role=role
    )
    for document in documents:
        for field, column in zip(fields, columns, strict=True):
            if field not in document.meta:
                raise CorpusError(f"{role}: no column {field!r}; available: {', '.join(document.meta)}")
            column.append(str(document.meta[field]))
        texts.append(document.text)
    return texts, columns
