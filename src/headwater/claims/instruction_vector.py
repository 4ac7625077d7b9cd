"""Experiment of ``instruction_vector``: does the sum of two differences keep what each of the two models can do?

One small base. The instruct model is that base tuned, with the language-model loss on the whole text, on beginnings of
docstrings of two packages followed by the package's name. The domain model is that base continued on networkx. Suites:
held-out networkx text, exact answers on held-out prompts, held-out general text. All arms are scored on the same items;
retention is against the best of base, domain and instruct.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headwater.claims.package_answers import PACKAGES, PROMPT_TOKENS, answered, tuned_on_answers, write_prompts
from headwater.compose.instruction_vector import merge, vector_geometry
from headwater.compose.suites import BitsSuite, ChoiceSuite, Score, Suite, retention
from headwater.core.budget import Budget
from headwater.core.claim import Claim, Measured, Part, Scale
from headwater.core.fit import FitSettings
from headwater.core.optim import OptimSpec
from headwater.core.recipe import CorpusRef, DataRef, ModelRef
from headwater.core.run import execute
from headwater.core.weights import WeightSource
from headwater.domain.references import Plain
from headwater.modalities.models import load_model, load_tokenizer, model_directory
from headwater.modalities.text.bases import HELD_OUT, Base, trained_base
from headwater.modalities.text.docs import Document, drop_overlap, fingerprint, split_documents
from headwater.modalities.text.docstrings import docstring_corpus

__all__ = ["CLAIM"]

CONTEXT = 128
LEAST_EXACT = 0.8
LARGEST_COSINE = 0.3


@dataclass(frozen=True)
class _Setting:
    base: Base | None  # None: the builtin small-base
    per_package: int  # docstrings, over all sides of the split
    instruct_steps: int
    domain_steps: int
    eval_chars: int
    rows: int = 16
    lr: float = 2e-3  # of every arm


_SETTINGS: Mapping[Scale, _Setting] = {
    "smoke": _Setting(
        Base("headwater:networkx", "causal", 32, 1, 2, 64, 512, CONTEXT, 4, 4),
        per_package=300,
        instruct_steps=3,
        domain_steps=2,
        eval_chars=2_000,
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


class _Experiment:
    def __init__(self, scale: Scale, seed: int, directory: Path) -> None:
        self.setting, self.seed, self.directory = _SETTINGS[scale], seed, directory
        base = self.setting.base
        name = model_directory(ModelRef(name="headwater:small-base")) if base is None else str(trained_base(base))
        self.base = Path(name)
        self.tokenizer = load_tokenizer(ModelRef(name=name))
        documents = docstring_corpus(PACKAGES, max_docs_per_package=self.setting.per_package)
        split = split_documents(documents, (1 - 1.5 * HELD_OUT, 0.5 * HELD_OUT, HELD_OUT))
        held = [*split.valid, *split.test]
        self.train = drop_overlap(split.train, held).kept
        self.suites = self._open_suites(held)

    def _open_suites(self, held: Sequence[Document]) -> dict[str, Suite]:
        path = self.directory / "prompts.jsonl"
        write_prompts(answered(held, self.tokenizer, (PROMPT_TOKENS, PROMPT_TOKENS)), path)
        chars = self.setting.eval_chars
        return {
            "domain": BitsSuite(corpus=CorpusRef(name="headwater:networkx"), eval_chars=chars).open("domain"),
            "instruction": ChoiceSuite(data=DataRef(name=str(path)), metric="exact", valid_share=0.2).open(
                "instruction"
            ),
            "general": BitsSuite(corpus=CorpusRef(name="headwater:general"), eval_chars=chars).open("general"),
        }

    def instruct(self, start: Path, name: str) -> Path:
        """``start`` tuned on the prompts and answers."""
        setting = self.setting
        return tuned_on_answers(
            start,
            self.train,
            self.tokenizer,
            self.directory / name,
            context=CONTEXT,
            rows=setting.rows,
            steps=setting.instruct_steps,
            lr=setting.lr,
            seed=self.seed,
        )

    def continued(self, start: Path, name: str) -> Path:
        """``start`` continued on networkx."""
        recipe = Plain(
            model=ModelRef(name=str(start)),
            domain=CorpusRef(name="headwater:networkx"),
            seq_len=CONTEXT,
            batch_tokens=CONTEXT * self.setting.rows,
            optim=OptimSpec(lr=self.setting.lr),
            budget=Budget(steps=self.setting.domain_steps),
            eval_at=(),
            eval_chars=1,
            fit=FitSettings(precision="fp32"),
            seed=self.seed,
        )
        execute(recipe, self.directory / name, resume=True)
        return self.directory / name / "model"

    def score(self, directory: Path) -> dict[str, Score]:
        """A model on the test side of every suite."""
        model = load_model(ModelRef(name=str(directory)), "causal")
        return {name: suite.test(model, self.tokenizer) for name, suite in self.suites.items()}


def measure(scale: Scale, seed: int, directory: Path) -> Measured:
    """Train the two models and the two rivals, merge, score everything."""
    directory.mkdir(parents=True, exist_ok=True)
    run = _Experiment(scale, seed, directory)
    domain, instruct = run.continued(run.base, "domain"), run.instruct(run.base, "instruct")
    paths = {
        "domain": domain,
        "instruct": instruct,
        "continued_instruct": run.continued(instruct, "continued_instruct"),
        "continue_then_tune": run.instruct(domain, "continue_then_tune"),
    }
    parts = {"domain": (domain, 1.0), "instruct": (instruct, 1.0)}
    for name, method in (("merged", "task_arithmetic"), ("average", "linear")):
        paths[name] = directory / name
        if not paths[name].exists():
            merge(run.base, parts, paths[name], method=method)  # type: ignore[arg-type]  # mypy widens the literals to str
    scores = {name: run.score(path) for name, path in {"base": run.base, **paths}.items()}
    geometry = vector_geometry(
        WeightSource.open(run.base), {name: WeightSource.open(paths[name]) for name in ("domain", "instruct")}
    )
    cosine = abs(float(geometry["cosine/domain/instruct"].iloc[-1]))
    arms = {name: _figures(run.suites, scores, name) for name in paths}
    arms["merged"]["cosine"] = cosine
    arms["limit"] = {"cosine": LARGEST_COSINE}
    exact, gain = arms["instruct"]["exact"], scores["base"]["domain"].value - scores["domain"]["domain"].value
    unmet = []
    if exact < LEAST_EXACT:
        unmet.append(
            f"seed {seed}: the instruct model answers {exact:.2f} of the held-out prompts exactly; needed {LEAST_EXACT}"
        )
    if gain <= 0:
        unmet.append(f"seed {seed}: continuing the base did not help in the domain ({gain:+.3f} bits/byte)")
    base = _figures(run.suites, scores, "base")
    notes = {f"base/{name}": f"{value:.3f}" for name, value in base.items()}
    prints = [suite.fingerprint for suite in run.suites.values()]
    return Measured(arms, {}, fingerprint([*run.train, Document("suites", "".join(prints))]), unmet, notes)


def _figures(suites: Mapping[str, Suite], scores: Mapping[str, Mapping[str, Score]], arm: str) -> dict[str, float]:
    own = scores[arm]
    figures = {
        "domain_bpb": own["domain"].value,
        "general_bpb": own["general"].value,
        "cross_entropy": own["instruction"].details["cross_entropy"],
        "exact": own["instruction"].details["exact"],
        "form": own["instruction"].details["form"],
    }
    kept = {}
    for name, suite in suites.items():
        values = [scores[part][name].value for part in ("base", "domain", "instruct")]
        best = max(values) if suite.direction == "higher" else min(values)
        # Where no part answers anything there is nothing to keep; the precondition then fails too.
        kept[f"retention/{name}"] = retention(own[name].value, best, suite.direction) if best > 0 else 0.0
    return figures | kept | {"retention/min": min(kept.values())}


def _kept_more_than(baseline: str, words: str) -> Part:
    return Part(
        f"On its weakest suite the sum keeps more than {words}.", "retention/min", "merged", baseline, "higher", 0.0
    )


CLAIM = Claim(
    id="instruction_vector",
    statement="Adding the instruction vector and the domain vector to their base keeps more of both models' abilities, "
    "on the weakest of three suites, than either model, their average, or continuing the instruct model on the domain; "
    "and the two vectors are nearly orthogonal.",
    source="Hirano and Imajo, arXiv:2409.19854: the merge of a 14B model continued on Japanese financial text with its "
    "instruct counterpart follows instructions and keeps the domain; the two vectors are nearly independent.",
    parts=(
        _kept_more_than("domain", "the domain model alone"),
        _kept_more_than("instruct", "the instruct model alone"),
        _kept_more_than("average", "the average of the two"),
        _kept_more_than("continued_instruct", "the instruct model continued on the domain, at equal budget"),
        Part("The cosine of the two vectors is below 0.3 in size.", "cosine", "merged", "limit", "lower", 0.0),
        Part(
            "In the domain, the sum is not worse than the domain model tuned on the instructions itself.",
            "domain_bpb",
            "merged",
            "continue_then_tune",
            "lower",
            -0.02,
            decides=False,
        ),
    ),
    rival="continued_instruct",
    preconditions=(
        "the instruct model answers at least 80 % of held-out prompts exactly",
        "continuing the base on the domain lowers its bits per byte there",
    ),
    seeds={"smoke": (0,), "small": (100, 101, 102), "full": (100, 101, 102)},
    measure=measure,
)
