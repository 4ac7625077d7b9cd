"""What an encoder and its class means or head leave on disk, and the code that predicts with them, without us."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwater.core.cache import atomic_path, atomic_write_text
from headwater.modalities.features import ArrayEncoder, Encoder

__all__ = ["feature_code", "save_adapted", "save_classifier", "write_card"]


def save_adapted(adapter: Any, kind: str, directory: Path) -> None:  # Any: PEFT's models are untyped
    """Write ``adapter/`` as PEFT or ``PetModel`` write it; a copy trained in full goes to ``adapted/``.

    Args:
        adapter: the PEFT model, the ``PetModel``, or the copy.
        kind: ``full`` for a copy.
        directory: of the run's model.
    """
    if kind != "full":
        adapter.save_pretrained(directory / "adapter")
    elif isinstance(adapter, PreTrainedModel):
        adapter.save_pretrained(directory / "adapted")
    else:
        with atomic_path(directory / "adapted" / "model.safetensors") as path:
            save_file({name: tensor.contiguous() for name, tensor in adapter.state_dict().items()}, path)


def write_card(
    directory: Path,
    encoder: nn.Module,
    *,
    kind: str | None,
    branches: Literal["both", "adapted"],
    unit_length: bool,
) -> None:
    """Write ``README.md``.

    Args:
        directory: where ``centroids.safetensors`` and ``classes.json`` lie.
        encoder: an ``Encoder`` that has made features, or an ``ArrayEncoder``.
        kind: of what was adapted; ``None`` for nothing.
        branches: whether the class means stand on both encoders' features or on the adapted one's.
        unit_length: whether each encoder's features are scaled to unit length.
    """
    transformers = isinstance(encoder, Encoder)
    code = [
        "import json",
        *feature_code(encoder),
        "",
        *_adapted(kind, transformers),
        "",
        *_predict(kind, branches, unit_length),
    ]
    base = "" if transformers else "`base` is your module as it was before, in evaluation mode. "
    atomic_write_text(directory / "README.md", _README.format(what=_WHAT[kind], base=base, code="\n".join(code)))


_README = """# Class means on features of an encoder

`centroids.safetensors` holds `centroids`, one mean per class, and `counts`; `classes.json` names the classes in the
same order. {what} The prediction is the class whose mean has the largest cosine with the features. {base}In this
directory:

```python
{code}
```
"""
_WHAT: dict[str | None, str] = {
    None: "The encoder is the pretrained one as it is.",
    "full": "`adapted/` holds the copy of the encoder that was trained on the first task.",
    **dict.fromkeys(("lora", "ia3"), "`adapter/`, which PEFT opens, was trained on the first task."),
    "adapter": "`adapter/` holds bottlenecks that stand beside modules of the encoder, trained on the first task.",
    "vpt": "`adapter/` holds prompt vectors that stand among the tokens of the encoder, trained on the first task.",
}


def feature_code(encoder: nn.Module) -> list[str]:
    """Lines of Python that open ``base``, a transformers model, and define ``features(model, inputs)``.

    Args:
        encoder: an ``Encoder`` that has made features; of an ``ArrayEncoder``, ``base`` is left to the reader.
    """
    return [
        "import torch",
        "from safetensors.torch import load_file",
        *(_open(encoder) if isinstance(encoder, Encoder) else []),
        "",
        *(_features(encoder) if isinstance(encoder, Encoder) else _ARRAY_FEATURES),
    ]


def save_classifier(
    directory: Path, encoder: Encoder | ArrayEncoder, weight: Tensor, bias: Tensor, label_names: Sequence[str]
) -> None:
    """Write a trained encoder to ``adapted/``, a linear head on it, the names of its classes, and ``README.md``.

    Args:
        directory: of the run's model.
        encoder: as it is now; it has made features, and so knows its pooling.
        weight: ``(classes, D)``.
        bias: ``(classes,)``.
        label_names: of all classes of the stream; those that have not arrived are left out.
    """
    save_adapted(encoder.model, "full", directory)
    with atomic_path(directory / "head.safetensors") as path:
        save_file({name: t.detach().cpu().contiguous() for name, t in (("weight", weight), ("bias", bias))}, path)
    atomic_write_text(
        directory / "classes.json", json.dumps({"label_names": list(label_names[: len(bias)])}, indent=2) + "\n"
    )
    what, opened, made = _OWN_ENCODER, _OPEN_OWN, _ARRAY_FEATURES
    if isinstance(encoder, Encoder):
        what, made = "", _features(encoder)
        if encoder.of_two:  # half of a model, which has no class that AutoModel knows
            opened = [*_open(encoder), 'base = type(base).from_pretrained("adapted").eval()']
        else:
            if encoder.processor is not None:
                encoder.processor.save_pretrained(directory / "adapted")
            opened = _open(encoder, "adapted")
    imports = ["import json", "import torch", "from safetensors.torch import load_file"]
    code = "\n".join([*imports, *opened, "", *made, "", *_LINEAR])
    atomic_write_text(directory / "README.md", _CLASSIFIER.format(what=what, code=code))


_CLASSIFIER = """# A fine-tuned encoder and a linear head

`adapted/` holds the encoder, `head.safetensors` the `weight` and `bias` of one linear layer on its features;
`classes.json` names its outputs. {what}In this directory:

```python
{code}
```
"""
_OWN_ENCODER = "`base` is your module, of the same shape as before. "
_OPEN_OWN = ['base.load_state_dict(load_file("adapted/model.safetensors"))', "base.eval()"]
_LINEAR = [
    'head, names = load_file("head.safetensors"), json.load(open("classes.json"))["label_names"]',
    "@torch.no_grad()",
    "def logits(inputs):",
    '    return features(base, inputs) @ head["weight"].T + head["bias"]',
    "def predict(inputs):",
    "    return [names[i] for i in logits(inputs).argmax(1).tolist()]",
]


def _open(encoder: Encoder, at: str | None = None) -> list[str]:
    """Code that opens an encoder as ``base``, with its processor: where it came from, or in the folder ``at``."""
    config, model = encoder.model.config, next(encoder.model.parameters())
    names = {"text": "AutoTokenizer", "image": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
    name = None if encoder.processor is None else names[encoder.modality]
    commit = getattr(config, "_commit_hash", None) if at is None else None
    options = f", revision={commit!r}" if commit else ""
    dtype = f", dtype={model.dtype}" if model.dtype != torch.float32 else ""
    half = ".get_encoder()" if encoder.of_two else ""
    lines = [
        f"from transformers import AutoModel{'' if name is None else f', {name}'}",
        "",
        f"BASE = {at or config._name_or_path!r}",
        # As ``load_encoder`` does: a checkpoint saved with another head may lack a pooler.
        "torch.manual_seed(0)  # for weights that the checkpoint lacks, if any",
        f"base = AutoModel.from_pretrained(BASE{options}{dtype}){half}.eval()",
    ]
    return lines if name is None else [*lines, f"processor = {name}.from_pretrained(BASE{options})"]


def _features(encoder: Encoder) -> list[str]:
    """A function from a model and inputs to features, as ``Encoder`` makes them."""
    text, pad = encoder.modality == "text", getattr(encoder.model.config, "pad_token_id", None)
    if encoder.processor is None:
        mask = f', "attention_mask": (inputs != {pad}).long()' if text and pad is not None else ""
        prepare = f'{{"{encoder.model.main_input_name}": inputs{mask}}}'
    elif text:
        limit = "" if encoder.max_length is None else f", max_length={encoder.max_length}"
        prepare = f'processor(inputs, padding=True, truncation=True{limit}, return_tensors="pt")'
    elif encoder.modality == "image":
        prepare = 'processor(inputs, return_tensors="pt")  # RGB images'
    else:
        # Padding would enter the mean below; how a mask of samples becomes one of frames differs from model to model.
        prepare = 'processor(inputs, sampling_rate=processor.sampling_rate, return_tensors="pt")  # one sound'
    lines = ["def features(model, inputs):", f"    batch = {prepare}"]
    if encoder.dual:
        lines += [
            f"    output = model.get_{encoder.modality}_features(**batch)",
            "    pooled = output if torch.is_tensor(output) else output.pooler_output",
        ]
    else:
        lines += _pooled(encoder, masked=text and (encoder.processor is not None or pad is not None))
    scaled = "torch.nn.functional.normalize(pooled.float())" if encoder.normalize else "pooled.float()"
    return [*lines, f"    return {scaled}"]


def _pooled(encoder: Encoder, *, masked: bool) -> list[str]:
    if encoder.layer == -1:
        hidden = ["    output = model(**batch)", "    hidden = output.last_hidden_state"]
    else:
        hidden = [f"    hidden = model(**batch, output_hidden_states=True).hidden_states[{encoder.layer}]"]
    assert encoder.resolved is not None, "it has made the features that the class means stand on"
    if encoder.resolved == "pooler":
        return [*hidden, "    pooled = output.pooler_output.flatten(1)"]
    if encoder.resolved == "cls":
        return [*hidden, "    pooled = hidden[:, 0]"]
    if encoder.resolved == "last":
        return [
            *hidden,
            '    last = hidden.shape[1] - 1 - batch["attention_mask"].flip(1).argmax(1)',
            "    pooled = hidden[torch.arange(len(hidden)), last]",
        ]
    if masked:
        return [
            *hidden,
            '    mask = batch["attention_mask"][..., None].float()',
            "    pooled = (hidden.float() * mask).sum(1) / mask.sum(1)",
        ]
    return [*hidden, "    pooled = hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)"]


_ARRAY_FEATURES = ["def features(model, inputs):", "    return model(inputs).float()"]


def _adapted(kind: str | None, transformers: bool) -> list[str]:
    if kind is None:
        return []
    if kind in ("lora", "ia3"):
        return [
            "from peft import PeftModel",
            'off = PeftModel.from_pretrained(base, "adapter").eval().disable_adapter',
            "adapted = base  # PEFT puts adapters into the model itself",
        ]
    if kind == "full":
        if transformers:
            return ['adapted = type(base).from_pretrained("adapted").eval()']
        return [
            "import copy",
            "adapted = copy.deepcopy(base)",
            'adapted.load_state_dict(load_file("adapted/model.safetensors"))',
        ]
    return (_BESIDE if kind == "adapter" else _AMONG).splitlines()


_SWITCH = """\
from contextlib import contextmanager
adapted, about, on = base, json.load(open("adapter/pet.json")), True
tensors = load_file("adapter/pet.safetensors")
@contextmanager
def off():
    global on
    on = False
    yield
    on = True
"""
_BESIDE = f"""\
{_SWITCH}def beside(site):
    part = {{name: tensors[f"{{site}}.{{name}}"] for name in ("down.weight", "down.bias", "up.weight", "up.bias")}}
    def hook(module, args, kwargs, output):
        if not on:
            return output
        hidden = args[0] if args else next(iter(kwargs.values()))
        bottleneck = torch.nn.functional.linear(hidden, part["down.weight"], part["down.bias"]).relu()
        added = about["scale"] * torch.nn.functional.linear(bottleneck, part["up.weight"], part["up.bias"])
        return output + added if torch.is_tensor(output) else (output[0] + added, *output[1:])
    return hook
for site in about["sites"]:
    base.get_submodule(site).register_forward_hook(beside(site), with_kwargs=True)"""
_AMONG = f"""\
{_SWITCH}def among(site):
    vectors = tensors[f"{{site}}.vectors"]
    def hook(module, args):
        if on:
            return (torch.cat((args[0], vectors.expand(len(args[0]), -1, -1)), 1), *args[1:])
    return hook
def without(module, args, output):
    if on:
        return output[:, : -about["num"]] if torch.is_tensor(output) else (output[0][:, : -about["num"]], *output[1:])
for site in about["sites"]:
    base.get_submodule(site).register_forward_pre_hook(among(site))
for site in about["ends"]:
    base.get_submodule(site).register_forward_hook(without)"""


def _predict(kind: str | None, branches: str, unit_length: bool) -> list[str]:
    if kind is None:
        parts = ["    parts = [features(base, inputs)]"]
    else:
        parts = ["    parts = [features(adapted, inputs)]"]
        if branches == "both" and kind == "full":
            parts.append("    parts.insert(0, features(base, inputs))")
        elif branches == "both":
            parts += ["    with off():", "        parts.insert(0, features(base, inputs))"]
    if unit_length and kind is not None:
        parts.append("    parts = [torch.nn.functional.normalize(part) for part in parts]")
    return [
        "@torch.no_grad()",
        "def encode(inputs):",
        *parts,
        "    return torch.cat(parts, 1)",
        "",
        'means = torch.nn.functional.normalize(load_file("centroids.safetensors")["centroids"])',
        'names = json.load(open("classes.json"))["label_names"]',
        "def predict(inputs):",
        "    cosine = torch.nn.functional.normalize(encode(inputs)) @ means.T",
        "    return [names[i] for i in cosine.argmax(1).tolist()]",
    ]
