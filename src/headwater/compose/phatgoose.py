"""PHATGOOSE: experts trained apart, one gate each trained afterwards, and tokens that find their experts by the gates.

Gate training, everything frozen but v, which starts at 0:

    y = W u + sigmoid(v . u) B A u        on the expert's own data and loss

Then the sigmoid is gone, and v, standardised, is the expert's routing vector (``headwater.compose.routing``):

    alpha_e = v_bar_e . u_bar / sqrt(n),   w = softmax of the k largest,   y = W u + sum_e w_e B_e A_e u

Source: Muqeeth, Liu, Liu and Raffel, "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
arXiv:2402.05859.
Differs: experts need not adapt the same layers; the paper's retrieval of one expert by the similarity of sentences is
not here.
Needs: LoRA adapters of one base, and a little of the data that each was trained on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import pandas as pd
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from headwater.compose.base import CallableModel, Composed, Composition, CompositionContext
from headwater.compose.emulated_files import PartFile
from headwater.compose.gates import (
    GATE_BUDGET,
    GATE_OPTIM,
    arrow_prototypes,
    average_activations,
    random_vectors,
    train_gates,
)
from headwater.compose.routing import LowRank, RoutedExperts, Rule
from headwater.compose.routing_files import (
    ExpertFile,
    RouterFile,
    adapters_in,
    has_gates,
    load_gates,
    read_experts,
    read_router,
    save_gates,
    write_router,
)
from headwater.core.budget import GivenBudget, Meter
from headwater.core.cache import atomic_write_text
from headwater.core.fit import FitSettings
from headwater.core.optim import OptimSpec
from headwater.core.recipe import CorpusRef, ModelRef
from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError, head_of, load_model
from headwater.modalities.text.docs import CorpusError, fingerprint, split_documents
from headwater.modalities.text.objectives import CausalObjective
from headwater.modalities.text.packing import PackedStream
from headwater.modalities.text.prepared import split_shares, tokenized
from headwater.modalities.text.sources import open_corpus

__all__ = [
    "Phatgoose",
    "load_routed",
    "route",
]

Routing: TypeAlias = Literal["gates", "average_activation", "arrow", "random", "average"]
"""Where routing vectors come from; see ``Phatgoose.routing``."""

RULES: Mapping[Routing, Rule] = {
    "gates": "standardised",
    "average_activation": "standardised",
    "arrow": "magnitude",
    "random": "standardised",
    "average": "uniform",
}


def route(
    base: PreTrainedModel,
    adapters: str | Path | Mapping[str, str | Path],
    *,
    k: int = 2,
    gates: Literal["trained", "arrow", "random", "average"] = "trained",
    temperature: float = 1.0,
    strict: bool = False,
    seed: int = 0,
) -> RoutedExperts:
    """Put LoRA adapters on their base as routed experts.

    Args:
        base: the model; its weights are frozen, and experts hang on it as hooks.
        adapters: directories by name, or one directory whose sub-directories are the adapters.
        k: experts per token and layer; ignored under ``average``, which takes all.
        gates: ``trained`` reads them beside the adapters (see ``train_gates``, ``save_gates``); ``arrow`` and
            ``random`` need none; ``average`` routes nowhere: the mean of all experts' changes.
        temperature: of the softmax over the chosen.
        strict: refuse experts that adapt different layers.
        seed: of ``arrow`` and ``random``.

    Returns:
        The routed model; with one adapter and ``k=1`` it is that adapter's model, whatever the gates.

    Raises:
        ModelError: adapters that do not fit, gates that are missing, untrained or of another version.
    """
    given = adapters_in(adapters) if isinstance(adapters, (str, Path)) else adapters
    paths = {name: Path(path) for name, path in given.items()}
    experts = read_experts(base, paths)
    rule: Rule = {"arrow": "magnitude", "average": "uniform"}.get(gates, "standardised")  # type: ignore[assignment]
    vectors: Mapping[str, Mapping[str, Tensor]] | None = None
    if gates == "trained":
        vectors = {name: load_gates(path, adapter=path) for name, path in paths.items()}
    elif gates != "average":
        vectors = (arrow_prototypes if gates == "arrow" else random_vectors)(experts, seed=seed)
    k = len(experts) if gates == "average" else k
    return RoutedExperts(base, experts, vectors, k=k, rule=rule, temperature=temperature, strict=strict)


def load_routed(directory: str | Path, *, trust_remote_code: bool = False) -> RoutedExperts:
    """Open what the recipe left.

    Args:
        directory: holds ``router.json``; names in it that begin with ``./`` are looked for beside it.
        trust_remote_code: run modelling code that the base ships.

    Returns:
        The routed model, in ``eval()``, on the CPU.

    Raises:
        ModelError: no ``router.json``, one that this version does not read, or a part that cannot be opened.
    """
    directory = Path(directory)
    router = read_router(directory)
    ref = ModelRef(
        name=router.base.name,
        revision=router.base.revision,
        dtype=router.base.dtype,
        trust_remote_code=trust_remote_code,
    )
    model = load_model(ref, head_of(ref))
    adapters = {name: _adapter_directory(expert) for name, expert in router.experts.items()}
    vectors = None
    if router.rule != "uniform":
        vectors = {
            name: load_gates(
                adapters[name] if expert.gates is None else directory / expert.gates, adapter=adapters[name]
            )
            for name, expert in router.experts.items()
        }
    experts = read_experts(model, adapters)
    routed = RoutedExperts(
        model,
        experts,
        vectors,
        k=router.k,
        rule=router.rule,
        temperature=router.temperature,
    )
    return routed.eval()


def _adapter_directory(expert: ExpertFile) -> Path:
    if expert.revision is None:
        return Path(expert.name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(expert.name, revision=expert.revision, allow_patterns=["*.safetensors", "*.json"]))


class Phatgoose(Composition):
    """Route every token, at every adapted layer, to the experts whose gates it opens.

    Source: Muqeeth et al., arXiv:2402.05859.
    """

    id: ClassVar[str] = "phatgoose"

    models: dict[str, ModelRef] = Field(
        description="`base`, and by names of your own the experts: LoRA adapters of it, trained anywhere with PEFT"
    )
    expert_data: dict[str, CorpusRef] = Field(
        default={},
        description="by expert, texts it was trained on, for those without gates on disk; documents that the usual "
        "split holds out are not read, nor any that a suite tests on",
    )
    k: int = Field(default=2, gt=0, description="experts per token and layer; `average` takes all")  # the paper's
    routing: Routing = Field(
        default="gates",
        description="where routing vectors come from: `gates`, trained; `average_activation`, an expert's mean inputs; "
        "`arrow`, its strongest input direction; `random`; `average` routes nowhere and averages the experts",
    )
    temperature: float = Field(default=1.0, gt=0, le=1000, description="divides scores before the softmax over experts")
    strict: bool = Field(default=False, description="refuse experts that adapt different layers")
    gates_in: Literal["adapter", "run"] = Field(
        default="adapter",
        description="where trained gates go: beside each adapter, where later runs find them, or into this run. "
        "Adapters from the Hub, and those that cannot be written to, have them in the run",
    )
    seq_len: int | None = Field(
        default=None, gt=1, description="tokens per packed block; by default the model's maximum, at most 1024"
    )
    batch_tokens: int = Field(default=32_768, gt=0, description="tokens per step of gate training")
    optim: OptimSpec = Field(default=GATE_OPTIM, description="how gates are moved: AdamW, constant after warmup")
    budget: GivenBudget = Field(default=GATE_BUDGET, description="of training the gates of one expert")
    fit: FitSettings = Field(
        default=FitSettings(), description="how gate training runs: precision, micro-batches, checkpoints"
    )

    @property
    def experts(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(role for role in self.models if role != "base")

    @model_validator(mode="after")
    def _fits_the_experts(self) -> Phatgoose:
        if not self.experts:
            raise ValueError("models holds no expert besides `base`; name LoRA adapters of it")
        if self.k > len(self.experts):
            raise ValueError(f"k is {self.k} and there are {len(self.experts)} experts; give more, or a smaller k")
        if unknown := sorted(set(self.expert_data) - set(self.experts)):
            raise ValueError(f"expert_data names {unknown[0]!r}, which is no expert: {', '.join(self.experts)}")
        if self.tokenizer_from != "base" or self.adapters_on != "base":
            raise ValueError("tokenizer_from and adapters_on are `base` here, which all experts adapt")
        if self.out_dtype != "auto":
            raise ValueError(f"out_dtype is {self.out_dtype!r}, but no weights are written; set the dtype of `base`")
        return self

    def compose(self, ctx: CompositionContext) -> Composed:
        """Find or make routing vectors, put the experts on the base, write the router, look where tokens go."""
        if whole := [role for role in self.experts if not ctx.is_adapter(role)]:
            raise ModelError(f"{whole[0]}: {self.models[whole[0]].name!r} is no LoRA adapter; experts must be.")
        model: Any = ctx.model("base")  # Any: transformers ships no types
        adapters = {role: ctx.directory(role) for role in self.experts}
        experts = read_experts(model, adapters)
        rule = RULES[self.routing]
        vectors, places = (None, dict.fromkeys(adapters)) if rule == "uniform" else self._vectors(ctx, experts)
        k = len(experts) if rule == "uniform" else self.k
        routed = RoutedExperts(
            model, experts, vectors, k=k, rule=rule, temperature=self.temperature, strict=self.strict
        )
        write_router(
            ctx.out,
            RouterFile(
                base=PartFile.of(self.models["base"], ctx.directory("base")),
                experts={role: self._file(ctx, role, places[role]) for role in self.experts},
                k=k,
                rule=rule,
                temperature=self.temperature,
            ),
        )
        ctx.tokenizer.save_pretrained(ctx.out)
        model.generation_config.save_pretrained(ctx.out)
        _write_usage(ctx, routed)
        return CallableModel(routed)

    def _file(self, ctx: CompositionContext, role: str, gates: Path | None) -> ExpertFile:
        part = PartFile.of(self.models[role], ctx.directory(role))
        beside = gates is None or gates == ctx.directory(role)
        return ExpertFile(
            name=part.name,
            revision=part.revision,
            gates=None if beside else f"./{gates.relative_to(ctx.out)}",  # type: ignore[union-attr]
        )

    def _vectors(
        self, ctx: CompositionContext, experts: Mapping[str, Mapping[str, LowRank]]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Path]]:
        """Routing vectors by expert and layer, and the directories that hold them."""
        computed: Mapping[str, Mapping[str, Tensor]] = {}
        if self.routing == "arrow":
            computed = arrow_prototypes(experts, seed=self.seed)
        elif self.routing == "random":
            computed = random_vectors(experts, seed=self.seed)
        vectors, places = {}, {}
        for role in self.experts:
            adapter, place = ctx.directory(role), ctx.out / "gates" / role
            if self.routing == "gates" and has_gates(adapter):
                found = load_gates(adapter, adapter=adapter)
                if self.models[role].kind != "hub":
                    place = adapter
            else:
                found = dict(computed[role]) if computed else self._measured(ctx, role)
                if self.routing == "gates" and self._beside(ctx, role):
                    place = adapter
            if place != adapter or not has_gates(adapter):
                about = {
                    "routing": self.routing,
                    "seed": self.seed,
                    "budget": self.budget.model_dump(exclude_none=True),
                }
                save_gates(found, place, adapter=adapter, **about)
            vectors[role], places[role] = found, place
        return vectors, places

    def _beside(self, ctx: CompositionContext, role: str) -> bool:
        """Whether gates can and should go to the adapter's own directory."""
        if self.gates_in == "run" or self.models[role].kind == "hub":
            return False
        if os.access(ctx.directory(role), os.W_OK):
            return True
        ctx.warn(f"gates/{role}", f"{ctx.directory(role)} cannot be written to; the gates of {role} are in this run")
        return False

    def _measured(self, ctx: CompositionContext, role: str) -> dict[str, Tensor]:
        """Gates or mean activations on the expert's data."""
        if role not in self.expert_data:
            raise ModelError(
                f"{role} has no gates in {ctx.directory(role)}. Name texts it was trained on under expert_data, "
                "or choose a routing that needs none (arrow, average)."
            )
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(ctx.model("base"), ctx.directory(role))  # Any: PEFT ships no types
        stream = self._stream(ctx, role, model)
        if self.routing == "average_activation":
            return average_activations(model, model.active_adapter, stream, CausalObjective())
        meter = Meter()
        found = train_gates(
            model,
            model.active_adapter,
            stream,
            CausalObjective(),
            directory=ctx.run.directory,
            budget=self.budget,
            optim=self.optim,
            seed=self.seed,
            name=f"gates-{role}",
            settings=self.fit,
            meter=meter,
        )
        ctx.meter.add(replace(meter.cost, seconds=0.0))  # composing is timed as a whole
        return found

    def _stream(self, ctx: CompositionContext, role: str, model: Any) -> PackedStream:  # Any: as above
        tested = {id for suite in ctx.suites.values() for id in suite.ids}
        documents = list(open_corpus(self.expert_data[role], role=f"expert_data.{role}"))
        split = split_documents(documents, split_shares(0.1))
        read = [document for document in split.train if document.id not in tested]
        if not read:
            raise CorpusError(f"expert_data.{role}: none of its {len(documents)} documents is left to train on.")
        ctx.run.record_data(f"expert_data/{role}", fingerprint(read))
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
        seq_len = self.seq_len or min(longest, 1024)
        rows = max(1, self.batch_tokens // seq_len)
        return PackedStream(tokenized(read, ctx.tokenizer), seq_len, rows, derive_seed(self.seed, "gates", role))


def _write_usage(ctx: CompositionContext, routed: RoutedExperts) -> None:
    """``usage.csv``: by suite and layer, how much of the validation tokens' weight each expert got."""
    tables: Sequence[pd.DataFrame] = []
    for name, suite in ctx.suites.items():
        with routed.routing() as record:
            suite.valid(routed, ctx.tokenizer)
        table = record.usage()
        table.insert(0, "suite", name)
        tables = [*tables, table]
        said = f"two layers agree on a token's best expert {record.agreement():.3f} of the time"
        ctx.run.notes[f"agreement/{name}"] = said
    atomic_write_text(ctx.run.path("usage.csv"), pd.concat(tables).to_csv(index=False))
