"""In which order to learn domains: what each one is about, as a vector, and chains through them by cosine.

Source: Yıldız et al., "Investigating Continual Pretraining in Large Language Models: Insights and Implications",
arXiv:2402.17400, where chains run through mean sentence embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.core.cache import cache_key
from headwater.core.recipe import ModelRef
from headwater.core.rng import numpy_generator
from headwater.modalities.features import cached_features
from headwater.modalities.models import load_encoder, load_tokenizer, model_directory, parameter_fingerprint
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.prepared import tokenizer_fingerprint

__all__ = ["Encoder", "How", "check_order", "domain_embeddings", "order_domains", "unit"]

Floats = NDArray[np.float64]
Encoder = Literal["auto", "tfidf"] | ModelRef
How = Literal["similar", "dissimilar", "random"]

EMBEDDED_TOKENS = 128
COMPONENTS = 64


def order_domains(
    embeddings: Mapping[str, ArrayLike],
    start: ArrayLike | None = None,
    how: How | Sequence[str] = "similar",
    *,
    seed: int = 0,
) -> list[str]:
    """Put domains into the order in which they are learned.

    Args:
        embeddings: name -> vector, ``(features,)``, none of them zero; of equal cosines the earlier name wins.
        start: where a chain begins, ``(features,)``, such as the general corpus; None: the mean of all unit vectors.
        how: ``similar``: first the nearest to the start, then always the nearest to the one before. ``dissimilar``:
            the same beginning, then always the farthest. ``random``: by ``seed``. Or the names in their order.
        seed: of ``random``.

    Raises:
        ValueError: no domain, a zero vector, or names that are not those of the embeddings, each once.

    Example:
        >>> order_domains({"a": [1, 0], "b": [0, 1], "c": [1, 1]}, start=[1, 0.1])
        ['a', 'c', 'b']
    """
    names = list(embeddings)
    if not isinstance(how, str):
        check_order(how, names)
        return list(how)
    if how == "random":
        return [names[i] for i in numpy_generator(seed, "domain order").permutation(len(names))]
    units = {name: unit(vector, f"the embedding of {name!r}") for name, vector in embeddings.items()}
    at = np.mean(list(units.values()), axis=0) if start is None else np.asarray(start, dtype=np.float64)
    current, chain, sign = unit(at, "the start"), list[str](), 1.0
    while len(chain) < len(names):
        left = [name for name in names if name not in chain]
        chain.append(max(left, key=lambda name: sign * round(float(units[name] @ current), 12)))
        current, sign = units[chain[-1]], 1.0 if how == "similar" else -1.0
    return chain


def check_order(order: Sequence[str], names: Sequence[str]) -> None:
    """Refuse an order that is not the names, each once.

    Raises:
        ValueError: says which are missing, unknown or named twice.
    """
    missing = [name for name in names if name not in order]
    unknown = [name for name in order if name not in names]
    twice = sorted({name for name in order if list(order).count(name) > 1})
    for found, word in ((missing, "leaves out"), (unknown, "names the unknown"), (twice, "names twice")):
        if found:
            raise ValueError(f"order {word} {', '.join(found)}; give each of {', '.join(names)} once.")


def unit(vector: ArrayLike, what: str) -> Floats:
    """A vector at length 1.

    Raises:
        ValueError: it is zero; ``what`` is said to be.
    """
    array = np.asarray(vector, dtype=np.float64)
    norm = float(np.linalg.norm(array))
    if not norm > 0:
        raise ValueError(f"{what} is zero and has no direction; leave it out, or give more text.")
    scaled: Floats = array / norm
    return scaled


def domain_embeddings(texts: Mapping[str, Sequence[str]], encoder: Encoder = "auto") -> tuple[dict[str, Floats], str]:
    """A vector for each set of texts: the mean of the unit vectors of its texts.

    Args:
        texts: name -> texts; blank ones are left out.
        encoder: a sentence encoder; ``tfidf``: TF-IDF of words, reduced to 64 components fitted on all the texts given;
            ``auto``: MiniLM where the package that brings it is installed, else ``tfidf``.

    Returns:
        ``(features,)`` by name, and what made them.

    Raises:
        CorpusError: a set without a text that is not blank.
        ModelError: the encoder cannot be opened.
    """
    kept = {name: [text for text in own if text.strip()] for name, own in texts.items()}
    if empty := [name for name, own in kept.items() if not own]:
        raise CorpusError(f"there is no text to embed in {empty[0]!r}")
    flat = [text for own in kept.values() for text in own]
    chosen = _chosen(encoder)
    if isinstance(chosen, ModelRef):
        model, tokenizer = load_encoder(chosen), load_tokenizer(chosen)
        key = cache_key([parameter_fingerprint(model), tokenizer_fingerprint(tokenizer), EMBEDDED_TOKENS, flat])
        options: dict[str, Any] = {"processor": tokenizer, "modality": "text", "max_length": EMBEDDED_TOKENS}
        store, _ = cached_features(key, model, flat, **options)
        vectors, made_by = np.asarray(store.X, dtype=np.float64), chosen.name
    else:
        vectors, made_by = _tfidf(flat), f"TF-IDF, {COMPONENTS} components"
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    ends = np.cumsum([len(own) for own in kept.values()])[:-1]
    return {name: part.mean(axis=0) for name, part in zip(kept, np.split(vectors, ends), strict=True)}, made_by


def _chosen(encoder: Encoder) -> ModelRef | Literal["tfidf"]:
    if encoder != "auto":
        return encoder
    minilm = ModelRef(name="headwater:minilm")
    try:
        model_directory(minilm)
    except ImportError:
        return "tfidf"
    return minilm


def _tfidf(texts: Sequence[str]) -> Floats:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+").fit_transform(texts)
    components = max(1, min(COMPONENTS, counts.shape[1] - 1, len(texts) - 1))
    vectors: Floats = TruncatedSVD(components, random_state=0).fit_transform(counts)
    return vectors
