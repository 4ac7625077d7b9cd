"""Experiment of ``instruction_balance``: does the residual give back the answers that continuing the model takes away?

One small base, and an instruct model tuned from it to name the package that a docstring is of. New text: sympy. Every
arm continues for the same number of steps at one learning rate: the base with the residual added, the instruct model
itself, and the base that is then tuned on the answers again, whose tuning comes on top. All are asked the same held-out
prompts. The form of an answer (its first token is one of a package's) and its being right are measured apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.claims.package_answers import (
    PACKAGES,
    PROMPT_TOKENS,
    TRAIN_TOKENS,
    answered,
    tuned_on_answers,
    write_prompts,
)
from headwater.core.budget import Budget
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.fit import FitSettings
from headwater.core.optim import OptimSpec
from headwater.core.recipe import CorpusRef, DataRef, ModelRef
from headwater.core.run import execute
from headwater.domain.base import AnswerTask
from headwater.domain.instruction_balance import InstructionBalance
from headwater.domain.references import Frozen
from headwater.modalities.models import load_tokenizer, model_directory
from headwater.modalities.text.bases import HELD_OUT, Base, trained_base
from headwater.modalities.text.docs import Document, drop_overlap, fingerprint, split_documents
from headwater.modalities.text.docstrings import docstring_corpus

__all__ = ["CLAIM"]

DOMAIN = "headwater:sympy"
CONTEXT = 128
LEAST_EXACT = 0.8


@dataclass(frozen=True)
class _Setting:
    base: Base | None  # None: the builtin small-base
    per_package: int  # docstrings, over all sides of the split
    instruct_steps: int
    domain_steps: int
    eval_chars: int
    rows: int
    lr: float  # of every arm


_SETTINGS: Mapping[Scale, _Setting] = {
    "smoke": _Setting(
        Base("headwater:networkx", "causal", 32, 1, 2, 64, 512, CONTEXT, 4, 4),
        per_package=300,
        instruct_steps=3,
        domain_steps=2,
        eval_chars=2_000,
        rows=4,
        lr=2e-3,
    ),
    "small": _Setting(
        None, per_package=1_000, instruct_steps=360, domain_steps=120, eval_chars=20_000, rows=8, lr=4e-3
    ),
    "full": _Setting(
        Base(hidden=384, layers=6, heads=6, mlp=1024, vocab=8192, context=CONTEXT, rows=64, steps=4_000, lr=1e-3),
        per_package=4_000,
        instruct_steps=1_500,
        domain_steps=600,
        eval_chars=400_000,
        rows=64,
        lr=5e-4,
    ),
}


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Tune the instruct model, run every arm by its recipe, ask all of them."""
    setting = _SETTINGS[scale]
    directory.mkdir(parents=True, exist_ok=True)
    if setting.base is None:
        base = Path(model_directory(ModelRef(name="headwater:small-base")))
    else:
        base = trained_base(setting.base)
    tokenizer = load_tokenizer(ModelRef(name=str(base)))
    documents = docstring_corpus(PACKAGES, max_docs_per_package=setting.per_package)
    split = split_documents(documents, (1 - 1.5 * HELD_OUT, 0.5 * HELD_OUT, HELD_OUT))
    held = [*split.valid, *split.test]
    train = drop_overlap(split.train, held).kept
    instruct = tuned_on_answers(
        base,
        train,
        tokenizer,
        directory / "instruct",
        context=CONTEXT,
        rows=setting.rows,
        steps=setting.instruct_steps,
        lr=setting.lr,
        seed=seed,
    )
    asked, lessons = directory / "asked.jsonl", directory / "lessons.jsonl"
    write_prompts(answered(held, tokenizer, (PROMPT_TOKENS, PROMPT_TOKENS)), asked)
    write_prompts(answered(train, tokenizer, TRAIN_TOKENS), lessons)
    fields: dict[str, Any] = {  # Any: fields of a recipe
        "domain": CorpusRef(name=DOMAIN),
        "downstream": (AnswerTask(name="packages", data=DataRef(name=str(asked))),),
        "seq_len": CONTEXT,
        "batch_tokens": CONTEXT * setting.rows,
        "optim": OptimSpec(lr=setting.lr),
        "eval_at": (),
        "eval_chars": setting.eval_chars,
        "fit": FitSettings(precision="fp32"),
        "seed": seed,
    }
    steps, tuning = setting.domain_steps, setting.instruct_steps
    arms = {}
    for name, arm, budget, own in (
        ("residual", "residual", steps, {}),
        ("continue_instruct", "continue_instruct", steps, {}),
        (
            "continue_then_tune",
            "continue_then_tune",
            steps + tuning,
            {"instructions": DataRef(name=str(lessons)), "tune_share": tuning / (steps + tuning)},
        ),
    ):
        recipe = InstructionBalance(
            model=ModelRef(name=str(base)),
            instruct=ModelRef(name=str(instruct)),
            arm=arm,  # type: ignore[arg-type]  # mypy widens the literals to str
            budget=Budget(steps=budget),
            **own,  # type: ignore[arg-type]  # fields by name
            **fields,
        )
        arms[name] = _figures(execute(recipe, directory / name, resume=True).metrics)
    for name, model in (("continue_base", directory / "residual" / "base"), ("instruct", instruct), ("base", base)):
        recipe_ = Frozen(model=ModelRef(name=str(model)), budget=Budget(steps=1), **fields)
        arms[name] = _figures(execute(recipe_, directory / f"asked-{name}", resume=True).metrics)
    unmet = []
    if (exact := arms["instruct"]["exact"]) < LEAST_EXACT:
        unmet.append(
            f"seed {seed}: the instruct model answers {exact:.2f} of the prompts exactly; needed {LEAST_EXACT}"
        )
    if (gain := arms["base"]["domain_bpb"] - arms["continue_base"]["domain_bpb"]) <= 0:
        unmet.append(f"seed {seed}: continuing the base did not help in the domain ({gain:+.3f} bits/byte)")
    notes = {
        f"seed-{seed}/{arm}": ", ".join(f"{name} {value:.3f}" for name, value in own.items())
        for arm, own in arms.items()
    }
    return Measured(arms, {}, fingerprint([*train, *held, Document("domain", DOMAIN)]), unmet, notes)


def _figures(metrics: Mapping[str, float]) -> dict[str, float]:
    named = ("exact", "form", "cross_entropy")
    return {"domain_bpb": metrics["domain/bpb"]} | {name: metrics[f"downstream/packages/{name}"] for name in named}


CLAIM = Claim(
    id="instruction_balance",
    statement="A base continued on new text, with the instruction residual added, keeps the answers better than the "
    "instruct model continued on that text, and knows the text as well as the continued base tuned on answers again.",
    source="Jindal et al., arXiv:2410.10739: for LLaMa 3, 3.1, Qwen 2 and 2.5, continuing the instruct model loses "
    "instruction following as tokens grow; continuing the base and adding the residual keeps both.",
    parts=(
        Part(
            "Its loss on the right answers is lower than the continued instruct model's.",
            "cross_entropy",
            "residual",
            "continue_instruct",
            "lower",
            0.0,
        ),
        Part(
            "In the domain it is at most 0.02 bits per byte worse than the continued base tuned on the answers again.",
            "domain_bpb",
            "residual",
            "continue_then_tune",
            "lower",
            -0.02,
        ),
        Part(
            "It gives the right answer, exactly, more often than the continued instruct model.",
            "exact",
            "residual",
            "continue_instruct",
            "higher",
            0.0,
            decides=False,
        ),
        Part(
            "Its answers begin as an answer does more often than the continued instruct model's.",
            "form",
            "residual",
            "continue_instruct",
            "higher",
            0.0,
            decides=False,
        ),
        Part(
            "In the domain it is at most 0.02 bits per byte worse than the continued base without the residual.",
            "domain_bpb",
            "residual",
            "continue_base",
            "lower",
            -0.02,
            decides=False,
        ),
    ),
    rival="continue_instruct",
    preconditions=(
        "the instruct model answers at least 80 % of held-out prompts exactly",
        "continuing the base on the domain lowers its bits per byte there",
    ),
    seeds={"smoke": (0,), "small": (100, 101, 102), "full": (100, 101, 102)},
    measure=measure,
)
