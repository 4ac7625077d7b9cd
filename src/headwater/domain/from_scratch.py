"""Pretraining from scratch on the domain alone: a vocabulary of its own, new weights, whole words masked.

    1  V = the start's tokenizer algorithm, trained on domain text, to the start's vocabulary size
    2  theta = the start's architecture over V, with new weights
    3  train theta on domain text only; in a masked model all tokens of a word are masked together

``transplant`` stands between this and going on from the start: the start's weights, and for each token v of V

    E_new[v] = mean of E_old[u] over the pieces u that the old tokenizer makes of v      (v itself where the old has it)

Source: Gu et al., "Domain-Specific Language Model Pretraining for Biomedical Natural Language Processing",
    arXiv:2007.15779, sections 2.2 and 3.2. The transplanted arm is ours.
Differs: the paper's next-sentence prediction is left out; what becomes of a masked word (80 % mask tokens, 10 % random,
    10 % as it was) is drawn once per word, and not per token; causal models are taken as well. The paper's plain
    heads for tasks are those of the stage ``adapt``.
Needs: much domain text (the paper: 21 GB); a model for its architecture; a fast tokenizer.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.cache import cache_dir, cache_key
from headwater.core.fit import Phase, Trained
from headwater.core.rng import derive_seed
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted, ContinuedPretraining
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.prepared import fingerprint_of, held_out_sample, tokenizer_fingerprint
from headwater.modalities.text.whole_words import WholeWordMasker

__all__ = [
    "FromScratch",
    "WholeWordMasker",
    "domain_tokenizer",
    "fresh_like",
    "transplant_embeddings",
    "vocabulary_report",
]

MIN_VOCABULARY_BYTES = 100_000
"""Less text than this gives a vocabulary of its own sentences."""

REPORT_CHARS = 1_000_000
MIN_OCCURRENCES = 3
CHUNK = 1_000


def domain_tokenizer(
    texts: Iterable[str], like: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> PreTrainedTokenizerBase:
    """Train a tokenizer of the same algorithm, normalisation and special tokens on other text.

    Args:
        texts: read once.
        like: a fast tokenizer.
        vocab_size: at most so many tokens, special ones included; as many as ``like`` by default.

    Raises:
        ValueError: a slow tokenizer, a ``vocab_size`` that does not hold its alphabet, or a special token of ``like``
            that the new tokenizer cuts up.
    """
    if not hasattr(like, "train_new_from_iterator"):
        raise ValueError(
            f"{type(like).__name__} is a slow tokenizer, which cannot be trained anew (no train_new_from_iterator); "
            "give a model with a fast one, or vocab: keep."
        )
    size = len(like) if vocab_size is None else vocab_size
    remaining = iter(texts)
    chunks = iter(lambda: list(islice(remaining, CHUNK)), [])
    new: PreTrainedTokenizerBase = like.train_new_from_iterator(chunks, size, show_progress=False)
    if len(new) > size:
        raise ValueError(f"vocab_size {size} is less than the special tokens and single characters alone: {len(new)}.")
    for token in like.all_special_tokens:
        found = new(token, add_special_tokens=False)["input_ids"]
        if found != [new.convert_tokens_to_ids(token)] or token not in new.get_vocab():
            raise ValueError(
                f"the special token {token!r} would not survive: the new tokenizer makes {len(found)} tokens of it. "
                "Declare it as a special token of the old one, or use vocab: keep."
            )
    return new


def fresh_like(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Return the same architecture with new weights, over the vocabulary of ``tokenizer``, in ``eval`` mode.

    Args:
        model: any Hugging Face model; neither read nor changed beyond its configuration.
        tokenizer: gives the vocabulary's size and the special ids.
        seed: of the weights; the global generator is neither read nor moved.
    """
    config = copy.deepcopy(model.config)
    _point_at(config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # models draw their weights from the global generator only
        fresh: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype)
    return fresh.eval()


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(max(tokenizer.get_vocab().values())) + 1


def _point_at(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:  # Any: model or generation configuration
    """Rewrite size and special ids; an id that the configuration leaves open stays open."""
    if hasattr(config, "get_text_config"):
        config.get_text_config().vocab_size = _size(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(tokenizer, name))


def transplant_embeddings(model: PreTrainedModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> float:
    """Give ``model``, in place, the vocabulary of ``new``: each row the mean of the rows of its old pieces.

    A head that is tied follows; one that is not, and its bias, are made the same way.

    Args:
        model: over the vocabulary of ``old``; rows beyond that vocabulary are dropped.
        old: its tokenizer.
        new: of the same algorithm, as ``domain_tokenizer`` makes it.

    Returns:
        The share of the new tokens that the old vocabulary has too; their rows are copied exactly.

    Raises:
        ValueError: a slow tokenizer, or two of different algorithms, whose tokens cannot be spelled in each other's.
    """
    pieces, copied = _pieces(old, new)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight.data_ptr() == inputs.weight.data_ptr()
    bias = getattr(head, "bias", None)
    made: list[tuple[str, Tensor]] = [("inputs", _means(inputs.weight, pieces))]
    if not tied:
        made.append(("head", _means(head.weight, pieces)))
    if bias is not None:
        made.append(("bias", _means(bias[:, None], pieces)[:, 0]))
    model.resize_token_embeddings(len(pieces), mean_resizing=False)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    targets = {"inputs": inputs.weight, "head": getattr(head, "weight", None), "bias": getattr(head, "bias", None)}
    with torch.no_grad():
        for name, values in made:
            cast(Tensor, targets[name]).copy_(values)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            _point_at(config, new)
    return copied


def _pieces(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> tuple[list[list[int]], float]:
    """Old ids that spell each new id, and the share of new tokens that the old vocabulary has."""
    backends: list[Any] = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (old, new)]  # Any: of Rust
    kinds = ["slow" if b is None else f"{type(b.model).__name__}, {type(b.pre_tokenizer).__name__}" for b in backends]
    if "slow" in kinds or kinds[0] != kinds[1]:
        raise ValueError(
            f"embeddings move between fast tokenizers of one algorithm; got {kinds[0]} and {kinds[1]}. "
            "Make the new one with domain_tokenizer(texts, old)."
        )
    speller = backends[0].model
    prefix = getattr(speller, "continuing_subword_prefix", None) or ""
    known = old.get_vocab()
    pieces: list[list[int]] = [[] for _ in range(_size(new))]
    for token, id in new.get_vocab().items():
        # The model, and not the whole tokenizer, so that bytes and leading spaces are spelled in its own alphabet.
        bare = token.removeprefix(prefix) or token
        pieces[id] = [known[token]] if token in known else [piece.id for piece in speller.tokenize(bare)]
    every = list(range(_size(old)))
    shared = sum(token in known for token in new.get_vocab()) / len(new.get_vocab())
    return [found or every for found in pieces], shared  # what cannot be spelled gets the mean of all


def _means(rows: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """Mean of the rows that each entry names, ``(V, dim)`` to ``(entries, dim)``; of one row: that row, bit for bit."""
    flat = torch.tensor([id for entry in pieces for id in entry], device=rows.device)
    ends = torch.tensor([0, *np.cumsum([len(entry) for entry in pieces])[:-1]], device=rows.device)
    means = nn.functional.embedding_bag(flat, rows.detach().float(), ends, mode="mean")
    return means.to(rows.dtype)


def vocabulary_report(
    old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, texts: Iterable[str], *, most: int = 20
) -> dict[str, Any]:  # Any: JSON data
    """What a vocabulary makes of text: description only, for more bytes per token is no better model.

    Args:
        old: the general tokenizer.
        new: the domain's.
        texts: read once; words are runs of letters.
        most: how many of the words that ``old`` fragments most are listed, among those that occur three times or more.

    Returns:
        ``bytes_per_token`` and ``whole_words`` (the share of the words' occurrences that are one token), each with
        ``old`` and ``new``; ``fragmented``: word, occurrences, and its pieces under both.

    Raises:
        ValueError: the texts hold no word.
    """
    words: Counter[str] = Counter()
    size, tokens = 0, {"old": 0, "new": 0}
    sides = {"old": old, "new": new}
    for text in texts:
        words.update(re.findall(r"[^\W\d_]+", text))
        size += len(text.encode("utf-8", "surrogatepass"))
        for side, tokenizer in sides.items():
            tokens[side] += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not words:
        raise ValueError("vocabulary_report: the texts hold no word.")
    pieces = {side: {word: _spelled(tokenizer, word) for word in words} for side, tokenizer in sides.items()}
    occurrences = words.total()
    frequent = [word for word, count in words.items() if count >= MIN_OCCURRENCES]
    frequent.sort(key=lambda word: (-len(pieces["old"][word]), -words[word], word))
    return {
        "bytes_per_token": {side: size / count for side, count in tokens.items()},
        "whole_words": {
            side: sum(words[word] for word, found in pieces[side].items() if len(found) == 1) / occurrences
            for side in sides
        },
        "fragmented": [
            {"word": word, "occurrences": words[word], **{side: pieces[side][word] for side in sides}}
            for word in frequent[:most]
        ],
    }


def _spelled(tokenizer: PreTrainedTokenizerBase, word: str) -> list[str]:
    """A word's tokens, in running text or at its beginning, whichever are fewer."""
    spellings = tokenizer([f" {word}", word], add_special_tokens=False)["input_ids"]
    found: list[str] = tokenizer.convert_ids_to_tokens(min(spellings, key=len))
    return found


class FromScratch(ContinuedPretraining):
    """The start's architecture, trained on the domain with a vocabulary and weights of its own."""

    id: ClassVar[str] = "from_scratch"

    vocab: Literal["domain", "keep"] = Field(
        default="domain", description="tokens: learned from the domain's training text, or the starting model's"
    )
    init: Literal["random", "transplant", "keep"] = Field(
        default="random",
        description="weights: new; the start's, with embeddings carried over to the new tokens; or the start's",
    )
    vocab_size: int | None = Field(  # section 3.2: as many tokens as the general vocabulary
        default=None, gt=0, description="tokens of a domain vocabulary; as many as the start's by default"
    )
    masking: Literal["whole_word", "token"] = Field(
        default="whole_word", description="what a masked model has masked together; a causal model masks nothing"
    )
    start_flops: float = Field(
        default=0.0,
        ge=0,
        description="FLOPs that trained the starting model, charged to the budget where its weights are used",
    )

    @model_validator(mode="after")
    def _possible(self) -> FromScratch:
        if self.init == "keep" and self.vocab == "domain":
            raise ValueError(
                "init 'keep' with a new vocabulary: rows would belong to other tokens; use 'transplant' or 'random'"
            )
        if self.init == "transplant" and self.vocab == "keep":
            raise ValueError("init 'transplant' has nothing to carry over when the vocabulary stays; use init: keep")
        if self.vocab_size is not None and self.vocab == "keep":
            raise ValueError(f"vocab_size {self.vocab_size} needs a new vocabulary; use vocab: domain, or leave it out")
        if self.lora is not None and self.init != "keep":
            raise ValueError(
                f"lora trains adapters of a model that stays as it is, and init {self.init!r} gives one that no base "
                "holds; leave lora out"
            )
        if self.start_flops > 0 and self.budget.flops is None:
            raise ValueError("start_flops can only be charged to a budget in flops; give one, or leave it out")
        return self

    def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
        """A vocabulary, a model over it, one phase on the domain."""
        old = ctx.tokenizer
        if self.vocab == "domain":
            ctx.adopt(self._domain_tokenizer(ctx))
        model, copied = self._model(ctx, old)
        self._report(ctx, old, copied)
        if self.init != "random" and self.start_flops:
            ctx.charge(self.start_flops, "training the starting model")
        ctx.domain_epochs(ctx.domain.train, 1 - self.replay)
        stream = ctx.with_replay(ctx.domain.train, self.replay, whole_words=self.masking == "whole_word")
        trained = yield Phase("train", model, stream, ctx.objective)
        return Adapted(trained.model, files=("vocabulary.json",))

    def _model(self, ctx: Adaptation, old: PreTrainedTokenizerBase) -> tuple[nn.Module, float | None]:
        """The model to train, and the share of its embeddings that were copied."""
        if self.vocab == "keep":
            return ctx.start(random=self.init == "random"), None
        start = cast(PreTrainedModel, ctx.start())
        if self.init == "random":
            return fresh_like(start, ctx.tokenizer, derive_seed(self.seed, "initialisation")), None
        return start, transplant_embeddings(start, old, ctx.tokenizer)

    def _domain_tokenizer(self, ctx: Adaptation) -> PreTrainedTokenizerBase:
        """Trained once per machine for the same text: it takes a while, and a resumed run must find the same one."""
        documents = ctx.domain.train
        size = sum(len(document.text.encode("utf-8", "surrogatepass")) for document in documents)
        if size < MIN_VOCABULARY_BYTES:
            raise CorpusError(
                f"domain: {size} bytes of training text; a vocabulary of its own needs at least "
                f"{MIN_VOCABULARY_BYTES}, or it learns whole sentences. Give more text, or vocab: keep."
            )
        about = {
            "documents": fingerprint_of(documents),
            "like": tokenizer_fingerprint(ctx.tokenizer),
            "roles": {name: str(token) for name, token in ctx.tokenizer.special_tokens_map.items()},
            "size": self.vocab_size,
        }
        target: Path = cache_dir("tokenizers") / cache_key(about)
        if not target.exists():
            new = domain_tokenizer((document.text for document in documents), ctx.tokenizer, self.vocab_size)
            working = target.with_name(f"{target.name}.{os.getpid()}.partial")
            new.save_pretrained(working)
            try:
                working.rename(target)
            except OSError:  # another process was first; its tokenizer is the same
                shutil.rmtree(working)
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(target)
        return loaded

    def _report(self, ctx: Adaptation, old: PreTrainedTokenizerBase, copied: float | None) -> None:
        sample = held_out_sample(ctx.domain.valid or ctx.domain.train, REPORT_CHARS)
        report = vocabulary_report(old, ctx.tokenizer, (document.text for document in sample))
        about = {"vocab_size": len(ctx.tokenizer), "copied": copied}
        ctx.run.write_json("vocabulary.json", {**about, **report})
