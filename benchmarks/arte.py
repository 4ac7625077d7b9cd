"""(p) What does keeping an example's keys and values give, when drafts are scored as one-shot examples?

    python -m benchmarks.arte

Four examples of 200 tokens, 40 questions of 12 tokens each, 3 tokens of likelihood after every question; a Llama of
three layers, width 128. The peer encodes the example anew before every question, in batches of as many questions.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.harness import Bound, alternate, report
from headwater.corpora.arte_drafts import Draft, Form
from headwater.corpora.arte_scores import icl_scores
from headwater.modalities.text.pairs import PairModel, Pairs
from headwater.modalities.text.tiny import PRESETS, tiny_llama
from headwater.modalities.text.tokenizers import word_tokenizer

DRAFTS, EXAMPLE, QUESTIONS, QUESTION = 4, 200, 40, 12
RATIO = 3.0

RNG = np.random.default_rng(0)
WORDS = [f"w{i}" for i in range(200)]
TOKENIZER = word_tokenizer([" ".join(["so", *WORDS])])
MODEL = tiny_llama(TOKENIZER, **PRESETS["tiny"], context=512, generator_seed=0)
FORM = Form(ask="{question}", between=" ", marker="so")


def words(count: int) -> str:
    """So many words at random."""
    return " ".join(RNG.choice(WORDS, count))


EXAMPLES = [Draft(words(QUESTION), words(EXAMPLE - QUESTION), "") for _ in range(DRAFTS)]
ITEMS = Pairs([words(QUESTION) for _ in range(QUESTIONS)], [words(2) for _ in range(QUESTIONS)])


def ours() -> np.ndarray:
    return icl_scores(MODEL, TOKENIZER, EXAMPLES, ITEMS, "nll", FORM)


def peer() -> np.ndarray:
    """The same by whole texts."""
    reader = PairModel(MODEL, TOKENIZER, "causal", 512, 3)
    targets = [f"so {answer}" for answer in ITEMS.targets]
    return np.array(
        [-reader.nats(Pairs([FORM.shot(draft) + item for item in ITEMS.sources], targets)) for draft in EXAMPLES]
    )


def check() -> str:
    """Both sides give the same likelihoods."""
    gap = float(np.abs(ours() - peer()).max())
    assert gap < 1e-4, f"the scores differ by {gap}"
    return f"scores differ by at most {gap:.1e}"


def main() -> None:
    """Print one JSON line."""
    torch.set_num_threads(1)
    checked = check()
    least = alternate({"ours": ours, "whole texts": peer})
    report(
        f"{DRAFTS} examples of {EXAMPLE} tokens scored on {QUESTIONS} questions of {QUESTION}",
        {"whole texts": (least["whole texts"] / least["ours"], Bound("higher", RATIO))},
        seconds=least,
        checked=checked,
    )


if __name__ == "__main__":
    main()
