"""Streaming weight arithmetic against plain torch, transformers and peft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headwater.core.weights import MergeReport, WeightDelta, WeightSource, adapter_deltas, delta, stream_map

SHAPES = {
    "a.weight": (37, 16),
    "b.weight": (64, 48),
    "c.bias": (48,),
    "d.conv": (8, 4, 3),
    "e.scale": (),
    "f.none": (0, 4),
}


def make(seed: int, dtype: torch.dtype = torch.float32, **replaced: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return tensors | {"position_ids": torch.arange(5)} | {name.replace("__", "."): t for name, t in replaced.items()}


def put(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config: object) -> WeightSource:
    directory.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
    else:
        places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(places.values()):
            save_file({name: tensors[name] for name in names if places[name] == file}, directory / file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    if config:
        (directory / "config.json").write_text(json.dumps(config))
    return WeightSource.open(directory)


def merge(name: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    base = values["base"]
    return base + 0.3 * (values["x"] - base) + 0.7 * (values["y"] - base)


def blockwise(name: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    return merge(name, values)


blockwise.elementwise = True


def load(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def trio(tmp_path: Path, dtype: torch.dtype = torch.float32, **config: object) -> dict[str, WeightSource]:
    return {role: put(tmp_path / role, make(i, dtype), **config) for i, role in enumerate(("base", "x", "y"))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3, 7])
@pytest.mark.parametrize("fn", [merge, blockwise])
def test_oracle_streamed_equals_in_memory_bitwise(tmp_path, dtype, shards, fn):
    models = {role: make(i, dtype) for i, role in enumerate(("base", "x", "y"))}
    counts = {"base": shards, "x": 1 + shards % 5, "y": 2}
    sources = {role: put(tmp_path / role, tensors, counts[role]) for role, tensors in models.items()}
    # A row of b.weight takes 4 * 48 * 4 bytes * 3 sources = 2,304: the elementwise case goes by one to six rows.
    memory = 4 << 30 if fn is merge else 2304 * 6
    report = stream_map(sources, fn, tmp_path / "out", max_shard_size=3000, max_memory=memory, workers=shards % 3 + 1)
    got = load(tmp_path / "out")
    assert report.files > 1
    assert sorted(got) == sorted(models["base"])
    for name, base in models["base"].items():
        expected = base
        if base.is_floating_point():
            expected = merge(name, {role: tensors[name].float() for role, tensors in models.items()}).to(dtype)
        assert got[name].dtype == base.dtype
        assert torch.equal(got[name], expected), name


def test_equation_sum_is_rounded_once(tmp_path):
    # bfloat16 has steps of 2^-7 at 1. Three changes of 2^-9 each vanish one by one, and round to one step together:
    # 1 + 3 * 2^-9 = 1.00586 lies nearer to 1 + 2^-7 = 1.00781 than to 1.
    one, change = torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 2.0**-9)
    sources = {"base": WeightSource.open({"w": one})}
    sources |= {f"d{i}": WeightDelta.open({"w": change}) for i in range(3)}
    stream_map(sources, lambda _, v: v["base"] + v["d0"] + v["d1"] + v["d2"], tmp_path / "out")
    assert load(tmp_path / "out")["w"].tolist() == [1 + 2.0**-7] * 4


def test_equation_share_of_zero_changes(tmp_path):
    base, tuned = torch.zeros(8), torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 2])
    sources = {"base": WeightSource.open({"w": base}), "x": WeightSource.open({"w": tuned})}
    sources["d"] = WeightDelta.open({})
    report = stream_map(sources, lambda _, v: v["x"], tmp_path / "out")
    assert report.zero_share == {"x": 0.75, "d": 1.0}
    assert report.bytes_read == 64
    assert report.bytes_written == (tmp_path / "out" / "model.safetensors").stat().st_size


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_fault_interrupted_merge_resumes_to_identical_bytes(tmp_path):
    sources = trio(tmp_path, torch.bfloat16, vocab_size=5)
    options = {"max_shard_size": 3000, "recipe": {"method": "sum"}}
    stream_map(sources, blockwise, tmp_path / "whole", **options)
    calls = []

    def stops(name, values):
        if name == "c.bias":
            raise KeyboardInterrupt
        calls.append(name)
        return blockwise(name, values)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        stream_map(sources, stops, out, **options)
    assert not out.exists()
    assert not list((tmp_path / "out.partial").glob("*.tmp.*"))
    again = []

    def counts(name, values):
        again.append(name)
        return blockwise(name, values)

    report = stream_map(sources, counts, out, **options)
    assert report.resumed >= 1
    assert not set(again) & {name for name in calls if name in load_first(tmp_path / "whole")}
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def load_first(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(min(directory.glob("*.safetensors")))


def test_fault_killed_process_resumes_to_identical_bytes(tmp_path):
    sources = trio(tmp_path)
    options = {"max_shard_size": 3000, "recipe": {}}
    stream_map(sources, merge, tmp_path / "whole", **options)
    code = f"""
import os
from pathlib import Path
from headwater.core.weights import WeightSource, stream_map
root = Path({str(tmp_path)!r})
def fn(name, values):
    if name == "c.bias":
        os._exit(9)
    base = values["base"]
    return base + 0.3 * (values["x"] - base) + 0.7 * (values["y"] - base)
sources = {{role: WeightSource.open(root / role) for role in ("base", "x", "y")}}
stream_map(sources, fn, root / "out", max_shard_size=3000, recipe={{}})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert list((tmp_path / "out.partial").glob("*.tmp"))
    report = stream_map(sources, merge, tmp_path / "out", **options)
    assert report.resumed >= 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def interrupted(tmp_path: Path, sources: dict[str, WeightSource], **options: object) -> None:
    def stops(name, values):
        if name == "c.bias":
            raise KeyboardInterrupt
        return values["base"]

    with pytest.raises(KeyboardInterrupt):
        stream_map(sources, stops, tmp_path / "out", max_shard_size=3000, **options)


def test_rejects_resuming_another_merge(tmp_path):
    sources = trio(tmp_path)
    interrupted(tmp_path, sources, recipe={"weight": 1})
    with pytest.raises(FileExistsError, match=r"other recipe.*Delete it to start anew"):
        stream_map(sources, merge, tmp_path / "out", max_shard_size=3000, recipe={"weight": 2})
    with pytest.raises(FileExistsError, match="other settings"):
        stream_map(sources, merge, tmp_path / "out", max_shard_size=3000, recipe={"weight": 1}, out_dtype="bfloat16")
    with pytest.raises(FileExistsError, match="without a recipe"):
        stream_map(sources, merge, tmp_path / "out", max_shard_size=3000)
    save_file(make(9), tmp_path / "x" / "model.safetensors")  # same layout, other values
    with pytest.raises(FileExistsError, match="other stamps"):
        stream_map(sources, merge, tmp_path / "out", max_shard_size=3000, recipe={"weight": 1})


def test_property_memory_does_not_grow_with_the_model(tmp_path):
    code = f"""
import resource
import torch
from pathlib import Path
from safetensors.torch import save_file
from headwater.core.weights import WeightSource, stream_map
root = Path({str(tmp_path)!r})
g = torch.Generator().manual_seed(0)
for role in ("base", "x", "y"):  # files of 128 MB written in pieces of 8 MB, so that making them takes no memory
    (root / role).mkdir()
    for i in range(16):
        tensor = torch.randn(2048, 2048, generator=g).bfloat16()
        save_file({{f"t{{i}}": tensor}}, root / role / f"part{{i:02d}}.safetensors")
def fn(name, v):
    return v["base"] + 0.3 * (v["x"] - v["base"]) + 0.7 * (v["y"] - v["base"])
fn.elementwise = True
sources = {{role: WeightSource.open(root / role) for role in ("base", "x", "y")}}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream_map(sources, fn, root / "out")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert (root / "out" / "model.safetensors").stat().st_size > 128 << 20
print((after - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    # Blocks of 2^17 elements: 3 sources * (stored 0.25 MB, next 0.25 MB, float32 0.5 MB) and temporaries: below 10 MB.
    assert int(done.stdout) < 48  # MB; one output file has 128


@pytest.mark.parametrize("tied", [True, False])
def test_oracle_transformers_opens_the_result(tmp_path, tied):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    models = {}
    for role in ("base", "x", "y"):
        models[role] = LlamaForCausalLM(config)
        models[role].save_pretrained(tmp_path / role, max_shard_size="20KB")
    sources = {role: WeightSource.open(tmp_path / role) for role in ("base", "x")}
    sources["y"] = WeightSource.open(models["y"].state_dict())  # a live model lists its tied head, a saved one does not
    report = stream_map(sources, blockwise, tmp_path / "out", max_shard_size=20_000)
    assert report.files > 1
    states = {role: model.state_dict() for role, model in models.items()}
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, merge(name, {role: state[name] for role, state in states.items()})), name


def test_property_head_stored_by_one_tied_model_only_is_left_out(tmp_path):
    weight = torch.ones(4, 2)
    sources = {
        "base": put(
            tmp_path / "base", {"embed_tokens.weight": weight, "lm_head.weight": weight + 0}, tie_word_embeddings=True
        ),
        "x": put(tmp_path / "x", {"embed_tokens.weight": weight}, tie_word_embeddings=True),
    }
    report = stream_map(sources, lambda _, v: v["x"], tmp_path / "out")
    assert report.skipped == ("lm_head.weight",)
    report = stream_map({"base": sources["x"], "x": sources["base"]}, lambda _, v: v["x"], tmp_path / "other")
    assert report.ignored == ("lm_head.weight",)
    sources["x"].directory.joinpath("config.json").write_text('{"tie_word_embeddings": false}')
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        stream_map(sources, merge, tmp_path / "third")


def lora(tmp_path: Path, **options: object):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
    } | options
    tuned = get_peft_model(model, LoraConfig(**settings))
    tuned.save_pretrained(tmp_path / "adapter")
    return tuned, WeightSource.open(tmp_path / "base")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 20}, "rank_pattern": {"down_proj": 2}},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_oracle_adapter_delta_equals_peft_merge(tmp_path, options):
    tuned, base = lora(tmp_path, **options)
    change = adapter_deltas(tmp_path / "adapter", base)
    change.apply(base, tmp_path / "out")
    expected = tuned.merge_and_unload().state_dict()
    got = load(tmp_path / "out")
    assert sorted(got) == sorted(expected)
    assert sum(not torch.equal(got[name], base.get(name)) for name in got) == len(change)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)  # float32 products of rank 4, order 1


def test_oracle_adapter_delta_of_transposed_weights_equals_peft_merge(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    base = WeightSource.open({name: tensor.clone() for name, tensor in model.state_dict().items()})
    config = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "adapter")
    change = adapter_deltas(tmp_path / "adapter", base)
    expected = tuned.merge_and_unload().state_dict()
    (name,) = change.names()
    torch.testing.assert_close(base.get(name) + change.get(name), expected[name], rtol=0, atol=1e-6)
    assert torch.allclose(change.slice(name, 3, 7), change.get(name)[3:7], atol=1e-7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3 adapter; only LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    ],
)
def test_rejects_adapters_that_are_not_low_rank_changes(tmp_path, options, words):
    _, base = lora(tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(ValueError, match=words):
        adapter_deltas(tmp_path / "adapter", base)


def test_rejects_adapter_of_another_base(tmp_path):
    _, base = lora(tmp_path, target_modules=["embed_tokens"])
    changed = {name: base.get(name) + (name == "model.embed_tokens.weight") for name in base}
    with pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight' is neither .* nor equal to the base"):
        adapter_deltas(tmp_path / "adapter", WeightSource.open(changed))
    lora(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no such tensor.*Another base"):
        adapter_deltas(tmp_path / "plain" / "adapter", WeightSource.open({"w": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"holds an adapter.*adapter_deltas"):
        WeightSource.open(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        adapter_deltas(tmp_path / "base", WeightSource.open({}))


@pytest.mark.parametrize(("stored", "kept"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_property_delta_added_back_gives_the_tuned_model(tmp_path, stored, kept):
    base, tuned = put(tmp_path / "base", make(0, stored)), put(tmp_path / "tuned", make(1, stored))
    delta(tuned, base, dtype=kept).save(tmp_path / "delta")
    change = WeightDelta.open(tmp_path / "delta")
    assert change.origin["tuned"] == tuned.fingerprint()
    manifest = json.loads((tmp_path / "delta" / "headwater_merge.json").read_text())
    assert manifest["recipe"]["shapes"]["a.weight"] == [37, 16]
    assert "position_ids" not in change
    change.apply(base, tmp_path / "again")
    assert all(torch.equal(tensor, tuned.get(name)) for name, tensor in load(tmp_path / "again").items())
    change.apply(base, tmp_path / "none", scale=0.0)
    assert all(torch.equal(tensor, base.get(name)) for name, tensor in load(tmp_path / "none").items())
    with pytest.raises(ValueError, match=r"weight difference.*WeightDelta\.open"):
        WeightSource.open(tmp_path / "delta")
    with pytest.raises(ValueError, match="not a saved weight difference"):
        WeightDelta.open(tmp_path / "base")


def test_property_live_model_is_not_changed_by_fn_in_place(tmp_path):
    live = {"w": torch.ones(3)}
    stream_map({"base": WeightSource.open(live)}, lambda _, v: v["base"].add_(1), tmp_path / "out")
    assert live["w"].tolist() == [1, 1, 1]
    assert load(tmp_path / "out")["w"].tolist() == [2, 2, 2]


def test_property_model_files_are_copied_and_config_follows(tmp_path):
    source = put(tmp_path / "base", {"embed_tokens.weight": torch.ones(4, 2)}, vocab_size=4, dtype="float32")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "optimizer.pt", "modeling_x.py"):
        (tmp_path / "base" / name).write_text("{}")
    other = WeightSource.open({"embed_tokens.weight": torch.full((6, 2), 3.0)})
    stream_map({"base": source, "x": other}, lambda _, v: v["x"], tmp_path / "out", vocab="union", out_dtype="bfloat16")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "headwater_merge.json", "model.safetensors",
        "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"vocab_size": 6, "dtype": "bfloat16"}


def test_equation_vocabularies_of_different_size(tmp_path):
    # base has 2 rows, x has 3, y has 1: x - base and y - base are 0 where a row is lacking.
    rows = {"base": [1.0, 1.0], "x": [2.0, 3.0, 4.0], "y": [5.0]}
    sources = {r: WeightSource.open({"embed_tokens.weight": torch.tensor(v)[:, None]}) for r, v in rows.items()}

    def add(_, v):
        return v["x"] + v["y"] - v["base"]

    with pytest.raises(ValueError, match=r"Only the vocabulary differs.*vocab='base'.*vocab='union'"):
        stream_map(sources, add, tmp_path / "none")
    stream_map(sources, add, tmp_path / "base", vocab="base")
    assert load(tmp_path / "base")["embed_tokens.weight"].flatten().tolist() == [6, 3]
    report: MergeReport = stream_map(sources, add, tmp_path / "union", vocab="union")
    assert load(tmp_path / "union")["embed_tokens.weight"].flatten().tolist() == [6, 3, 4]
    assert report.vocabulary_rows == {"embed_tokens.weight": 3}


def test_property_missing_names_copied_or_left_out(tmp_path):
    base, x = {"u": torch.zeros(2), "v": torch.ones(2)}, {"u": torch.full((2,), 5.0), "z": torch.ones(1)}
    sources = {"base": WeightSource.open(base), "x": WeightSource.open(x)}
    report = stream_map(sources, lambda _, v: v["x"], tmp_path / "copy", missing="copy")
    assert {name: t.tolist() for name, t in load(tmp_path / "copy").items()} == {"u": [5, 5], "v": [1, 1]}
    assert (report.copied, report.skipped, report.ignored) == (("v",), (), ("z",))
    report = stream_map(sources, lambda _, v: v["x"], tmp_path / "skip", missing="skip")
    assert list(load(tmp_path / "skip")) == ["u"]
    assert (report.copied, report.skipped) == ((), ("v",))


def test_rejects_different_names(tmp_path):
    base = {f"n{i:02d}": torch.ones(1) for i in range(14)}
    sources = {"base": WeightSource.open(base), "x": WeightSource.open({"n00": torch.ones(1), "extra": torch.ones(1)})}
    expected = r"13 only in 'base' \(first 10: n01, .*, n10\); 1 only in 'x' \(first 10: extra\)"
    with pytest.raises(ValueError, match=expected):
        stream_map(sources, merge, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b__weight": torch.full((64, 48), float("nan"))}, r"source 'x' .* holds NaN or infinity in 'b\.weight'"),
        ({"e__scale": torch.tensor(float("-inf"))}, r"source 'x' .* holds NaN or infinity in 'e\.scale'"),
        ({"position_ids": torch.arange(5) + 1}, r"'position_ids' \(torch\.int64\) differs between 'base' and 'x'"),
        ({"position_ids": torch.arange(5).int()}, r"torch\.int32 in 'x' and torch\.int64 in 'base'"),
        ({"b__weight": torch.ones(64, 47)}, r"1 tensor\(s\) differ in shape.*b\.weight: base \[64, 48\], x \[64, 47\]"),
        ({"b__weight": torch.ones(64, 48).to(torch.float8_e4m3fn)}, "quantised or complex"),
    ],
)
def test_rejects_sources_that_do_not_fit(tmp_path, change, words):
    sources = {"base": put(tmp_path / "base", make(0)), "x": put(tmp_path / "x", make(1, **change))}
    with pytest.raises(ValueError, match=words):
        stream_map(sources, lambda _, v: v["base"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "x"]  # nothing is left behind


def test_rejects_pickles_with_the_command_that_converts_them(tmp_path):
    torch.save(make(0), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle.*from_pretrained\('.*save_pretrained\("):
        WeightSource.open(tmp_path)
    path = tmp_path / "weights.pt"
    torch.save(make(0), path)
    with pytest.raises(ValueError, match="is a pickle") as caught:
        WeightSource.open(path)
    command = str(caught.value).split('python -c "')[1].removesuffix('"')
    subprocess.run([sys.executable, "-c", command], check=True)
    assert torch.equal(WeightSource.open(tmp_path / "weights.safetensors").get("b.weight"), make(0)["b.weight"])


def test_rejects_bad_places_and_arguments(tmp_path):
    source = put(tmp_path / "base", make(0))
    sources = {"base": source}
    keep = merge
    with pytest.raises(ValueError, match="lies in an input's directory"):
        stream_map(sources, keep, tmp_path / "base" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="exists; delete it or choose another output"):
        stream_map(sources, keep, tmp_path / "full")
    with pytest.raises(ValueError, match="there is no source 'start'; sources are base"):
        stream_map(sources, keep, tmp_path / "out", base="start")
    with pytest.raises(ValueError, match=r"accumulate must be torch\.float32 or torch\.float64; got torch\.bfloat16"):
        stream_map(sources, keep, tmp_path / "out", accumulate=torch.bfloat16)
    with pytest.raises(ValueError, match="workers must be at least 1; got 0"):
        stream_map(sources, keep, tmp_path / "out", workers=0)
    with pytest.raises(ValueError, match=r"'b\.weight' needs about 49,152 bytes.*fn\.elementwise = True"):
        stream_map(sources, lambda _, v: v["base"], tmp_path / "out", max_memory=40_000)
    with pytest.raises(ValueError, match=r"fn gave shape \[1\] for .*; expected"):
        stream_map(sources, lambda _, v: torch.ones(1), tmp_path / "out")
    with pytest.raises(ValueError, match=r"result for .* too large for torch\.float16"):
        stream_map(sources, lambda _, v: v["base"] * 1e6, tmp_path / "out", out_dtype="float16")
    live = WeightSource.open(make(0))
    with pytest.raises(ValueError, match="is not a directory: there is no configuration"):
        stream_map({"base": source, "x": live}, keep, tmp_path / "out", files_from="x")
    quantised = put(tmp_path / "q", make(0), quantization_config={"bits": 4})
    with pytest.raises(ValueError, match="is quantised; give the unquantised model"):
        stream_map({"base": quantised}, keep, tmp_path / "out")


def test_rejects_full_disk_before_reading(tmp_path):
    # A sparse file: its header promises 8 TB, which take no room here.
    size = 8 << 40
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    source = WeightSource.open(tmp_path / "large.safetensors")
    with pytest.raises(OSError, match=r"the result needs 8796\.093 GB; .* GB are free"):
        stream_map({"base": source}, blockwise, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_rejects_damaged_files(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(make(0), path)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="was cut: its header describes"):
        WeightSource.open(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="not a safetensors file"):
        WeightSource.open(path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        WeightSource.open(tmp_path / "nowhere")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"1 shard\(s\) missing, first gone\.safetensors"):
        WeightSource.open(tmp_path)
    index.write_text('{"weight_map": {"w": "../secret.safetensors"}}')
    with pytest.raises(ValueError, match="points outside its directory"):
        WeightSource.open(tmp_path)


def test_degenerate_one_tensor_none_and_scalars(tmp_path):
    source = WeightSource.open({"s": torch.tensor(2.0), "n": torch.ones(0, 3), "flag": torch.tensor([True])})
    stream_map({"base": source}, lambda _, v: None, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["s"], torch.tensor(2.0))
    assert load(tmp_path / "out")["n"].shape == (0, 3)
    assert load(tmp_path / "out")["flag"].tolist() == [True]
    with pytest.raises(ValueError, match="nothing to write"):
        stream_map({"base": WeightSource.open({})}, merge, tmp_path / "other")


def test_property_names_follow_file_and_offset_and_slices_agree(tmp_path):
    source = put(tmp_path / "base", make(0, torch.bfloat16), shards=3)
    assert sorted(source.names()) == sorted(make(0))
    assert source.meta("b.weight") == ((64, 48), torch.bfloat16, 64 * 48 * 2)
    assert torch.equal(source.slice("b.weight", 5, 9), make(0, torch.bfloat16)["b.weight"][5:9])
    assert WeightSource.open(make(0)).fingerprint() == WeightSource.open(make(1)).fingerprint()
    assert WeightSource.open(make(0)).fingerprint() != WeightSource.open(make(0, torch.bfloat16)).fingerprint()
