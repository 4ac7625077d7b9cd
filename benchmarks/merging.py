"""(d) What does streaming cost a merge: ``stream_map`` against ``safe_open``, axpy and ``save_file``, shard by shard.

    python -m benchmarks.merging [--gib SIZE]

    out = round( 0.7 a + 0.3 b )      in float32, a and b in bfloat16

The peer holds one shard of the result at a time; ``stream_map`` a block of one tensor. ``stream_map`` also checks every
value for NaN, counts what does not change, and syncs every file before it takes its name; the peer syncs too, since a
result that a power cut can lose took no time to write. Inputs stay in the page cache (see ``notes``): the page cache
holds what memory is left, so a smaller ``--gib`` is the fairer run on a full machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.harness import Bound, own_peak_bytes, peak_of, report
from headwater.core.weights import WeightSource, stream_map

ROUNDS, SHARD = 4, 1 << 29  # counted rounds; bytes of a file
WIDTH, INNER, KEYS, VOCABULARY = 2048, 5632, 512, 32_000
PEAK = 600 * 10**6
SHARE = 0.3


def shapes(nbytes: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a decoder: an embedding, and layers until the size is reached."""
    layer = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KEYS, WIDTH), "self_attn.v_proj": (KEYS, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
    }  # fmt: skip
    rest = nbytes - 2 * VOCABULARY * WIDTH
    layers = max(1, round(rest / sum(2 * torch.Size(shape).numel() for shape in layer.values())))
    named = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    return {"model.embed_tokens.weight": (VOCABULARY, WIDTH)} | named


def write_model(directory: Path, nbytes: int, seed: int) -> None:
    """Random bfloat16 weights in files of at most ``SHARD`` bytes; tensors are cut from one pool, which is quicker."""
    directory.mkdir()
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(seed)).mul_(0.02).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes(nbytes).items():
        size = 2 * torch.Size(shape).numel()
        if used + size > SHARD:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    for number, shard in enumerate(shards, 1):
        sizes = {name: torch.Size(shape).numel() for name, shape in shard.items()}
        tensors = {n: pool.repeat(-(-size // len(pool)))[:size].view(shard[n]) for n, size in sizes.items()}
        save_file(tensors, directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors")


def mixed(_: str, values: dict[str, Tensor]) -> Tensor:
    return values["a"].mul_(1 - SHARE).add_(values["b"], alpha=SHARE)


mixed.elementwise = True  # type: ignore[attr-defined]


def ours(work: Path) -> None:
    sources = {role: WeightSource.open(work / role) for role in ("a", "b")}
    stream_map(sources, mixed, work / "ours", base="a", max_shard_size=SHARD)


def raw(work: Path) -> None:
    (work / "raw").mkdir()
    for path in sorted((work / "a").iterdir()):
        with safe_open(path, "pt") as first, safe_open(work / "b" / path.name, "pt") as second:
            merged = {}
            for name in first.keys():  # noqa: SIM118 (not a mapping)
                values = {"a": first.get_tensor(name).float(), "b": second.get_tensor(name).float()}
                merged[name] = mixed(name, values).bfloat16()
        save_file(merged, work / "raw" / path.name)
        with (work / "raw" / path.name).open("rb+") as file:
            os.fsync(file.fileno())


def check(work: Path) -> str:
    """Every tensor of both results, bit for bit."""
    left, right = (WeightSource.open(work / name) for name in ("ours", "raw"))
    assert set(left.names()) == set(right.names())
    for name in left.names():
        assert torch.equal(left.get(name).view(torch.int16), right.get(name).view(torch.int16)), f"{name} differs"
    return f"{len(left.names())} tensors of both results are equal bit for bit"


def measure(work: Path, sides: dict[str, Callable[[Path], None]]) -> tuple[dict[str, float], dict[str, float], str]:
    """Least processor and wall seconds of each side, in turn; what an earlier round wrote is deleted unmeasured."""
    cpu, wall = dict.fromkeys(sides, float("inf")), dict.fromkeys(sides, float("inf"))
    for number in range(1 + ROUNDS):
        for name, side in sides.items():
            shutil.rmtree(work / name, ignore_errors=True)
            begin, started = time.process_time(), time.perf_counter()
            side(work)
            spent, took = time.process_time() - begin, time.perf_counter() - started
            if number:
                cpu[name], wall[name] = min(cpu[name], spent), min(wall[name], took)
        if number == 0:
            checked = check(work)
    return cpu, wall, checked


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=2.0, help="size of each of the two checkpoints")
    parser.add_argument("--peak", type=Path, help="internal: merge in this folder and print the peak")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        ours(options.peak)
        print(json.dumps({"peak_bytes": own_peak_bytes()}))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for seed, role in enumerate(("a", "b")):
            write_model(work / role, int(options.gib * 2**30), seed)
        cpu, wall, checked = measure(work, {"ours": ours, "raw": raw})
        shutil.rmtree(work / "ours")
        peak, _ = peak_of("benchmarks.merging", "--peak", str(work))
        size = sum(path.stat().st_size for path in (work / "a").iterdir())
    report(
        "What does streaming cost a merge of two checkpoints?",
        {
            "processor time": (cpu["ours"] / cpu["raw"], Bound("lower", floor=1.2)),
            "wall time": (wall["ours"] / wall["raw"], Bound("lower", floor=1.2)),
            "peak resident over 600 MB": (peak / PEAK, Bound("lower", floor=1)),
        },
        seconds={f"{name}, {kind}": s[name] for kind, s in (("processor", cpu), ("wall", wall)) for name in cpu},
        checked=checked,
        notes={
            "bytes_of_each": size,
            "peak_bytes": peak,
            "available_bytes": os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "page_cache": "inputs are read from it where they fit; the first round is not counted",
        },
    )


if __name__ == "__main__":
    main()
