"""Where a text comes from, put before it: what of a URL is shown, as which tokens, and which of them are targets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from headwater.core.rng import derive_seed, hash_uniform
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import text_digest
from headwater.modalities.text.examples import NOTHING, Example, encoded, example_pieces, start_token_id
from headwater.modalities.text.prepared import tokenizer_fingerprint

__all__ = ["TEMPLATE", "MetadataFormatter", "Missing", "Transform", "condition", "transform_url"]

Transform = Literal["domain", "full", "suffix", "hash", "identity"]
Missing = Literal["error", "plain", "unknown"]
TEMPLATE = "URL: {value}\n\n"  # section 2
UNKNOWN = "unknown"


def transform_url(value: str, kind: Transform = "domain") -> str:
    """What of a URL goes before the document.

    Args:
        value: a URL, with or without scheme.
        kind: ``domain``: the host in lower case, without port, ``www.`` kept; ``suffix``: its last label; ``hash``: 16
            hexadecimal digits that stand for the host; ``full``: the URL without surrounding space; ``identity``: as
            it is, for what is no URL.

    Raises:
        ValueError: there is no host in it.

    Example:
        >>> transform_url("https://en.wikipedia.org/wiki/Pisa")
        'en.wikipedia.org'
        >>> transform_url("en.wikipedia.org:443/wiki", "suffix")
        'org'
    """
    if kind == "identity":
        return value
    url = value.strip()
    if kind == "full" and url:
        return url
    host = urlsplit(url if "://" in url else f"//{url.removeprefix('//')}").hostname
    if not host:
        raise ValueError(f"there is no host in {value!r}; use transform 'identity' for what is no URL.")
    if kind == "suffix":
        return host.rpartition(".")[2]
    if kind == "hash":
        return hashlib.blake2b(host.encode(), digest_size=8).hexdigest()
    return host


def condition(prompt: str, value: str, template: str = TEMPLATE) -> str:
    r"""Put a source, real or invented, before a prompt, as the model saw it in training.

    Example:
        >>> condition("The Leaning Tower", "en.wikipedia.org")
        'URL: en.wikipedia.org\n\nThe Leaning Tower'
    """
    return template.replace("{value}", value) + prompt


class MetadataFormatter:
    """The document with its source before it; the loss is on the document and EOS.

    Args:
        tokenizer: the model's.
        field: where ``Document.meta`` holds the source.
        template: holds ``{value}`` once; empty: nothing goes before the document.
        transform: see ``transform_url``.
        missing: a document without the field is an error, goes without source, or has the source ``unknown``.
        mask_metadata: False: the loss is on the source too.
        dropout: share of the documents that go without their source, always the same ones; in [0, 1].
        max_tokens: the value is cut so that source and template take no more.
        seed: of ``dropout``.

    Raises:
        ValueError: the template has no place for the value, or takes ``max_tokens`` alone; no EOS.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        field: str = "url",
        template: str = TEMPLATE,
        transform: Transform = "domain",
        *,
        missing: Missing = "error",
        mask_metadata: bool = True,
        dropout: float = 0.0,
        max_tokens: int = 256,
        seed: int = 0,
    ) -> None:
        if template and template.count("{value}") != 1:
            raise ValueError(f"template must hold {{value}} once, or be empty; got {template!r}.")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be in [0, 1]; got {dropout}.")
        self.tokenizer, self.field, self.template, self.transform = tokenizer, field, template, transform
        self.missing, self.mask_metadata, self.dropout, self.seed = missing, mask_metadata, dropout, seed
        self.max_tokens, self.start = max_tokens, start_token_id(tokenizer)
        self.eos_token_id: int = tokenizer.eos_token_id
        self._heads: dict[str, list[int]] = {}
        if len(self._ids(template.replace("{value}", ""))) >= max_tokens:
            raise ValueError(f"template {template!r} alone takes {max_tokens} tokens, all that metadata may have.")

    @property
    def reads(self) -> tuple[str, ...]:
        """The field."""
        return (self.field,)

    @property
    def about(self) -> Mapping[str, Any]:  # Any: JSON data
        """Everything but the documents that decides the examples."""
        names = ("field", "template", "transform", "missing", "mask_metadata", "dropout", "max_tokens", "seed", "start")
        settings = {name: getattr(self, name) for name in names}
        return {"format": "metadata", **settings, "tokenizer": tokenizer_fingerprint(self.tokenizer)}

    def __call__(self, documents: Sequence[Document], room: int | None = None) -> list[list[Example]]:
        """Format documents; see ``examples.Formatter``.

        Raises:
            CorpusError: a document has no such field, or not a text.
        """
        dropped = self._dropped(documents)
        return [
            example_pieces(
                NOTHING if gone else self._head(document), ids, room=room, start=self.start, eos=self.eos_token_id
            )
            for document, ids, gone in zip(documents, encoded(documents, self.tokenizer), dropped, strict=True)
        ]

    def value(self, document: Document) -> str | None:
        """What the document's source is called; None where it goes without.

        Raises:
            CorpusError: it has no such field, or one that is not a text.
        """
        raw = document.meta.get(self.field)
        if self.lacks(document):
            if self.missing == "error":
                raise CorpusError(
                    f"document {document.id!r} has no {self.field!r}; set missing to 'plain' or 'unknown' to go on"
                )
            return UNKNOWN if self.missing == "unknown" else None
        if not isinstance(raw, (str, int)):
            raise CorpusError(
                f"document {document.id!r}: {self.field!r} holds a {type(raw).__name__}; a source is a text"
            )
        try:
            return transform_url(str(raw), self.transform)
        except ValueError as error:
            raise CorpusError(f"document {document.id!r}: {error}") from None

    def head(self, value: str) -> list[int]:
        """The tokens of template and value; a value that is too long loses its end."""
        found = self._heads.get(value)
        if found is None:
            found = self._ids(condition("", value, self.template))
            if len(found) > self.max_tokens:
                before, after = (self._ids(text) for text in self.template.split("{value}"))
                room = max(0, self.max_tokens - len(before) - len(after))
                found = [*before, *self._ids(value)[:room], *after]
            self._heads[value] = found
        return found

    def is_cut(self, value: str) -> bool:
        """Whether ``head`` cuts the value."""
        return len(self._ids(condition("", value, self.template))) > self.max_tokens

    def lacks(self, document: Document) -> bool:
        """Whether the document has no such field, or nothing in it."""
        raw = document.meta.get(self.field)
        return raw is None or (isinstance(raw, str) and not raw.strip())

    def _head(self, document: Document) -> Example:
        value = self.value(document) if self.template else None
        if value is None:
            return NOTHING
        ids = np.array(self.head(value), dtype=np.int32)
        return Example(ids, np.full(len(ids), not self.mask_metadata))

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _dropped(self, documents: Sequence[Document]) -> NDArray[np.bool_]:
        keys = [int.from_bytes(text_digest(document.id)[:8], "little", signed=True) for document in documents]
        draws = hash_uniform(derive_seed(self.seed, "metadata dropout"), keys, 1)[:, 0]
        return draws < self.dropout
