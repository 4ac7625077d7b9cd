"""What an emulated fine-tuning leaves on disk: which models, how they are combined, and code that does it without us.

``composed.json`` is read by ``load_emulated``; ``README.md`` says the same to a reader, with a snippet that needs
transformers only. The models stay where they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from headwater.core.cache import atomic_write_text
from headwater.core.recipe import ModelRef, RecipeError, Spec, validate
from headwater.modalities.models import ModelError

__all__ = ["ComposedFile", "PartFile", "read_composed", "write_composed"]

FILE = "composed.json"
FORMULA = (
    "log p(y) = log_softmax(large(y) + scale * sum over k of tuned[k] * (model_k(y) - small(y))), of float32 logits at "
    "each position"
)
FILTERED = (
    "; a correction tuned[k] * (log p_k(y) - log p_small(y)) is 0 outside the smallest set of tokens that holds top_p "
    "of the probability of the filter_by"
)


class PartFile(Spec):
    """One model."""

    name: str = Field(description="Hub name or directory; one that begins with `./` is beside composed.json")
    revision: str | None = Field(default=None, description="Hub commit")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="dtype to load in")
    adapter_on: str | None = Field(default=None, description="for a LoRA adapter, the model it is put on")

    @classmethod
    def of(cls, ref: ModelRef, directory: Path, adapter_on: str | None = None) -> PartFile:
        """A recipe's model: a Hub model by name and commit, any other by its absolute directory.

        Args:
            ref: the model.
            directory: where it was found; of a Hub model, its snapshot, named by the commit.
            adapter_on: for a LoRA adapter, the model it is put on.
        """
        hub = ref.kind == "hub"
        name, revision = (ref.name, directory.name) if hub else (str(directory.resolve()), None)
        return cls(name=name, revision=revision, dtype=ref.dtype, adapter_on=adapter_on)


class ComposedFile(Spec):
    """The whole of ``composed.json``."""

    format: Literal[1] = Field(default=1, description="version of this file's form")
    method: Literal["emulated_finetuning"] = Field(default="emulated_finetuning", description="what was composed")
    formula: str = Field(default=FORMULA, description="the distribution, for readers")
    models: dict[str, PartFile] = Field(description="`large`, `small` and the tuned models")
    tuned: dict[str, float] = Field(min_length=1, description="weight of each tuned model")
    scale: float = Field(default=1.0, description="factor on the whole correction")
    top_p: float | None = Field(default=None, gt=0, le=1, description="where the correction is kept; null: everywhere")
    filter_by: Literal["tuned", "mixture"] = Field(default="tuned", description="whose probability `top_p` is of")


def write_composed(directory: Path, composed: ComposedFile) -> None:
    """Write ``composed.json`` and ``README.md``."""
    directory.mkdir(parents=True, exist_ok=True)
    if composed.top_p is not None:
        composed = composed.model_copy(update={"formula": FORMULA + FILTERED})
    atomic_write_text(directory / "README.md", _readme(composed))
    atomic_write_text(directory / FILE, json.dumps(composed.model_dump(), indent=2) + "\n")


def read_composed(directory: Path) -> ComposedFile:
    """Read ``composed.json``, names that begin with ``./`` made paths.

    Raises:
        ModelError: it is not there, or not of a form that this version reads.
    """
    path = directory / FILE
    if not path.exists():
        raise ModelError(f"{directory} has no {FILE}; give the directory that the recipe wrote, such as RUN/model.")
    try:
        read = validate(ComposedFile, json.loads(path.read_text(encoding="utf-8")), where=str(path))
    except (json.JSONDecodeError, RecipeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if missing := sorted({"large", "small", *read.tuned, *_bases(read)} - read.models.keys()):
        raise ModelError(f"{path}: models has no {missing[0]!r}; it has {', '.join(read.models)}.")
    beside = {
        role: part.model_copy(update={"name": str(directory / part.name)}) if part.name.startswith("./") else part
        for role, part in read.models.items()
    }
    return read.model_copy(update={"models": beside})


def _bases(composed: ComposedFile) -> list[str]:
    return [part.adapter_on for part in composed.models.values() if part.adapter_on is not None]


def _readme(composed: ComposedFile) -> str:
    rows = []
    for role, part in composed.models.items():
        weight = f"{composed.tuned[role]:g}" if role in composed.tuned else ""
        notes = f"adapter on {part.adapter_on}" if part.adapter_on else ""
        rows.append(f"| {role} | `{part.name}` | {part.revision or ''} | {part.dtype} | {weight} | {notes} |")
    table = "\n".join(rows)
    kept = ""
    if composed.top_p is not None:
        kept = (
            f" The correction is kept for the likeliest tokens that hold {composed.top_p:g} of the probability of "
            f"the {composed.filter_by} distribution, and 0 for all others."
        )
    return f"""# Emulated fine-tuning

There are no weights here: this is a way of decoding from models that exist (`{FILE}` says the same to programs).

| role | model | revision | dtype | weight | |
|---|---|---|---|---|---|
{table}

At every position, with `large`, `small` and each tuned model's logits in float32:

    log p = log_softmax(large + scale * sum of weight * (tuned - small)),   scale = {composed.scale:g}

All models read the same tokens; the tokenizer is in this directory.{kept}

## With Headwater

```python
from transformers import AutoTokenizer
from headwater.compose.emulated_finetuning import load_emulated

model, tokenizer = load_emulated("."), AutoTokenizer.from_pretrained(".")
print(tokenizer.decode(model.generate(**tokenizer("Why?", return_tensors="pt"), max_new_tokens=40)[0]))
```

## Without

```python
{_snippet(composed)}```
"""


def _snippet(composed: ComposedFile) -> str:
    """Greedy decoding with transformers alone."""
    lines = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if _bases(composed):
        lines.append("from peft import PeftModel")
    lines += [
        "",
        "",
        "def opened(name, revision, dtype):",
        "    return AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype).eval()",
        "",
        "",
        "models = {",
    ]
    for role, part in composed.models.items():
        base = part if part.adapter_on is None else composed.models[part.adapter_on]
        call = f"opened({base.name!r}, {base.revision!r}, {base.dtype!r})"
        lines.append(f"    {role!r}: {call if base is part else f'PeftModel.from_pretrained({call}, {part.name!r})'},")
    lines += [
        "}",
        'ids = AutoTokenizer.from_pretrained(".")("Why?", return_tensors="pt")["input_ids"]',
        "with torch.no_grad():",
        "    for _ in range(40):",
        "        logits = {role: model(ids).logits[:, -1].float() for role, model in models.items()}",
        "        width = min(x.shape[-1] for x in logits.values())",
        "        large, small, *_ = (logits[role][:, :width] for role in ('large', 'small'))",
        f"        tuned = [(logits[role][:, :width], weight) for role, weight in {composed.tuned!r}.items()]",
    ]
    if composed.top_p is None:
        lines.append(f"        total = large + {composed.scale!r} * sum(w * (x - small) for x, w in tuned)")
    else:
        lines += [
            "        def kept(x):  # the smallest set of tokens that holds top_p",
            "            p, order = x.softmax(-1).sort(descending=True)",
            f"            first = p.cumsum(-1) - p < {composed.top_p!r}",
            "            return torch.zeros_like(first).scatter(-1, order, first)",
            "        changes = [(x, w * (x.log_softmax(-1) - small.log_softmax(-1))) for x, w in tuned]",
        ]
        if composed.filter_by == "tuned":
            lines.append(f"        total = large + {composed.scale!r} * sum(kept(x) * change for x, change in changes)")
        else:
            lines += [
                f"        total = large + {composed.scale!r} * sum(change for _, change in changes)",
                "        total = torch.where(kept(total), total, large)",
            ]
    lines += [
        "        log_p = total.log_softmax(-1)",
        "        ids = torch.cat([ids, log_p.argmax(-1, keepdim=True)], -1)",
    ]
    return "\n".join(lines) + "\n"
