"""Claim of ``meta_tuning``: taught to answer questions about some topics, a language model answers those about others.

A world in which all that a question means is known. Eight data sets have nine topics each; a topic is a name and eight
words, and three topics at a time share eighteen words among them. A text is ten words, three in ten of its topic and
the rest of any. A Llama of two layers is pretrained on

    n7 : w31 w30 w38 ...                        a name with words of its topic
    w31 w312 w37 w36 ...                        texts, without the name of their topic
    w37 ? w31 w312 w37 ... answer : yes         whether a word stands in a text

and meta-tuned on "n7 ? w31 w312 w37 ... answer :" of five data sets. A sixth chooses learning rates and the best use of
the model out of the box, and the questions of the last two, which share no word with the others, are the test. Out of
the box, the model answers yes or no as it is; or gives log p(text | name) - log mean p(text | any name), with the text
read in order or as a bag of words after the name. Fine-tuned from random weights, it sees the same questions in the
same order.

Set up in pilots on seed 0, before any small run. 72 topics stand for 120 and a width of 64 for 128. The likelihood
ratio is what a model that fits this world well computes best: at four words in ten of the topic its AUC was 0.96, where
counting the words of a known topic gave 0.965, and a margin of 0.05 did not fit below 1. Texts therefore hold fewer of
their topic's words; no set-up was found, nor can there be one, in which counting is far above the ratio of a model that
has learned the words. With lines of half of a topic's words, meta-tuning had an AUC of 0.66 and the ratio 0.89; with
all of them and longer pretraining, 0.82 and 0.92. Learning rates of 0.003 did worse than 0.001 on validation questions
for both starts, so the grid goes down from there. The set-up as it stands gave 0.67, against 0.92 for the ratio, 0.54
for yes or no and 0.50 from random weights: the first part was expected to fail, and stays because the strongest use of
the model out of the box is what a user would do without meta-tuning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headwater.adapt.meta_data import LabelDescription, build_meta_dataset, group_split
from headwater.adapt.meta_tuning import MetaTuningObjective, ZeroShotClassifier, description_auc
from headwater.core.budget import Budget
from headwater.core.cache import cache_dir, cache_key
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec
from headwater.core.rng import derive_seed, numpy_generator
from headwater.modalities.text.class_inputs import ClassStream
from headwater.modalities.text.objectives import IGNORED, CausalObjective
from headwater.modalities.text.score import scoring
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import word_tokenizer
from headwater.modalities.text.yes_no import YesNoScorer

__all__ = ["CLAIM"]

DATASETS, TOPICS, SHARING, POOL = 8, 9, 3, 18  # topics per data set; topics that share a pool of words
WORDS, LENGTH, OWN = 8, 10, 0.3
TRAIN, VALIDATION, TEST = (0, 1, 2, 3, 4), 5, (6, 7)
FEW, SOME = TRAIN[:1], TRAIN[:2]
LEAST_KNOWN, LEAST_LEARNED, MARGIN = 0.6, 0.7, 0.05
FLOAT32 = FitSettings(precision="fp32")


@dataclass(frozen=True)
class _Setting:
    hidden: int
    pretraining_steps: int
    steps: int
    texts: int  # of each topic to train on
    tested: int
    learning_rates: tuple[float, ...] = (3e-4, 1e-3)


_SETTINGS: Mapping[Scale, _Setting] = {
    "smoke": _Setting(16, pretraining_steps=2, steps=2, texts=6, tested=3, learning_rates=(1e-3,)),
    "small": _Setting(64, pretraining_steps=300, steps=200, texts=120, tested=30),
}


class _World:
    """Topics and their texts, as indices of words."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = numpy_generator(seed, "topics")
        count = DATASETS * TOPICS
        pools = POOL * (np.arange(count) // SHARING)
        self.words = np.stack([rng.permutation(POOL)[:WORDS] + first for first in pools])
        self.size = count // SHARING * POOL
        self.tokenizer = word_tokenizer(
            [" ".join(["yes no ? answer :", *self.names(range(count)), *self.written(np.arange(self.size))])]
        )
        self.ids: dict[str, int] = self.tokenizer.get_vocab()

    @staticmethod
    def names(topics: Sequence[int]) -> list[str]:
        return [f"n{topic}" for topic in topics]

    @staticmethod
    def written(words: NDArray[np.int64]) -> list[str]:
        return [f"w{word}" for word in words]

    def draw(self, topics: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """A text of each topic, ``(n, LENGTH)``."""
        shape = (len(topics), LENGTH)
        own = self.words[topics[:, None], rng.integers(WORDS, size=shape)]
        return np.where(rng.random(shape) < OWN, own, rng.integers(self.size, size=shape))

    def texts(self, dataset: int, role: str, each: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Texts of a data set and their topics."""
        topics = np.repeat(np.arange(TOPICS) + TOPICS * dataset, each)
        return self.draw(topics, numpy_generator(self.seed, role, dataset)), topics

    def shown(self, texts: NDArray[np.int64]) -> list[str]:
        return [" ".join(self.written(text)) for text in texts]


@dataclass(frozen=True)
class _Reading:
    """What the model is pretrained on, endlessly: lines, texts, and questions about words, as many of each."""

    world: _World
    rows: int = 126
    tokens_per_row: int = LENGTH + 5

    @property
    def fingerprint(self) -> str:
        """Of what the rows follow from."""
        about = [DATASETS, TOPICS, SHARING, POOL, WORDS, LENGTH, OWN]
        return cache_key([self.world.seed, self.rows, *about])

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, ``(rows, time)``."""
        world, each = self.world, self.rows // 3
        code = world.ids.__getitem__
        rng = numpy_generator(world.seed, "pretraining", step)
        topics = rng.integers(len(world.words), size=(3, each))
        word = np.array([code(name) for name in world.written(np.arange(world.size))])
        ids = np.full((3, each, LENGTH + 5), code("<pad>"))
        ids[0, :, 0] = [code(name) for name in world.names(topics[0])]
        ids[0, :, 1] = code(":")
        defining = world.words[topics[0][:, None], rng.integers(WORDS, size=(each, LENGTH))]
        ids[0, :, 2 : LENGTH + 2] = word[defining]
        ids[1, :, :LENGTH] = word[world.draw(topics[1], rng)]
        texts = world.draw(topics[2], rng)
        there = texts[np.arange(each), rng.integers(LENGTH, size=each)]
        asked = np.where(rng.random(each) < 0.5, there, rng.integers(world.size, size=each))
        answers = np.where((texts == asked[:, None]).any(1), code("yes"), code("no"))
        columns = [word[asked][:, None], np.full((each, 1), code("?")), word[texts]]
        columns += [np.tile([code("answer"), code(":")], (each, 1)), answers[:, None]]
        ids[2] = np.concatenate(columns, axis=1)
        rows = torch.from_numpy(ids.reshape(self.rows, -1)[start:stop])
        real = rows != code("<pad>")
        return {"input_ids": rows, "attention_mask": real.long(), "labels": rows.masked_fill(~real, IGNORED)}


class _Experiment:
    def __init__(self, scale: Scale, seed: int, directory: Path) -> None:
        self.setting, self.seed, self.directory = _SETTINGS[scale], seed, directory
        self.world = _World(seed)
        size = self.setting.hidden
        weights = derive_seed(seed, "weights")
        self.fresh = tiny_llama(self.world.tokenizer, size, 2, 4, 5 * size // 2, 32, generator_seed=weights)
        stream = _Reading(self.world)
        self.base = fit(
            Phase("pretraining", copy.deepcopy(self.fresh), stream, CausalObjective()),
            budget=Budget(steps=self.setting.pretraining_steps),
            optim=OptimSpec(lr=3e-3),
            seed=seed,
            directory=cache_dir("meta-tuning", cache_key([asdict(self.setting), seed, stream.fingerprint])),
            settings=FLOAT32,
        ).model

    def scorer(self, model: nn.Module) -> YesNoScorer:
        return YesNoScorer(model, self.world.tokenizer)

    def tuned(self, start: nn.Module, datasets: Sequence[int], lr: float, name: str) -> nn.Module:
        """``start`` trained on the questions of some data sets."""
        world = self.world
        described = [
            LabelDescription(f"d{dataset}", f"n{topic}", f"n{topic} ?", f"g{dataset}")
            for dataset in (*TRAIN, VALIDATION, *TEST)
            for topic in range(TOPICS * dataset, TOPICS * (dataset + 1))
        ]
        train, _ = group_split(described, [f"g{d}" for d in (*TRAIN, VALIDATION, *TEST) if d not in datasets])
        labelled = {}
        for dataset in datasets:
            texts, topics = world.texts(dataset, "train", self.setting.texts)
            labelled[f"d{dataset}"] = (world.shown(texts), world.names(topics.tolist()))
        meta = build_meta_dataset(labelled, train, seed=self.seed)
        scorer = self.scorer(copy.deepcopy(start))
        targets = np.eye(2, dtype=np.float32)[meta["answer"][:]]
        stream = ClassStream(
            scorer.encode(meta["text"][:], meta["question"][:]),
            targets,
            rows=64,
            seed=self.seed,
            pad=world.ids["<pad>"],
        )
        return fit(
            Phase(f"{name}-{len(datasets)}-{lr:g}", scorer.model, stream, MetaTuningObjective(scorer)),
            budget=Budget(steps=self.setting.steps),
            optim=OptimSpec(lr=lr, betas=(0.9, 0.999), warmup=0.02, schedule="linear", final_lr=0.0),
            seed=self.seed,
            directory=self.directory,
            settings=FLOAT32,
        ).model

    def aucs(self, score: Callable[[NDArray[np.int64], range], NDArray[np.float64]], dataset: int) -> list[float]:
        """AUC of every topic's question on fresh texts; ``score`` takes texts and topics, and gives ``(n, topics)``."""
        texts, topics = self.world.texts(dataset, "test", self.setting.tested)
        asked = range(TOPICS * dataset, TOPICS * (dataset + 1))
        found: list[float] = description_auc(score(texts, asked), topics[:, None] == np.array(asked)).tolist()
        return found

    def answers(self, model: nn.Module) -> Callable[[NDArray[np.int64], range], NDArray[np.float64]]:
        """Scores by asking."""

        def score(texts: NDArray[np.int64], topics: range) -> NDArray[np.float64]:
            questions = {name: [f"{name} ?"] for name in self.world.names(topics)}
            return ZeroShotClassifier(self.scorer(model), questions).question_scores(self.world.shown(texts))

        return score

    def information(self, bag: bool) -> Callable[[NDArray[np.int64], range], NDArray[np.float64]]:
        """Scores by how much likelier a text is after a name than after any."""

        def score(texts: NDArray[np.int64], topics: range) -> NDArray[np.float64]:
            code = self.world.ids
            words = torch.tensor([[code[word] for word in self.world.written(text)] for text in texts])
            found = []
            with scoring(self.base):
                for name in self.world.names(topics):
                    start = torch.tensor([[code[name], code[":"]]])
                    ids = start if bag else torch.cat([start.expand(len(texts), 2), words[:, :-1]], 1)
                    logs = self.base(input_ids=ids, use_cache=False).logits[:, 1:].double().log_softmax(-1)
                    found.append(logs.expand(len(texts), LENGTH, -1).gather(2, words[..., None])[..., 0])
            each = torch.stack(found, dim=1)  # texts, topics, words
            whole = each if bag else each.sum(2, keepdim=True)
            result: NDArray[np.float64] = (whole - whole.logsumexp(1, keepdim=True)).sum(2).numpy()
            return result

        return score

    def counted(self, texts: NDArray[np.int64], topics: range) -> NDArray[np.float64]:
        """Scores of one who knows the words of every topic."""
        return np.stack([np.isin(texts, self.world.words[topic]).sum(1) for topic in topics], 1).astype(np.float64)


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Pretrain, meta-tune, choose on the sixth data set, and take the AUC of every question of the last two."""
    run = _Experiment(scale, seed, directory)
    notes: dict[str, str] = {}

    def chosen(start: nn.Module, name: str) -> tuple[nn.Module, float]:
        tuned = {lr: run.tuned(start, TRAIN, lr, name) for lr in run.setting.learning_rates}
        validated = {lr: float(np.mean(run.aucs(run.answers(model), VALIDATION))) for lr, model in tuned.items()}
        best = max(validated, key=validated.__getitem__)
        notes[f"seed-{seed}/{name}"] = f"learning rate {best:g}, validation AUC {validated[best]:.3f}"
        return tuned[best], best

    meta, lr = chosen(run.base, "meta-tuned")
    fresh, _ = chosen(run.fresh, "random-start")
    uses = {
        "yes or no": run.answers(run.base),
        "information": run.information(bag=False),
        "information, bag of words": run.information(bag=True),
    }
    validated = {name: float(np.mean(run.aucs(score, VALIDATION))) for name, score in uses.items()}
    best = max(validated, key=validated.__getitem__)
    notes[f"seed-{seed}/out of the box"] = f"{best}, validation AUC {validated[best]:.3f}"
    scores = {
        "meta-tuned": run.answers(meta),
        "random start": run.answers(fresh),
        "out of the box": uses[best],
        "yes or no": uses["yes or no"],
        "9 topics": run.answers(run.tuned(run.base, FEW, lr, "meta-tuned")),
        "18 topics": run.answers(run.tuned(run.base, SOME, lr, "meta-tuned")),
        "counted": run.counted,
    }
    items = {
        arm: {"auc": [auc for dataset in TEST for auc in run.aucs(score, dataset)]} for arm, score in scores.items()
    }
    arms = {arm: {"auc": float(np.mean(own["auc"]))} for arm, own in items.items()}
    learned = float(np.mean(run.aucs(scores["meta-tuned"], TRAIN[0])))
    notes[f"seed-{seed}/auc"] = ", ".join(f"{arm} {own['auc']:.3f}" for arm, own in arms.items())
    fingerprint = _Reading(run.world).fingerprint
    unmet = [f"seed {seed}: {words}" for words in _unmet(arms, learned)]
    return Measured(arms, items, fingerprint, unmet, notes)


def _unmet(arms: Mapping[str, Mapping[str, float]], learned: float) -> list[str]:
    known = arms["out of the box"]["auc"]
    said = []
    if known > 1 - MARGIN:
        said.append(f"out of the box the AUC is {known:.3f}; needed at most {1 - MARGIN}")
    if known < LEAST_KNOWN:
        said.append(f"out of the box the AUC is {known:.3f}; needed {LEAST_KNOWN}")
    if learned < LEAST_LEARNED:
        said.append(f"on questions trained on, the AUC is {learned:.3f}; needed {LEAST_LEARNED}")
    return said


def _part(statement: str, treatment: str, baseline: str, margin: float, decides: bool) -> Part:
    return Part(statement, "auc", treatment, baseline, "higher", margin, decides=decides)


CLAIM = Claim(
    id="meta_tuning",
    statement="In a world of 72 topics, a causal model of two layers, meta-tuned on questions about 45 of them, has an "
    "AUC on the questions of 18 unseen ones that is more than 0.05 above its best use out of the box, and above the "
    "same training from random weights.",
    source="Zhong, Lee, Zhang and Klein, arXiv:2104.04670: a meta-tuned T5 of 770M parameters has a higher AUC than a "
    "question-answering model of its size on most unseen label descriptions, and larger models gain more.",
    parts=(
        _part(
            "Meta-tuning is more than 0.05 above the best use of the model out of the box.",
            "meta-tuned",
            "out of the box",
            MARGIN,
            decides=True,
        ),
        _part(
            "It is more than 0.05 above the same training from random weights.",
            "meta-tuned",
            "random start",
            MARGIN,
            decides=True,
        ),
        _part(
            "It is more than 0.05 above the model's own yes or no, the comparison of the paper.",
            "meta-tuned",
            "yes or no",
            MARGIN,
            decides=False,
        ),
        _part("18 topics give more than 9.", "18 topics", "9 topics", 0.0, decides=False),
        _part("45 topics give more than 18.", "meta-tuned", "18 topics", 0.0, decides=False),
    ),
    rival="out of the box",
    preconditions=(
        f"the best use out of the box has an AUC of at least {LEAST_KNOWN}, and at most {1 - MARGIN}",
        f"the meta-tuned model has an AUC of at least {LEAST_LEARNED} on questions that it was trained on",
    ),
    seeds={"smoke": (0,), "small": (100, 101, 102)},
    measure=measure,
)
