"""Curation of a corpus: datatrove's blocks and ours over shards, resumable, with nothing lost on the way.

    documents -> stage -> stage -> ... -> kept/          a stage ends where a step must see all documents first

Beside what is kept stand ``removed/`` (by step, each document with its reason), ``errors/`` (documents that broke a
step, with the traceback), and ``manifest.jsonl``: for every shard and step, what went in, came out, left and why. The
same documents come out whatever the number of workers, on this machine or on Ray.

datatrove runs the blocks, shards, resumes and writes. What it does not do is here: documents that break a step do not
stop the run, every step's removals are kept, results of other settings are refused, a truncated output is made again.

Source: Penedo et al., datatrove (https://github.com/huggingface/datatrove), whose blocks and executors these are.
Needs: the extra ``curate``; ``ray`` for several machines.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headwater.core.cache import atomic_write_text
from headwater.core.recipe import CorpusRef
from headwater.modalities.text.curate_steps import Guard, Kept, Ledger, StageDocuments, StoredDocuments, settings_of
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.document_store import DocumentStore, stored_corpus
from headwater.modalities.text.steps import KeepBest

__all__ = ["Checkpoint", "Curated", "CurationChanged", "Dedup", "Executor", "StepCount", "curate"]

logger = logging.getLogger(__name__)

SHARD_DOCUMENTS = 50_000
_VERSION = 1


class CurationChanged(CorpusError):
    """A directory holds the results of other documents or other steps."""


@dataclass(frozen=True)
class Checkpoint:
    """Ends a stage: what was done before is not done again when a later step changes."""


@dataclass(frozen=True)
class Dedup:
    """Near-duplicates by MinHash, of each group all but one dropped: datatrove's four blocks.

    Attributes:
        ngram: words of a shingle.
        buckets, hashes: bands and hashes in each; pairs above a similarity of about (1 / buckets)^(1 / hashes) meet.
        seed: of the hash functions.
    """

    ngram: int = 5
    buckets: int = 14
    hashes: int = 8
    seed: int = 1


@dataclass(frozen=True)
class Executor:
    """Where shards are worked on.

    Attributes:
        kind: ``local``: in this process, or in several beside it; ``ray``: on the cluster at ``address``.
        workers: shards at a time.
        address: of a Ray cluster; None starts one here.
        gigabytes: memory that Ray reserves for a shard.
    """

    kind: str = "local"
    workers: int = 1
    address: str | None = None
    gigabytes: float = 2.0

    def run(self, pipeline: Sequence[Any], tasks: int, logs: Path) -> None:  # Any: blocks of datatrove
        """Run a pipeline over ``tasks`` shards; those that are complete are left alone.

        Raises:
            RuntimeError: Ray gave some of the shards up.
        """
        from headwater.modalities.text.curate_executors import local_executor, ray_executor

        make = ray_executor if self.kind == "ray" else local_executor
        executor = make(self, pipeline, tasks, logs)
        executor.run()
        if missing := executor.get_incomplete_ranks(range(tasks), skip_completed=True):
            raise RuntimeError(
                f"{len(missing)} of {tasks} shards were not finished, the first being {missing[0]}; "
                f"see {logs / 'logs'}. What is finished is kept: run again to go on."
            )


@dataclass(frozen=True)
class StepCount:
    """What a step did to all shards.

    Attributes:
        stage, name: which step.
        docs_in, docs_out, bytes_in, bytes_out: before and after it.
        changed: documents whose text it changed.
        removed: how many documents left, by reason.
        errors: documents that broke it.
        seconds: of all shards, what stands before it not counted.
        scores: some of the numbers it wrote, if it scores.
        samples: some texts, each with its ``fate`` (removed, changed, kept) and a ``note``: why, or what it became.
    """

    stage: int
    name: str
    docs_in: int
    docs_out: int
    bytes_in: int
    bytes_out: int
    changed: int
    removed: dict[str, int]
    errors: int
    seconds: float
    scores: list[float] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Curated:
    """What a curation left.

    Attributes:
        directory: with ``kept/``, ``removed/``, ``errors/`` and ``manifest.jsonl``.
        steps: what each step did.
    """

    directory: Path
    steps: tuple[StepCount, ...]

    @property
    def documents(self) -> DocumentStore:
        """What was kept, in the order of the source.

        Raises:
            CorpusError: nothing was.
        """
        if not any(step.docs_out for step in self.steps[-1:]):
            worst = max(self.steps, key=lambda step: step.docs_in - step.docs_out)
            raise CorpusError(
                f"curation kept no document; step {worst.name!r} dropped {worst.docs_in - worst.docs_out} of "
                f"{worst.docs_in}, for {', '.join(worst.removed)}. Look at {self.directory / 'removed'}."
            )
        return stored_corpus(CorpusRef(name=str((self.directory / "kept").resolve())), role="curated")

    @property
    def metrics(self) -> dict[str, float]:
        """``curated/docs_in``, ``docs_out``, ``bytes_in``, ``bytes_out``, ``errors`` and ``seconds``."""
        first, last = self.steps[0], self.steps[-1]
        return {
            "curated/docs_in": float(first.docs_in),
            "curated/docs_out": float(last.docs_out),
            "curated/bytes_in": float(first.bytes_in),
            "curated/bytes_out": float(last.bytes_out),
            "curated/errors": float(sum(step.errors for step in self.steps)),
            "curated/seconds": sum(step.seconds for step in self.steps),
        }


def curate(
    documents: DocumentStore,
    steps: Sequence[Any],  # Any: blocks of datatrove, Checkpoint, Dedup
    directory: Path,
    *,
    executor: Executor = Executor(),  # frozen
    shard_documents: int = SHARD_DOCUMENTS,
    max_errors: int = 100,
    samples: int = 0,
    overwrite: bool = False,
) -> Curated:
    """Run steps over documents; go on where an earlier run with the same settings stopped.

    Args:
        documents: what there is.
        steps: filters, formatters and other blocks of datatrove that work on one document after another, our own, and
            ``Checkpoint`` and ``Dedup``.
        directory: written to.
        executor: where; it changes no document.
        shard_documents: documents of a shard, the unit of resuming.
        max_errors: documents of a shard that may break a step before the run stops.
        samples: texts of each step and fate for the report; none unless asked, since they are the user's.
        overwrite: make those stages again whose settings changed, instead of refusing.

    Raises:
        CurationChanged: the directory holds results of other documents or steps; says which step differs first.
        ValueError: no step, or a step whose settings cannot be told.
    """
    stages = _stages(steps)
    shards = max(1, -(-len(documents) // shard_documents))
    read = f"{documents.fingerprint} {documents.metadata_fingerprint}"
    head = {"version": _VERSION, "documents": read, "shard_documents": shard_documents}
    settings = [[settings_of(step) for step in stage] for stage in stages]
    _settle(directory, head, settings, overwrite=overwrite)
    found: list[StepCount] = []
    for number, stage in enumerate(stages):
        place = _Place(directory, number, last=number == len(stages) - 1)
        _run_stage(place, stage, documents, executor, shards, max_errors=max_errors, samples=samples)
        found += place.counts(shards)
        logger.info(
            "stage %d of %d: %d of %d documents left", number + 1, len(stages), found[-1].docs_out, len(documents)
        )
    _write_manifest(directory, len(stages), shards)
    atomic_write_text(directory / "steps.json", json.dumps([asdict(step) for step in found], indent=1) + "\n")
    return Curated(directory, tuple(found))


def _stages(steps: Sequence[Any]) -> list[list[Any]]:
    stages: list[list[Any]] = [[]]
    for step in steps:
        if isinstance(step, Checkpoint):
            stages.append([])
            continue
        if isinstance(step, (KeepBest, Dedup)) and stages[-1]:
            stages.append([])
        stages[-1].append(step)
    found = [stage for stage in stages if stage]
    if not found:
        raise ValueError("curation needs at least one step.")
    return found


def _settle(directory: Path, head: Mapping[str, Any], stages: list[list[Any]], *, overwrite: bool) -> None:
    """Write the settings, or compare them with those there; clear stages that are to be made again."""
    path = directory / "curation.json"
    wanted = {**head, "stages": stages}
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        first = _first_difference(there, wanted)
        if first is not None:
            stage, words = first
            if not overwrite:
                raise CurationChanged(
                    f"{directory} holds the results of other settings: {words}. Choose another directory, or make what "
                    "differs again with overwrite."
                )
            for number in range(stage, max(len(there["stages"]), len(stages))):
                _Place(directory, number).clear()
            # What was the last stage wrote elsewhere than a stage before others does.
            if len(there["stages"]) != len(stages):
                _Place(directory, min(len(there["stages"]), len(stages)) - 1).clear()
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(wanted, indent=2) + "\n")


def _first_difference(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[int, str] | None:
    """The first stage that differs and what to say of it; None where nothing differs."""
    for name in ("version", "documents", "shard_documents"):
        if there[name] != wanted[name]:
            return 0, f"{name} was {there[name]} and is {wanted[name]}"
    for number in range(max(len(there["stages"]), len(wanted["stages"]))):
        sides = [s["stages"][number] if number < len(s["stages"]) else [] for s in (there, wanted)]
        for place in range(max(map(len, sides))):
            old, new = (side[place] if place < len(side) else None for side in sides)
            if old != new:
                return number, f"step {place + 1} of stage {number + 1} was {_said(old)} and is {_said(new)}"
    return None


def _said(settings: Any) -> str:
    return "nothing" if settings is None else json.dumps(settings)[:300]


@dataclass(frozen=True)
class _Place:
    """Where a stage reads and writes."""

    directory: Path
    number: int
    last: bool = True

    @property
    def output(self) -> Path:
        return self.directory / ("kept" if self.last else f"stages/{self.number:02d}/documents")

    @property
    def own(self) -> Path:
        return self.directory / f"stages/{self.number:02d}"

    def ledger(self, shard: int) -> Path:
        return self.own / "ledger" / f"{shard:05d}.json"

    def clear(self) -> None:
        shutil.rmtree(self.own, ignore_errors=True)
        for name in ("removed", "errors"):
            for path in sorted((self.directory / name).glob(f"{self.number:02d}-*")):
                shutil.rmtree(path)
        shutil.rmtree(self.directory / "kept", ignore_errors=True)

    def forget_broken(self, shards: int) -> None:
        """Let shards whose output is not as their ledger says be made again."""
        for shard in range(shards):
            done = self.own / "logs" / "completions" / f"{shard:05d}"
            if not done.exists():
                continue
            ledger = self.ledger(shard)
            about = json.loads(ledger.read_text(encoding="utf-8")) if ledger.exists() else None
            output = self.output / f"{shard:05d}.jsonl.gz"
            if about is None or not output.exists() or output.stat().st_size != about["bytes"]:
                done.unlink()

    def counts(self, shards: int) -> list[StepCount]:
        """The stage's steps, over all shards."""
        ledgers = [json.loads(self.ledger(shard).read_text(encoding="utf-8")) for shard in range(shards)]
        return [
            _summed(self.number, [ledger["steps"][i] for ledger in ledgers]) for i in range(len(ledgers[0]["steps"]))
        ]


def _summed(stage: int, parts: Sequence[Mapping[str, Any]]) -> StepCount:
    removed: Counter[str] = Counter()
    for part in parts:
        removed.update(part["removed"])
    sums: dict[str, Any] = {  # Any: counts, and seconds
        name: sum(part[name] for part in parts)
        for name in ("docs_in", "docs_out", "bytes_in", "bytes_out", "changed", "errors", "seconds")
    }
    sums["scores"] = [score for part in parts for score in part["scores"]]
    sums["samples"] = [sample for part in parts for sample in part["samples"]]
    return StepCount(stage=stage, name=parts[0]["name"], removed=dict(removed.most_common()), **sums)


def _run_stage(
    place: _Place,
    stage: Sequence[Any],
    documents: DocumentStore,
    executor: Executor,
    shards: int,
    *,
    max_errors: int,
    samples: int,
) -> None:
    place.forget_broken(shards)
    before = _Place(place.directory, place.number - 1, last=False)
    source = StoredDocuments(documents, shards) if place.number == 0 else StageDocuments(before.output)
    steps = list(stage)
    if isinstance(steps[0], Dedup):
        steps[0] = _dedup(steps[0], source, place, executor, shards)
    elif isinstance(steps[0], KeepBest):
        steps[0].learn(document.metadata for shard in range(shards) for document in source.run(None, shard, shards))
    guards = []
    for position, step in enumerate(steps):
        name = "near-duplicates" if isinstance(stage[position], Dedup) else _readable(step)
        label = f"{place.number:02d}-{position:02d}"
        allowed = None if isinstance(stage[position], Dedup) else max_errors
        guards.append(Guard(step, name, label, place.directory, max_errors=allowed, samples=samples))
    ledger = Ledger(guards, place.output, place.own / "ledger")
    executor.run([source, *guards, Kept(place.output), ledger], shards, place.own / "logs")


def _readable(step: Any) -> str:
    """The step's name without datatrove's pictures."""
    return str(step.name).encode("ascii", "ignore").decode().strip() or type(step).__name__


def _dedup(settings: Dedup, source: Any, place: _Place, executor: Executor, shards: int) -> Any:
    """Find what to drop, and return the block that drops it."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup import MinhashDedupSignature as Signature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(
        n_grams=settings.ngram,
        num_buckets=settings.buckets,
        hashes_per_bucket=settings.hashes,
        seed=settings.seed,
        hash_config=HashConfig(hash_fc="sha1"),  # datatrove's other one breaks with xxhash 4
    )
    folder = {name: str(place.own / "minhash" / name) for name in ("signatures", "buckets", "remove")}
    logs = place.own / "minhash" / "logs"
    executor.run([source, Signature(folder["signatures"], config=config)], shards, logs / "signatures")
    buckets = MinhashDedupBuckets(folder["signatures"], folder["buckets"], config=config)
    executor.run([buckets], settings.buckets, logs / "buckets")
    cluster = MinhashDedupCluster(folder["buckets"], folder["remove"], config=config)
    executor.run([cluster], 1, logs / "cluster")
    return MinhashDedupFilter(folder["remove"])


def _write_manifest(directory: Path, stages: int, shards: int) -> None:
    lines = []
    for stage in range(stages):
        for shard in range(shards):
            about = json.loads(_Place(directory, stage).ledger(shard).read_text(encoding="utf-8"))
            for step in about["steps"]:
                counts = {name: value for name, value in step.items() if name not in ("scores", "samples")}
                lines.append(json.dumps({"stage": stage, "shard": shard, **counts}))
    atomic_write_text(directory / "manifest.jsonl", "".join(line + "\n" for line in lines))
