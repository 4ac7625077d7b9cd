"""Experiment of ``sobert``: do whole threads at a long context make a better encoder than single posts at a short one?

The threads are scikit-learn's source files: a module's docstring, those of its classes and functions, those of their
methods, told apart by file for training and test. Two small encoders read equally many tokens of them: one whole
threads at 512 tokens, one single docstrings at 128, in any order. Both predict the same masked tokens of held-out
threads, each in windows of the length it was trained at. A third encoder, four times as large in its layers, reads text
of other packages for the same FLOPs; frozen features of each are probed for the sub-package of a docstring.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.budget import Budget
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec
from headwater.core.rng import derive_seed
from headwater.domain.sobert import AlignedObjective, aligned_stream
from headwater.modalities.text.docs import Document, drop_overlap, fingerprint, split_sides
from headwater.modalities.text.docstrings import docstring_corpus
from headwater.modalities.text.score import linear_probe, masked_bits
from headwater.modalities.text.threads import docstring_posts, thread_documents
from headwater.modalities.text.tiny import Size, tiny_bert
from headwater.modalities.text.tokenizers import train_bpe

__all__ = ["CLAIM"]

PACKAGE, GENERAL = "sklearn", ("numpy", "pandas", "scipy", "stdlib")
SHORT, LONG = 128, 512
SMALL, LARGE = Size(hidden=128, layers=4, heads=4, mlp=256), Size(hidden=256, layers=4, heads=8, mlp=512)


@dataclass(frozen=True)
class _Setting:
    vocab: int
    tokens: int  # of the two small encoders
    batch_tokens: int
    test_threads: int
    probes: int  # draws of labels
    small: Size
    large: Size
    limit: int | None = None  # docstrings
    lr: float = 2e-3


_TINY = Size(hidden=16, layers=1, heads=2, mlp=32)
_SETTINGS: Mapping[Scale, _Setting] = {
    "smoke": _Setting(400, 4_096, 2_048, test_threads=5, probes=1, small=_TINY, large=_TINY, limit=400),
    "small": _Setting(2_048, 300_000, 4_096, test_threads=40, probes=5, small=SMALL, large=LARGE),
}


class _Experiment:
    def __init__(self, scale: Scale, seed: int, directory: Path) -> None:
        self.setting, self.seed, self.directory = _SETTINGS[scale], seed, directory
        documents = docstring_corpus((PACKAGE,))[: self.setting.limit]
        modules = [document.meta["module"] for document in documents]
        sides = split_sides(modules, (0.85, 0.0, 0.15), "files")  # a file is on one side
        parts = [[d for d, at in zip(documents, sides, strict=True) if at == side] for side in (0, 2)]
        self.test_posts = parts[1]
        self.posts = drop_overlap(parts[0], parts[1]).kept
        self.tokenizer = train_bpe([d.text for d in self.posts], self.setting.vocab, extra_tokens=("<mask>",))
        self.threads = self._threads(self.posts)
        self.test = self._threads(self.test_posts)[: self.setting.test_threads]

    def _threads(self, posts: Sequence[Document]) -> list[Document]:
        def count(texts: Sequence[str]) -> list[int]:
            return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

        # Long ones are cut into rows, not dropped: both arms are to read the same posts.
        rows = docstring_posts(posts)
        return thread_documents(rows, max_tokens=1 << 30, count_tokens=count).documents

    def trained(
        self,
        name: str,
        documents: Sequence[Document],
        tokenizer: PreTrainedTokenizerBase,
        size: Size,
        seq_len: int,
        budget: Budget,
    ) -> tuple[PreTrainedModel, float]:
        """A fresh encoder trained on documents, and the FLOPs that took."""
        setting = self.setting
        model = tiny_bert(
            tokenizer, **size, context=LONG, generator_seed=derive_seed(self.seed, "weights", name) % 2**31
        )
        stream = aligned_stream(
            [(documents, 1.0)],
            tokenizer,
            seq_len=seq_len,
            rows=setting.batch_tokens // seq_len,
            seed=derive_seed(self.seed, "order"),
        )
        trained = fit(
            Phase(name, model, stream, AlignedObjective()),
            budget=budget,
            optim=OptimSpec(lr=setting.lr, warmup=0.1),
            seed=self.seed,
            directory=self.directory,
            settings=FitSettings(precision="fp32"),
        )
        return cast(PreTrainedModel, trained.model), float(trained.cost.flops or 0.0)

    def bits(self, model: PreTrainedModel, window: int) -> list[float]:
        """Bits per masked token of each test thread, scaled so that their mean is the total's."""
        scored = masked_bits(model, self.tokenizer, self.test, window=window)
        found: list[float] = (scored.nats / np.log(2) / scored.counts.mean()).tolist()
        return found

    def frequency_bits(self) -> float:
        """Bits a token of the test threads under the frequencies of training tokens: what needs no context."""
        size = len(self.tokenizer)
        seen, held = (
            np.bincount(np.concatenate(self.tokenizer([d.text for d in side])["input_ids"]).astype(int), minlength=size)
            for side in (self.posts, self.test)
        )
        return float(-(held * np.log2((seen + 1) / (seen.sum() + size))).sum() / held.sum())

    def probe(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        """Accuracy of a linear probe for the sub-package, on held-out and training docstrings alike."""
        labels = [document.meta["module"].split(".")[1] for document in self.test_posts]
        common = {label for label, count in Counter(labels).items() if count >= 12}
        kept = [(d.text, label) for d, label in zip(self.test_posts, labels, strict=True) if label in common]
        texts, names = zip(*kept, strict=True)
        seeds = [derive_seed(0, "probe", draw) % 2**32 for draw in range(self.setting.probes)]
        return float(linear_probe(model, tokenizer, texts, names, len(texts) // 2, seeds, window=SHORT).accuracy.mean())


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Train the three encoders, score and probe them."""
    run = _Experiment(scale, seed, directory)
    setting = run.setting
    budget = Budget(tokens=setting.tokens)
    threads, flops = run.trained("threads", run.threads, run.tokenizer, setting.small, LONG, budget)
    posts, _ = run.trained("posts", run.posts, run.tokenizer, setting.small, SHORT, budget)
    general = [*docstring_corpus(GENERAL, max_docs_per_package=setting.limit or 2_500)]
    own = train_bpe([d.text for d in general], setting.vocab, extra_tokens=("<mask>",))
    larger, _ = run.trained("general", general, own, setting.large, SHORT, Budget(flops=flops))
    items: dict[str, dict[str, Sequence[float]]] = {
        "threads": {"masked_bits": run.bits(threads, LONG)},
        "posts": {"masked_bits": run.bits(posts, SHORT)},
        # Asked as the other is: what the longer context alone is worth to a model that was trained at it.
        "threads_short": {"masked_bits": run.bits(threads, SHORT)},
    }
    arms: dict[str, dict[str, float]] = {
        name: {"masked_bits": float(np.mean(own_items["masked_bits"]))} for name, own_items in items.items()
    }
    arms["threads"]["probe"] = run.probe(threads, run.tokenizer)
    arms["posts"]["probe"] = run.probe(posts, run.tokenizer)
    arms["general"] = {"probe": run.probe(larger, own)}
    notes: dict[str, Any] = {
        f"seed-{seed}/copied": f"{_copied(run.test):.3f} of the lines of a test thread stand in it more than once",
        f"seed-{seed}/threads": f"{len(run.threads)} to learn from, of {len(run.posts)} docstrings",
        f"seed-{seed}/frequencies": f"{run.frequency_bits():.3f} bits a token from token frequencies alone",
    }
    tokens = len(run.tokenizer("\n".join(d.text for d in run.posts))["input_ids"])
    unmet = []
    if scale != "smoke" and tokens * 4 < setting.tokens:
        unmet.append(f"seed {seed}: {tokens} tokens to learn from, read {setting.tokens / tokens:.1f} times")
    return Measured(arms, items, fingerprint([*run.posts, *run.test]), unmet, notes)


def _copied(threads: Sequence[Document]) -> float:
    """Share of the lines of threads that occur again in the same thread: what context makes easy."""
    repeated = total = 0
    for thread in threads:
        lines = [line.strip() for line in thread.text.splitlines() if len(line.strip()) > 20]
        counts = Counter(lines)
        repeated += sum(count for count in counts.values() if count > 1)
        total += len(lines)
    return repeated / max(1, total)


CLAIM = Claim(
    id="sobert",
    statement="At equally many tokens, an encoder trained on whole threads at 512 tokens predicts masked tokens of "
    "held-out threads better than one trained on single posts at 128; and its features tell sub-packages apart as well "
    "as those of a larger encoder trained on general text for the same FLOPs.",
    source="Mukherjee and Hellendoorn, arXiv:2306.03268: SOBertBase and SOBertLarge, trained on whole StackOverflow "
    "posts with a context of 2 048, beat general models and larger ones on four tasks.",
    parts=(
        Part(
            "Masked tokens of held-out threads cost at least 0.05 bits less.",
            "masked_bits",
            "threads",
            "posts",
            "lower",
            0.05,
        ),
        Part(
            "A probe of its features is at most 0.01 less accurate than one of the larger general encoder.",
            "probe",
            "threads",
            "general",
            "higher",
            -0.01,
        ),
        Part(
            "Masked tokens cost less with 512 tokens around them than with 128, under the same encoder.",
            "masked_bits",
            "threads",
            "threads_short",
            "lower",
            0.0,
            decides=False,
        ),
        Part(
            "A probe of its features is at most 0.01 less accurate than one of the encoder of single posts.",
            "probe",
            "threads",
            "posts",
            "higher",
            -0.01,
            decides=False,
        ),
    ),
    rival="posts",
    preconditions=("the text is read at most four times",),
    seeds={"smoke": (0,), "small": (100, 101, 102)},
    measure=measure,
)
