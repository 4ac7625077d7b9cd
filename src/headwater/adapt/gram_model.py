"""Dual encoders that classify by phrases behind a trained prompt: CoOp's classifier, and visual prompts beside it.

    logits[i, c] = scale cos(image_i, text([prompt, phrase_c]))

Sources: the classifier: Zhou et al., "Learning to Prompt for Vision-Language Models", arXiv:2109.01134; visual prompts:
    Jia et al., "Visual Prompt Tuning", arXiv:2203.12119, of which this is the shallow kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from headwater.core.cache import atomic_path, atomic_write_text
from headwater.modalities.features import Encoder
from headwater.modalities.text.softprompt import SoftPrompt, attach_soft_prompt

__all__ = ["SENTENCE_SCALE", "PromptedClassifier", "PromptedDualEncoder", "Prompts", "use_eager_attention"]

Prompts = Mapping[str, Tensor]
"""Vectors by tower: ``text`` ``(tokens, dim)``, ``vision`` ``(tokens, dim)``, either or both."""

SENTENCE_SCALE = 20.0
"""Of cosines between sentences, which have no temperature of their own: the one sentence encoders are trained with."""


def use_eager_attention(model: nn.Module) -> None:
    """Let a model compute attention step by step: PyTorch's fused kernels have no second derivative.

    Raises:
        ValueError: the model has no such implementation.
    """
    name = type(model).__name__
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"{name} offers no choice of attention; second order needs `eager`. Use first order.")
    model.set_attn_implementation("eager")  # type: ignore[operator]  # Hugging Face's
    configs = [getattr(module, "config", None) for module in model.modules()]
    used = {str(kind) for c in configs if (kind := getattr(c, "_attn_implementation", None))}
    if other := used - {"eager"}:
        raise ValueError(f"{name} keeps attention {', '.join(sorted(other))}; second order needs `eager`.")


class PromptedDualEncoder(nn.Module):
    """A frozen dual encoder with soft prompts, for CLIP, SigLIP and their like, and for sentence encoders.

    With a sentence encoder, images are features of the other texts, computed once.

    Args:
        model: a Hugging Face dual encoder, or a text encoder; frozen in place and put into evaluation mode.
        tokenizer: its own, padding on the right.
        prompts: ``text`` and ``vision``, either or both; as wide as the tower's hidden states.
        template: what the words of a class become behind the prompt; ``{}`` stands for its phrase.
        scale: of the cosines; ``None``: the model's own, or 20 where it has none.
        second_order: use attention that can be differentiated twice.

    Raises:
        ValueError: an unknown or no prompt, a visual prompt without an image tower, a template without ``{}``, or a
            width that does not suit.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Mapping[str, SoftPrompt],
        *,
        template: str = "{}",
        scale: float | None = None,
        second_order: bool = False,
    ) -> None:
        super().__init__()
        if not prompts or set(prompts) - {"text", "vision"}:
            raise ValueError(f"prompts are for `text`, `vision` or both; got {sorted(prompts)}.")
        if "{}" not in template:
            raise ValueError(f"the template needs a {{}} for the phrase of a class; got {template!r}.")
        if "vision" in prompts and not hasattr(model, "vision_model"):
            raise ValueError(f"{type(model).__name__} has no image tower that could take a visual prompt.")
        if second_order:
            use_eager_attention(model)
        self.model: Any = model.requires_grad_(False).eval()  # Any: forward signatures differ
        self.tokenizer, self.template = tokenizer, template
        self.prompts = nn.ModuleDict(prompts)
        self.encoder = Encoder(model, tokenizer, "text", normalize=True)
        table = getattr(model, "text_model", model).get_input_embeddings()  # type: ignore[operator]  # HF's
        text = prompts.get("text") or SoftPrompt(table.weight[:0])
        if "vision" in prompts and prompts["vision"].weight.shape[1] != model.vision_model.config.hidden_size:  # type: ignore[union-attr]
            raise ValueError(
                f"the visual prompt is {prompts['vision'].weight.shape[1]} wide; the image tower's hidden states are "
                f"{model.vision_model.config.hidden_size}."  # type: ignore[union-attr]
            )
        begins = self._tokens(["a"])["input_ids"][0, 0].item()
        first = {tokenizer.bos_token_id, tokenizer.cls_token_id}
        self.position = "bos" if begins in first - {None} else "start"
        self.attached = attach_soft_prompt(
            model,
            text,
            self.position,  # type: ignore[arg-type]  # one of the two
            max_length=self.encoder.max_length,
        )
        own = getattr(model, "logit_scale", None)
        self.scale = float(scale if scale is not None else SENTENCE_SCALE if own is None else own.detach().exp())

    def vectors(self) -> dict[str, Tensor]:
        """The prompts as they are."""
        return {name: prompt.weight for name, prompt in self.prompts.items()}  # type: ignore[misc]  # SoftPrompts

    def text_features(self, phrases: Sequence[str], prompts: Prompts | None = None) -> Tensor:
        """Unit vectors of classes, ``(classes, D)``.

        Args:
            phrases: what each class is called.
            prompts: used in place of the encoder's own; gradients flow into them.

        Raises:
            ValueError: a phrase is too long for the tower behind the prompt.
        """
        tokens = self._tokens([self.template.replace("{}", phrase) for phrase in phrases])
        with self.attached.inserted((prompts or {}).get("text")):
            features: Tensor = self.encoder(self.attached.extend(tokens))
        return features

    def image_features(self, images: Tensor, prompts: Prompts | None = None) -> Tensor:
        """Unit vectors of images, ``(n, D)``.

        Args:
            images: pixels ``(n, channels, height, width)``; or features ``(n, D)`` computed beforehand.
            prompts: as in ``text_features``.

        Raises:
            ValueError: features, with a visual prompt, which pixels are needed for.
        """
        if images.ndim == 2:
            if "vision" in self.prompts:
                raise ValueError("a visual prompt changes what the image tower sees: give pixels, not features.")
            return nn.functional.normalize(images, dim=-1)
        with self._visual((prompts or {}).get("vision")):
            output = self.model.get_image_features(pixel_values=images)
        return nn.functional.normalize(getattr(output, "pooler_output", output).float(), dim=-1)

    def forward(self, images: Tensor, phrases: Sequence[str], prompts: Prompts | None = None) -> Tensor:
        """Logits, ``(n, classes)``."""
        return self.scale * self.image_features(images, prompts) @ self.text_features(phrases, prompts).T

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        # SigLIP pools at the last position and was trained on rows of full length; others read no more than there is.
        full = "siglip" in str(getattr(self.model.config, "model_type", ""))
        length = self.encoder.max_length if full else None
        batch = self.tokenizer(texts, padding="max_length" if full else True, max_length=length, return_tensors="pt")
        return {name: values.to(next(self.model.parameters()).device) for name, values in batch.items()}

    @contextmanager
    def _visual(self, vectors: Tensor | None) -> Iterator[None]:
        if "vision" not in self.prompts:
            yield
            return
        chosen: Tensor = self.vectors()["vision"] if vectors is None else vectors

        # Behind the patches: they have their positions already, and the class token stays first.
        def append(module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
            return torch.cat((embedded, chosen.to(embedded).expand(len(embedded), -1, -1)), dim=1)

        handle = self.model.vision_model.embeddings.register_forward_hook(append)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True, eq=False)
class PromptedClassifier:
    """What tuning a prompt leaves: the prompt, the regulator it was tuned with, and the weights that classify.

    Attributes:
        encoder: with the tuned prompts.
        regulators: by the names of the prompts.
        phrases: of the classes.
        about: JSON data for ``prompt.json``: ``model``, ``labels`` and what else the prompt depends on.
    """

    encoder: PromptedDualEncoder
    regulators: Mapping[str, nn.Module]
    phrases: tuple[str, ...]
    about: Mapping[str, Any]  # Any: JSON data

    @property
    def trainable_parameters(self) -> int:
        """Numbers in the prompts."""
        return sum(prompt.numel() for prompt in self.encoder.prompts.parameters())

    def predict_scores(self, inputs: NDArray[Any]) -> NDArray[Any]:  # Any: a float dtype
        """Logits of features, ``(n, classes)``."""
        with torch.no_grad():
            logits = self.encoder(torch.from_numpy(np.array(inputs, dtype=np.float32)), self.phrases)
        return np.asarray(logits.cpu())

    def save_pretrained(self, directory: Path) -> None:
        """Write ``prompt.safetensors``, ``regulator.safetensors``, ``classes.safetensors``, ``prompt.json``, and
        ``README.md``.
        """
        with torch.no_grad():
            weight = self.encoder.text_features(self.phrases)
        regulator = {
            f"{name}.{key}": tensor
            for name, module in self.regulators.items()
            for key, tensor in module.state_dict().items()
        }
        files = {"prompt": self.encoder.vectors(), "regulator": regulator, "classes": {"weight": weight}}
        for name, tensors in files.items():
            if tensors:
                with atomic_path(directory / f"{name}.safetensors") as path:
                    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        said = {
            "format": 1,
            **self.about,
            "template": self.encoder.template,
            "phrases": list(self.phrases),
            "position": self.encoder.position,
            "scale": self.encoder.scale,
        }
        atomic_write_text(directory / "prompt.json", json.dumps(said, indent=2) + "\n")
        where = "behind the first token" if self.encoder.position == "bos" else "before the first token"
        shapes = ", ".join(f"`{name}` {tuple(v.shape)}" for name, v in self.encoder.vectors().items())
        atomic_write_text(directory / "README.md", _README.format(where=where, shapes=shapes, **said))


_README = """# A prompt for a frozen dual encoder

`prompt.safetensors` holds the vectors {shapes}. The text ones stand {where} of each row that the text tower of
`{model}` reads, as if they were words: they count for positions, attention mask and pooling. Behind them stands the
phrase of a class in the template `{template}`. `prompt.json` names classes, phrases and template;
`regulator.safetensors`, if it is there, holds the function that gradients of the prompt passed through.

`classes.safetensors` holds the result, a unit vector for each class, so that predicting needs no prompt. `features` are
unit vectors of the other side, images or texts, from the same model without a prompt:

    from safetensors.torch import load_file
    weight = load_file("classes.safetensors")["weight"]
    ({scale:g} * features @ weight.T).softmax(-1)        # class probabilities
"""
