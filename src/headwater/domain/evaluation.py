"""The four answers about an adapted model, measured the same way for every method of the stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headwater.core.cache import cached_json
from headwater.core.fit import Phase, Trained
from headwater.core.recipe import Metrics
from headwater.core.rng import derive_seed
from headwater.domain.adaptation import Adaptation
from headwater.domain.corpus import MIN_HELD_OUT_DOCUMENTS, Prepared
from headwater.domain.gap import gap
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import Document, fingerprint
from headwater.modalities.text.ledger import ledger, ledger_metrics
from headwater.modalities.text.prepared import held_out_sample
from headwater.modalities.text.score import Scored, bits_per_byte, choice_scores, linear_probe, masked_bits
from headwater.modalities.text.sources import open_labelled

if TYPE_CHECKING:
    from headwater.core.run import Run
    from headwater.domain.base import Continuation

__all__ = ["Evaluation"]

MIDWAY_CHARS = 12_000
MIDWAY_DOCUMENT_CHARS = 1_000
VALIDATION_CHARS = 100_000
LEDGER_CHARS = 40_000
COMPLETION_TOKENS = 40
_GAINED = {"domain": "domain/gain", "general": "general/forgetting"}


class Evaluation:
    """Scores the starting model, the model on its way, and the adapted model.

    The final figures are on the test documents, whole; figures on the way are on one fixed subsample of the
    validation documents; ``valid/...`` is what hyperparameters may be chosen by.

    Args:
        recipe: what runs.
        ctx: of the run.
        run: where files go.
        domains: by role, where there are several: the figures of the domain are means over them. The context's one
            domain by default.
    """

    def __init__(
        self, recipe: Continuation, ctx: Adaptation, run: Run, domains: Mapping[str, Prepared] | None = None
    ) -> None:
        self.recipe, self.ctx, self.run = recipe, ctx, run
        prepared = ctx.prepared
        parts = {"domain": prepared} if domains is None else domains
        self.domains = tuple(parts)
        self.test = {
            role: held_out_sample(part.domain_test, recipe.eval_chars, at_least=MIN_HELD_OUT_DOCUMENTS)
            for role, part in parts.items()
        }
        self.valid = {role: _first(part.domain.valid or part.domain.train, len(parts)) for role, part in parts.items()}
        if prepared.general is not None:
            self.test["general"] = held_out_sample(
                prepared.general_test, recipe.eval_chars, at_least=MIN_HELD_OUT_DOCUMENTS
            )
            self.valid["general"] = _first(prepared.general.valid or prepared.general.train)
        self.sub = {
            role: _excerpts(documents, 1 if role == "general" else len(parts)) for role, documents in self.valid.items()
        }
        self.tasks = {task.name: open_labelled(task.data, role=f"downstream {task.name}") for task in recipe.downstream}
        if ctx.head != "causal" and (asked := self._named("answers")):
            raise ModelError(
                f"downstream {asked[0]}: answers are asked of a causal model, and {recipe.model.name!r} is a "
                f"{ctx.head} one; use a task of kind probe"
            )
        self.trajectory: dict[str, list[tuple[float, float]]] = {}
        self._tokens_before = 0.0
        unit = "bits/byte" if ctx.head == "causal" else "bits/masked token"
        run.notes["unit"] = unit

    def before(self) -> None:
        """Score the starting model; kept in the user cache, since every contestant starts there."""
        about = {
            "model": self.ctx.start_fingerprint,
            "documents": {role: fingerprint(documents) for role, documents in sorted(self.test.items())},
            "valid": {role: fingerprint(documents) for role, documents in sorted(self.valid.items())},
            "tasks": [task.model_dump(mode="json") for task in self.recipe.downstream],
            "seq_len": self.ctx.seq_len,
            "tokenizer": len(self.ctx.tokenizer),
            "version": 3,
        }
        self.start: dict[str, Any] = cached_json(
            "start-scores", about, lambda: self._score_all(self.ctx.start(lora=False))
        )
        if self.recipe.prompts:
            self._samples = [{"model": "before", **sample} for sample in self._complete(self.ctx.start(lora=False))]

    def score_tests(self, model: nn.Module) -> dict[str, Any]:  # Any: JSON data
        """By role, nats and numbers of units of each test document."""
        return {role: self.score_test(model, role) for role in self.test}

    def score_test(self, model: nn.Module, role: str) -> list[list[float]]:
        """Nats and numbers of units of each test document of one role."""
        scored = self._score(model, self.test[role])
        return [scored.nats.tolist(), scored.counts.tolist()]

    def _score_all(self, model: nn.Module, items: dict[str, Any] | None = None) -> dict[str, Any]:  # Any: JSON data
        valid = {role: self._score(model, documents).bits_per_unit for role, documents in self.valid.items()}
        return {
            "items": self.score_tests(model) if items is None else items,
            "valid": valid,
            "probe": {name: self._probe(model, name).tolist() for name in self._named("probe")},
            "answers": {name: self._answers(model, name) for name in self._named("answers")},
            "ledger": self._ledger(model),
        }

    def _named(self, kind: str) -> list[str]:
        return [task.name for task in self.recipe.downstream if task.kind == kind]

    def _answers(self, model: nn.Module, name: str) -> dict[str, float]:
        prompts, answers = self.tasks[name]
        labels = sorted(set(answers))
        scored = choice_scores(
            cast(Any, model),  # Any: see _score
            self.ctx.tokenizer,
            prompts,
            [labels.index(answer) for answer in answers],
            labels,
            window=self.ctx.seq_len,
        )
        figures = {
            "accuracy": scored.accuracy,
            "exact": scored.exact,
            "form": scored.form,
            "cross_entropy": scored.cross_entropy,
        }
        return {what: float(values.mean()) for what, values in figures.items()}

    def _ledger(self, model: nn.Module) -> dict[str, float]:
        if self.ctx.head != "causal":
            return {}
        general = held_out_sample(self.test.get("general", []), LEDGER_CHARS)
        return ledger(cast(Any, model), self.ctx.tokenizer, general, window=self.ctx.seq_len)  # Any: see _score

    def _score(self, model: nn.Module, documents: Sequence[Document]) -> Scored:
        language_model = cast(Any, model)  # Any: PEFT models answer as the language model they wrap
        if self.ctx.head == "causal":
            return bits_per_byte(language_model, self.ctx.tokenizer, documents, window=self.ctx.seq_len)
        return masked_bits(language_model, self.ctx.tokenizer, documents, window=self.ctx.seq_len)

    def _probe(self, model: nn.Module, name: str) -> NDArray[np.float64]:
        texts, labels = self.tasks[name]
        task = next(task for task in self.recipe.downstream if task.name == name)
        assert task.kind == "probe"
        seeds = [derive_seed(0, "probe", name, draw) % 2**32 for draw in range(task.draws)]
        probe = linear_probe(
            cast(Any, model),
            self.ctx.tokenizer,
            texts,
            labels,
            task.num_labels,
            seeds,
            window=self.ctx.seq_len,  # Any: see _score
        )
        return probe.accuracy

    def midway(self, model: nn.Module) -> dict[str, float]:
        """Bits per unit on the fixed subsample; what ``fit`` calls at ``eval_at``."""
        found = {role: self._score(model, documents).bits_per_unit for role, documents in self.sub.items()}
        means = {"domain/bpb": float(np.mean([found[role] for role in self.domains]))}
        return means | ({"general/bpb": found["general"]} if "general" in found else {})

    def add_trajectory(self, phase: Phase, trained: Trained) -> None:
        """Append a phase's trajectory, its tokens counted from the beginning of the run."""
        for point in trained.trajectory:
            for name, value in point.items():
                series = self.trajectory.setdefault(name, []) if name.endswith("/bpb") else None
                tokens = self._tokens_before + point["tokens"]
                if series is not None and (not series or series[-1][0] < tokens):  # two points may share a step
                    series.append((tokens, value))
        self._tokens_before += trained.tokens

    def after(self, model: nn.Module, items: dict[str, Any] | None = None) -> Metrics:  # Any: JSON data
        """Score the adapted model, write the run's files, and return the metrics.

        Args:
            model: the adapted model.
            items: what ``score_tests`` gave for it, where that is known.
        """
        model.eval()
        end = self._score_all(model, items)
        comparable = self.ctx.head == "causal" or self.ctx.same_tokens
        if not comparable:
            self.run.notes["unit"] = "bits/masked token of its own vocabulary"
            self.ctx.warn(
                "tokenizer",
                "a masked model's bits are per token, and the tokens changed: gain and forgetting are not measured; "
                "compare by downstream tasks",
            )
        metrics: Metrics = {}
        values: dict[str, Any] = {}  # Any: JSON data
        for kind, roles in (("domain", self.domains), ("general", ("general",))):
            if roles[0] not in self.test:
                continue
            metrics |= self._levels(kind, roles, end)
            if comparable:
                measured, values[_GAINED[kind]] = self._difference(kind, roles, end)
                metrics |= measured
        if "general" in self.test and comparable:
            metrics["valid/general_forgetting"] = end["valid"]["general"] - self.start["valid"]["general"]
            metrics |= self._worst()
        for name in self._named("answers"):
            for what, value in end["answers"][name].items():
                metrics[f"downstream/{name}/{what}_start"] = self.start["answers"][name][what]
                metrics[f"downstream/{name}/{what}"] = value
        for name in self._named("probe"):
            first, last = np.array(self.start["probe"][name]), np.array(end["probe"][name])
            metrics |= {
                f"downstream/{name}/accuracy_start": float(first.mean()),
                f"downstream/{name}/accuracy": float(last.mean()),
                f"downstream/{name}/gain": float((last - first).mean()),
            }
        metrics |= ledger_metrics(self.start["ledger"], end["ledger"])
        self.run.write_json("items.json", values)
        if self.trajectory:
            self.run.write_json("trajectory.json", {"x": "tokens", "series": self.trajectory})
        if self.recipe.prompts:
            completed = [{"model": "after", **sample} for sample in self._complete(model)]
            self.run.write_json("samples.json", self._samples + completed)
        return metrics

    def _levels(self, kind: str, roles: Sequence[str], end: dict[str, Any]) -> Metrics:  # Any: JSON data
        """Bits per unit of one kind of text, means over its roles."""
        items = [end["items"][role] for role in roles]
        return {
            f"{kind}/bpb": float(np.mean([_bits(item).mean() / _mean_size(item) for item in items])),
            f"valid/{kind}_bpb": float(np.mean([end["valid"][role] for role in roles])),
        }

    def _difference(self, kind: str, roles: Sequence[str], end: dict[str, Any]) -> tuple[Metrics, dict[str, Any]]:
        """What became of one kind of text, means over its roles, and every document's part in that."""
        befores, afters = ([_bits(side["items"][role]) for role in roles] for side in (self.start, end))
        sizes = [_mean_size(end["items"][role]) for role in roles]
        sign = 1 if kind == "domain" else -1
        better = [sign * (b - a) / n for b, a, n in zip(befores, afters, sizes, strict=True)]
        # Weighted so that the mean over documents is the mean over roles, however many documents each has.
        total = sum(map(len, better))
        values = np.concatenate([one * (total / (len(roles) * len(one))) for one in better])
        names = [d.id if len(roles) == 1 else f"{role}/{d.id}" for role in roles for d in self.test[role]]
        start = float(np.mean([b.mean() / n for b, n in zip(befores, sizes, strict=True)]))
        return {f"{kind}/bpb_start": start, _GAINED[kind]: float(values.mean())}, {
            "ids": names,
            "values": values.tolist(),
        }

    def _worst(self) -> Metrics:
        """The highest forgetting on the way, on the subsample, and after how many tokens it was seen."""
        series = self.trajectory.get("general/bpb")
        if not series:
            return {}
        found = gap(np.array([x for x, _ in series]), np.array([y for _, y in series]))
        self.run.write_json("gap.json", {k: None if math.isinf(v) else v for k, v in asdict(found).items()})
        return {"general/worst": found.depth, "general/worst_at": found.at}

    def _complete(self, model: nn.Module) -> list[dict[str, str]]:
        """Greedy completions of the recipe's prompts; a masked model completes nothing."""
        if self.ctx.head != "causal":
            return []
        found = []
        tokenizer, generator = self.ctx.tokenizer, cast(Any, model)  # Any: generate is not declared on nn.Module
        for prompt in self.recipe.prompts:
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(generator.device)
            with torch.inference_mode():
                output = generator.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=COMPLETION_TOKENS,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found.append({"prompt": prompt, "text": text})
        return found


def _bits(item: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.asarray(item[0]) / math.log(2)


def _mean_size(item: Sequence[Sequence[float]]) -> float:
    # Dividing each document's bits by the mean size makes their mean the corpus figure: total bits / total units.
    return float(np.mean(item[1]))


def _first(documents: Sequence[Document], parts: int = 1) -> list[Document]:
    return held_out_sample(documents, VALIDATION_CHARS // parts)


def _excerpts(documents: Sequence[Document], parts: int = 1) -> list[Document]:
    """The first 1,000 characters of documents, 12,000 in all over all parts: small enough to score nine times a run."""
    cut = [Document(d.id, d.text[:MIDWAY_DOCUMENT_CHARS], d.meta) for d in documents]
    return held_out_sample(cut, MIDWAY_CHARS // parts)
