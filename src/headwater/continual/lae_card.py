"""The README that LAE leaves: code that opens both sets of modules and predicts with them, without us."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from headwater.continual.cards import feature_code
from headwater.core.cache import atomic_write_text
from headwater.modalities.features import Encoder

__all__ = ["write_card"]


def write_card(
    directory: Path,
    encoder: nn.Module,
    *,
    kind: Literal["lora", "adapter", "prefix"],
    ensemble: Literal["max", "mean", "online", "offline"],
    two: bool,
) -> None:
    """Write ``README.md``.

    Args:
        directory: where ``head.safetensors``, ``classes.json`` and ``adapter/`` lie.
        encoder: an ``Encoder`` that has made features, or an ``ArrayEncoder``.
        kind: of the modules.
        ensemble: how their answers become one.
        two: whether there is a second set of modules.
    """
    first, second = '("online", "adapter")', '("offline", "adapter/offline")'
    voices = [second] if two and ensemble == "offline" else [first, second] if two and ensemble != "online" else [first]
    code = [
        "import json",
        *feature_code(encoder),
        "",
        f"VOICES = dict([{', '.join(voices)}])",
        *_USE[kind].splitlines(),
        "",
        *_PREDICT.format(how="mean" if ensemble == "mean" else "amax").splitlines(),
    ]
    base = "" if isinstance(encoder, Encoder) else "`base` is your module as it was before, in evaluation mode. "
    what = _WHAT[kind] + (" `adapter/offline/` holds their slow average, in the same form." if two else "")
    atomic_write_text(directory / "README.md", _README.format(what=what, base=base, code="\n".join(code)))


_README = """# A linear head on an encoder with small modules in it

`head.safetensors` holds `weight` (classes, width) and `bias`; `classes.json` names the classes in the same order.
{what} {base}In this directory:

```python
{code}
```
"""
_WHAT = {
    "lora": "`adapter/` holds LoRA on keys and values, which PEFT opens and, with `merge_and_unload`, merges.",
    "adapter": "`adapter/` holds bottlenecks that stand beside modules of the encoder.",
    "prefix": "`adapter/` holds keys and values that the encoder's attention reads besides those of the tokens.",
}
_PREDICT = """\
head, names = load_file("head.safetensors"), json.load(open("classes.json"))["label_names"]
@torch.no_grad()
def scores(inputs):
    made = []
    for name in VOICES:
        use(name)
        logits = features(base, inputs) @ head["weight"].T + head["bias"]
        made.append(logits.softmax(1))
    return torch.stack(made).{how}(0)

def predict(inputs):
    return [names[i] for i in scores(inputs).argmax(1).tolist()]"""
_LORA = """\
from peft import PeftModel
adapted = None
for name, folder in VOICES.items():
    if adapted is None:
        adapted = PeftModel.from_pretrained(base, folder, adapter_name=name).eval()  # it changes `base` itself
    else:
        adapted.load_adapter(folder, name)
use = adapted.set_adapter"""
_TENSORS = """\
tensors = {name: load_file(f"{folder}/pet.safetensors") for name, folder in VOICES.items()}
sites, used = json.load(open("adapter/pet.json"))["sites"], None
def use(name):
    global used
    used = tensors[name]"""
_ADAPTER = f"""\
{_TENSORS}
def beside(site):
    def hook(module, args, kwargs, output):
        part = lambda name: used[f"{{site}}.{{name}}"]
        hidden = args[0] if args else next(iter(kwargs.values()))
        bottleneck = torch.nn.functional.linear(hidden, part("down.weight"), part("down.bias")).relu()
        added = torch.nn.functional.linear(bottleneck, part("up.weight"), part("up.bias")) * part("calibration.value")
        return output + added if torch.is_tensor(output) else (output[0] + added, *output[1:])
    return hook
for site in sites:
    base.get_submodule(site).register_forward_hook(beside(site), with_kwargs=True)"""
_PREFIX = f"""\
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
{_TENSORS}
places = {{base.get_submodule(site): site for site in sites}}
def attend(module, query, key, value, mask, scaling=None, **kwargs):
    if module not in places:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    part = lambda name: used[f"{{places[module]}}.{{name}}"]
    heads = lambda vectors: vectors.view(len(vectors), query.shape[1], -1).transpose(0, 1)
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    tokens, prefix = query @ key.transpose(-1, -2), query @ heads(part("key")).transpose(-1, -2)
    if mask is not None:
        tokens = tokens.masked_fill(~mask, float("-inf"))
    weights = torch.cat((prefix, tokens), -1).softmax(-1)[..., prefix.shape[-1] :]
    output = weights @ value + part("calibration.value") * (prefix.softmax(-1) @ heads(part("value")))
    return output.transpose(1, 2), None
AttentionInterface.register("prefix", attend)
AttentionMaskInterface.register("prefix", sdpa_mask)
base.set_attn_implementation("prefix")"""
_USE = {"lora": _LORA, "adapter": _ADAPTER, "prefix": _PREFIX}
