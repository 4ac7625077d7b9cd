"""Raised base, curriculum, context law: the oracles of the long-context recipe."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

from headwater.core.budget import Budget
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.domain.adaptation import Adaptation
from headwater.domain.long_context import (
    LongContext,
    Stretch,
    _refuse_too_long,
    _whole_steps,
    auto_base,
    extend_rope,
    fit_context_law,
    long_share,
    training_bytes,
    windowed_layers,
)
from headwater.modalities.models import ModelError
from headwater.modalities.text.objectives import CausalObjective

Fields = dict[str, Any]
SHAPE: Fields = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
GROUPED: Fields = {**SHAPE, "num_key_value_heads": 1, "head_dim": 16}
ROTARY = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "mistral": MistralConfig(**GROUPED, sliding_window=48),
    "gpt-neox, a quarter of the head turns": GPTNeoXConfig(**SHAPE),
    "gemma": GemmaConfig(**GROUPED),
    "gemma 3, windows and full layers": Gemma3TextConfig(
        **GROUPED, sliding_window=48, layer_types=["sliding_attention", "full_attention"]
    ),
}


def fresh(config: Any, cls: Any = AutoModelForCausalLM) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = cls.from_config(type(config).from_dict(config.to_dict())).eval()
    return model


def logits(model: PreTrainedModel, length: int = 60, **inputs: Any) -> torch.Tensor:
    ids = torch.arange(length)[None] * 7 % 50
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **inputs).logits
    return found


def angles(model: PreTrainedModel, name: str = "inv_freq") -> torch.Tensor:
    return next(buffer for path, buffer in model.named_buffers() if path.endswith(f"rotary_emb.{name}"))


# -- positions


def test_equation_angles_are_powers_of_the_base() -> None:
    model = extend_rope(fresh(ROTARY["llama"]), max_length=256, base=1e6)
    # Heads of 32 / 2 = 16 turn in 8 pairs: b^(-2i/16), so pair 4 turns by 1e6^(-1/2) = 0.001 per position.
    assert angles(model).shape == (8,)
    assert angles(model)[0] == 1
    assert angles(model)[4].item() == pytest.approx(1e-3, rel=1e-6)
    expected = torch.tensor([1e6 ** (-i / 8) for i in range(8)], dtype=torch.float64)
    torch.testing.assert_close(angles(model).double(), expected, rtol=1e-6, atol=0)


def test_equation_auto_base_turns_the_slowest_pair_half_way_at_most() -> None:
    assert auto_base(10_000.0, 128, 32_768) == 500_000.0, "the paper's"
    base = auto_base(2.0, 8, 1000)  # 2 pi b^(6/8) = 2000
    assert 2 * math.pi * base**0.75 == pytest.approx(2000)
    assert auto_base(7.0, 2, 1000) == 350.0, "one pair has no slower one"


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("method", ["abf", "pi"])
def test_oracle_a_saved_model_gives_the_same_logits(name: str, method: Any, tmp_path: Path) -> None:
    start = fresh(ROTARY[name])
    before = logits(start)
    model = extend_rope(start, max_length=256, method=method)
    after = logits(model, 200)
    assert not torch.allclose(after[:, :60], before, atol=1e-6), "a live model must change, not its configuration only"
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.config.max_position_embeddings == 256
    assert torch.equal(logits(opened, 200), after)


@pytest.mark.parametrize("name", ROTARY)
def test_oracle_without_a_method_nothing_changes_but_the_limit(name: str) -> None:
    start = fresh(ROTARY[name])
    before = logits(start)
    assert torch.equal(logits(extend_rope(start, max_length=256, method="none")), before)
    assert start.config.max_position_embeddings == 256


def test_oracle_interpolation_reads_positions_as_if_closer() -> None:
    before = logits(fresh(ROTARY["llama"]), position_ids=torch.arange(60)[None])
    model = extend_rope(fresh(ROTARY["llama"]), max_length=256, method="pi")  # factor 256 / 64 = 4
    torch.testing.assert_close(logits(model, position_ids=4 * torch.arange(60)[None]), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["abf", "pi"])
def test_property_only_differences_of_positions_count(method: Any) -> None:
    model = extend_rope(fresh(ROTARY["llama"]), max_length=256, method=method)
    shifted = logits(model, position_ids=torch.arange(60)[None] + 137)
    torch.testing.assert_close(shifted, logits(model), rtol=0, atol=1e-4)


def test_property_window_layers_keep_their_angles_and_are_listed(caplog: pytest.LogCaptureFixture) -> None:
    model = fresh(ROTARY["gemma 3, windows and full layers"])
    local = angles(model, "sliding_attention_inv_freq").clone()
    extend_rope(model, max_length=256)
    assert torch.equal(angles(model, "sliding_attention_inv_freq"), local)
    assert "layers 0 attend within a window shorter than 256" in caplog.text
    assert windowed_layers(ROTARY["mistral"], 256) == [0, 1]
    assert windowed_layers(ROTARY["mistral"], 48) == []
    assert windowed_layers(ROTARY["qwen2"], 256) == []


def test_property_a_configuration_in_the_older_form_is_read(tmp_path: Path) -> None:
    old = {**ROTARY["llama"].to_dict(), "rope_theta": 77.0, "rope_scaling": None}
    del old["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    model = fresh(AutoConfig.from_pretrained(tmp_path))
    assert extend_rope(model, max_length=256).config.rope_parameters["rope_theta"] == 50 * 77.0


def test_property_bfloat16_weights_keep_exact_angles() -> None:
    model = extend_rope(fresh(ROTARY["llama"]).to(torch.bfloat16), max_length=256, base=1e6)
    assert angles(model).dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


SCALED = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})


@pytest.mark.parametrize(
    ("config", "cls", "words"),
    [
        (GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50), AutoModelForCausalLM, r"learned positions.*wpe"),
        (OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=32), AutoModelForCausalLM, "learned positions"),
        (BertConfig(**SHAPE), AutoModelForMaskedLM, "learned positions"),
        (BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50), AutoModelForCausalLM, "ALiBi"),
        (SCALED, AutoModelForCausalLM, r"scaled already \(rope_type 'yarn', base 10000\)"),
    ],
)
def test_rejects_positions_that_do_not_turn(config: Any, cls: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        extend_rope(fresh(config, cls), max_length=4096)


def test_rejects_a_context_or_base_that_is_not_larger_and_leaves_the_model_alone() -> None:
    model = fresh(ROTARY["llama"])
    before = logits(model)
    with pytest.raises(ModelError, match="has 64 positions already; max_length must be more, got 64"):
        extend_rope(model, max_length=64)
    with pytest.raises(ModelError, match="base must be above the model's, 10000; got 5000"):
        extend_rope(model, max_length=128, base=5000.0)
    assert model.config.max_position_embeddings == 64
    assert torch.equal(logits(model), before)


def test_property_a_given_base_replaces_a_scaling(caplog: pytest.LogCaptureFixture) -> None:
    model = extend_rope(fresh(SCALED), max_length=256, base=1e6)
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert "'yarn' of the rotary positions is replaced" in caplog.text
    assert torch.equal(logits(model), logits(extend_rope(fresh(ROTARY["llama"]), max_length=256, base=1e6)))


class _Fixed(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.inv_freq = config, torch.nn.Buffer(torch.ones(8), persistent=False)


def test_rejects_a_rotary_module_that_does_not_follow_its_configuration() -> None:
    model = fresh(ROTARY["llama"])
    model.model.rotary_emb = _Fixed(model.config)
    with pytest.raises(ModelError, match="_Fixed does not compute its frequencies from rope_parameters"):
        extend_rope(model, max_length=256)


class _Largest(TorchDispatchMode):
    """Remembers the most elements of a tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize("method", ["abf", "pi"])
def test_property_training_makes_no_square_of_the_length(method: Any) -> None:
    length, ids = 1024, torch.arange(1024)[None] % 50
    model = extend_rope(fresh(ROTARY["llama"]), max_length=length, method=method).train()
    with _Largest() as seen:
        CausalObjective()(model, {"input_ids": ids, "labels": ids}).total.backward()
    assert length * 50 <= seen.elements < length * length / 8, "logits are the largest; a mask or scores would be T x T"


# -- data, memory, law


def test_equation_long_documents_are_drawn_more_often() -> None:
    # 2 x 300 long tokens against 200 short ones: 600 / 800.
    assert long_share([100, 100, 300], 300, 2.0) == 0.75
    assert long_share([100, 100, 300], 300, 1.0) == 300 / 500
    assert long_share([100], 300, 2.0) == 0
    with pytest.raises(ValueError, match="weight must be > 0; got 0"):
        long_share([1], 1, 0)


def test_property_borders_fall_on_whole_steps() -> None:
    stretches = (Stretch(until=0.4, length=32), Stretch(until=1.0, length=128))
    assert [s.until * 6 for s in _whole_steps(stretches, Budget(steps=6), 256)] == [2, 6]
    assert _whole_steps(stretches, Budget(tokens=2560), 256)[0].until * 2560 == 1024
    assert _whole_steps(stretches, Budget(flops=1e9), 256) == stretches
    with pytest.raises(ValueError, match="the stretch of length 32 gets less than one step"):
        _whole_steps(stretches, Budget(steps=1), 256)


def test_property_memory_is_refused_with_the_longest_length_that_fits() -> None:
    model = fresh(ROTARY["llama"])
    fixed, sequence = training_bytes(model, 1000, checkpointing=False)
    assert fixed == 16 * sum(p.numel() for p in model.parameters()), "weights, gradients, two moments of 4 bytes"
    # Per token: 17 x 2 layers x 32 x 4 bytes, and 50 logits of 12 bytes.
    assert sequence == 1000 * (17 * 2 * 32 * 4 + 50 * 12)
    assert training_bytes(model, 1000, checkpointing=True)[1] < sequence
    _refuse_too_long(model, 1000, fixed + sequence, checkpointing=False)
    with pytest.raises(ModelError, match=r"about 500 tokens would fit\. Set fit.gradient_checkpointing"):
        _refuse_too_long(model, 1000, fixed + sequence / 2, checkpointing=False)


def test_oracle_the_context_law_recovers_what_was_planted() -> None:
    c = np.geomspace(16, 32_768, 2000)
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(len(c)))
    found = fit_context_law(c, ((30.0 / c) ** 0.45 + 1.6) * noise)
    assert found == pytest.approx({"alpha": 30.0, "beta": 0.45, "gamma": 1.6}, rel=0.02)


def test_rejects_too_little_to_fit_a_law() -> None:
    with pytest.raises(ValueError, match="at least four contexts"):
        fit_context_law([1, 2, 4], [3, 2, 1])
    with pytest.raises(ValueError, match="finite and above 0"):
        fit_context_law([1, 2, 4, 8], [3, 2, 1, -1])


# -- the recipe

CHANGES: Fields = {"target_length": 128, "budget": {"steps": 5}}


def recipe_of(fields: Fields, **changes: Any) -> LongContext:
    recipe = load_recipe({"method": "long_context", **fields, **CHANGES, **changes})
    assert isinstance(recipe, LongContext)
    return recipe


def test_property_the_run_lifts_the_limit_and_scores_the_short_context_at_the_old_length(
    domain_fields: Fields, tmp_path: Path
) -> None:
    result = execute(recipe_of(domain_fields), tmp_path / "run")
    plain = execute(load_recipe({"method": "frozen", **domain_fields}), tmp_path / "frozen")
    # The same windows of 32 tokens as every other method of the family: the figures stand on one axis.
    assert result.metrics["general/bpb_start"] == plain.metrics["general/bpb"]
    assert result.metrics["domain/bpb_start"] == plain.metrics["domain/bpb"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.max_position_embeddings == 128
    assert model.config.rope_parameters["rope_theta"] == 500_000.0
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").model_max_length >= 128
    with (tmp_path / "run" / "context_loss.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["length"]) for row in rows] == [2, 4, 8, 16, 32, 64, 128]
    assert result.metrics["context/128"] == pytest.approx(float(rows[-1]["nats"]))
    assert set(json.loads((tmp_path / "run" / "context_law.json").read_text())) == {"alpha", "beta", "gamma"}


def test_property_tokens_per_step_are_constant_and_moments_go_on(domain_fields: Fields, tmp_path: Path) -> None:
    execute(recipe_of(domain_fields), tmp_path)
    # 0.4 of 5 steps of 256 tokens at 32 tokens a row, the rest at 128.
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = {row["phase"]: row["tokens"] for row in log}
    assert last == {"0-length-32": 2 * 256, "1-length-128": 3 * 256}
    newest = max((tmp_path / "checkpoints" / "1-length-128").rglob("state.json"))
    assert json.loads(newest.read_text())["identity"]["continues"] == "0-length-32"


def test_property_short_sequences_first_cost_fewer_counted_flops(domain_fields: Fields, tmp_path: Path) -> None:
    full = [{"until": 1.0, "length": 128}]
    costs = [
        execute(recipe_of(domain_fields, eval_at=[], curriculum=curriculum), tmp_path / str(number)).cost
        for number, curriculum in enumerate((None, full))
    ]
    assert costs[0]["tokens"] == costs[1]["tokens"] == 5 * 256
    assert costs[0]["flops"] < costs[1]["flops"]


def test_property_adapters_are_merged_so_that_the_directory_opens_at_the_new_length(
    domain_fields: Fields, tmp_path: Path
) -> None:
    execute(recipe_of(domain_fields, lora={"r": 2}, eval_at=[]), tmp_path)
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert opened.config.max_position_embeddings == 128
    assert torch.isfinite(opened(input_ids=torch.arange(128)[None]).logits).all()


def test_property_documents_too_short_are_warned_of(domain_fields: Fields, tmp_path: Path) -> None:
    recipe = recipe_of(domain_fields, target_length=1024, batch_tokens=1024, budget={"steps": 3}, eval_at=[])
    result = execute(recipe, tmp_path)
    assert "packed long sequences have no long dependencies" in result.notes["warning/length"]


def test_property_long_documents_fill_their_share(domain_fields: Fields, tmp_path: Path) -> None:
    with Run(tmp_path / "probe", recipe_of(domain_fields)) as run:
        ctx = Adaptation.open(recipe_of(domain_fields), run)
        median = int(np.median(ctx.num_tokens(ctx.domain.train)))
    recipe = recipe_of(domain_fields, target_length=median, long_weight=3.0, replay=0.25, batch_tokens=32 * median)
    with Run(tmp_path / "run", recipe) as run:
        ctx = Adaptation.open(recipe, run)
        lengths = ctx.num_tokens(ctx.domain.train)
        (long, share), (short, rest), (_, replay) = recipe._parts(ctx)
    assert len(long) == (lengths >= median).sum()
    assert len(long) + len(short) == len(lengths)
    assert share == pytest.approx(0.75 * long_share(lengths, median, 3.0))
    assert share + rest + replay == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general": None}, "general"),
        ({"target_length": 32}, r"target_length \(32\) must be above the old length, seq_len 32"),
        ({"base": 0.5}, "base must be above 1"),
        ({"probe_lengths": [64, 32]}, "probe_lengths must rise"),
        ({"probe_lengths": [256]}, "probe_lengths must rise within 2 to target_length"),
        ({"curriculum": [{"until": 0.5, "length": 64}]}, "rise and end at 1"),
        ({"curriculum": [{"until": 1.0, "length": 256}]}, "longer than target_length"),
    ],
)
def test_rejects_when_built(domain_fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(domain_fields, **changes)


def test_rejects_what_the_model_or_data_cannot_do(domain_fields: Fields, tiny_masked: Path, tmp_path: Path) -> None:
    for number, (changes, words) in enumerate(
        [
            ({"model": str(tiny_masked)}, "this one is masked"),
            ({"target_length": 64}, "has 64 positions already"),
            ({"target_length": 96}, r"multiple of every sequence length of the curriculum, \[32, 96\].*next is 288"),
            ({"target_length": 1 << 20, "batch_tokens": 1 << 20}, "less than one sequence of target_length 1048576"),
        ]
    ):
        with pytest.raises(ValueError, match=words):
            execute(recipe_of(domain_fields, eval_at=[], **changes), tmp_path / str(number))
