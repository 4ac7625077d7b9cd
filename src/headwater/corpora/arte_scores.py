"""What a draft is worth to a student, which questions tell drafts apart, and pairs of a better and a worse draft.

    score(d)   = mean over preference questions of  [the student is right, shown d as its only example]
    variance   : keep the questions with the largest p (1 - p), p = share of drafts that get them right
    2pl        : P(draft i gets question j) = sigmoid(a_j theta_i + c_j),  theta ~ N(0, 1);  keep those with the largest
                 expected information  E[a_j^2 P (1 - P)]
    pair       : (chosen, rejected) of one group with  score(chosen) - score(rejected) >= margin

The keys and values of a draft are computed once and every question goes on from them. Questions of different lengths
share a batch by padding between the draft and the question, which is masked and takes no position.

Source: Liu et al., arXiv:2406.19227; Bock and Aitkin, "Marginal maximum likelihood estimation of item
    parameters", Psychometrika 46, 1981.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.corpora.arte_drafts import Draft, Form, TeacherPrompts, parse_rationale
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.instruct import exact_match
from headwater.modalities.text.pairs import Pairs
from headwater.modalities.text.preference import Preference, sequence_logps
from headwater.modalities.text.score import scoring, start_token

__all__ = [
    "Candidate",
    "NoPreference",
    "draft_pairs",
    "icl_score",
    "icl_scores",
    "preference_pairs",
    "select_discriminative",
]

Metric = Literal["accuracy", "nll"]

LARGEST_SLOPE, LARGEST_INTERCEPT = 8.0, 16.0
NODES = 31


class NoPreference(CorpusError):
    """No draft is better than another by the margin, so there is nothing to align the teacher with."""


def icl_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draft: Draft,
    pref_set: Pairs,
    metric: Metric = "accuracy",
    *,
    form: Form | None = None,
    max_answer: int = 256,
    batch_size: int = 64,
) -> float:
    """The mean of ``icl_scores`` for one draft over the preference questions."""
    return float(icl_scores(model, tokenizer, [draft], pref_set, metric, form, max_answer, batch_size).mean())


def icl_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafts: Sequence[Draft],
    pref_set: Pairs,
    metric: Metric = "accuracy",
    form: Form | None = None,
    max_answer: int = 256,
    batch_size: int = 64,
) -> NDArray[np.float64]:
    """How a student answers each question with each draft as its only example.

    Args:
        model: the student, whose keys and values can be cached.
        tokenizer: its own.
        drafts: examples.
        pref_set: questions with their answers.
        metric: ``accuracy``: 1 where the student's greedy rationale ends in the right answer, else 0; ``nll``: the
            mean log-likelihood of a token of ``marker answer`` right after the question, so that more is better too.
        form: how the student is asked.
        max_answer: tokens that it may write.
        batch_size: questions per forward pass.

    Returns:
        ``(drafts, questions)``.

    Raises:
        ValueError: no question.
    """
    if not len(pref_set):
        raise ValueError("drafts are scored on preference questions, and there is none.")
    asked, start = form or Form(), start_token(tokenizer)
    items = _ids(tokenizer, [asked.prompt(question) for question in pref_set.sources])
    targets = _ids(tokenizer, [f"{asked.join}{asked.marker} {answer}" for answer in pref_set.targets])
    texts = [asked.shot(draft) for draft in drafts]
    different = list(dict.fromkeys(texts))  # a small teacher repeats itself
    found = np.zeros((len(different), len(pref_set)))
    with scoring(model) as device:
        for row, shot in enumerate(_ids(tokenizer, different)):
            prefix = torch.tensor([[start, *shot]], device=device)
            known = model(input_ids=prefix, use_cache=True).past_key_values
            for begin in range(0, len(items), batch_size):
                chunk = slice(begin, begin + batch_size)
                cache = copy.deepcopy(known)
                cache.batch_repeat_interleave(len(items[chunk]))
                if metric == "nll":
                    found[row, chunk] = _likelihoods(model, prefix, cache, items[chunk], targets[chunk])
                else:
                    written = _written(model, tokenizer, prefix, cache, items[chunk], max_answer)
                    right = zip(written, pref_set.targets[chunk], strict=True)
                    found[row, chunk] = [_right(text, answer, asked) for text, answer in right]
    rows = {text: row for row, text in enumerate(different)}
    return found[[rows[text] for text in texts]]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return found


def _right(text: str, answer: str, form: Form) -> float:
    parsed = parse_rationale(text, form.marker)
    return 0.0 if parsed is None else exact_match(parsed[1], answer)


def _after(prefix: Tensor, rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the left, ``(rows, width)``, and the mask of prefix and rows, ``(rows, prefix + width)``."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.ones(len(rows), prefix.shape[1] + width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, prefix.shape[1] : prefix.shape[1] + width - len(row)] = 0
    return ids.to(prefix.device), mask.to(prefix.device)


def _written(
    model: Any,  # Any: generate is not declared where transformers ships no types
    tokenizer: PreTrainedTokenizerBase,
    prefix: Tensor,
    cache: Any,  # Any: transformers ships no types
    items: Sequence[Sequence[int]],
    max_answer: int,
) -> list[str]:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = _after(prefix, items, pad)
    whole = torch.cat([prefix.expand(len(items), -1), ids], dim=1)
    output = model.generate(
        input_ids=whole,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=max_answer,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(output[:, whole.shape[1] :], skip_special_tokens=True)
    return texts


def _likelihoods(
    model: PreTrainedModel,
    prefix: Tensor,
    cache: Any,  # Any: transformers ships no types
    items: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> NDArray[np.float64]:
    rows = [[*item, *target] for item, target in zip(items, targets, strict=True)]
    ids, mask = _after(prefix, rows, 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, prefix.shape[1] :]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    labels = torch.full_like(ids, -100)
    counts = torch.tensor([len(target) for target in targets])
    for number, count in enumerate(counts.tolist()):
        labels[number, -count:] = ids[number, -count:]
    found: NDArray[np.float64] = (sequence_logps(logits, labels).cpu().double() / counts).numpy()
    return found


# -- which questions tell drafts apart


def select_discriminative(
    matrix: ArrayLike, k: int, method: Literal["variance", "2pl"] = "variance"
) -> NDArray[np.int64]:
    """The questions whose scores tell drafts apart best.

    Args:
        matrix: ``(drafts, questions)``; for ``2pl`` only 0 and 1.
        k: how many; more than there are gives all of them.
        method: see the module.

    Returns:
        Their columns, ``(min(k, questions),)`` int64, the best first; of equals the first.

    Raises:
        ValueError: not a matrix with at least one draft, ``k`` below 1, or ``2pl`` on scores that are not 0 and 1.
    """
    scores = np.asarray(matrix, dtype=np.float64)
    if scores.ndim != 2 or not len(scores):
        raise ValueError(f"matrix must be (drafts, questions) with at least one draft; got {scores.shape}.")
    if k < 1:
        raise ValueError(f"k must be >= 1; got {k}.")
    worth = scores.var(axis=0) if method == "variance" else _information(scores)
    return np.argsort(-worth.round(12), kind="stable")[:k].astype(np.int64)


def _information(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected information of each question about a draft's ability; 0 where all drafts do alike."""
    if not np.isin(scores, (0.0, 1.0)).all():
        raise ValueError("2pl is a model of answers that are right (1) or wrong (0); use 'variance' for other scores.")
    varied = np.flatnonzero(scores.var(axis=0) > 0)
    worth = np.zeros(scores.shape[1])
    if not len(varied):
        return worth
    slopes, intercepts = _two_parameter(scores[:, varied])
    theta, weight = _normal_nodes()
    right = expit(np.outer(theta, slopes) + intercepts)
    worth[varied] = slopes**2 * (weight[:, None] * right * (1 - right)).sum(axis=0)
    return worth


def _normal_nodes() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes, weights / weights.sum()


def _two_parameter(scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slopes a >= 0 and intercepts c of every question by marginal maximum likelihood; bounded, as few drafts need."""
    theta, weight = _normal_nodes()
    count = scores.shape[1]

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        slopes, intercepts = parameters[:count], parameters[count:]
        logits = np.outer(theta, slopes) + intercepts
        joint = scores @ log_expit(logits).T + (1 - scores) @ log_expit(-logits).T + np.log(weight)
        evidence = np.logaddexp.reduce(joint, axis=1)
        posterior = np.exp(joint - evidence[:, None])  # (drafts, nodes)
        # d log p / d logit is (answer - P), averaged over where each draft may stand.
        residual = posterior.T @ scores - posterior.sum(axis=0)[:, None] * expit(logits)  # (nodes, questions)
        gradient = np.concatenate([theta @ residual, residual.sum(axis=0)])
        return -float(evidence.sum()), -gradient

    share = np.clip(scores.mean(axis=0), 0.01, 0.99)
    begin = np.concatenate([np.ones(count), np.log(share / (1 - share))])
    bounds = [(0.0, LARGEST_SLOPE)] * count + [(-LARGEST_INTERCEPT, LARGEST_INTERCEPT)] * count
    best = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds).x
    return best[:count], best[count:]


# -- pairs


@dataclass(frozen=True)
class Candidate:
    """One of several texts that answer a prompt; those of one prompt are a group."""

    prompt: str
    text: str
    score: float


def preference_pairs(
    scores: Sequence[Candidate], margin: float = 0.05, per_group: int | None = None, kind: str = ""
) -> list[Preference]:
    """Pairs of texts of one prompt whose scores differ by the margin or more.

    Args:
        scores: texts with their scores, in any order; a text that occurs more than once counts with its mean.
        margin: > 0.
        per_group: pairs of a prompt at most, those that differ most; all by default.
        kind: of the pairs.

    Raises:
        ValueError: ``margin`` is not positive, or ``per_group`` below 1.
    """
    if not margin > 0:
        raise ValueError(f"margin must be > 0; got {margin}.")
    if per_group is not None and per_group < 1:
        raise ValueError(f"per_group must be >= 1; got {per_group}.")
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for candidate in scores:
        groups[candidate.prompt][candidate.text].append(candidate.score)
    found = []
    for prompt in sorted(groups):
        means = {text: float(np.mean(sorted(values))) for text, values in groups[prompt].items()}
        gaps = [
            (round(means[a] - means[b], 12), a, b)
            for a, b in permutations(sorted(means), 2)
            if means[a] - means[b] >= margin - 1e-12
        ]
        gaps.sort(key=lambda gap: -gap[0])
        found += [Preference(prompt, better, worse, kind) for _, better, worse in gaps[:per_group]]
    return found


def draft_pairs(
    drafts: Sequence[Draft],
    scores: ArrayLike,
    seeds: Sequence[str],
    prompts: TeacherPrompts | None = None,
    *,
    margin: float = 0.05,
    per_group: int | None = None,
) -> list[Preference]:
    """Pairs of questions that answer one seed, by the mean score of their rationales, and of rationales of a question.

    Args:
        drafts: whose ``meta["seed"]`` counts into ``seeds``.
        scores: of each draft, ``(drafts,)``.
        seeds: the seed questions.
        prompts: as they were asked for.
        margin: see ``preference_pairs``.
        per_group: likewise, of each kind.

    Raises:
        NoPreference: no pair of either kind.
    """
    words, values = prompts or TeacherPrompts(), np.asarray(scores, dtype=np.float64)
    of_question: dict[str, list[float]] = defaultdict(list)
    for draft, value in zip(drafts, values.tolist(), strict=True):
        of_question[draft.question].append(value)
    wrote = dict.fromkeys((draft.meta["seed"], draft.question) for draft in drafts)
    questions = [
        Candidate(words.for_question(seeds[place]), question, float(np.mean(of_question[question])))
        for place, question in wrote
    ]
    rationales = [
        Candidate(words.for_rationale(draft.question), draft.rationale, value)
        for draft, value in zip(drafts, values.tolist(), strict=True)
    ]
    pairs = [
        *preference_pairs(questions, margin, per_group, "question"),
        *preference_pairs(rationales, margin, per_group, "rationale"),
    ]
    if not pairs:
        spread = f"from {values.min():.3g} to {values.max():.3g}" if len(values) else "of no draft"
        raise NoPreference(
            f"no draft of {len(values)} is better than another of its group by {margin}: scores are {spread}. Give "
            "harder preference questions, or more rationales, or score by 'nll'."
        )
    return pairs
