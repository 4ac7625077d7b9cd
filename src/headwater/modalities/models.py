"""Opening a pretrained model by reference: Hub name, local directory, LoRA adapter directory, or builtin."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from headwater.core.recipe import ModelRef

__all__ = [
    "Head",
    "ModelError",
    "head_of",
    "is_quantised",
    "load_encoder",
    "load_model",
    "load_tokenizer",
    "local_directory",
    "model_directory",
    "parameter_fingerprint",
]

Head = Literal["causal", "masked", "seq2seq", "none"]

_CLASSES = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "none": AutoModel,
}


class ModelError(ValueError):
    """A model that cannot be opened or used as asked."""


def model_directory(ref: ModelRef) -> str:
    """Name or path for ``from_pretrained``; a builtin is built first, a directory of pickles is refused.

    Raises:
        ModelError: no such directory or builtin, or weights that are only there as pickles.
    """
    if ref.kind == "previous":
        raise ModelError(f"model {ref.name!r} has a meaning only inside a pipeline, after its first step")
    if ref.kind == "builtin":
        from headwater.modalities.text.bases import builtin_model
        from headwater.modalities.vision.bases import DIGITS_VIT, digits_vit

        if ref.name == DIGITS_VIT:
            return str(digits_vit())
        return str(builtin_model(ref.name.removeprefix("headwater:")))
    if ref.kind == "hub":
        return ref.name
    path = ref.path
    if not path.is_dir():
        raise ModelError(
            f"model {ref.name!r}: no such directory. Give a directory that transformers saved, or a Hub name."
        )
    if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        raise ModelError(
            f"model {path}: no config.json and no adapter_config.json; it is no model that transformers or peft saved"
        )
    pickles = sorted(
        p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl") and "training_args" not in p.name
    )
    if pickles and not list(path.glob("*.safetensors")):
        raise ModelError(
            f"model {path}: its weights are a pickle ({pickles[0]}), which can run code when opened. "
            "Convert a file you trust: AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR, safe_serialization=True)"
        )
    return str(path)


def local_directory(ref: ModelRef) -> Path:
    """Where a model's files are on this machine; those of a Hub name in the Hub's cache, fetched if need be.

    Raises:
        ModelError: see ``model_directory``.
    """
    directory = model_directory(ref)
    if ref.kind != "hub":
        return Path(directory)
    from huggingface_hub import snapshot_download

    wanted = [
        "*.safetensors",
        "*.json",
        "*.txt",
        "*.model",
        "*.jinja",
    ]  # no pickle is fetched, nor any other format's weights
    return Path(snapshot_download(directory, revision=ref.revision, allow_patterns=wanted))


def head_of(ref: ModelRef) -> Head:
    """Which kind of language model a checkpoint is, by the architecture its configuration names.

    Raises:
        ModelError: an architecture without a language-model head that we know.
    """
    directory = model_directory(ref)
    if (Path(directory) / "adapter_config.json").exists():
        return "causal"
    config = AutoConfig.from_pretrained(directory, revision=ref.revision, trust_remote_code=ref.trust_remote_code)
    if config.is_encoder_decoder:
        return "seq2seq"
    names = " ".join(config.architectures or [])
    if "MaskedLM" in names or "ForPreTraining" in names:
        return "masked"
    if "CausalLM" in names or "LMHead" in names:
        return "causal"
    if type(config) in AutoModelForMaskedLM._model_mapping and not names:
        return "masked"
    if type(config) in AutoModelForCausalLM._model_mapping and not names:
        return "causal"
    raise ModelError(f"model {ref.name!r}: cannot tell what language model {names or type(config).__name__} is")


def load_model(ref: ModelRef, head: Head, *, random: bool = False) -> nn.Module:
    """A fresh copy of a model, in ``eval`` mode, on the CPU.

    Args:
        ref: the model; a directory with a LoRA adapter is opened on its base and merged.
        head: which ``AutoModel`` class opens it.
        random: take the configuration only and draw new weights from torch's global generator (fork it and
            seed it outside).

    Raises:
        ModelError: see ``model_directory``.
    """
    directory = model_directory(ref)
    shared: dict[str, Any] = {"revision": ref.revision, "trust_remote_code": ref.trust_remote_code}
    dtype = ref.dtype if ref.dtype == "auto" else getattr(torch, ref.dtype)
    cls = _CLASSES[head]
    if random:
        config = AutoConfig.from_pretrained(directory, **shared)
        model: nn.Module = cls.from_config(config, trust_remote_code=ref.trust_remote_code)
        return model.to(torch.float32 if dtype == "auto" else dtype).eval()
    if (Path(directory) / "adapter_config.json").exists():
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(directory).base_model_name_or_path
        if not base:
            raise ModelError(
                f"adapter {directory} does not name its base model; set base_model_name_or_path in adapter_config.json"
            )
        inner = load_model(ref.model_copy(update={"name": base, "revision": None}), head)
        merged: nn.Module = PeftModel.from_pretrained(inner, directory).merge_and_unload()
        return merged.eval()
    opened: nn.Module = cls.from_pretrained(directory, dtype=dtype, use_safetensors=True, **shared)
    return opened.eval()


def load_encoder(ref: ModelRef) -> nn.Module:
    """A fresh copy of a model without a head, in ``eval`` mode, on the CPU.

    Raises:
        ModelError: see ``load_model``.
    """
    # Weights that a checkpoint lacks, such as the pooler of one saved with a language-model head, are drawn from the
    # global generator: from the same state each time, or the model would have another fingerprint at every opening.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return load_model(ref, "none")


def load_tokenizer(ref: ModelRef) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token: EOS where it has none of its own.

    Raises:
        ModelError: the model has no tokenizer, or one with neither EOS nor SEP.
    """
    directory = model_directory(ref)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, revision=ref.revision, trust_remote_code=ref.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {ref.name!r}: no tokenizer could be opened beside it ({str(error).splitlines()[0]})"
        ) from error
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise ModelError(
            f"the tokenizer of {ref.name!r} has neither an EOS nor a SEP token, so documents cannot be kept apart"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_quantised(model: nn.Module) -> bool:
    """Whether weights are stored in a format that cannot be trained directly."""
    return getattr(model, "quantization_method", None) is not None or bool(getattr(model, "is_quantized", False))


def parameter_fingerprint(model: nn.Module) -> str:
    """Hash of a model's weights, for caching what was measured on it.

    Reads every weight once (about 1 GB/s).
    """
    import hashlib

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
