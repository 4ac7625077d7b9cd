"""What the experiments on instruction models ask: which package is this the beginning of a docstring of?

The instruct model is a base tuned, with the language-model loss on the whole text, on beginnings of docstrings of two
packages followed by the package's name. Two well-separated classes, so that a small model can answer at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from headwater.core.budget import Budget
from headwater.core.cache import atomic_write_text
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec
from headwater.core.recipe import ModelRef
from headwater.core.rng import derive_seed
from headwater.modalities.models import load_model
from headwater.modalities.text.docs import Document
from headwater.modalities.text.objectives import CausalObjective
from headwater.modalities.text.packing import PackedStream, tokenize_documents

__all__ = ["PACKAGES", "PROMPT_TOKENS", "TRAIN_TOKENS", "answered", "tuned_on_answers", "write_prompts"]

PACKAGES = ("sklearn", "stdlib")  # of the five of the general corpus, those that a linear model tells apart best
PROMPT_TOKENS = 70
TRAIN_TOKENS = (40, 100)
ASK = "\n### Package:"


def answered(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, int]
) -> list[Document]:
    """The beginning of each docstring and the question; ``answer`` in the meta. As many of each package.

    Args:
        documents: docstrings.
        tokenizer: measures the beginnings.
        lengths: their least and largest number of tokens, drawn by document: with one length for all a model learns to
            count to the question, and then asks it in the middle of every text.
    """
    by_package = [[d for d in documents if d.meta["package"] == name] for name in PACKAGES]
    chosen = [document for own in by_package for document in own[: min(map(len, by_package))]]
    ids = tokenizer([document.text for document in chosen], add_special_tokens=False)["input_ids"]
    found = []
    for document, tokens in zip(chosen, ids, strict=True):
        length = lengths[0] + derive_seed(0, "length", document.id) % (lengths[1] - lengths[0] + 1)
        prompt = tokenizer.decode(tokens[:length]) + ASK
        found.append(Document(document.id, prompt, {"answer": f" {document.meta['package']}"}))
    return found


def write_prompts(prompts: Sequence[Document], path: Path) -> None:
    """Write prompts and answers as JSON lines with the columns ``text`` and ``label``."""
    rows = [{"text": prompt.text, "label": prompt.meta["answer"]} for prompt in prompts]
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def tuned_on_answers(
    start: Path,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    context: int,
    rows: int,
    steps: int,
    lr: float,
    seed: int,
) -> Path:
    """``start`` tuned on prompts and answers of ``documents``, saved to ``target``.

    Args:
        start: directory of a causal model.
        documents: training docstrings of ``PACKAGES``.
        tokenizer: the model's.
        target: a new directory; the run goes beside it.
        context: tokens per block.
        rows: blocks per step.
        steps: of the optimizer.
        lr: peak learning rate.
        seed: of the order.
    """
    prompts = answered(documents, tokenizer, TRAIN_TOKENS)
    texts = [Document(prompt.id, prompt.text + prompt.meta["answer"]) for prompt in prompts]
    stream = PackedStream(tokenize_documents(texts, tokenizer), context, rows, seed)
    phase = Phase(target.name, load_model(ModelRef(name=str(start)), "causal"), stream, CausalObjective())
    trained = fit(
        phase,
        budget=Budget(steps=steps),
        optim=OptimSpec(lr=lr),
        seed=seed,
        directory=target.with_name(f"{target.name}-run"),
        settings=FitSettings(precision="fp32"),
    )
    trained.model.save_pretrained(target)  # type: ignore[operator]  # a Hugging Face model
    tokenizer.save_pretrained(target)
    return target
