"""Small language models that are trained here, once per machine: the starting points of the demo and of claims.

A base is a directory that transformers opens, in the user cache under a hash of its settings, its text and the
versions that shaped it. It is trained on the training part of its corpus only, by the same split that the recipes use,
so the general test documents are new to it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import transformers

from headwater.core.budget import Budget
from headwater.core.cache import atomic_write_text, cache_dir, cache_key
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec
from headwater.core.recipe import CorpusRef
from headwater.modalities.text.docstrings import minilm_directory
from headwater.modalities.text.document_store import DocumentStore, stored_corpus
from headwater.modalities.text.objectives import CausalObjective, TokenObjective
from headwater.modalities.text.packing import MaskedStream, PackedStream, tokenize_documents
from headwater.modalities.text.prepared import drop_repeats, split_corpus, split_shares
from headwater.modalities.text.tiny import tiny_bert, tiny_llama
from headwater.modalities.text.tokenizers import train_bpe

__all__ = ["BASES", "Base", "builtin_model", "trained_base"]

HELD_OUT = 0.1
FORMAT = 1


@dataclass(frozen=True)
class Base:
    """How a small model is made.

    Attributes:
        corpus: what it reads.
        kind: ``causal`` (Llama) or ``masked`` (BERT).
        hidden, layers, heads, mlp: its shape.
        vocab: tokens of its byte-level BPE, trained on the same text.
        context: tokens it sees at once.
        rows: blocks per step.
        steps: optimizer steps.
        lr: peak learning rate.
        seed: of weights and order.
    """

    corpus: str = "headwater:general"
    kind: Literal["causal", "masked"] = "causal"
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    mlp: int = 344
    vocab: int = 2048
    context: int = 128
    rows: int = 32
    steps: int = 170
    lr: float = 3e-3
    seed: int = 0


BASES = {
    "smoke-base": Base(hidden=32, layers=1, heads=2, mlp=64, vocab=512, context=64, rows=8, steps=10),
    "demo-base": Base(),
    "small-base": Base(hidden=96, layers=2, mlp=256, vocab=1024, rows=16, steps=160, lr=5e-3),
    "small-masked": Base(kind="masked", hidden=96, layers=2, mlp=384, vocab=1024, rows=16, steps=160, lr=3e-3),
}


def builtin_model(name: str) -> Path:
    """Directory of a builtin model: ``minilm``, or one of ``BASES``, trained now if it is not in the cache.

    Raises:
        ValueError: there is no such builtin.
        ImportError: the package that brings ``minilm`` is not installed.
    """
    if name == "minilm":
        return minilm_directory()
    if name not in BASES:
        raise ValueError(f"no builtin model {name!r}; there are {', '.join(sorted((*BASES, 'minilm')))}")
    return _in_this_process(BASES[name])


@cache
def _in_this_process(base: Base) -> Path:
    # Finding a base means reading its corpus, which takes a second; a process asks several times.
    return trained_base(base)


def trained_base(base: Base, *, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Directory of a base, trained now if it is not in the cache; a second process waits for the first.

    Args:
        base: its settings.
        progress: is told when training begins.
    """
    documents = _training_documents(base)
    about = {
        **asdict(base),
        "documents": documents.fingerprint,
        "versions": [torch.__version__, transformers.__version__],
        "format": FORMAT,
    }
    key = cache_key(about)
    target = cache_dir("models") / key
    with _locked(cache_dir("models") / f"{key}.lock"):
        if not (target / "base.json").exists():
            progress(
                f"training a base model of {base.layers} layers for {base.steps} steps (once; then it is in the cache)"
            )
            with tempfile.TemporaryDirectory(dir=cache_dir("models"), prefix=f"{key}.") as working:
                finished = _train(base, documents, Path(working))
                atomic_write_text(finished / "base.json", json.dumps(about, indent=2) + "\n")
                if target.exists():
                    shutil.rmtree(target)
                finished.rename(target)
    return target


def _training_documents(base: Base) -> DocumentStore:
    documents = stored_corpus(CorpusRef(name=base.corpus), role="base")
    return drop_repeats({"base": split_corpus(documents, split_shares(HELD_OUT))})[0]["base"].train


def _train(base: Base, documents: DocumentStore, working: Path) -> Path:
    masked = base.kind == "masked"
    tokenizer = train_bpe((d.text for d in documents), base.vocab, extra_tokens=("<mask>",) if masked else ())
    shape = {
        "hidden": base.hidden,
        "layers": base.layers,
        "heads": base.heads,
        "mlp": base.mlp,
        "context": base.context,
    }
    model = (tiny_bert if masked else tiny_llama)(tokenizer, **shape, generator_seed=base.seed)
    stream = PackedStream(tokenize_documents(documents, tokenizer), base.context, base.rows, base.seed)
    phase = (
        Phase("base", model, MaskedStream(stream, tokenizer, seed=base.seed), TokenObjective())
        if masked
        else Phase("base", model, stream, CausalObjective())
    )
    fit(
        phase,
        budget=Budget(steps=base.steps),
        optim=OptimSpec(lr=base.lr),
        seed=base.seed,
        directory=working / "run",
        settings=FitSettings(precision="fp32"),  # the same weights whichever precision would be faster here
    )
    finished = working / "model"
    model.save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    return finished


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
