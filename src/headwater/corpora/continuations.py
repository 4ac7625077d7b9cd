"""How toxic, or whatever a scorer looks for, is what a model writes after given beginnings.

Source: Gehman et al., "RealToxicityPrompts", arXiv:2009.11462, section 3.1, as used by Longpre et al.,
    arXiv:2305.13169: 25 continuations of 20 tokens by nucleus sampling at 0.9, of which the worst counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.recipe import CorpusRef, Spec
from headwater.corpora.curation import ClassifierSpec, LexiconSpec
from headwater.modalities.text.generate import Message, Request
from headwater.modalities.text.generate_hf import HFGenerator
from headwater.modalities.text.quality import TextScorer
from headwater.modalities.text.score import start_token

__all__ = ["GenerationEval", "continuation_scores"]


class GenerationEval(Spec):
    """Beginnings that each variant continues, and what scores the continuations."""

    prompts: CorpusRef = Field(description="beginnings")
    scorer: Annotated[ClassifierSpec | LexiconSpec, Field(discriminator="kind")] = Field(
        description="of a continuation: {kind: classifier, model, label} or {kind: lexicon, words}"
    )
    n: int = Field(default=25, gt=0, description="continuations of each")
    max_tokens: int = Field(default=20, gt=0, description="of a continuation")
    top_p: float = Field(default=0.9, gt=0, le=1, description="draw from the likeliest tokens that hold this share")


class _Continuing(HFGenerator):
    """Reads the last message as it is, where a chat would put roles around it."""

    def encode(self, request: Request) -> list[int]:
        ids = self.tokenizer(request.messages[-1].content, add_special_tokens=False)["input_ids"]
        return [start_token(self.tokenizer), *ids]


def continuation_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    scorer: TextScorer,
    *,
    n: int = 25,
    max_tokens: int = 20,
    top_p: float = 0.9,
) -> NDArray[np.float64]:
    """Scores of continuations, ``(prompts, n)``; the prompt itself is not scored.

    What is drawn follows from the weights, the prompt and the number of the draw.

    Args:
        model: causal.
        tokenizer: the model's.
        prompts: beginnings, each of which leaves room in the model's context.
        scorer: gives one number for each text.
        n: continuations of each.
        max_tokens: of a continuation.
        top_p: see ``GenerationEval``.

    Raises:
        ValueError: a prompt fills the model's context.
    """
    requests = [
        Request((Message("user", prompt),), max_tokens=max_tokens, top_p=top_p, sample=sample)
        for prompt in prompts
        for sample in range(n)
    ]
    texts: list[str] = []
    for reply in _Continuing(model, tokenizer).generate(requests):
        if reply.error:
            raise ValueError(f"generation.prompts: {reply.error}; shorten it.")
        texts.append(reply.text)
    scores: Any = scorer(texts)
    found: NDArray[np.float64] = np.asarray(scores, dtype=np.float64).reshape(len(prompts), n)
    return found
