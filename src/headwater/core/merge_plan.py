"""What a streaming merge will write, decided from headers alone: the names, shapes and dtypes of all sources."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from headwater.core.safetensors_stream import TensorMeta, WeightSource

__all__ = ["MergePlan", "TensorTask", "mapped_tensors", "plan_merge"]

# The tensors with one row per token, by the names that Hugging Face models give them.
_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|wte|shared|embed_in|embed_out|lm_head|predictions(\.decoder)?)"
    r"\.(weight|bias)$"
)
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")


class TensorTask(NamedTuple):
    """One tensor of the result."""

    name: str
    out: TensorMeta
    inner: TensorMeta  # as the base has it; fewer rows than ``out`` where vocabularies are united
    holders: tuple[str, ...]  # the roles that are read, the base first
    mapped: bool  # False: the base's tensor is copied, after comparison with the other holders

    @property
    def row_bytes(self) -> int:
        """Bytes of a call's working set per row: inputs as stored (1), as float32 (2 if bfloat16), the next ones."""
        return 4 * len(self.holders) * self.inner.row_elements * self.inner.dtype.itemsize


class MergePlan(NamedTuple):
    """Every tensor of the result, and the names that are treated otherwise; see ``MergeReport``."""

    tasks: list[TensorTask]
    copied: tuple[str, ...]
    skipped: tuple[str, ...]
    ignored: tuple[str, ...]
    vocabulary_rows: dict[str, int]


def plan_merge(sources: Mapping[str, WeightSource], base: str, out_dtype: str, missing: str, vocab: str) -> MergePlan:
    """Decide every tensor of the result from headers alone; refuse what does not fit."""
    main = sources[base]
    others = {role: source for role, source in sources.items() if role != base}
    lacking, skipped, ignored = _compare_names(main, base, others, missing)
    tasks, rows_differ, wrong = [], {}, []
    for name in main.names():
        if name in skipped:
            continue
        inner = main.meta(name)
        copy_only = name in lacking
        holders = (base,) if copy_only else (base, *(role for role, source in others.items() if name in source))
        metas = {role: sources[role].meta(name) for role in holders}
        _check_dtypes(name, metas, base)
        if not inner.dtype.is_floating_point:
            wrong += [name] * (len({meta.shape for meta in metas.values()}) > 1)
            tasks.append(TensorTask(name, inner, inner, holders, mapped=False))
            continue
        dtype = inner.dtype if out_dtype == "auto" else getattr(torch, out_dtype)
        rows = inner.rows
        if any(meta.shape != inner.shape for meta in metas.values()):
            if not _only_vocabulary(name, metas.values()) or vocab == "error":
                wrong.append(name)
            if vocab == "union":
                rows = max(meta.rows for role, meta in metas.items() if not sources[role].is_delta)
            rows_differ[name] = rows
        out = TensorMeta.of((rows, *inner.shape[1:]) if inner.shape else (), dtype)
        tasks.append(TensorTask(name, out, inner, holders, mapped=not copy_only))
    if wrong:
        raise ValueError(_shape_message(sources, wrong))
    if not tasks:
        raise ValueError(f"{main.label} holds no tensor that all sources have: there is nothing to write.")
    copied = tuple(name for name in main.names() if name in lacking and name not in skipped)
    return MergePlan(tasks, copied, skipped, ignored, rows_differ)


def mapped_tensors(sources: Mapping[str, WeightSource], base: str) -> dict[str, TensorMeta]:
    """The floating-point tensors of ``base``, after checking that all sources have the same names and shapes.

    Raises:
        ValueError: they have not, or a tensor is quantised.
    """
    tasks = plan_merge(sources, base, "auto", "error", "error").tasks
    return {task.name: task.inner for task in tasks if task.mapped}


def _compare_names(
    main: WeightSource, base: str, others: Mapping[str, WeightSource], missing: str
) -> tuple[set[str], tuple[str, ...], tuple[str, ...]]:
    """Names of the base that some source lacks, those of them to leave out, and names that the base lacks."""
    lacking: set[str] = set()
    tied: set[str] = set()
    ignored: dict[str, None] = {}  # an ordered set
    known = set(main.names())
    for role, source in others.items():
        extra = [name for name in source.names() if name not in known]
        absent = [] if source.is_delta else [name for name in main.names() if name not in source]
        tied_here = {name for name in absent if _ties(source, name) and _ties(main, name)}
        absent = [name for name in absent if name not in tied_here]
        ignored |= dict.fromkeys(extra)
        extra = [name for name in extra if not _ties(source, name)]
        if missing == "error" and (absent or extra):
            sides = [f"{len(absent)} only in {base!r} (first 10: {', '.join(absent[:10])})"] * bool(absent)
            sides += [f"{len(extra)} only in {role!r} (first 10: {', '.join(extra[:10])})"] * bool(extra)
            raise ValueError(
                f"tensor names differ: {'; '.join(sides)}. Use missing='copy' to keep the base's tensors as they are, "
                "missing='skip' to leave them out; what the base lacks is never written."
            )
        lacking |= set(absent)
        tied |= tied_here
    left_out = tied | (lacking if missing == "skip" else set())
    return lacking, tuple(name for name in main.names() if name in left_out), tuple(ignored)


def _ties(source: WeightSource, name: str) -> bool:
    """Whether ``name`` is an output head that this model shares with its embedding."""
    if name in source.tied:
        return True
    config = source.config
    flag = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False))
    return bool(flag) and _HEAD.search(name) is not None


def _check_dtypes(name: str, metas: Mapping[str, TensorMeta], base: str) -> None:
    kinds = {role: meta.dtype for role, meta in metas.items()}
    for role, dtype in kinds.items():
        if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize == 1):
            raise ValueError(f"{name!r} of {role!r} is {dtype}: quantised or complex weights cannot be combined.")
        mixed = dtype.is_floating_point != kinds[base].is_floating_point
        if mixed or (not dtype.is_floating_point and dtype != kinds[base]):
            raise ValueError(f"{name!r} is {dtype} in {role!r} and {kinds[base]} in {base!r}.")


def _only_vocabulary(name: str, metas: Iterable[TensorMeta]) -> bool:
    return _VOCABULARY.search(name) is not None and len({meta.shape[1:] for meta in metas}) == 1


def _shape_message(sources: Mapping[str, WeightSource], wrong: list[str]) -> str:
    metas = {name: {role: source.meta(name) for role, source in sources.items() if name in source} for name in wrong}
    lines = [
        f"{name}: " + ", ".join(f"{role} {list(meta.shape)}" for role, meta in metas[name].items())
        for name in wrong[:5]
    ]
    advice = "The models are not of one architecture."
    if all(_only_vocabulary(name, found.values()) for name, found in metas.items()):
        advice = "Only the vocabulary differs: use vocab='base' to keep the base's rows, or vocab='union' to keep all."
    return f"{len(wrong)} tensor(s) differ in shape; first 5: {'; '.join(lines)}. {advice}"
