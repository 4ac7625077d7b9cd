"""Weight arithmetic over checkpoints that are never loaded: differences of models, LoRA adapters as differences.

    delta = tuned - base        new = fn(base, delta, ...)        one tensor at a time

The module to import: it also gives ``WeightSource`` and ``stream_map``, which live in modules of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwater.core.merge_plan import mapped_tensors
from headwater.core.safetensors_stream import MANIFEST, TensorMeta, WeightSource, open_files, weight_files
from headwater.core.stream_map import MergeReport, OutDtype, require_finite, stream_map

__all__ = ["MergeReport", "TensorMeta", "WeightDelta", "WeightSource", "adapter_deltas", "delta", "stream_map"]


class WeightDelta(WeightSource):
    """A change of weights, as a source: computed when read, saved as safetensors, added to any model of these shapes.

    Tensors that it does not hold do not change. Made by ``delta``, ``adapter_deltas`` or ``WeightDelta.open``.

    Args:
        values: the differences, floating point.
        origin: what they are the difference of, as JSON; goes to the manifest.
    """

    is_delta = True

    def __init__(self, values: WeightSource, origin: Mapping[str, object]) -> None:
        self._values, self.origin, self.label = values, dict(origin), values.label

    @classmethod
    def open(cls, ref: str | Path | Mapping[str, Tensor]) -> WeightDelta:
        """Open what ``save`` wrote, or take a mapping of names to differences.

        Raises:
            ValueError: the directory does not hold a saved difference.
        """
        if isinstance(ref, Mapping):
            return cls(WeightSource.open(ref), {"values": "in memory"})
        manifest = Path(ref) / MANIFEST
        recipe = json.loads(manifest.read_text("utf-8"))["recipe"] if manifest.is_file() else {}
        if "delta" not in recipe:
            raise ValueError(f"{ref} is not a saved weight difference: there is no {MANIFEST} that says so.")
        return cls(open_files(weight_files(Path(ref)), str(ref)), recipe["delta"])

    def names(self) -> tuple[str, ...]:
        """Names of the tensors that may change."""
        return self._values.names()

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def meta(self, name: str) -> TensorMeta:
        """Shape, dtype and bytes of a change."""
        return self._values.meta(name)

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a change, computed now."""
        return self._values.slice(name, start, stop)

    def fingerprint(self) -> str:
        """Sha256 over the layouts of what it is made from."""
        return self._values.fingerprint()

    def stamp(self) -> list[list[str | int]] | None:
        """The files that it is made from."""
        return self._values.stamp()

    def save(self, out: Path) -> MergeReport:
        """Write the difference to a new directory: safetensors, and JSON with the shapes and the sha of both sources.

        Raises:
            ValueError, FileExistsError, OSError: as ``stream_map``.
        """
        shapes = {name: list(self.meta(name).shape) for name in self.names()}
        return stream_map(
            {"delta": self}, _keep_delta, out, base="delta", recipe={"delta": self.origin, "shapes": shapes}
        )

    def apply(
        self, source: WeightSource, out: Path, *, scale: float = 1.0, out_dtype: OutDtype = "auto"
    ) -> MergeReport:
        """Write ``source + scale * delta`` to a new model directory, with ``source``'s configuration and tokenizer.

        Raises:
            ValueError, FileExistsError, OSError: as ``stream_map``.
        """

        def add(_: str, values: dict[str, Tensor]) -> Tensor:
            return values["source"] + scale * values["delta"]

        add.elementwise = True  # type: ignore[attr-defined]  # functions take attributes; mypy has no type for that
        recipe = {"add": self.origin, "scale": scale}
        widest = max((self.meta(name).dtype for name in self.names()), key=lambda dtype: dtype.itemsize)
        accumulate = torch.promote_types(torch.float32, widest)
        return stream_map(
            {"source": source, "delta": self},
            add,
            out,
            base="source",
            out_dtype=out_dtype,
            accumulate=accumulate,
            recipe=recipe,
        )


def _keep_delta(_: str, values: dict[str, Tensor]) -> Tensor:
    return values["delta"]


_keep_delta.elementwise = True  # type: ignore[attr-defined]  # functions take attributes; mypy has no type for that


def delta(tuned: WeightSource, base: WeightSource, *, dtype: torch.dtype = torch.float32) -> WeightDelta:
    """``tuned - base``, tensor by tensor, when it is read. Integer tensors must be equal and are not part of it.

    Args:
        tuned: the model that was changed.
        base: the model it came from; same names and shapes.
        dtype: of the differences. float32 gives back bfloat16 and float16 sources when it is added to ``base`` again
            (exactly, unless a value changed by more than 2^16 times its new size); float64 does so for float32 sources.

    Raises:
        ValueError: names or shapes differ, or a tensor is quantised.
    """
    tensors = mapped_tensors({"base": base, "tuned": tuned}, "base")
    metas = {name: TensorMeta.of(meta.shape, dtype) for name, meta in tensors.items()}
    origin = {"tuned": tuned.fingerprint(), "base": base.fingerprint(), "dtype": str(dtype).removeprefix("torch.")}
    return WeightDelta(_Difference(tuned, base, metas), origin)


class _Derived(WeightSource):
    """Tensors that are computed from those of ``parts`` when they are read."""

    def __init__(self, label: str, metas: dict[str, TensorMeta], parts: tuple[WeightSource, ...]) -> None:
        self.label, self._metas, self._parts = label, metas, parts

    def names(self) -> tuple[str, ...]:
        return tuple(self._metas)

    def __contains__(self, name: object) -> bool:
        return name in self._metas

    def meta(self, name: str) -> TensorMeta:
        if name not in self._metas:
            raise KeyError(f"{self.label} has no tensor {name!r}.")
        return self._metas[name]

    def fingerprint(self) -> str:
        return hashlib.sha256("-".join(part.fingerprint() for part in self._parts).encode()).hexdigest()

    def stamp(self) -> list[list[str | int]] | None:
        stamps = [part.stamp() for part in self._parts]
        return None if None in stamps else [entry for stamp in stamps if stamp for entry in stamp]


class _Difference(_Derived):
    def __init__(self, tuned: WeightSource, base: WeightSource, metas: dict[str, TensorMeta]) -> None:
        super().__init__(f"{tuned.label} - {base.label}", metas, (tuned, base))
        self._tuned, self._base = tuned, base

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        dtype = self._metas[name].dtype
        tuned, base = (part.slice(name, start, stop).to(dtype) for part in (self._tuned, self._base))
        for part, values in ((self._tuned, tuned), (self._base, base)):
            require_finite(values, f"{part.label} holds NaN or infinity in {name!r}.")
        return tuned.sub_(base)


def adapter_deltas(adapter_dir: str | Path, base: WeightSource) -> WeightDelta:
    """A PEFT LoRA adapter as the change it makes to ``base``: ``scaling * B @ A``, one module at a time, in float32.

    ``scaling`` is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA; rank and alpha patterns are honoured,
    linear and embedding layers are covered.

    Args:
        adapter_dir: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the model that the adapter was trained on.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: not LoRA; a kind of LoRA that is not a fixed low-rank change of the base (DoRA, PiSSA...); biases or
            ``modules_to_save``; modules that ``base`` does not have in that shape.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3;
        Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732.
    """
    directory = Path(adapter_dir)
    for required in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / required).is_file():
            raise FileNotFoundError(
                f"{directory} has no {required}: it is not an adapter saved by PEFT as safetensors."
            )
    config = json.loads((directory / "adapter_config.json").read_text("utf-8"))
    _require_plain_lora(config, directory)
    source = WeightSource.open(directory / "adapter_model.safetensors")
    factors: dict[str, _Factors] = {}
    metas: dict[str, TensorMeta] = {}
    for key in source.names():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(\.weight)?", key)
        if match is None:
            # PEFT saves an adapted embedding's own weights beside the factors.
            own = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if own in base and torch.equal(source.get(key), base.get(own)):
                continue
            raise ValueError(
                f"{directory}: {key!r} is neither a LoRA factor nor equal to the base; merge it with PEFT."
            )
        if match[3] == "B":
            continue
        module, name = match[1], f"{match[1]}.weight"
        second = re.sub(r"A(\.weight)?$", r"B\1", key)
        (rank, inputs), (outputs, _) = _matrix(source, key), _matrix(source, second)
        transposed = bool(match[2]) or config.get("fan_in_fan_out", False)
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        if name not in base or base.meta(name).shape != shape:
            found = base.meta(name).shape if name in base else "no such tensor"
            raise ValueError(f"{directory} changes {name!r} of shape {shape}; {base.label} has {found}. Another base?")
        patterns = config.get("alpha_pattern") or {}
        alpha = next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", module)), config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        factors[name] = _Factors(key, second, scaling, transposed)
        metas[name] = TensorMeta.of(shape, torch.float32)
    return WeightDelta(_LowRank(source, metas, factors), {"adapter": source.fingerprint(), "base": base.fingerprint()})


def _require_plain_lora(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse what ``scaling * B @ A`` does not describe."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{directory} is a {config.get('peft_type')} adapter; only LORA is a weight difference.")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise ValueError(f"{directory} also trains biases; merge it with PEFT (merge_and_unload) and use the result.")
    if config.get("modules_to_save"):
        modules = config["modules_to_save"]
        raise ValueError(f"{directory} replaces whole modules (modules_to_save={modules}); merge it with PEFT first.")
    # These start from, or act as, something else than a fixed low-rank change of every input's weights.
    other = (
        *("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "velora_config", "arrow_config"),
        *("alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices"),
    )
    init = config.get("init_lora_weights", True)
    rewrites_base = isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    if found := [key for key in other if config.get(key)] + [f"init_lora_weights={init}"] * rewrites_base:
        raise ValueError(
            f"{directory} uses {found[0]}, which is not scaling * B @ A; merge it with PEFT and use the result."
        )


def _matrix(source: WeightSource, key: str) -> tuple[int, int]:
    if key not in source:
        raise ValueError(f"{source.label} lacks {key!r}, the other factor of its module.")
    shape = source.meta(key).shape
    if len(shape) != 2:
        raise ValueError(f"{source.label}: {key!r} has shape {shape}; only linear and embedding layers are supported.")
    return shape[0], shape[1]


class _Factors(NamedTuple):
    first: str  # A: (rank, inputs)
    second: str  # B: (outputs, rank)
    scaling: float
    transposed: bool  # the weight is (inputs, outputs)


class _LowRank(_Derived):
    def __init__(self, source: WeightSource, metas: dict[str, TensorMeta], factors: dict[str, _Factors]) -> None:
        super().__init__(source.label, metas, (source,))
        self._source, self._factors = source, factors

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        first, second, scaling, transposed = self._factors[name]
        a, b = self._source.get(first).float(), self._source.get(second).float()
        product = a[:, start:stop].T @ b.T if transposed else b[start:stop] @ a
        return product.mul_(scaling)
