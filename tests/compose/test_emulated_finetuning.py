from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.compose.emulated import ARCHITECTURES, VOCABULARY, WINDOW, brute_force, model, prompts
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

from headwater.compose.emulated_files import ComposedFile, PartFile, read_composed, write_composed
from headwater.compose.emulated_finetuning import (
    EmulatedFinetuning,
    EmulatedModel,
    check_vocabularies,
    emulated_log_probs,
    load_emulated,
    score,
)
from headwater.compose.references import SinglePart
from headwater.core.recipe import ModelRef, RecipeError
from headwater.core.run import execute
from headwater.modalities.models import ModelError
from headwater.modalities.text.score import bits_per_byte
from headwater.modalities.text.tiny import tiny_t5
from headwater.modalities.text.tokenizers import train_bpe

Three = tuple[nn.Module, nn.Module, nn.Module]
MIXED = "llama, qwen2 and mistral"


@pytest.fixture(scope="module")
def parts() -> dict[str, Three]:
    """Large, small and tuned small models, one set for each architecture and one of several."""
    made = {
        kind: (model(kind, 0, hidden=32, layers=3), model(kind, 1), model(kind, 2))
        for kind in (*ARCHITECTURES, "llama")
    }
    return made | {MIXED: (made["llama"][0], made["qwen2"][1], made["mistral"][2])}


def probabilities(*shares: float) -> torch.Tensor:
    return torch.tensor(shares).log()


# -- the equation


def test_equation_of_three_tokens():
    # large (2, 1, 1)/4, small (1, 1, 1)/3, tuned (1, 4, 1)/6: ratios (1, 4, 1)/2, product (2, 4, 1)/2 -> (2, 4, 1)/7
    large, small, tuned = probabilities(2, 1, 1), probabilities(1, 1, 1), probabilities(1, 4, 1)
    assert emulated_log_probs(large, small, tuned).exp().tolist() == pytest.approx([2 / 7, 4 / 7, 1 / 7])
    # scale 1/2: the ratio's root, (1, 2, 1): product (2, 2, 1)
    assert emulated_log_probs(large, small, tuned, scale=0.5).exp().tolist() == pytest.approx([0.4, 0.4, 0.2])


def test_equation_of_two_tuned_models():
    # ratios (1, 4, 1) to the power 1/2 and (9, 1, 1) to the power 1/2: (3, 2, 1) times (2, 1, 1) = (6, 2, 1)
    both = [(probabilities(1, 4, 1), 0.5), (probabilities(9, 1, 1), 0.5)]
    found = emulated_log_probs(probabilities(2, 1, 1), probabilities(1, 1, 1), both)
    assert found.exp().tolist() == pytest.approx([6 / 9, 2 / 9, 1 / 9])


def test_equation_of_the_filter_by_the_tuned_model():
    # tuned (.6, .3, .1) at p = .5 keeps token 0 alone, whose ratio to 1/3 is 1.8: (1.8, 1, 1)/3.8 over a flat large one
    flat, tuned = probabilities(1, 1, 1), probabilities(0.6, 0.3, 0.1)
    found = emulated_log_probs(flat, flat, tuned, top_p=0.5)
    assert found.exp().tolist() == pytest.approx([1.8 / 3.8, 1 / 3.8, 1 / 3.8])
    # at p = .7 tokens 0 and 1 are kept: (1.8, .9, 1)/3.7
    found = emulated_log_probs(flat, flat, tuned, top_p=0.7)
    assert found.exp().tolist() == pytest.approx([1.8 / 3.7, 0.9 / 3.7, 1 / 3.7])


def test_equation_of_the_filter_by_the_mixture():
    # The unfiltered mixture is (.2, .3, .1) / .6 = (1/3, 1/2, 1/6): at p = .4 token 1 alone keeps its ratio of .9.
    large, small, tuned = probabilities(1 / 9, 1 / 3, 5 / 9), probabilities(1, 1, 1), probabilities(0.6, 0.3, 0.1)
    # large * ratio = (1/9 * 1.8, 1/3 * .9, 5/9 * .3) = (.2, .3, 1/6): token 1 is the likeliest
    found = emulated_log_probs(large, small, tuned, top_p=0.4, filter_by="mixture")
    total = 1 / 9 + 0.3 + 5 / 9
    assert found.exp().tolist() == pytest.approx([1 / 9 / total, 0.3 / total, 5 / 9 / total])


@pytest.mark.parametrize("filter_by", ["tuned", "mixture"])
def test_property_a_filter_that_keeps_all_changes_nothing(filter_by):
    large, small, tuned = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    kept = emulated_log_probs(large, small, tuned, top_p=1.0, filter_by=filter_by)
    assert torch.allclose(kept, emulated_log_probs(large, small, tuned), atol=1e-6)


def test_property_constants_cancel_also_under_a_filter():
    large, small, tuned = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"top_p": 0.5}, {"top_p": 0.5, "filter_by": "mixture"}):
        shifted = emulated_log_probs(large + 3, small - 2, tuned + 1, **options)
        assert torch.allclose(shifted, emulated_log_probs(large, small, tuned, **options), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_oracle_half_precision_logits_are_computed_with_in_float32(dtype):
    large, small, tuned = (10 * torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = (large.double() + tuned.double() - small.double()).log_softmax(-1)
    found = emulated_log_probs(large, small, tuned)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_oracle_heads_of_other_widths_are_cut_to_the_common_one():
    large, small, tuned = (torch.randn(2, width, generator=torch.Generator().manual_seed(width)) for width in (9, 7, 8))
    found = emulated_log_probs(large, small, tuned)
    assert torch.equal(found[:, :7], emulated_log_probs(large[:, :7], small, tuned[:, :7]))
    assert (found[:, 7:] == -torch.inf).all()
    assert found.exp().sum(-1).tolist() == pytest.approx([1, 1])


def test_degenerate_no_rows_and_one_token():
    assert emulated_log_probs(*torch.zeros(3, 0, 4)).shape == (0, 4)
    assert emulated_log_probs(*torch.zeros(3, 2, 1)).tolist() == [[0.0], [0.0]]


def test_rejects_logits_that_do_not_fit():
    with pytest.raises(ValueError, match=r"large has logits \(2, 4\), another \(3, 4\)"):
        emulated_log_probs(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="top_p must be in"):
        emulated_log_probs(*torch.zeros(3, 4), top_p=0.0)


# -- the model


@torch.no_grad()
def test_property_equal_models_cancel_exactly(parts):
    large, small, tuned = parts["llama"]
    ids, _ = prompts()
    alone = large(ids).logits.log_softmax(-1)
    assert torch.equal(EmulatedModel(large, small, small)(ids).logits, alone)
    assert torch.equal(EmulatedModel(large, small, tuned, scale=0.0)(ids).logits, alone)
    tuned_alone = tuned(ids).logits.log_softmax(-1)
    assert torch.allclose(EmulatedModel(small, small, tuned)(ids).logits, tuned_alone, atol=2e-5)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, MIXED])
def test_oracle_greedy_with_left_padding_is_brute_force(parts, kind):
    ids, mask = prompts()
    found = EmulatedModel(*parts[kind]).generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0
    )
    assert torch.equal(found, brute_force(*parts[kind], ids, mask, 64))
    assert len(set(found[1, 7:].tolist())) > 5  # a loop of one token would prove little


@pytest.mark.parametrize("kind", [*ARCHITECTURES, MIXED])
def test_oracle_beams_with_caches_are_beams_without(parts, kind):
    ids, mask = prompts()
    settings = {"max_new_tokens": 24, "num_beams": 4, "do_sample": False, "pad_token_id": 0}
    composed = EmulatedModel(*parts[kind])
    found = composed.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(found, composed.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings))


def test_oracle_sampling_with_caches_is_sampling_without(parts):
    ids, mask = prompts()
    composed = EmulatedModel(*parts[MIXED], scale=0.7, top_p=0.9)
    drawn = []
    for use_cache in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            drawn.append(
                composed.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=True, top_k=20, pad_token_id=0,
                    use_cache=use_cache, num_return_sequences=2,
                )
            )  # fmt: skip
    assert torch.equal(*drawn)


def test_property_every_model_reads_each_token_once(parts):
    read: dict[int, list[int]] = {0: [], 1: [], 2: []}
    hooks = [
        part.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: read[number].append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        for number, part in enumerate(parts["llama"])
    ]
    ids, mask = prompts()
    EmulatedModel(*parts["llama"]).generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, num_beams=2, do_sample=False, pad_token_id=0
    )
    for hook in hooks:
        hook.remove()
    assert list(read.values()) == [[7, 1, 1, 1, 1]] * 3


@torch.no_grad()
def test_oracle_a_cache_continues_where_it_stopped(parts):
    composed = EmulatedModel(*parts["qwen3"])
    ids, _ = prompts()
    first = composed(ids[1:2, :4])
    second = composed(ids[1:2, 4:], past_key_values=first.past_key_values)
    whole = composed(ids[1:2], use_cache=False).logits
    assert torch.allclose(torch.cat([first.logits, second.logits], dim=1), whole, atol=1e-4)
    assert first.past_key_values.get_seq_length() == 7


@torch.no_grad()
@pytest.mark.parametrize("taken_back", [1, 3])
def test_oracle_a_shortened_cache_is_one_that_never_read_on(parts, taken_back):
    composed = EmulatedModel(*parts["mistral"])
    ids = torch.randint(2, VOCABULARY, (1, 3 * WINDOW), generator=torch.Generator().manual_seed(1))
    cache = composed.parts.fresh_cache()
    composed(ids[:, :-4], past_key_values=cache)
    cache.activate_past_recording()
    composed(ids[:, -4:-1], past_key_values=cache)
    cache.keep(3 * WINDOW - 1 - taken_back)
    again = composed(ids[:, -1 - taken_back :], past_key_values=cache).logits
    assert torch.allclose(again, composed(ids, use_cache=False).logits[:, -1 - taken_back :], atol=1e-4)


@torch.no_grad()
def test_property_reordering_moves_the_rows_of_all_parts(parts):
    composed = EmulatedModel(*parts["llama"])
    ids, _ = prompts()
    cache = composed(ids).past_key_values
    before = {name: part.layers[-1].keys.clone() for name, part in cache.parts.items()}
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert set(before) == {"large", "small", "tuned"}
    for name, keys in before.items():
        assert torch.equal(cache.parts[name].layers[-1].keys, keys[[2, 0, 0]])


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_oracle_assisted_generation_is_greedy_generation(parts, kind):
    ids = prompts()[0][1:2]
    composed = EmulatedModel(*parts[kind])
    plain = composed.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(
        composed.generate(ids, max_new_tokens=20, do_sample=False, assistant_model=parts[kind][2]), plain
    )


def test_oracle_pipeline_is_generate(world):
    composed = EmulatedModel(
        *(AutoModelForCausalLM.from_pretrained(world[role]) for role in ("large", "small", "tuned"))
    )
    tokenizer = AutoTokenizer.from_pretrained(world["large"])
    said = pipeline("text-generation", model=composed, tokenizer=tokenizer)(
        "graph edge", max_new_tokens=6, do_sample=False, return_full_text=False
    )[0]["generated_text"]
    ids = tokenizer("graph edge", return_tensors="pt")["input_ids"]
    expected = composed.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert said == tokenizer.decode(expected, skip_special_tokens=True)


def test_property_generation_ends_where_any_part_would(parts):
    large, small, tuned = (model("llama", seed) for seed in (0, 1, 2))
    large.generation_config.eos_token_id, tuned.generation_config.eos_token_id = 3, [5, 3]
    composed = EmulatedModel(large, small, tuned)
    assert composed.generation_config.eos_token_id == [3, 5]
    assert large.generation_config.eos_token_id == 3
    ids = prompts()[0][1:2]
    free = EmulatedModel(*(model("llama", seed) for seed in (0, 1, 2))).generate(ids, max_new_tokens=9, do_sample=False)
    composed.generation_config.eos_token_id = [int(free[0, 9])]
    stopped = composed.generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(stopped, free[:, : free[0].tolist().index(int(free[0, 9]), 7) + 1])


def test_oracle_several_tuned_models_and_a_bf16_part():
    large, small, one, two = (model("qwen2", seed) for seed in range(4))
    one = one.to(torch.bfloat16)
    ids, _ = prompts()
    with torch.no_grad():
        found = EmulatedModel(large, small, {"helpful": (one, 0.7), "harmless": (two, 0.3)}, scale=2.0)(ids).logits
        logits = [part(ids).logits.double().log_softmax(-1) for part in (large, small, one, two)]
    expected = logits[0] + 2 * (0.7 * (logits[2] - logits[1]) + 0.3 * (logits[3] - logits[1]))
    assert torch.allclose(found.double(), expected.log_softmax(-1), atol=1e-4)


def test_oracle_score_and_loss_and_bits_are_of_the_composed_distribution(world):
    three = [AutoModelForCausalLM.from_pretrained(world[role]) for role in ("large", "small", "tuned")]
    composed, tokenizer = EmulatedModel(*three), AutoTokenizer.from_pretrained(world["large"])
    text = "graph edge node path"
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
    with torch.no_grad():
        a, b, c = (part(ids).logits.double().log_softmax(-1) for part in three)
    log_p = (a + c - b).log_softmax(-1)[0, :-1]
    expected = -log_p[torch.arange(len(log_p)), ids[0, 1:]]
    nats = score(composed, ids)
    assert nats[0, 0] == 0
    assert torch.allclose(nats[0, 1:].double(), expected, atol=1e-4)
    assert composed(ids, labels=ids).loss.item() == pytest.approx(float(expected.mean()), rel=1e-5)
    assert bits_per_byte(composed, tokenizer, [text]).nats[0] == pytest.approx(float(expected.sum()), rel=1e-5)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), torch.ones_like(ids)], dim=1)
    assert (score(composed, padded, mask)[0, :3] == 0).all()


def test_property_all_parts_are_in_the_mode_of_the_large_one(parts):
    large, _, tuned = parts["llama"]
    composed = EmulatedModel(large, model("llama", 1).train(), tuned)
    assert not any(module.training for module in composed.modules())


def test_property_the_shortest_context_is_the_whole_s(parts):
    composed = EmulatedModel(parts["llama"][0], model("llama", 1, max_position_embeddings=128), parts["llama"][2])
    assert composed.config.max_position_embeddings == 128
    assert parts["llama"][0].config.max_position_embeddings == 256


def test_rejects_what_cannot_be_composed(parts):
    large, small, tuned = parts["llama"]
    with pytest.raises(ValueError, match="small is an encoder-decoder"):
        EmulatedModel(large, tiny_t5(64, 16, 1, 2, 16, generator_seed=0), tuned)
    with pytest.raises(ValueError, match="tuned must be a causal language model"):
        EmulatedModel(large, small, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="names other than 'large' and 'small'; got none"):
        EmulatedModel(large, small, {})
    with pytest.raises(ValueError, match="names other than"):
        EmulatedModel(large, small, {"small": (tuned, 1.0)})
    with pytest.raises(ValueError, match="top_p must be in"):
        EmulatedModel(large, small, tuned, top_p=1.5)
    with pytest.raises(NotImplementedError, match="write_composed"):
        EmulatedModel(large, small, tuned).save_pretrained("anywhere")


def test_rejects_a_model_with_another_kind_of_state(parts):
    class Recurrent(type(parts["llama"][1])):
        @classmethod
        def _supports_default_dynamic_cache(cls) -> bool:
            return False

    with pytest.raises(ValueError, match="keeps its state in a form of its own"):
        EmulatedModel(parts["llama"][0], Recurrent(parts["llama"][1].config), parts["llama"][2])


def test_rejects_caches_of_one_model(parts):
    composed = EmulatedModel(*parts["llama"])
    ids, _ = prompts()
    one = DynamicCache(config=parts["llama"][0].config)
    with pytest.raises(TypeError, match="belongs to one model"):
        composed(ids, past_key_values=one)
    with pytest.raises(TypeError, match="Static, quantised and offloaded caches"):
        composed.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_fault_a_part_that_drops_its_cache_is_noticed(parts):
    class Forgetful(type(parts["llama"][1])):
        def forward(self, past_key_values=None, use_cache=None, **rest):
            return super().forward(use_cache=False, **rest)

    with pytest.raises(RuntimeError, match="small read 7 tokens and its cache went from 0 to 0"):
        EmulatedModel(parts["llama"][0], Forgetful(parts["llama"][1].config), parts["llama"][2])(prompts()[0])


# -- vocabularies, directories, recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """Directories as the Hub holds them: three models of one tokenizer, texts, prompts."""
    root = tmp_path_factory.mktemp("emulated")
    words = ["graph", "edge", "node", "path", "tree", "cycle", "walk", "degree", "flow", "cut", "sort", "heap"]
    texts = [" ".join(words[(i * k + k * k) % 12] for k in range(1, 12)) + f" {i}" for i in range(120)]
    tokenizer = train_bpe(texts, 300)
    paths = {"root": root, "texts": root / "texts.jsonl", "prompts": root / "prompts.jsonl"}
    paths["texts"].write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    rows = [{"text": text, "label": (" yes", " no")[i % 2]} for i, text in enumerate(texts[:60])]
    paths["prompts"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for seed, (role, hidden) in enumerate((("large", 32), ("small", 16), ("tuned", 16))):
        paths[role] = root / role
        model("llama", seed, hidden=hidden, **ids).save_pretrained(paths[role])
        tokenizer.save_pretrained(paths[role])
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(paths["small"]), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    paths["adapter"] = root / "adapter"
    wrapped.save_pretrained(paths["adapter"])
    return paths


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))


def fields(world: dict[str, Path], **changes: object) -> dict[str, object]:
    return {
        "models": {"large": str(world["large"]), "small": str(world["small"]), "small_tuned": str(world["tuned"])},
        "suites": {
            "text": {"kind": "bits_per_byte", "corpus": str(world["texts"]), "held_out": 0.3},
            "answers": {"kind": "choice", "data": str(world["prompts"]), "metric": "cross_entropy"},
        },
    } | changes


def test_rejects_other_vocabularies_and_says_how_they_differ(world):
    tokenizer = AutoTokenizer.from_pretrained(world["large"])
    longer = AutoTokenizer.from_pretrained(world["large"])
    longer.add_tokens(["<|turn|>"])
    with pytest.raises(ModelError, match=r"1 in chat only: '<\|turn\|>' \(300\) is in chat only\."):
        check_vocabularies({"large": tokenizer, "chat": longer})
    other = train_bpe(["zebra zebras zigzag" * 3], 300)
    with pytest.raises(ModelError, match=r"\d+ have another id, \d+ are in large only") as error:
        check_vocabularies({"large": tokenizer, "small": other})
    assert str(error.value).split("only: ")[1].count(";") == 4  # five of them are shown
    check_vocabularies({"large": tokenizer, "small": AutoTokenizer.from_pretrained(world["small"])})


def test_rejects_a_recipe_of_other_vocabularies_before_any_weight_is_read(world, tmp_path):
    AutoModelForCausalLM.from_pretrained(world["tuned"]).save_pretrained(tmp_path / "chat")
    longer = AutoTokenizer.from_pretrained(world["tuned"])
    longer.add_tokens(["<|turn|>"])
    longer.save_pretrained(tmp_path / "chat")
    models = {"large": str(world["large"]), "small": str(world["small"]), "small_tuned": str(tmp_path / "chat")}
    with pytest.raises(ModelError, match="in small_tuned only"):
        execute(EmulatedFinetuning(**fields(world, models=models)), tmp_path / "run")


@torch.no_grad()
def test_oracle_what_a_run_leaves_loads_as_what_it_measured(world, tmp_path):
    recipe = EmulatedFinetuning(**fields(world, scale=0.5, filter={"p": 0.8, "by": "mixture"}))
    result = execute(recipe, tmp_path / "run")
    loaded = load_emulated(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    three = [AutoModelForCausalLM.from_pretrained(world[role]) for role in ("large", "small", "tuned")]
    direct = EmulatedModel(*three, scale=0.5, top_p=0.8, filter_by="mixture")
    ids = tokenizer("graph edge node", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(ids).logits, direct(ids).logits)
    assert not loaded.training
    assert result.metrics["suite/text/composed"] not in {result.metrics[f"suite/text/{role}"] for role in recipe.models}
    assert result.metrics["inference/params_resident"] == sum(p.numel() for part in three for p in part.parameters())
    assert result.metrics["inference/flops_ratio"] > 1.1
    said = json.loads((tmp_path / "run" / "model" / "composed.json").read_text())
    assert (said["scale"], said["top_p"], said["filter_by"]) == (0.5, 0.8, "mixture")
    assert said["models"]["large"] == {
        "name": str(world["large"]), "revision": None, "dtype": "float32", "adapter_on": None
    }  # fmt: skip
    assert not list((tmp_path / "run" / "model").glob("*.safetensors"))


@pytest.mark.parametrize("filter", [None, {"p": 0.9}, {"p": 0.9, "by": "mixture"}])
def test_oracle_the_readme_s_code_decodes_as_the_loaded_model(world, tmp_path, monkeypatch, filter):
    models = {"large": str(world["large"]), "small": str(world["small"]), "one": str(world["tuned"])}
    models["two"] = str(world["adapter"])
    recipe = EmulatedFinetuning(
        **fields(world, models=models, tuned={"one": 0.6, "two": 0.4}, tokenizer_from="large", filter=filter)
    )
    execute(recipe, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run" / "model")
    readme = Path("README.md").read_text(encoding="utf-8")
    ours, theirs = (part.split("```python\n")[1].split("```")[0] for part in readme.split("## With")[1:])
    names: dict[str, object] = {}
    exec(theirs, names)
    exec(ours, names)
    ids = names["tokenizer"]("Why?", return_tensors="pt")["input_ids"]
    expected = names["model"].generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert torch.equal(names["ids"], expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_oracle_sharded_bf16_directories_of_each_architecture(world, tmp_path, kind, tied):
    tokenizer = AutoTokenizer.from_pretrained(world["large"])
    three = []
    for seed, role in enumerate(("large", "small", "small_tuned")):
        width = len(tokenizer) + 4 * seed  # heads padded differently
        made = model(kind, seed, hidden=32 if role == "large" else 16, vocab_size=width, tie_word_embeddings=tied)
        made.to(torch.bfloat16).save_pretrained(tmp_path / role, max_shard_size="12KB")
        tokenizer.save_pretrained(tmp_path / role)
        assert (tmp_path / role / "model.safetensors.index.json").exists()
        three.append(AutoModelForCausalLM.from_pretrained(tmp_path / role, dtype="auto"))
    models = {p.name: {"name": str(p), "dtype": "auto"} for p in tmp_path.iterdir() if p.name != "cache"}
    result = execute(EmulatedFinetuning(**fields(world, models=models)), tmp_path / "run")
    loaded = load_emulated(tmp_path / "run" / "model")
    assert loaded.parts.models["large"].dtype == torch.bfloat16
    ids = tokenizer("graph edge node", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(ids).logits, EmulatedModel(*three)(ids).logits)
    assert loaded.generate(ids, max_new_tokens=5, num_beams=2, do_sample=False).max() < len(tokenizer)
    assert f"{len(tokenizer) + 4} in small" in result.notes["vocabulary"]


@torch.no_grad()
def test_oracle_an_adapter_is_the_model_it_makes_of_small(world, tmp_path):
    models = {"large": str(world["large"]), "small": str(world["small"]), "small_tuned": str(world["adapter"])}
    result = execute(EmulatedFinetuning(**fields(world, models=models)), tmp_path / "run")
    from peft import PeftModel

    small = AutoModelForCausalLM.from_pretrained(world["small"])
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world["small"]), world["adapter"]).eval()
    composed = EmulatedModel(AutoModelForCausalLM.from_pretrained(world["large"]), small, live)  # unmerged
    ids = torch.randint(2, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    found = load_emulated(tmp_path / "run" / "model")(ids).logits
    assert torch.allclose(found, composed(ids).logits, atol=1e-4)
    assert not torch.allclose(found, EmulatedModel(composed.parts.models["large"], small, small)(ids).logits, atol=1e-2)
    assert result.metrics["suite/text/small_tuned"] != result.metrics["suite/text/small"]
    assert composed.generate(ids, max_new_tokens=8, do_sample=False).shape == (2, 17)


def test_oracle_the_reference_writes_a_part_of_these_roles(world, tmp_path):
    models = {"large": str(world["large"]), "small": str(world["small"]), "small_tuned": str(world["adapter"])}
    shared = fields(world, models=models, tokenizer_from="large", adapters_on="small", part="small_tuned")
    metrics = execute(SinglePart(**shared), tmp_path / "run").metrics
    assert metrics["suite/text/composed"] == pytest.approx(metrics["suite/text/small_tuned"], abs=1e-5)


def test_property_names_beside_the_file_move_with_it(world, tmp_path):
    for role in ("large", "small", "tuned"):
        AutoModelForCausalLM.from_pretrained(world[role]).save_pretrained(tmp_path / "a" / role)
    found = {role: PartFile(name=f"./{role}") for role in ("large", "small", "tuned")}
    write_composed(tmp_path / "a", ComposedFile(models=found, tuned={"tuned": 1.0}))
    (tmp_path / "a").rename(tmp_path / "b")
    assert load_emulated(tmp_path / "b").weights == {"tuned": 1.0}
    hub = PartFile.of(ModelRef(name="org/model"), Path("/cache/models--org--model/snapshots/0123abc"))
    assert (hub.name, hub.revision) == ("org/model", "0123abc")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no composed.json"),
        ("{", "cannot be read"),
        ('{"format": 2, "models": {}, "tuned": {"a": 1}}', "format"),
        ('{"models": {"large": {"name": "a"}}, "tuned": {"a": 1}}', "models has no 'a'; it has large"),
    ],
)
def test_rejects_a_directory_that_was_not_written_whole(tmp_path, text, words):
    if text is not None:
        (tmp_path / "composed.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        read_composed(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tuned": {"chat": 1.0}}, "tuned names 'chat', which is no role"),
        ({"tuned": {"small": 1.0, "small_tuned": 1.0}}, "'small', which is no tuned model"),
        ({"models": {"large": "a", "small": "b", "small_tuned": "c", "d": "d"}}, "'d' has no weight"),
        ({"models": {"large": "a", "small_tuned": "c"}}, "no role 'small'"),
        ({"out_dtype": "bfloat16"}, "no weights are written"),
        ({"filter": {"p": 0.0}}, "filter.p"),
        ({"tuned": {}}, "tuned"),
    ],
)
def test_rejects_recipes_whose_roles_do_not_fit(world, changes, words):
    with pytest.raises(RecipeError, match=words):
        EmulatedFinetuning(**fields(world, **changes))


def test_rejects_an_adapter_where_a_model_is_meant(world, tmp_path):
    models = {"large": str(world["adapter"]), "small": str(world["small"]), "small_tuned": str(world["tuned"])}
    with pytest.raises(ModelError, match=r"large: .* is an adapter; give the model"):
        execute(EmulatedFinetuning(**fields(world, models=models)), tmp_path / "run")
    lonely = {"large": str(world["large"]), "small_tuned": str(world["adapter"])}
    shared = fields(world, models=lonely, tokenizer_from="large", part="large")
    with pytest.raises(ModelError, match="no model 'base' to put it on; set adapters_on to one of large, small_tuned"):
        execute(SinglePart(**shared), tmp_path / "single")


def test_learns_the_manners_of_the_small_and_the_facts_of_the_large():
    # A context of a fact (tokens 0..3 -> 4..7) which the large model answers with .4 and hedges (8) with .6; the small
    # one hedges the same way and knows nothing; tuned it never hedges. Neither is right alone; together always.
    large = torch.full((4, 9), 1e-4).scatter(1, torch.arange(4, 8)[:, None], 0.4)
    large[:, 8] = 0.6
    small, tuned = torch.full((4, 9), 0.05), torch.full((4, 9), 1 / 9)
    small[:, 8], tuned[:, 8] = 0.6, 1e-3
    found = emulated_log_probs(large.log(), small.log(), tuned.log()).argmax(-1)
    assert found.tolist() == [4, 5, 6, 7]
    assert large.argmax(-1).tolist() == [8] * 4
