"""The mixture of denoisers: nothing lost, counts exact, the same bytes anywhere, and plain models train on it."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import sentences
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from headwater.core.recipe import RecipeError
from headwater.core.run import execute
from headwater.modalities.models import ModelError
from headwater.modalities.text.corruption import SpanCorruption, SuffixCorruption, span_counts
from headwater.modalities.text.denoising import Denoiser, MixtureOfDenoisers
from headwater.modalities.text.objectives import CausalObjective
from headwater.modalities.text.tiny import tiny_llama, tiny_t5
from headwater.modalities.text.tokenizers import train_bpe
from headwater.pretrain.base import with_rows
from headwater.pretrain.ul2 import (
    UL2,
    UL2_DENOISERS,
    PrefixObjective,
    generate,
    prefix_lm_denoisers,
    prepare_tokenizer,
    t5_denoisers,
    with_mode,
)

Fields = dict[str, Any]
LENGTH = 64


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_bpe([*sentences("domain", 5), *sentences("general", 5)], 320)
    prepare_tokenizer(tokenizer, None)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def features(rows: int, length: int = LENGTH, seed: int = 0) -> list[Fields]:
    ids = np.random.default_rng(seed).integers(2, 320, (rows, length))
    return [{"input_ids": row.tolist(), "row": i} for i, row in enumerate(ids)]


def sentinel_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>")) for i in range(100)]


def unpadded(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Input and target of every row of an encoder-decoder batch."""
    return [
        (ids[seen.bool()].tolist(), labels[labels != -100].tolist())
        for ids, seen, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


# -- what the collator makes


def test_equation_layouts_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    mask = np.array([[0, 1, 1, 0, 0, 0, 0, 1]], dtype=bool)
    ids = np.array([[10, 11, 12, 13, 14, 15, 16, 17]])
    s0, s1, *_ = sentinel_ids(tokenizer)
    mode = tokenizer.convert_tokens_to_ids("[R]")
    corruption = SpanCorruption(mean_span=3, rate=0.15)
    source = [mode, 10, s0, 13, 14, 15, 16, s1, 1]
    both = MixtureOfDenoisers(tokenizer, t5_denoisers(), input_length=8).ask(ids, mask, corruption)
    assert both["input_ids"].tolist() == [source]
    assert both["labels"].tolist() == [[-100, 11, 12, -100, 17, -100]]  # sentinels and EOS carry no loss
    assert both["decoder_input_ids"].tolist() == [[0, s0, 11, 12, s1, 17]]  # but the decoder reads them
    one = MixtureOfDenoisers(tokenizer, t5_denoisers(), layout="prefix_decoder", input_length=8)
    batch = one.ask(ids, mask, corruption)
    assert batch["input_ids"].tolist() == [[*source, s0, 11, 12, s1, 17, 1]]
    assert batch["labels"].tolist() == [[-100] * 9 + [-100, 11, 12, -100, 17, -100]]
    assert batch["prefix_lengths"].tolist() == [9]
    assert batch["position_ids"].tolist() == [list(range(15))]


@pytest.mark.parametrize("number", range(7))
def test_oracle_rows_can_be_rebuilt_with_exact_counts(tokenizer: PreTrainedTokenizerFast, number: int) -> None:
    denoiser = UL2_DENOISERS[number]
    rows = features(1_000, LENGTH, seed=number)
    batch = MixtureOfDenoisers(tokenizer, [denoiser], input_length=LENGTH, seed=3)(rows)
    sentinels = set(sentinel_ids(tokenizer))
    mode = tokenizer.convert_tokens_to_ids(f"[{denoiser.mode}]")
    for (source, target), feature in zip(unpadded(batch), rows, strict=True):
        assert source[0] == mode
        assert source[-1] == target[-1] == tokenizer.eos_token_id
        assert target.count(tokenizer.eos_token_id) == 1
        source, target = source[1:-1], target[:-1]
        if isinstance(denoiser.corruption, SuffixCorruption):
            assert not sentinels & {*source, *target}
            assert source + target == feature["input_ids"]
            assert LENGTH // 2 <= len(source) < LENGTH
            continue
        noise, spans = span_counts(LENGTH, denoiser.corruption.mean_span, denoiser.corruption.rate)
        used = [token for token in source if token in sentinels]
        assert used == sentinel_ids(tokenizer)[:spans]
        assert len(target) == noise + spans
        pieces: dict[int, list[int]] = {}
        for token in target:
            if token in sentinels:
                pieces[current := token] = []
            else:
                pieces[current].append(token)
        assert [t for token in source for t in pieces.get(token, [token])] == feature["input_ids"]


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_decoder", "causal_decoder"])
def test_property_a_row_is_the_same_bytes_alone_in_a_batch_and_in_a_worker(
    tokenizer: PreTrainedTokenizerFast, layout: Any
) -> None:
    rows = features(21)
    collator = MixtureOfDenoisers(
        tokenizer, UL2_DENOISERS, layout=layout, input_length=LENGTH, return_denoiser=True, seed=5
    )
    alone = [collator([row]) for row in rows]
    reordered = collator([rows[i] for i in (13, 2, 20, 0, 7, 7, 5)])
    workers = list(DataLoader(rows, batch_size=7, num_workers=2, collate_fn=collator))  # type: ignore[arg-type]
    for name in alone[0]:
        whole = torch.cat([batch[name] for batch in workers])
        for i, row in enumerate(alone):
            assert torch.equal(row[name][0], whole[i])
        for place, i in enumerate((13, 2, 20, 0, 7, 7, 5)):
            assert torch.equal(reordered[name][place], alone[i][name][0])


def test_property_another_seed_and_another_row_draw_anew(tokenizer: PreTrainedTokenizerFast) -> None:
    row = features(1)[0]
    made = [
        MixtureOfDenoisers(tokenizer, t5_denoisers(), input_length=LENGTH, seed=seed)([{**row, "row": number}])
        for seed, number in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(batch["input_ids"][0].tolist()) for batch in made}) == 3


def test_property_weights_choose_the_denoisers(tokenizer: PreTrainedTokenizerFast) -> None:
    def share(weights: list[float] | None) -> np.ndarray:
        collator = MixtureOfDenoisers(tokenizer, UL2_DENOISERS, weights, input_length=LENGTH)
        return np.bincount(collator.choose(np.arange(70_000)), minlength=7) / 70_000

    assert share([0, 0, 1, 0, 0, 0, 0]).tolist() == [0, 0, 1, 0, 0, 0, 0]
    # 70,000 draws: a standard deviation of 0.0013 at 1/7
    assert share(None) == pytest.approx(np.full(7, 1 / 7), abs=0.007)
    assert share([4, 0, 2, 0, 0, 0, 2]) == pytest.approx([0.5, 0, 0.25, 0, 0, 0, 0.25], abs=0.01)


def test_property_every_batch_has_the_announced_shape(tokenizer: PreTrainedTokenizerFast) -> None:
    for layout in ("encoder_decoder", "prefix_decoder", "causal_decoder"):
        collator = MixtureOfDenoisers(tokenizer, UL2_DENOISERS, layout=layout, input_length=LENGTH)  # type: ignore[arg-type]
        batch = collator(features(3))
        assert (batch["input_ids"].shape, batch["labels"].shape) == ((3, collator.shape[0]), (3, collator.shape[1]))
    # 3 of every 6 tokens are noise: 1 mode + 32 kept + 11 sentinels + EOS; 32 + 11 + EOS; the suffix keeps up to 63
    assert MixtureOfDenoisers(tokenizer, UL2_DENOISERS, input_length=64).shape == (65, 44)


def test_degenerate_rows_of_many_lengths_and_too_short_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"input_ids": list(range(10, 10 + n)), "row": n} for n in (8, 64, 3, 20, 64)]
    collator = MixtureOfDenoisers(tokenizer, prefix_lm_denoisers(), input_length=LENGTH)
    batch = collator(rows)
    assert collator.dropped == 1
    rebuilt = [source[1:-1] + target[:-1] for source, target in unpadded(batch)]
    assert rebuilt == [row["input_ids"] for row in rows if len(row["input_ids"]) >= 8]
    assert collator([])["input_ids"].shape[0] == 0


def test_degenerate_a_span_longer_than_the_noise_is_one_span(tokenizer: PreTrainedTokenizerFast) -> None:
    denoiser = Denoiser(mode="X", corruption=SpanCorruption(mean_span=64, rate=0.15))
    (source, target), *_ = unpadded(MixtureOfDenoisers(tokenizer, [denoiser], input_length=16)(features(1, 16)))
    assert len(set(source) & set(sentinel_ids(tokenizer))) == 1
    assert len(target) == 1 + 2 + 1  # sentinel, round(16 x 0.15) = 2, EOS


def test_property_without_modes_there_is_no_token_in_front(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = MixtureOfDenoisers(tokenizer, t5_denoisers(), input_length=LENGTH, mode_tokens=None)(features(4))
    moded = MixtureOfDenoisers(tokenizer, t5_denoisers(), input_length=LENGTH)(features(4))
    assert [source for source, _ in unpadded(plain)] == [source[1:] for source, _ in unpadded(moded)]


def test_property_overflow_is_cut_and_counted_only_when_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    half = (Denoiser(mode="X", corruption=SpanCorruption(mean_span=3, rate=0.5)),)
    with pytest.raises(ValueError, match=r"target_length 20 is too short: .* up to 44"):
        MixtureOfDenoisers(tokenizer, half, input_length=64, target_length=20)
    collator = MixtureOfDenoisers(tokenizer, half, input_length=64, target_length=20, overflow="truncate")
    made = unpadded(collator(features(5)))
    assert collator.truncated == 5
    assert all(len(target) == 20 and target[-1] == tokenizer.eos_token_id for _, target in made)


def test_rejects_at_construction(tokenizer: PreTrainedTokenizerFast) -> None:
    half = (Denoiser(mode="X", corruption=SpanCorruption(mean_span=3, rate=0.5)),)
    few = sentinel_ids(tokenizer)[:50]
    with pytest.raises(ValueError, match="rows of 512 tokens need 85 sentinels; there are 50"):
        MixtureOfDenoisers(tokenizer, half, input_length=512, sentinels=few)
    with pytest.raises(ValueError, match=r"'<mode R>' must be one token.*prepare_tokenizer"):
        MixtureOfDenoisers(tokenizer, t5_denoisers(), input_length=64, mode_tokens={"R": "<mode R>"})
    with pytest.raises(ValueError, match="mode 'S' has no token"):
        MixtureOfDenoisers(tokenizer, prefix_lm_denoisers(), input_length=64, mode_tokens={"R": "[R]"})
    with pytest.raises(ValueError, match="one weight >= 0 per denoiser"):
        MixtureOfDenoisers(tokenizer, UL2_DENOISERS, [1.0], input_length=64)
    with pytest.raises(ValueError, match="not all 0"):
        MixtureOfDenoisers(tokenizer, t5_denoisers(), [0.0], input_length=64)
    with pytest.raises(ValueError, match="input_length must be at least 8; got 4"):
        MixtureOfDenoisers(tokenizer, t5_denoisers(), input_length=4)
    with pytest.raises(ValueError, match="unknown layout 'decoder'"):
        MixtureOfDenoisers(tokenizer, t5_denoisers(), layout="decoder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only the layout 'prefix_decoder' needs a model"):
        MixtureOfDenoisers(tokenizer, t5_denoisers(), model=tiny_t5(320, 16, 1, 2, 32, generator_seed=0))
    bare = make_tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match="needs a pad and an EOS token"):
        MixtureOfDenoisers(bare, t5_denoisers(), input_length=64)


def test_rejects_features(tokenizer: PreTrainedTokenizerFast) -> None:
    collator = MixtureOfDenoisers(tokenizer, t5_denoisers(), input_length=64)
    with pytest.raises(ValueError, match=r"with_rows\(dataset\); in transformers.Trainer set remove_unused_columns=F"):
        collator([{"input_ids": list(range(10, 30))}])
    with pytest.raises(ValueError, match="a row has 65 tokens, more than input_length 64"):
        collator(features(1, 65))
    with pytest.raises(ValueError, match="all 2 rows are shorter than 8 tokens"):
        collator(features(2, 7))


def row_by_row(rows: list[Fields], mode: dict[str, int], sentinels: list[int]) -> dict[str, torch.Tensor]:
    """The same kind of batch, made the obvious way: a generator per row, one token after another."""
    inputs, labels = [], []
    for feature in rows:
        rng, ids = np.random.default_rng([0, feature["row"]]), feature["input_ids"]
        denoiser = UL2_DENOISERS[int(rng.integers(7))]
        if isinstance(denoiser.corruption, SuffixCorruption):
            taken = [i >= int(rng.integers(len(ids) // 2, len(ids))) for i in range(len(ids))]
        else:
            noise, spans = span_counts(len(ids), denoiser.corruption.mean_span, denoiser.corruption.rate)
            starts = sorted(rng.choice(len(ids) - noise + 1, spans, replace=False).tolist())
            cuts = [0, *sorted((rng.choice(noise - 1, spans - 1, replace=False) + 1).tolist()), noise]
            taken, kept = [], 0
            for number, start in enumerate(starts):
                taken += [False] * (start - kept) + [True] * (cuts[number + 1] - cuts[number])
                kept = start
            taken += [False] * (len(ids) - len(taken))
        source, target, number, before = [mode[denoiser.mode]], [], 0, False
        for token, gone in zip(ids, taken, strict=True):
            if gone and not before and isinstance(denoiser.corruption, SpanCorruption):
                source.append(sentinels[number])
                target.append(sentinels[number])
                number += 1
            (target if gone else source).append(token)
            before = gone
        inputs.append([*source, 1])
        labels.append([*target, 1])
    seen = [[1] * len(source) for source in inputs]
    widths = max(map(len, inputs)), max(map(len, labels))
    return {
        "input_ids": torch.tensor([row + [0] * (widths[0] - len(row)) for row in inputs]),
        "attention_mask": torch.tensor([row + [0] * (widths[0] - len(row)) for row in seen]),
        "labels": torch.tensor([row + [-100] * (widths[1] - len(row)) for row in labels]),
    }


def test_property_many_times_as_fast_as_row_by_row(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = features(64, 512)
    arrays = [{**row, "input_ids": torch.tensor(row["input_ids"])} for row in rows]
    collator = MixtureOfDenoisers(tokenizer, UL2_DENOISERS, input_length=512)
    modes = {mode: int(tokenizer.convert_tokens_to_ids(f"[{mode}]")) for mode in "RSX"}
    sentinels = sentinel_ids(tokenizer)

    def seconds(call: Any, repeats: int) -> float:
        begin = time.process_time()
        for _ in range(repeats):
            call()
        return (time.process_time() - begin) / repeats

    ratio = max(
        seconds(lambda: row_by_row(rows, modes, sentinels), 2) / seconds(lambda: collator(arrays), 20) for _ in range(3)
    )
    assert ratio >= 6  # 12 when measured, both timed in the same process; half of it is left for noise


# -- models train on it


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_oracle_prefix_loss_row_by_row(tokenizer: PreTrainedTokenizerFast, attention: str) -> None:
    model = tiny_llama(tokenizer, 16, 2, 2, 32, context=256, generator_seed=0)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.ndim == 2):
            matrix.mul_(12)  # fresh weights hardly attend: who sees whom would not show in the loss
    collator = MixtureOfDenoisers(tokenizer, UL2_DENOISERS, layout="prefix_decoder", input_length=32)
    batch = collator(features(9, 32))
    total = count = 0.0
    for ids, labels, prefix in zip(batch["input_ids"], batch["labels"], batch["prefix_lengths"].tolist(), strict=True):
        length = int((labels != -100).nonzero().max()) + 1
        mask = torch.full((length, length), torch.finfo(torch.float32).min)
        for query in range(length):
            for key in range(length):
                if key <= query or key < prefix:
                    mask[query, key] = 0.0
        with torch.no_grad():
            logp = model(input_ids=ids[None, :length], attention_mask=mask[None, None]).logits[0].log_softmax(-1)
        for at in range(prefix, length):
            total -= float(logp[at - 1, ids[at]])
            count += 1
    with torch.no_grad():
        ours = PrefixObjective()(model, batch)
        given = MixtureOfDenoisers(tokenizer, UL2_DENOISERS, layout="prefix_decoder", input_length=32, model=model)(
            features(9, 32)
        )
        through_the_model = CausalObjective()(model, given)
        stock = model(**given).loss
        causal = CausalObjective()(model, batch)
    assert int(ours.count) == count
    assert abs(float(causal.total) / total - 1) > 0.001, "the mask matters"
    # some 300 float32 terms of about 6 each
    assert float(ours.total) == pytest.approx(total, rel=1e-5)
    assert float(through_the_model.total) == pytest.approx(total, rel=1e-5)
    assert float(stock) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("layout", ["encoder_decoder", "prefix_decoder", "causal_decoder"])
def test_learns_in_a_stock_trainer_with_a_plain_model(layout: Any, tmp_path: Path) -> None:
    tokenizer = train_bpe(sentences("general", 20), 320)
    tokens = tokenizer(" ".join(sentences("general", 60)), add_special_tokens=False)["input_ids"]
    dataset = [{"input_ids": tokens[i : i + 32]} for i in range(0, 32 * 300, 32)]
    if layout == "encoder_decoder":
        model: Any = tiny_t5(tokenizer, 32, 1, 2, 64, generator_seed=0)
    else:
        model = tiny_llama(tokenizer, 32, 1, 2, 64, generator_seed=0)
    prepare_tokenizer(tokenizer, model, 16)
    collator = MixtureOfDenoisers(
        tokenizer,
        UL2_DENOISERS,
        layout=layout,
        input_length=32,
        model=model if layout == "prefix_decoder" else None,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=40,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            logging_steps=5,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=with_rows(dataset, epochs=3),  # type: ignore[arg-type]
        data_collator=collator,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # chance is ln 339 = 5.8; the text has about 35 words and suffixes, so a few steps take off more than a nat
    assert losses[-1] < losses[0] - 1.0


def test_oracle_micro_batches_give_the_gradient_of_the_whole(pretrain_fields: Fields, tmp_path: Path) -> None:
    found = []
    for micro in (8, 2):
        fields = {**pretrain_fields, "fit": {"precision": "fp32", "micro_rows": micro}}
        found.append(execute(UL2(**fields), tmp_path / str(micro)).metrics["val/loss"])
    # targets are ragged: means over micro-batches would be off by percents
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_property_new_embeddings_are_the_mean_of_the_old() -> None:
    tokenizer = train_bpe(sentences("general", 5), 300)
    for tie in (True, False):
        model = tiny_llama(tokenizer, 16, 1, 2, 32, tie=tie, generator_seed=0)
        before = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
        fresh = train_bpe(sentences("general", 5), 300)
        state = torch.get_rng_state()
        ids = prepare_tokenizer(fresh, model, 20)
        assert torch.equal(torch.get_rng_state(), state), "the global generator is not moved"
        assert len(ids) == 23
        for old, module in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
            assert torch.equal(module.weight[: len(old)], old)
            away = module.weight[ids] - old.mean(dim=0)
            assert 0.008 < float(away.detach().std()) < 0.012  # 368 normals of deviation 0.01
        assert prepare_tokenizer(fresh, model, 20) == [], "nothing is added twice"


def test_property_sentinels_that_exist_are_used() -> None:
    tokenizer = train_bpe(sentences("general", 5), 330, extra_tokens=[f"<extra_id_{i}>" for i in range(30)])
    assert len(prepare_tokenizer(tokenizer, None, 30)) == 3  # the modes
    assert tokenizer.convert_tokens_to_ids("<extra_id_7>") in tokenizer.all_special_ids


# -- use


def test_equation_with_mode() -> None:
    assert with_mode("text", "S") == "[S]text"
    with pytest.raises(ValueError, match="no mode 'Q'; there are R, S, X"):
        with_mode("text", "Q")


def test_oracle_generate_is_greedy_and_warns_without_a_mode(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(tokenizer, 16, 1, 2, 32, generator_seed=1)
    ids = tokenizer("[S]sum mean", add_special_tokens=False)["input_ids"] + [1]
    with torch.no_grad():
        expected = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        causal = generate(model, tokenizer, "sum mean", mode="S", layout="causal_decoder", max_new_tokens=5)
        prefix = generate(model, tokenizer, "sum mean", mode="S", layout="prefix_decoder", max_new_tokens=5)
    assert causal == tokenizer.decode([token for token in expected.tolist() if token > 1])
    assert isinstance(prefix, str)
    t5 = tiny_t5(tokenizer, 16, 1, 2, 32, generator_seed=1)
    with pytest.warns(UserWarning, match="no mode token"):
        generate(t5, tokenizer, "sum mean", mode=None, max_new_tokens=3)


# -- the recipe


def test_equation_what_is_counted(pretrain_fields: Fields, tmp_path: Path) -> None:
    result = execute(UL2(**pretrain_fields), tmp_path / "a")
    # 6 steps of 8 rows of 32 tokens. A row takes 1 + 31 + 1 = 33 encoder positions (the suffix keeps up to 31), and in
    # the decoder the longest target: 16 tokens in round(16 / 3) = 5 spans, and EOS, 22.
    assert result.metrics["tokens_source"] == 6 * 256
    assert result.metrics["tokens_processed"] == 48 * (33 + 22)
    assert {"val/loss/R", "val/loss/S", "val/loss/X"} <= result.metrics.keys()


def test_property_losses_by_mode_average_to_the_whole(pretrain_fields: Fields, tmp_path: Path) -> None:
    metrics = execute(UL2(**pretrain_fields), tmp_path / "a").metrics
    modes = [metrics[f"val/loss/{mode}"] for mode in "RSX"]
    assert min(modes) < metrics["val/loss"] < max(modes)


@pytest.mark.parametrize("layout", ["auto", "causal_decoder"])
def test_property_a_decoder_is_trained_too(pretrain_fields: Fields, tmp_path: Path, layout: str) -> None:
    fields = {**pretrain_fields, "model": {**pretrain_fields["model"], "kind": "llama"}, "layout": layout}
    metrics = execute(UL2(**fields), tmp_path / "a").metrics
    # 1 + 32 + 2 x 5 + 2: every span stands twice as a sentinel
    assert metrics["tokens_processed"] == 48 * 45
    assert np.isfinite(metrics["adapted/infill"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": [1.0]}, "weights must be 7 numbers"),
        ({"denoisers": []}, "denoisers"),
        ({"mode_tokens": {"R": "[R]"}}, r"mode '[SX]' has no token"),
        ({"seq_length": 4}, "seq_length"),
        ({"layout": "sideways"}, "layout"),
    ],
)
def test_rejects_when_built(pretrain_fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        UL2(**{**pretrain_fields, **changes})


def test_rejects_models_that_do_not_fit(
    pretrain_fields: Fields, tiny_causal: Path, tiny_masked: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="'prefix_decoder' was asked for, but the model is an encoder-decoder"):
        execute(UL2(**{**pretrain_fields, "layout": "prefix_decoder"}), tmp_path / "a")
    with pytest.raises(ModelError, match="take 85 positions, and the model has 64"):
        execute(UL2(**{**pretrain_fields, "model": {"name": str(tiny_causal)}, "seq_length": 62}), tmp_path / "b")
    with pytest.raises(ModelError, match="is a masked language model"):
        execute(UL2(**{**pretrain_fields, "model": {"name": str(tiny_masked)}}), tmp_path / "c")


def test_property_continuing_starts_from_the_models_own_weights(
    pretrain_fields: Fields, tiny_causal: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    fields = {**pretrain_fields, "model": {"name": str(tiny_causal)}, "optim": {"lr": 1e-12, "weight_decay": 0.0}}
    own = load_file(tiny_causal / "model.safetensors")
    for from_scratch, same in ((False, True), (True, False)):
        execute(UL2(**fields, from_scratch=from_scratch), tmp_path / str(from_scratch))
        left = load_file(tmp_path / str(from_scratch) / "model" / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        assert np.allclose(left[name], own[name], atol=1e-6) == same
