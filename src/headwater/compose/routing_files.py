"""What routing between LoRA experts reads and leaves: adapters as PEFT saved them, gates beside them, a router.

Gates are ``adapter_gates.safetensors`` (a vector for each adapted layer, by its name in the base model) and
``gate_config.json``, in the adapter's directory or one of their own; PEFT opens the adapter as before. ``router.json``
names base, experts and rule; ``README.md`` says the same to a reader, with code that needs PEFT only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from headwater.compose.emulated_files import PartFile
from headwater.compose.routing import LowRank, Rule
from headwater.core.cache import atomic_write_bytes, atomic_write_text
from headwater.core.recipe import RecipeError, Spec, validate
from headwater.core.weights import WeightSource, adapter_deltas
from headwater.modalities.models import ModelError

__all__ = [
    "ExpertFile",
    "RouterFile",
    "adapters_in",
    "has_gates",
    "load_gates",
    "read_experts",
    "read_router",
    "save_gates",
    "write_router",
]

logger = logging.getLogger(__name__)

GATES, GATE_CONFIG, ROUTER = "adapter_gates.safetensors", "gate_config.json", "router.json"
FORMULA: Mapping[Rule, str] = {
    "standardised": "score_e = standardise(gate_e) . standardise(u) / sqrt(width of u), where standardise(x) = (x - "
    "mean(x)) / std(x)",
    "magnitude": "score_e = |gate_e . u|",
    "uniform": "score_e = 0",
}
WEIGHED = (
    "; w = softmax of the k largest scores / temperature; output = W u + sum over those of w_e * scaling_e * B_e A_e u"
    ", at each adapted linear layer and token, u being the layer's input"
)


def adapters_in(directory: str | Path) -> dict[str, Path]:
    """The LoRA adapters in the sub-directories of ``directory``, by name and in its order.

    Raises:
        ModelError: there is none.
    """
    found = {path.parent.name: path.parent for path in sorted(Path(directory).glob("*/adapter_config.json"))}
    if not found:
        raise ModelError(f"{directory} has no sub-directory with an adapter_config.json, so it holds no experts.")
    return found


def read_experts(model: nn.Module, adapters: Mapping[str, Path]) -> dict[str, dict[str, LowRank]]:
    """What LoRA adapters add to a model's linear layers, in PEFT's own reading of them.

    Ranks, alphas, their patterns and rsLoRA may differ between adapters. Adapters of embeddings and convolutions are
    left out, with a warning.

    Args:
        model: the base; PEFT wraps its layers for the time of the call. Its weights are frozen.
        adapters: directories by expert.

    Returns:
        By expert and layer, on the CPU, scaling in ``up``.

    Raises:
        ModelError: an adapter that is no plain LoRA (DoRA, biases, whole modules), belongs on another model than the
            others, or does not fit this one; a model with adapters on it.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ModelError("the base has adapters on it already; unload or merge them, or give the base itself.")
    _check(adapters, WeightSource.open(model.state_dict()))
    experts: dict[str, dict[str, LowRank]] = {name: {} for name in adapters}
    wrapped = None
    try:
        for number, (name, directory) in enumerate(adapters.items()):
            slot = f"expert{number}"  # PEFT does not allow every name
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, directory, adapter_name=slot)
            else:
                wrapped.load_adapter(directory, slot)
            left_out = []
            for layer, module in wrapped.base_model.model.named_modules():
                if not isinstance(module, LoraLayer):
                    continue
                if slot in module.lora_A and isinstance(module.lora_A[slot], nn.Linear):
                    down, up = (part[slot].weight.detach().cpu() for part in (module.lora_A, module.lora_B))
                    experts[name][layer] = LowRank(down.clone(), up.float().mul(module.scaling[slot]).to(up.dtype))
                elif slot in module.lora_A or slot in module.lora_embedding_A:
                    left_out.append(layer)
            if left_out:
                logger.warning("%s also adapts %s, which is not linear; left out", name, ", ".join(left_out))
    finally:
        if wrapped is not None:
            wrapped.unload()
    return experts


def _check(adapters: Mapping[str, Path], base: WeightSource) -> None:
    """Refuse before PEFT touches the model."""
    named: dict[str, str] = {}
    for name, directory in adapters.items():
        try:
            adapter_deltas(directory, base)
        except (FileNotFoundError, ValueError) as error:
            raise ModelError(f"{name}: {error}") from error
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        named[name] = str(config.get("base_model_name_or_path"))
    first, *others = named
    for other in others:
        if named[other] != named[first]:
            raise ModelError(
                f"{first} was trained on {named[first]!r} and {other} on {named[other]!r}; experts must share their "
                "base. If that is one model under two names, give it one name in both adapter_config.json "
                "(base_model_name_or_path)."
            )


def save_gates(gates: Mapping[str, Tensor], directory: Path, *, adapter: Path, **about: JsonValue) -> None:
    """Write an expert's gates.

    Args:
        gates: vectors ``(n,)`` by layer.
        directory: the adapter's own, or another.
        adapter: the adapter's directory; its weights' hash is kept, so that gates are not used on another version.
        about: further facts for ``gate_config.json``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {layer: vector.detach().cpu().contiguous() for layer, vector in gates.items()}
    config = {"format": 1, "adapter_sha256": _sha256(adapter), **about}
    # The configuration last: without it there are no gates.
    atomic_write_bytes(directory / GATES, save(tensors))
    atomic_write_text(directory / GATE_CONFIG, json.dumps(config, indent=2) + "\n")


def has_gates(directory: Path) -> bool:
    """Whether ``directory`` holds gates."""
    return (directory / GATES).is_file() and (directory / GATE_CONFIG).is_file()


def load_gates(directory: Path, *, adapter: Path) -> dict[str, Tensor]:
    """Read what ``save_gates`` wrote.

    Raises:
        ModelError: nothing there, a damaged file, or gates of another version of the adapter.
    """
    if not has_gates(directory):
        raise ModelError(f"{directory} holds no gates ({GATES}, {GATE_CONFIG}); train them.")
    config = json.loads((directory / GATE_CONFIG).read_text(encoding="utf-8"))
    if config.get("adapter_sha256") != _sha256(adapter):
        raise ModelError(
            f"the gates in {directory} were trained for other weights than {adapter} holds now. Remove {GATES} and "
            f"{GATE_CONFIG} and train them again."
        )
    try:
        gates: dict[str, Tensor] = load_file(directory / GATES)
    except SafetensorError as error:
        raise ModelError(f"{directory / GATES} is damaged ({error}); remove it and train the gates again.") from error
    return gates


def _sha256(adapter: Path) -> str:
    with (adapter / "adapter_model.safetensors").open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class ExpertFile(Spec):
    """One expert."""

    name: str = Field(description="Hub name or directory of the adapter")
    revision: str | None = Field(default=None, description="Hub commit")
    gates: str | None = Field(
        default=None, description="directory of its routing vectors; `./` is beside router.json, null the adapter's own"
    )


class RouterFile(Spec):
    """The whole of ``router.json``."""

    format: Literal[1] = Field(default=1, description="version of this file's form")
    method: Literal["phatgoose"] = Field(default="phatgoose", description="what was composed")
    formula: str = Field(default="", description="how a token is routed, for readers")
    base: PartFile = Field(description="the model that all experts adapt")
    experts: dict[str, ExpertFile] = Field(min_length=1, description="the experts, in order")
    k: int = Field(gt=0, description="experts per token and layer")
    rule: Rule = Field(default="standardised", description="how tokens are scored")
    temperature: float = Field(default=1.0, gt=0, description="divides the scores before the softmax")


def write_router(directory: Path, router: RouterFile) -> None:
    """Write ``router.json`` and ``README.md``."""
    directory.mkdir(parents=True, exist_ok=True)
    router = router.model_copy(update={"formula": FORMULA[router.rule] + WEIGHED})
    atomic_write_text(directory / "README.md", _readme(router))
    atomic_write_text(directory / ROUTER, json.dumps(router.model_dump(), indent=2) + "\n")


def read_router(directory: Path) -> RouterFile:
    """Read ``router.json``.

    Raises:
        ModelError: it is not there, or not one that this version reads.
    """
    path = directory / ROUTER
    if not path.is_file():
        raise ModelError(f"{directory} has no {ROUTER}; give the directory that the recipe left.")
    try:
        return validate(RouterFile, json.loads(path.read_text(encoding="utf-8")), where=str(path))
    except (RecipeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _readme(router: RouterFile) -> str:
    rows = [f"| base | `{router.base.name}` | {router.base.revision or ''} | |"]
    for name, expert in router.experts.items():
        gates = "" if router.rule == "uniform" else f"`{expert.gates or 'beside the adapter'}`"
        rows.append(f"| {name} | `{expert.name}` | {expert.revision or ''} | {gates} |")
    table = "\n".join(rows)
    return f"""# Routed experts

There are no weights here: this is a way of running LoRA adapters that exist on the model that they adapt (`{ROUTER}`
says the same to programs). Each token goes to {router.k} of {len(router.experts)} experts, at each adapted layer anew.

| | model | revision | gates |
|---|---|---|---|
{table}

    {(FORMULA[router.rule] + WEIGHED).replace("; ", chr(10) + "    ")}

with temperature {router.temperature:g}. Gates are `{GATES}` in the directories above: one vector for each adapted
layer, by its name in the base. The adapters open in PEFT as before. The tokenizer is in this directory.

## With Headwater

```python
from transformers import AutoTokenizer
from headwater.compose.phatgoose import load_routed

model, tokenizer = load_routed("."), AutoTokenizer.from_pretrained(".")
print(tokenizer.decode(model.generate(**tokenizer("Why?", return_tensors="pt"), max_new_tokens=40)[0]))
```

## Without

```python
{_snippet(router)}```
"""


def _snippet(router: RouterFile) -> str:
    """Greedy decoding with transformers and PEFT alone; every expert runs on every token, so slowly."""
    score = {
        "standardised": "standardise(x) @ standardise(torch.stack(vectors)).T / x.shape[-1] ** 0.5",
        "magnitude": "(x @ torch.stack(vectors).T).abs()",
        "uniform": "x.new_zeros(len(x), len(there))",
    }[router.rule]
    base = router.base
    lines = ["import torch", "from peft import PeftModel"]
    lines += [] if router.rule == "uniform" else ["from safetensors.torch import load_file"]
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        "models = {  # name, revision; of the experts also where the gates are",
        f"    'base': ({base.name!r}, {base.revision!r}),",
    ]
    for name, expert in router.experts.items():
        lines.append(f"    {name!r}: ({expert.name!r}, {expert.revision!r}, {(expert.gates or expert.name)!r}),")
    lines += [
        "}",
        "(name, revision), experts = models.pop('base'), list(models)",
        f"model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype={base.dtype!r})",
        "for number, (name, revision, _) in enumerate(models.values()):",
        "    if number == 0:",
        "        model = PeftModel.from_pretrained(model, name, 'e0', revision=revision)",
        "    else:",
        "        model.load_adapter(name, f'e{number}', revision=revision)",
        "model.eval()",
    ]
    if router.rule != "uniform":
        lines.append(f"gates = [load_file(f'{{where}}/{GATES}') for _, _, where in models.values()]")
    if router.rule == "standardised":
        lines += [
            "",
            "",
            "def standardise(x):",
            "    x = x - x.mean(-1, keepdim=True)",
            "    return x / x.std(-1, keepdim=True, unbiased=False)",
        ]
    lines += [
        "",
        "",
        "def routed(layer, name):",
        "    there = [e for e in range(len(experts)) if f'e{e}' in layer.lora_A]",
    ]
    if router.rule != "uniform":
        lines.append("    vectors = [gates[e][name].float() for e in there]")
    lines += [
        "    def forward(u, *args, **kwargs):",
        "        x = u.flatten(0, -2).float()",
        f"        best, chosen = ({score}).topk(min({router.k}, len(there)))",
        f"        best = (best / {router.temperature!r}).softmax(-1)",
        "        weights = torch.zeros(len(x), len(there)).scatter(1, chosen, best)",
        "        out = layer.base_layer(u)",
        "        for column, e in enumerate(there):",
        "            a, b = layer.lora_A[f'e{e}'], layer.lora_B[f'e{e}']",
        "            added = b(a(u.to(a.weight.dtype))) * layer.scaling[f'e{e}']",
        "            out = out + (added * weights[:, column].view(*u.shape[:-1], 1)).to(out.dtype)",
        "        return out",
        "    return forward",
        "",
        "",
        "for name, layer in model.get_base_model().named_modules():",
        "    if getattr(layer, 'lora_A', None):",
        "        layer.forward = routed(layer, name)",
        'ids = AutoTokenizer.from_pretrained(".")("Why?", return_tensors="pt")["input_ids"]',
        "with torch.no_grad():",
        "    for _ in range(40):",
        "        log_p = model(ids).logits[:, -1].float().log_softmax(-1)",
        "        ids = torch.cat([ids, log_p.argmax(-1, keepdim=True)], -1)",
    ]
    return "\n".join(lines) + "\n"
