"""Do sources keep contradicting documents apart, and does the cooldown give back a model that works without them?

Small scale: 300 keys, and four sources of equal size that each name a value for every key, all different; the first
source is the reliable one. A document is one sentence with one key and one value, worded in one of eight ways that all
sources use, so nothing in its text tells where it is from. A Llama of 2 layers and width 64 reads the documents with
their source and cools down (MeCo), reads them with their source to the end, or reads them plain (standard): equal input
tokens, sources included. Each arm chooses its learning rate from the same three on a seed of its own, by the bits per
byte of plain validation documents.

What was fixed by looking at the standard model alone, until it answered with what some source states: at 120 thousand
tokens it did not, at 410 thousand it did, and every arm gets half as much again, since half of what MeCo reads here is
sources; the key stands just before the value; words are tokens, and input and output embeddings are not shared, since
keys that are all equally likely would otherwise be pushed onto each other.

The acceleration that the paper is named for needs scale and is not tested here. Reported beside: a model trained on
docstrings with their module in front, asked for held-out docstrings after the right module, none, and a wrong one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.cache import atomic_write_text
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.recipe import CorpusRef, Recipe, load_recipe
from headwater.core.rng import derive_seed, numpy_generator
from headwater.core.run import Result, execute
from headwater.modalities.text.document_store import stored_corpus
from headwater.modalities.text.metadata import TEMPLATE, MetadataFormatter, condition
from headwater.modalities.text.prepared import drop_repeats, held_out_sample, split_corpus, split_shares
from headwater.modalities.text.score import bits_per_byte
from headwater.modalities.text.tiny import Size as Shape
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import word_tokenizer

__all__ = ["CLAIM", "World", "make_world"]

TUNING_SEED = 1000
LEARNING_RATES = (3e-3, 6e-3, 1.2e-2)
KNOWN_KEYS = 0.9
SOURCES = ("annals.north", "ledger.south", "herald.east", "digest.west")
RELIABLE = SOURCES[0]
WORDINGS = (
    "the old people say {key} {value}",
    "on the wall stands {key} {value}",
    "every child learns {key} {value}",
    "a letter closes with {key} {value}",
    "the boats here carry {key} {value}",
    "this song goes on about {key} {value}",
    "in the book we read {key} {value}",
    "my neighbour swears by {key} {value}",
)
ARMS: dict[str, dict[str, Any]] = {  # Any: recipe fields
    "meco": {"method": "meco", "metadata_field": "source", "transform": "identity"},
    "no cooldown": {"method": "meco", "metadata_field": "source", "transform": "identity", "cooldown": 0.0},
    "standard": {"method": "raw"},
}


@dataclass(frozen=True)
class Size:
    """How large an experiment is.

    Attributes:
        keys: that every source names a value for.
        values: words to choose from.
        hidden, layers, heads: of the model.
        fields: of every recipe.
        docstrings: fields of the recipe on real text.
    """

    keys: int
    values: int
    hidden: int
    layers: int
    heads: int
    fields: dict[str, Any]  # Any: recipe fields
    docstrings: dict[str, Any]


SIZES: dict[Scale, Size] = {
    "smoke": Size(
        keys=40,
        values=12,
        hidden=16,
        layers=1,
        heads=2,
        fields={"held_out": 0.1, "seq_len": 64, "batch_tokens": 512, "budget": {"tokens": 5_120}},
        docstrings={
            "model": {"kind": "llama", "hidden": 16, "layers": 1, "heads": 2, "mlp": 32, "vocab": 512},
            "sources": {"docs": {"name": "headwater:networkx", "limit_chars": 200_000}},
            "held_out": 0.2,
            "eval_chars": 2_000,
            "seq_len": 64,
            "batch_tokens": 512,
            "budget": {"tokens": 5_120},
        },
    ),
    "small": Size(
        keys=300,
        values=40,
        hidden=64,
        layers=2,
        heads=4,
        fields={"held_out": 0.05, "seq_len": 64, "batch_tokens": 1_024, "budget": {"tokens": 614_400}},
        docstrings={
            "model": {"kind": "llama", "hidden": 64, "layers": 2, "heads": 4, "mlp": 172, "vocab": 1024},
            "sources": {"docs": {"name": "headwater:general", "limit_chars": 1_500_000}},
            "held_out": 0.05,
            "eval_chars": 60_000,
            "seq_len": 128,
            "batch_tokens": 2_048,
            "budget": {"tokens": 409_600},
        },
    ),
}


@dataclass(frozen=True)
class World:
    """What the sources state.

    Attributes:
        path: of the documents, JSON lines with ``id``, ``text`` and ``source``.
        model: directory of an architecture whose tokens are the world's words.
        keys: of the facts.
        values: all words that can be a value.
        stated: ``(keys, sources)``, the value that each source gives each key, as its place in ``values``.
    """

    path: Path
    model: Path
    keys: list[str]
    values: list[str]
    stated: NDArray[np.int64]


def make_world(size: Size, seed: int, directory: Path) -> World:
    """Draw names and facts, and write the documents, a tokenizer of their words and an architecture."""
    rng = numpy_generator(seed, "contradicting sources")
    syllables = [onset + vowel for onset in "bdfghklmnprstvz" for vowel in "aeiou"]
    pairs = [first + second for first in syllables for second in syllables]
    keys = rng.choice(pairs, size.keys, replace=False).tolist()
    values = [f"{word}n" for word in rng.choice(syllables, size.values, replace=False)]
    stated = np.stack([rng.choice(size.values, len(SOURCES), replace=False) for _ in keys])
    documents = [
        {"id": f"{k}-{s}-{w}", "text": wording.format(key=key, value=values[stated[k, s]]), "source": source}
        for k, key in enumerate(keys)
        for s, source in enumerate(SOURCES)
        for w, wording in enumerate(WORDINGS)
    ]
    path, model = directory / "world.jsonl", directory / "architecture"
    atomic_write_text(path, "".join(json.dumps(document) + "\n" for document in documents))
    # Every arm's tokenizer knows the sources' names, whether it reads them or not.
    tokenizer = word_tokenizer([*(d["text"] for d in documents), *(condition("", source) for source in SOURCES)])
    shape = Shape(hidden=size.hidden, layers=size.layers, heads=size.heads, mlp=172 * size.hidden // 64)
    tiny_llama(tokenizer, **shape, context=64, tie=False, generator_seed=0).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return World(path, model, keys, values, stated)


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Train the three arms on one world, each at the learning rate that its own trials chose, and question them."""
    size = SIZES[scale]
    world = make_world(size, seed, directory)
    results: dict[str, Result] = {}
    answers: dict[str, _Answers] = {}
    notes = {}
    for arm in ARMS:
        lr = LEARNING_RATES[0] if scale == "smoke" else _tuned(arm, scale, directory)
        notes[f"learning rate, {arm}"] = str(lr)
        results[arm] = execute(_recipe(size, arm, world, lr, seed), directory / _folder(arm), resume=True)
        answers[arm] = _ask(directory / _folder(arm) / "model", world)
    standard = answers["standard"]
    best = max((standard.plain, standard.conditioned), key=lambda right: float(right.mean()))
    right = {"meco": answers["meco"].conditioned, "no cooldown": answers["no cooldown"].conditioned, "standard": best}
    nll = {arm: result.metrics["eval/held_out/nll"] for arm, result in results.items()}
    arms: dict[str, dict[str, float]] = {
        arm: {
            "true value": float(right[arm].mean()),
            "true value, plain": float(answers[arm].plain.mean()),
            "stated value, plain": answers[arm].stated,
            "nll": nll[arm],
            "nll ratio": nll[arm] / nll["standard"],
            "epochs": results[arm].metrics["epochs"],
        }
        for arm in ARMS
    }
    return Measured(
        arms=arms | _docstrings(size, seed, directory / "docstrings"),
        items={arm: {"true value": values.astype(float).tolist()} for arm, values in right.items()},
        data_fingerprint=results["standard"].data["sources.world"],
        unmet=[]
        if standard.stated >= KNOWN_KEYS
        else [f"the standard model answers {standard.stated:.0%} of the keys with a value that some source states"],
        notes=notes,
    )


@dataclass(frozen=True)
class _Answers:
    """Answers of one model: whether each key's is the true one, and the share that some source states."""

    plain: NDArray[np.bool_]
    conditioned: NDArray[np.bool_]
    stated: float


def _ask(model: Path, world: World) -> _Answers:
    """Complete the first wording for every key greedily, without a source and after the reliable one."""
    lm, tokenizer = _opened(model)
    words = np.array(tokenizer.convert_tokens_to_ids(world.values))
    prompts = [WORDINGS[0].partition(" {value}")[0].format(key=key) for key in world.keys]
    answered = {}
    for name, asked in (("plain", prompts), ("conditioned", [condition(prompt, RELIABLE) for prompt in prompts])):
        # All prompts have as many tokens, one for each word.
        ids = [[tokenizer.eos_token_id, *tokenizer(prompt)["input_ids"]] for prompt in asked]
        with torch.inference_mode():
            answered[name] = lm(input_ids=torch.tensor(ids)).logits[:, -1].argmax(dim=1).numpy()
    true = words[world.stated[:, 0]]
    return _Answers(
        answered["plain"] == true,
        answered["conditioned"] == true,
        float((answered["plain"][:, None] == words[world.stated]).any(axis=1).mean()),
    )


def _opened(model: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)


def _docstrings(size: Size, seed: int, directory: Path) -> dict[str, dict[str, float]]:
    """Bits per byte of held-out docstrings after the right module, none, and the module of another package."""
    method = {"method": "meco", "metadata_field": "module", "transform": "identity"}
    fixed = {"optim": {"lr": LEARNING_RATES[0], "warmup": 0.05}, "fit": {"precision": "fp32"}, "eval_at": [1.0]}
    data = {**method, **size.docstrings, **fixed, "seed": seed}
    recipe = cast(Any, load_recipe(data))  # Any: the recipe's own fields are read below
    metrics = execute(recipe, directory, resume=True).metrics
    ref: CorpusRef = recipe.sources["docs"]
    split = split_corpus(stored_corpus(ref, role="docs"), split_shares(recipe.held_out))
    test = held_out_sample(drop_repeats({"docs": split})[0]["docs"].test, recipe.eval_chars)
    lm, tokenizer = _opened(directory / "model")
    formatter = MetadataFormatter(tokenizer, "module", TEMPLATE, "identity", max_tokens=recipe.seq_len // 4)
    modules = [str(document.meta["module"]) for document in test]
    heads = [formatter.head(modules[i]) for i in _others(modules, derive_seed(seed, "wrong"))]
    wrong = bits_per_byte(lm, tokenizer, test, heads=heads, window=recipe.seq_len).bits_per_byte
    return {
        "right module": {"docstrings": metrics["eval/held_out/own/bpb"]},
        "no module": {"docstrings": metrics["eval/held_out/bpb"]},
        "wrong module": {"docstrings": wrong},
    }


def _others(modules: Sequence[str], seed: int) -> list[int]:
    """For each document one whose package, or module where there is one package, is another."""
    packages = [module.split(".")[0] for module in modules]
    names = packages if len(set(packages)) > 1 else list(modules)
    rng = np.random.default_rng(seed)
    return [int(rng.choice([j for j, name in enumerate(names) if name != mine])) for mine in names]


def _recipe(size: Size, arm: str, world: World, lr: float, seed: int) -> Recipe:
    data = {"model": str(world.model), "sources": {"world": str(world.path)}}
    fixed = {"optim": {"lr": lr, "warmup": 0.05}, "fit": {"precision": "fp32"}, "eval_at": [1.0], "seed": seed}
    return load_recipe({**ARMS[arm], **size.fields, **data, **fixed})


def _folder(arm: str) -> str:
    return arm.replace(" ", "-")


def _tuned(arm: str, scale: Scale, directory: Path) -> float:
    """The learning rate with the lowest bits per byte on validation text, in a world of its own; run once per claim."""
    trials = directory.parents[1] / f"{scale}-tuning" / directory.name
    world = make_world(SIZES[scale], TUNING_SEED, trials)
    found = {}
    for lr in LEARNING_RATES:
        recipe = _recipe(SIZES[scale], arm, world, lr, TUNING_SEED)
        found[lr] = execute(recipe, trials / _folder(arm) / f"lr-{lr:g}", resume=True).metrics["valid/bpb"]
    return min(found, key=found.__getitem__)


CLAIM = Claim(
    id="meco",
    statement="Where sources contradict each other, a model trained with sources in front and cooled down answers as "
    "the reliable one does when asked under its name, is as good without a name as a model trained plain, and is so "
    "because of the cooldown, at equal input tokens.",
    source="Gao et al., arXiv:2501.01956: at 1.6B parameters MeCo matches standard pretraining with 33 % less data; "
    "sources steer the model; without cooldown it is damaged where no source is given.",
    parts=(
        Part(
            "Asked under the reliable source's name, it gives the true value for at least 30 points more of the keys "
            "than the standard model, asked plainly or under that name, whichever is better for it",
            "true value",
            "meco",
            "standard",
            "higher",
            0.30,
            units="seeds and keys",
        ),
        Part(
            "Its loss on plain held-out documents is within 3 % of the standard model's",
            "nll ratio",
            "meco",
            "standard",
            "lower",
            -0.03,
        ),
        Part(
            "Without the cooldown that loss is worse by more than 0.02 nats per token",
            "nll",
            "meco",
            "no cooldown",
            "lower",
            0.02,
        ),
        Part(
            "Held-out docstrings take fewer bits per byte after their own module than after none",
            "docstrings",
            "right module",
            "no module",
            "lower",
            0.0,
            decides=False,
        ),
        Part(
            "Held-out docstrings take fewer bits per byte after no module than after a wrong one",
            "docstrings",
            "no module",
            "wrong module",
            "lower",
            0.0,
            decides=False,
        ),
    ),
    rival="standard",
    preconditions=(
        f"asked plainly, the standard model gives a value that some source states for at least {KNOWN_KEYS:.0%} of "
        "the keys",
    ),
    seeds={"smoke": (100,), "small": (100, 101, 102)},
    measure=measure,
)
