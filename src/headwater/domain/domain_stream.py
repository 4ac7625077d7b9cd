"""A sequence of domains: continued pretraining on one after another, and what each stage did to every domain.

    theta_j = train(theta_{j-1}, D_j),   p[i, j] = bits per byte of theta_i on D_j,   j = 1 .. N

One pass over each domain, in sequence: with the budget divided in proportion to their tokens, all are read equally
often. The optimizer starts afresh in each, and by default nothing is replayed. The order is a chain of nearest
neighbours from the general corpus by the cosine of mean embeddings (``similar``), or random. ``transfer.py`` holds the
measures.

Source: Yıldız et al., "Investigating Continual Pretraining in Large Language Models: Insights and Implications",
arXiv:2402.17400.
Differs: bits per byte for perplexity; TF-IDF embeddings where no sentence encoder is there; replay, a warm-up in every
    domain, ``dissimilar`` and given orders are added. A small constant learning rate (5e-5) and batches of 64 x 1024
    tokens, as recalled for GPT-2, are unverified.
Needs: a base model; three domains or more, each a corpus of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, model_validator
from torch import nn

from headwater.core.budget import Meter
from headwater.core.cache import atomic_write_text
from headwater.core.family import Axis
from headwater.core.figures import heat_map_svg, standalone
from headwater.core.fit import BatchStream, Phase, Trained, fit_phases
from headwater.core.optim import OptimSpec
from headwater.core.phase import EvalAt
from headwater.core.recipe import CorpusRef, Metrics
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Continuation
from headwater.domain.corpus import Prepared, prepare_each
from headwater.domain.evaluation import Evaluation
from headwater.domain.order import Encoder, How, check_order, domain_embeddings, order_domains, unit
from headwater.domain.transfer import TransferMatrix, similarity_transfer_correlation
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import Document
from headwater.modalities.text.document_store import DocumentStore

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["DomainStream", "TransferMatrix", "domain_embeddings", "order_domains", "similarity_transfer_correlation"]

Floats = NDArray[np.float64]
DomainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]

SHARED_IN_SILENCE = 0.05
EMBEDDED_DOCUMENTS, EMBEDDED_CHARS = 64, 1_000
"""Of each domain: so many documents, evenly spaced, and so much of each."""


class DomainStream(Continuation):
    """Continued pretraining on domains one after another, with the matrix of what each stage did."""

    id: ClassVar[str] = "domain_stream"

    domains: dict[DomainName, CorpusRef] = Field(
        min_length=3, description="name -> texts of a domain; each is split into train, validation and test"
    )
    order: How | tuple[DomainName, ...] = Field(
        default="similar",
        description="similar or dissimilar: a chain of nearest or farthest domains that begins nearest to the general "
        "corpus; random: by the seed; or all names in their order",
    )
    embedding: Annotated[Encoder, Field(union_mode="left_to_right")] = Field(
        default="auto",
        description="what domains are compared by: a sentence encoder, `tfidf`, or `auto`: MiniLM where it is "
        "installed, else tfidf",
    )
    restart_optimizer: bool = Field(default=True, description="begin each domain without the moments of the one before")
    warmup_each: bool = Field(
        default=True, description="a whole learning-rate schedule for each domain; false: one over the whole stream"
    )
    replay_seen: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of every batch drawn from the domains learned before"
    )
    dapt: bool = Field(
        default=True,
        description="train a model on each domain alone too, outside the budget, charged as cost/dapt_...",
    )
    keep_checkpoints: Literal["all", "last", "diagonal"] = Field(
        default="last",
        description="which models are saved: last: the final one; diagonal: also the one after each stage, in models/; "
        "all: also those trained on one domain alone",
    )
    batch_tokens: int = Field(default=65_536, gt=0, description="tokens per optimizer step")  # 64 x 1024, unverified
    optim: OptimSpec = Field(
        default=OptimSpec(lr=5e-5, schedule="constant"),  # unverified
        description="how weights are moved: AdamW at a constant rate after a warm-up",
    )
    eval_at: EvalAt = Field(
        default=(0.0, 0.1, 0.5, 1.0),
        description="fractions of each domain's part of the budget at which excerpts of all texts are scored",
    )
    eval_chars: int = Field(
        default=30_000,
        gt=0,
        description="characters of each test set that are scored after every stage, at least twenty whole documents",
    )

    @model_validator(mode="after")
    def _order_and_shares(self) -> Self:
        if not isinstance(self.order, str):
            check_order(self.order, list(self.domains))
        if self.replay + self.replay_seen >= 1:
            raise ValueError(
                f"replay ({self.replay}) and replay_seen ({self.replay_seen}) leave nothing of a batch to the domain; "
                "their sum must be below 1"
            )
        return self

    def run(self, run: Run) -> Metrics:
        """Prepare and order the domains, train stage by stage with a row of the matrix after each, then each alone."""
        stream = _Stream.open(self, run)
        evaluation = Evaluation(self, stream.ctx, run, stream.prepared)
        evaluation.before()
        rows = _Rows(run)

        def stage_ended(phase: Phase, trained: Trained) -> None:
            evaluation.add_trajectory(phase, trained)
            rows.get(phase.name, lambda: evaluation.score_tests(trained.model))

        def alone_ended(phase: Phase, trained: Trained) -> None:
            role = _role(phase.name.removeprefix(ALONE))
            rows.get(phase.name, lambda: {role: evaluation.score_test(trained.model, role)})

        model = fit_phases(
            stream.stages(), meter=stream.ctx.meter, evaluate=evaluation.midway, eval_at=self.eval_at,
            began=stream.ctx.note_phase, ended=stage_ended, **self._fitted(run),
        )  # fmt: skip
        metrics = evaluation.after(model, rows.found[stream.stage_name(len(stream.order))])
        stream.ctx.save(model, run, files=LEFT, read=" then ".join(f"`{name}`" for name in stream.order))
        if self.dapt:
            spent = Meter()
            fit_phases(
                stream.alone(), meter=spent, evaluate=evaluation.midway, eval_at=(), ended=alone_ended,
                **self._fitted(run),
            )  # fmt: skip
            amounts = {name: float(getattr(spent.cost, name)) for name in ("tokens", "flops", "seconds")}
            metrics |= {f"cost/dapt_{name}": amount for name, amount in amounts.items() if np.isfinite(amount)}
        matrix = stream.matrix(evaluation.start["items"], rows)
        _leave(matrix, run)
        run.cost = {**stream.ctx.meter.cost.to_dict(), "trainable": stream.ctx.trainable}
        return metrics | matrix.summary() | stream.figures(matrix)

    def _fitted(self, run: Run) -> dict[str, Any]:  # Any: arguments of fit_phases
        """What training in sequence and training alone share."""
        return {
            "budget": lambda: self.budget,
            "optim": self.optim,
            "seed": self.seed,
            "directory": run.directory,
            "settings": self.fit,
            "log": run.log,
        }


ALONE = "alone-"
LEFT = ("matrix.npz", "matrix.json", "heat-map.svg", "order.json")


@dataclass
class _Stream:
    """The domains of a run: each one an adaptation with the corpora of its own, all from one starting model.

    Attributes:
        recipe: what runs.
        run: where it runs.
        contexts: by domain, in the order of the recipe.
        order: of the stages.
        alike: ``(N, N)``, cosines of the domains' embeddings, in the order of the stages.
        shares: of the budget, by domain; in proportion to training tokens.
    """

    recipe: DomainStream
    run: Run
    contexts: dict[str, Adaptation]
    order: list[str]
    alike: Floats
    shares: dict[str, float]

    @classmethod
    def open(cls, recipe: DomainStream, run: Run) -> Self:
        """Read what the recipe names, refuse what cannot work, and choose the order; writes ``order.json``."""
        roles = {_role(name): ref for name, ref in recipe.domains.items()}
        prepared = prepare_each(roles, recipe.general, held_out=recipe.held_out)
        first = Adaptation.of(recipe, next(iter(prepared.values())), run)
        contexts = {name: replace(first, prepared=prepared[_role(name)]) for name in recipe.domains}
        for part in prepared.values():
            for role, found in part.fingerprints.items():
                run.record_data(role, found)
        tokens = {name: float(ctx.num_tokens(ctx.domain.train).sum()) for name, ctx in contexts.items()}
        shares = {name: own / sum(tokens.values()) for name, own in tokens.items()}
        _check_budget(first, shares)
        _warn_of_shared(contexts)
        order, alike = _choose_order(recipe, contexts, run)
        stream = cls(recipe, run, contexts, order, alike, shares)
        last = contexts[order[-1]]
        last.domain_epochs(last.domain.train, (1 - recipe.replay - recipe.replay_seen) * shares[order[-1]])
        return stream

    @property
    def ctx(self) -> Adaptation:
        """The context whose meter is charged and in whose name is saved."""
        return next(iter(self.contexts.values()))

    @property
    def prepared(self) -> dict[str, Prepared]:
        """Corpora by role."""
        return {_role(name): ctx.prepared for name, ctx in self.contexts.items()}

    def stage_name(self, number: int) -> str:
        """Of a stage, counted from 1: its phase and the row of the matrix after it."""
        return f"{number:02d}-{self.order[number - 1]}"

    def stages(self) -> Generator[Phase, Trained, nn.Module]:
        """Train one model on all domains in order."""
        recipe, model = self.recipe, self.ctx.start()
        before: Phase | None = None
        begun = 0.0
        for number, name in enumerate(self.order, start=1):
            share = self.shares[name]
            phase = Phase(
                self.stage_name(number),
                model,
                self._mixed(name, seen=self.order[: number - 1]),
                self.ctx.objective,
                share=share,
                schedule_span=None if recipe.warmup_each else share,
                schedule_start=0.0 if recipe.warmup_each else begun,
                continues=None if recipe.restart_optimizer else before,
            )
            trained = yield phase
            if recipe.keep_checkpoints != "last":
                self._keep(trained.model, phase.name, " then ".join(f"`{n}`" for n in self.order[:number]))
            before, begun = phase, begun + share
        return model

    def alone(self) -> Generator[Phase, Trained, None]:
        """Train the starting model on each domain; not on the first where its stage in the stream is just that."""
        for name in self.order[1 if self.recipe.warmup_each else 0 :]:
            trained = yield Phase(
                f"{ALONE}{name}", self.ctx.start(), self._mixed(name), self.ctx.objective, share=self.shares[name]
            )
            if self.recipe.keep_checkpoints == "all":
                self._keep(trained.model, f"{ALONE}{name}", f"`{name}` alone")

    def _mixed(self, name: str, seen: Sequence[str] = ()) -> BatchStream:
        """A domain's text, with shares of general text and of domains seen before, those in proportion to tokens."""
        replay, before = self.recipe.replay, self.recipe.replay_seen if seen else 0.0
        parts: list[tuple[Sequence[Document], float]] = [(self.contexts[name].domain.train, 1 - replay - before)]
        if self.ctx.general is not None:
            parts.append((self.ctx.general.train, replay))
        total = sum(self.shares[other] for other in seen)
        parts += [(self.contexts[other].domain.train, before * self.shares[other] / total) for other in seen]
        return self.ctx.mix(parts)

    def _keep(self, model: nn.Module, name: str, read: str) -> None:
        self.ctx.save(model, self.run, read=read, to=self.run.path("models") / name)

    def matrix(self, start: Mapping[str, Any], rows: _Rows) -> TransferMatrix:  # Any: JSON data
        """The matrix of what was scored."""
        scored = [start, *(rows.found[self.stage_name(number)] for number in range(1, len(self.order) + 1))]
        bpb = np.array([[_bits(row[_role(name)]) for name in self.order] for row in scored])
        if not self.recipe.dapt:
            return TransferMatrix(bpb, tuple(self.order))
        found = [rows.found.get(f"{ALONE}{name}", scored[1]) for name in self.order]
        alone = [_bits(row[_role(name)]) for row, name in zip(found, self.order, strict=True)]
        return TransferMatrix(bpb, tuple(self.order), np.array(alone))

    def figures(self, matrix: TransferMatrix) -> Metrics:
        """Facts about the data, and whether alike domains help each other."""
        each = [ctx.data_metrics() for ctx in self.contexts.values()]
        facts = {
            **each[0],
            "data/domain_documents": sum(facts["data/domain_documents"] for facts in each),
            "domain/bytes_per_token": float(np.mean([facts["domain/bytes_per_token"] for facts in each])),
            "data/epochs": self.contexts[self.order[-1]].epochs,
        }
        found = {**facts, "stream/similarity_transfer": similarity_transfer_correlation(matrix, self.alike)}
        return {name: value for name, value in found.items() if value is not None and np.isfinite(value)}


class _Rows:
    """Scores by phase, each kept as a file when it comes, so that a resumed run scores nothing twice."""

    def __init__(self, run: Run) -> None:
        # Read once, before anything is trained: every process of a run sees the same.
        stored = sorted(run.nested("rows").glob("*.json"))
        self.found: dict[str, Any] = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in stored}
        self._home = run.path("rows")

    def get(self, name: str, score: Callable[[], dict[str, Any]]) -> None:  # Any: JSON data
        """Score, unless that was done before."""
        if name not in self.found:
            self.found[name] = score()
            atomic_write_text(self._home / f"{name}.json", json.dumps(self.found[name]))


def _role(name: str) -> str:
    return f"domains.{name}"


def _bits(item: Sequence[Sequence[float]]) -> float:
    """Bits per unit, from nats and numbers of units of documents."""
    return float(np.sum(item[0]) / np.log(2) / np.sum(item[1]))


def _check_budget(ctx: Adaptation, shares: Mapping[str, float]) -> None:
    tokens, name = ctx.budget_tokens(), min(shares, key=lambda name: shares[name])
    if tokens is not None and tokens * shares[name] + 1e-6 < ctx.rows * ctx.seq_len:
        raise ModelError(
            f"the budget gives {int(tokens * shares[name])} tokens to domain {name!r}, less than one step of "
            f"{ctx.rows * ctx.seq_len}; raise the budget, lower batch_tokens, or give that domain more text"
        )


def _warn_of_shared(contexts: Mapping[str, Adaptation]) -> None:
    for name, ctx in contexts.items():
        for other, share in ctx.prepared.shared.items():
            if share > SHARED_IN_SILENCE:
                twin = other.removeprefix(_role(""))
                ctx.warn(
                    f"shared/{name}/{twin}",
                    f"{share:.0%} of the documents of domain {name!r} stand in {twin!r} too; what looks like transfer "
                    "between them is partly the same text",
                )


def _choose_order(recipe: DomainStream, contexts: Mapping[str, Adaptation], run: Run) -> tuple[list[str], Floats]:
    """The order, and the domains' cosines in it."""
    stores = {name: ctx.domain.train for name, ctx in contexts.items()}
    general = next(iter(contexts.values())).general
    texts = {_role(name): _sample(store) for name, store in stores.items()}
    if general is not None:
        texts["general"] = _sample(general.train)
    vectors, made_by = domain_embeddings(texts, recipe.embedding)
    start = vectors.pop("general", None)
    own = {name: vectors[_role(name)] for name in contexts}
    order = order_domains(own, start, recipe.order, seed=recipe.seed)
    units = np.stack([unit(own[name], f"the embedding of {name!r}") for name in order])
    alike: Floats = units @ units.T
    run.write_json(
        "order.json",
        {
            "order": order,
            "how": recipe.order if isinstance(recipe.order, str) else "given",
            "embedding": made_by,
            "similarity": alike.tolist(),
            "similarity_to_general": None if start is None else (units @ unit(start, "general")).tolist(),
        },
    )
    run.notes |= {"order": ", ".join(order), "embedding": made_by}
    return order, alike


def _sample(documents: DocumentStore) -> list[str]:
    places = np.unique(np.linspace(0, len(documents) - 1, EMBEDDED_DOCUMENTS).astype(np.int64))
    return [document.text[:EMBEDDED_CHARS] for document in documents.select(places)]


def _leave(matrix: TransferMatrix, run: Run) -> None:
    """Write the matrix, and a picture of what each stage had gained by then."""
    matrix.save(run.path("matrix.npz").parent)
    gained = (matrix.bpb[0] - matrix.bpb[1:]).tolist()
    names = [f"after {name}" for name in matrix.domains]
    picture = heat_map_svg(gained, names, matrix.domains, Axis("", "Gain over the start", "higher", "bits/byte"), "map")
    atomic_write_text(run.path("heat-map.svg"), standalone(picture))
