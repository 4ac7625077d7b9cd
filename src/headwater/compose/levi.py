"""LEVI: a large pretrained model and a small one of the task's own, joined at several layers by adapters.

    o_j = a_j([f_{l_j}(x); g(x)]),  j = 1..m          logits = (1/m) sum_j o_j
    loss = (1/m) sum_j CE(o_j, y)

Fine-tuned, a large model keeps the spurious features of its pretraining; a small one trained from nothing learns those
of the task's data. Joined at several layers, with f frozen (or moved by LoRA only) and g and the adapters trained
together, neither side's dominate, and answers hold up better on other distributions.

Source: Roh et al., "LEVI: Generalizable Fine-tuning via Layer-wise Ensemble of Different Views",
arXiv:2402.04644.
Differs: whether the paper's loss has a term for the averaged answer is unverified; the default has none.
Needs: a pretrained model, labelled texts; labelled texts of another distribution show whether it helped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headwater.compose.layerwise import (
    EnsembleOutput,
    LayerwiseEnsemble,
    LayerwiseObjective,
    OutputEnsemble,
    cache_views,
    small_text,
    view_report,
)
from headwater.core.budget import GivenBudget, Meter
from headwater.core.cache import atomic_path, atomic_write_text
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.lora import LoraSpec, add_lora
from headwater.core.optim import OptimSpec
from headwater.core.order import VirtualIndex
from headwater.core.phase import EvalAt
from headwater.core.recipe import DataRef, Metrics, ModelRef, Recipe
from headwater.core.rng import derive_seed
from headwater.modalities.models import ModelError, is_quantised, load_encoder, load_tokenizer
from headwater.modalities.text.class_inputs import input_lengths, length_batches, padded_inputs
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.labelled_split import LabelledTexts, read_labelled
from headwater.modalities.text.sources import open_labelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwater.core.run import Run

__all__ = ["EnsembleOutput", "LayerwiseEnsemble", "LayerwiseObjective", "Levi", "load_levi", "view_report"]

Arm = Literal["levi", "linear_probe", "fine_tune", "lora", "output_ensemble"]
WEIGHTS, CONFIG = "ensemble.safetensors", "levi.json"
LARGE_SHARE = 0.5


class Levi(Recipe):
    """Fine-tune for a task and for distributions that it does not show.

    The other arms are what it is compared with, on the same texts and budget.

    Source: Roh et al., arXiv:2402.04644.
    """

    id: ClassVar[str] = "levi"

    pretrained: ModelRef = Field(description="the large model, encoder or decoder: Hub name or local directory")
    task: DataRef = Field(description="labelled texts: learned from, chosen by and, held out, tested on")
    test: DataRef | None = Field(default=None, description="labelled texts of the test; by default a share of `task`")
    ood: DataRef | None = Field(
        default=None, description="labelled texts of another distribution; without them that is not measured"
    )
    held_out: float = Field(default=0.2, gt=0, lt=0.5, description="share of `task` kept for the test, without `test`")
    validation: float = Field(default=0.1, gt=0, lt=0.5, description="share of `task` kept for choosing by")
    arm: Arm = Field(
        default="levi",
        description="levi; or a rival: a linear layer on the frozen model, the whole model fine-tuned, LoRA, or a "
        "fine-tuned and a small model that meet in their answers only",
    )
    layers: int | tuple[int, ...] = Field(
        default=4, description="how many layers are joined, evenly spaced, the last included; or which, from 1"
    )
    adapter_hidden: int = Field(default=256, gt=0, description="width inside each adapter")
    small_width: int = Field(default=64, ge=32, description="width of the small model, a multiple of 32")
    small_layers: int = Field(default=2, gt=0, description="layers of the small model")
    averaged_loss: float = Field(
        default=0.0, ge=0, description="weight of the loss of the averaged answer, added to the adapters' own"
    )
    lora: LoraSpec | None = Field(
        default=None, description="adapters that move the pretrained model; null leaves it frozen"
    )
    max_tokens: int = Field(default=256, gt=1, description="tokens of each text that are read")
    batch_size: int = Field(default=32, gt=0, description="texts per optimizer step")
    budget: GivenBudget = Field(description="what the training may spend: tokens, steps, flops or seconds")
    optim: OptimSpec = Field(
        default=OptimSpec(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, warmup=0.06),
        description="how weights are moved: AdamW, a schedule, clipping",
    )
    eval_at: EvalAt = Field(
        default=(0.0, 0.5, 1.0), description="fractions of the budget at which validation is measured"
    )
    fit: FitSettings = Field(
        default=FitSettings(), description="how the loop runs: precision, micro-batches, checkpoints"
    )

    @model_validator(mode="after")
    def _lora_has_an_arm(self) -> Levi:
        if self.lora is not None and self.arm not in ("levi", "lora"):
            raise ValueError(f"arm {self.arm!r} does not use lora; leave it out")
        if self.small_width % 32:
            raise ValueError(f"small_width must be a multiple of 32; got {self.small_width}")
        return self

    def run(self, run: Run) -> Metrics:
        """Split the texts, train, measure on both distributions, save."""
        split = read_labelled(self.task, self.test, held_out=self.held_out, validation=self.validation, role="task")
        run.record_data("task", split.fingerprint)
        tests = {"id": split.test}
        if self.ood is None:
            run.notes["ood"] = "not measured: no texts of another distribution were given"
        else:
            tests["ood"] = _other_distribution(self.ood, split.labels, split.train)
            run.record_data("ood", _digest(tests["ood"]))
        tokenizer = load_tokenizer(self.pretrained)
        model = self._model(run, len(split.labels), tokenizer)
        sides = {"train": split.train, "valid": split.valid, **tests}
        encoded = {side: _Texts(own, tokenizer, self.max_tokens) for side, own in sides.items()}
        stream = _Stream(encoded["train"], self.batch_size, derive_seed(self.seed, "order"))
        if isinstance(model, LayerwiseEnsemble) and model.frozen:
            stream.views = self._views(run, model, encoded["train"])
        meter = Meter()
        trained = fit(
            Phase("train", model, stream, LayerwiseObjective(self.averaged_loss)),
            budget=self.budget,
            optim=self.optim,
            seed=self.seed,
            directory=run.directory,
            settings=self.fit,
            evaluate=lambda own: {"valid/accuracy": float(_right(own, encoded["valid"]).mean())},
            eval_at=self.eval_at,
            meter=meter,
            on_metrics=lambda metrics: run.log(metrics, phase="train"),
        )
        model.eval()
        right = {side: _right(model, encoded[side]) for side in ("valid", *tests)}
        metrics = {f"{side}/accuracy": float(own.mean()) for side, own in right.items()}
        metrics |= {f"data/{side}": float(len(own)) for side, own in sides.items()}
        run.write_json(
            "items.json",
            {f"{s}/accuracy": {"ids": list(range(len(r))), "values": r.tolist()} for s, r in right.items()},
        )
        if isinstance(model, LayerwiseEnsemble) and self.arm == "levi":
            batches = list(encoded["valid"].batches())
            atomic_write_text(run.path("views.csv"), view_report(model, batches).to_csv(index=False))
        points = [(point["tokens"], point["valid/accuracy"]) for point in trained.trajectory]
        run.write_json("trajectory.json", {"x": "tokens", "series": {"valid/accuracy": points}})
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        run.cost = {**meter.cost.to_dict(), "trainable": trainable, "labels": len(split.train)}
        self._save(run.model, model, split.labels, tokenizer)
        return metrics

    def _model(self, run: Run, classes: int, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        """What the arm trains; new weights are drawn from the recipe's seed."""
        encoder = load_encoder(self.pretrained)
        if is_quantised(encoder) and self.arm in ("fine_tune", "output_ensemble"):
            raise ModelError(f"pretrained {self.pretrained.name!r} is quantised; its weights cannot be trained")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, "initialisation"))
            made = _assemble(self, encoder, classes, len(tokenizer), tokenizer.pad_token_id)
        large, small = (sum(p.numel() for p in part.parameters()) for part in (encoder, _small_of(made)))
        if small > LARGE_SHARE * large:
            message = f"the small model has {small} parameters, the pretrained one {large}; it should have far fewer"
            run.logger.warning(message)
            run.notes["warning/small"] = message
        return made

    def _views(self, run: Run, model: LayerwiseEnsemble, texts: _Texts) -> NDArray[Any]:
        """The pretrained model's views of the training texts, computed once."""
        path = run.path("checkpoints") / "views.npy"
        path.parent.mkdir(exist_ok=True)
        order = texts.in_order()
        return cache_views(model, order, len(texts), path)

    def _save(self, target: Path, model: nn.Module, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        target.mkdir(parents=True, exist_ok=True)
        moved = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        state = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in model.state_dict().items()
            if name in moved or not name.startswith("pretrained.")
        }
        with atomic_path(target / WEIGHTS) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        about = {
            "format": 1,
            "recipe": {
                "pretrained": self.pretrained.model_dump(mode="json"),
                "arm": self.arm,
                "layers": self.layers,
                "adapter_hidden": self.adapter_hidden,
                "small_width": self.small_width,
                "small_layers": self.small_layers,
                "lora": None if self.lora is None else self.lora.model_dump(mode="json"),
                "max_tokens": self.max_tokens,
            },
            "labels": list(labels),
            "vocabulary": len(tokenizer),
            "padding": tokenizer.pad_token_id,
        }
        atomic_write_text(target / CONFIG, json.dumps(about, indent=2) + "\n")
        tokenizer.save_pretrained(target)
        atomic_write_text(target / "README.md", _README.format(self.pretrained.name, ", ".join(labels)))


_README = """# levi

Joins `{}` with a small model; answers with one of {}. `ensemble.safetensors` holds what was trained, by the names
`small.*`, `adapters.J.*` (and `pretrained.*` where that was trained), `levi.json` how they are put together:

    logits = mean over joined layers j of adapters[j](concat[pooled hidden state j, the small model's vector])

```python
from transformers import AutoTokenizer

from headwater.compose.levi import load_levi

model, tokenizer = load_levi(DIR), AutoTokenizer.from_pretrained(DIR)
logits = model(**tokenizer("a text", return_tensors="pt")).logits
```
"""


def load_levi(directory: str | Path) -> nn.Module:
    """Open what the recipe left: the ensemble (or the rival) in ``eval()``, on the CPU.

    Raises:
        ModelError: the directory holds no such thing, or its pretrained model cannot be opened.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise ModelError(f"{directory} has no {CONFIG}; give the directory that the recipe left, such as RUN/model.")
    about = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    fields = about["recipe"]
    recipe = Levi.model_construct(
        **{
            **fields,
            "pretrained": ModelRef(**fields["pretrained"]),
            "lora": None if fields["lora"] is None else LoraSpec(**fields["lora"]),
        }
    )
    encoder = load_encoder(recipe.pretrained)
    with torch.random.fork_rng(devices=[]):
        model = _assemble(recipe, encoder, len(about["labels"]), about["vocabulary"], about["padding"])
    missing, unexpected = model.load_state_dict(load_file(directory / WEIGHTS), strict=False)
    if unexpected or any(not name.startswith("pretrained.") for name in missing):
        raise ModelError(f"{directory / WEIGHTS} does not fit {CONFIG}: {[*unexpected, *missing][:3]}")
    return model.eval()


def _assemble(recipe: Levi, encoder: nn.Module, classes: int, vocabulary: int, pad: int) -> nn.Module:
    """The modules of an arm; new weights come from torch's global generator."""
    if recipe.arm in ("levi", "output_ensemble"):
        small = small_text(
            vocabulary,
            width=recipe.small_width,
            layers=recipe.small_layers,
            positions=max(recipe.max_tokens, 8),
            pad=pad,
        )
        if recipe.arm == "output_ensemble":
            return OutputEnsemble(encoder.requires_grad_(True), small, classes)
        return LayerwiseEnsemble(
            encoder if recipe.lora is None else add_lora(encoder, recipe.lora, seed=recipe.seed),
            small,
            classes,
            layers=recipe.layers if isinstance(recipe.layers, int) else list(recipe.layers),
            adapter_hidden=recipe.adapter_hidden,
            train_pretrained=recipe.lora is not None,
        )
    if recipe.arm == "lora":
        encoder = add_lora(encoder, recipe.lora or LoraSpec(), seed=recipe.seed)
    trained = recipe.arm != "linear_probe"
    return LayerwiseEnsemble(encoder, None, classes, layers=1, adapter_hidden=0, train_pretrained=trained)


def _small_of(model: nn.Module) -> nn.Module:
    if isinstance(model, OutputEnsemble):
        return model.members[1]
    small = getattr(model, "small", None)
    return small if isinstance(small, nn.Module) else nn.Module()


@dataclass(eq=False)
class _Texts:
    """Labelled texts as token ids."""

    texts: LabelledTexts
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    ids: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = self.tokenizer(list(self.texts.texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        if empty := [number for number, ids in enumerate(self.ids) if not ids]:
            raise CorpusError(f"text {self.texts.texts[empty[0]][:40]!r} has no token; leave it out.")

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """Some of them as a batch."""
        return padded_inputs(self.ids, rows, int(self.tokenizer.pad_token_id))

    def in_order(self, batch_size: int = 64) -> Iterator[dict[str, Tensor]]:
        """All of them."""
        for begin in range(0, len(self), batch_size):
            yield self.inputs(np.arange(begin, min(begin + batch_size, len(self))))

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """All of them with their labels, those of similar length together."""
        for rows in length_batches(input_lengths(self.ids)):
            yield {
                **self.inputs(rows),
                "labels": torch.from_numpy(self.texts.classes[rows]),
                "row": torch.from_numpy(rows),
            }


class _Stream:
    """Batches of labelled texts in an order that is shuffled anew in every epoch; ``views`` where they are known."""

    views: NDArray[Any] | None = None

    def __init__(self, texts: _Texts, rows: int, seed: int) -> None:
        self.texts, self.rows = texts, min(rows, len(texts))
        self.order = VirtualIndex(len(texts), seed)
        self.tokens_per_row = -(-int(input_lengths(texts.ids).sum()) // len(texts))
        self.fingerprint = hashlib.blake2b(
            json.dumps([self.rows, seed, texts.ids, texts.texts.classes.tolist()]).encode(), digest_size=16
        ).hexdigest()

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Rows [start, stop) of batch ``step``."""
        positions = step * self.rows + np.arange(self.rows, dtype=np.int64)[start:stop]
        _, items = self.order(positions)
        batch = {**self.texts.inputs(items), "labels": torch.from_numpy(self.texts.texts.classes[items])}
        if self.views is not None:
            batch["views"] = torch.from_numpy(self.views[items])
        return batch


def _right(model: nn.Module, texts: _Texts) -> NDArray[np.float64]:
    """1 for each text that is answered right."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    right = np.zeros(len(texts))
    with torch.no_grad():
        for batch in texts.batches():
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            answers = model(**inputs).logits.argmax(-1).cpu()
            right[batch["row"].numpy()] = (answers == batch["labels"]).double().numpy()
    model.train(training)
    return right


def _other_distribution(ref: DataRef, labels: Sequence[str], train: LabelledTexts) -> LabelledTexts:
    texts, names = open_labelled(ref, role="ood")
    if new := sorted(set(names) - set(labels)):
        raise CorpusError(f"ood: label {new[0]!r} is none of the task's: {', '.join(labels)}.")
    seen = set(train.texts)
    kept = [(text, labels.index(name)) for text, name in zip(texts, names, strict=True) if text not in seen]
    if not kept:
        raise CorpusError("ood: every text is one that is learned from; give texts of another distribution.")
    return LabelledTexts([text for text, _ in kept], np.array([label for _, label in kept], dtype=np.int64))


def _digest(texts: LabelledTexts) -> str:
    return hashlib.blake2b(json.dumps([list(texts.texts), texts.classes.tolist()]).encode(), digest_size=16).hexdigest()
