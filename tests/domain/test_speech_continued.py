"""The recipe on a Hugging Face directory: phases, what is trained, what is measured, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.settings import opens_as_speech

from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Result, Run, execute
from headwater.domain.speech_context import SpeechContext
from headwater.domain.speech_continued import SpeechContinued
from headwater.modalities.models import ModelError
from headwater.modalities.speech.languages import language, utterance, write_corpus
from headwater.modalities.speech.tiny import tiny_feature_extractor, tiny_wav2vec2
from headwater.modalities.text.docs import CorpusError

Fields = dict[str, Any]


def recipe_of(fields: Fields, **changes: Any) -> SpeechContinued:
    recipe = load_recipe({"method": "speech_continued", **fields, **changes})
    assert isinstance(recipe, SpeechContinued)
    return recipe


def ran(fields: Fields, directory: Path, **changes: Any) -> Result:
    return execute(recipe_of(fields, **changes), directory)


def context(fields: Fields, directory: Path, **changes: Any) -> SpeechContext:
    recipe = recipe_of(fields, **changes)
    with Run(directory, recipe) as run:
        return SpeechContext(recipe, run)


def weights(directory: Path, part: str = "") -> dict[str, np.ndarray]:
    return {k: v for k, v in load_file(directory / "model.safetensors").items() if k.startswith(part)}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_property_a_checkpoint_of_either_norm_is_continued_and_opens_without_us(
    speech_fields: Fields, tmp_path: Path, norm: str
) -> None:
    start = tmp_path / "start"
    tiny_wav2vec2(16, 1, 2, 16, conv=8, codes=4, norm=norm, generator_seed=3).save_pretrained(start)  # type: ignore[arg-type]
    tiny_feature_extractor(norm).save_pretrained(start)  # type: ignore[arg-type]
    ran(speech_fields, tmp_path / "run", model=str(start))
    opens_as_speech(tmp_path / "run" / "model")
    assert not same(weights(start), weights(tmp_path / "run" / "model"))
    readme = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"Give it {'an' if norm == 'layer' else 'no'} attention mask" in readme


def test_property_a_model_without_extractor_is_read_as_its_norm_asks(speech_fields: Fields, tmp_path: Path) -> None:
    for norm in ("group", "layer"):
        start = tmp_path / norm
        tiny_wav2vec2(16, 1, 2, 16, conv=8, codes=4, norm=norm, generator_seed=3).save_pretrained(start)  # type: ignore[arg-type]
        ctx = context(speech_fields, tmp_path / f"run-{norm}", model=str(start))
        assert ctx.attention_mask == (norm == "layer")
        assert "no preprocessor_config.json" in ctx.run.notes["warning/extractor"]


def test_property_phases_train_what_they_should(speech_fields: Fields, tmp_path: Path) -> None:
    ran(speech_fields, tmp_path / "both")
    adapted, recogniser = weights(tmp_path / "both" / "model"), weights(tmp_path / "both" / "ctc")
    convolutions = "wav2vec2.feature_extractor"
    assert same(weights(tmp_path / "both" / "model", convolutions), weights(tmp_path / "both" / "ctc", convolutions))
    layers = [name for name in recogniser if name.startswith("wav2vec2.encoder.layers") and name.endswith("weight")]
    assert layers
    assert all(not np.array_equal(adapted[name], recogniser[name]) for name in layers)
    # The head alone: of 11 steps only the last one moves the encoder, and its learning rate is 0.
    alone = {"shares": [0.0, 1.0], "freeze_encoder": 0.9, "budget": {"steps": 12}}
    ran(speech_fields, tmp_path / "head", **alone, ctc_optim={"lr": 1e-2, "final_lr": 0.0})
    start, frozen = (weights(path, "wav2vec2") for path in (Path(speech_fields["model"]), tmp_path / "head" / "ctc"))
    assert all(np.allclose(start[name], frozen[name], atol=1e-6) for name in start)
    assert not np.array_equal(
        weights(tmp_path / "head" / "ctc", "lm_head")["lm_head.weight"], recogniser["lm_head.weight"]
    )


def test_property_no_share_leaves_the_start_as_it_was_and_shares_are_steps(
    speech_fields: Fields, tmp_path: Path
) -> None:
    result = ran(speech_fields, tmp_path / "ctc", shares=[0.0, 0.5])
    assert same(weights(Path(speech_fields["model"])), weights(tmp_path / "ctc" / "model"))
    assert result.metrics["domain/gain"] == result.metrics["general/forgetting"] == 0.0
    # 6 steps * 0.5 = 3, of which 0.34 and 0.66, rounded down: 1 and 1.
    assert result.cost["steps"] == 2
    alone = ran(speech_fields, tmp_path / "pretraining", labelled=None)
    assert alone.cost["steps"] == 6
    assert not (tmp_path / "pretraining" / "ctc").exists()
    assert not any(name.startswith("downstream") for name in alone.metrics)
    assert alone.cost["flops"]


def test_oracle_compare_start_is_a_run_without_pretraining(speech_fields: Fields, tmp_path: Path) -> None:
    both = ran(speech_fields, tmp_path / "both", compare_start=True)
    start = ran(speech_fields, tmp_path / "start", shares=[0.0, 0.5])
    for name in ("cer", "wer"):
        assert both.metrics[f"downstream/ctc/{name}_start"] == start.metrics[f"downstream/ctc/{name}"]
    plain = ran(speech_fields, tmp_path / "plain")
    assert both.cost["steps"] == plain.cost["steps"], "the comparison is outside the budget"


def test_equation_metrics_are_means_of_what_is_written_by_item(speech_fields: Fields, tmp_path: Path) -> None:
    metrics = ran(speech_fields, tmp_path / "run").metrics
    items = json.loads((tmp_path / "run" / "items.json").read_text())
    for name in ("domain/gain", "general/forgetting", "downstream/ctc/cer"):
        assert np.mean(items[name]["values"]) == pytest.approx(metrics[name])
    assert metrics["domain/gain"] == pytest.approx(metrics["domain/nats_start"] - metrics["domain/nats"])
    assert metrics["general/forgetting"] == pytest.approx(metrics["general/nats"] - metrics["general/nats_start"])
    errors = json.loads((tmp_path / "run" / "errors.json").read_text())
    edits, size = sum(row["edits"] for row in errors), sum(row["characters"] for row in errors)
    assert metrics["downstream/ctc/cer"] == pytest.approx(edits / size)
    assert all(row["characters"] == len(row["reference"]) for row in errors)


def test_property_related_languages_join_the_training_set_and_the_vocabulary(
    speech_fields: Fields, tmp_path: Path
) -> None:
    known = language("known", seed=1)
    write_corpus(tmp_path / "related", [utterance(known, 300 + i, words=1) for i in range(12)])
    alone = context(speech_fields, tmp_path / "a")
    joined = context(speech_fields, tmp_path / "b", related=[str(tmp_path / "related")])
    assert len(joined.labelled.train) == len(alone.labelled.train) + 12
    assert {clip.id for clip in joined.labelled.test} == {clip.id for clip in alone.labelled.test}
    mine, both = (set(ctx.processor.tokenizer.get_vocab()) for ctx in (alone, joined))
    assert mine < both


def test_property_nothing_that_is_tested_on_is_trained_on(speech_fields: Fields, tmp_path: Path) -> None:
    # The labelled recordings stand in the raw audio as well, under other names.
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for source in ("audio", "labelled"):
        for path in Path(speech_fields[source]).glob("*.wav"):
            shutil.copy(path, mixed / f"{source}-{path.name}")
    ctx = context(speech_fields, tmp_path / "run", audio=str(mixed))
    tested = {clip.digest for sets in (ctx.audio, ctx.labelled) for clip in (*sets.test, *sets.valid)}
    trained = {clip.digest for sets in (ctx.audio, ctx.labelled) for clip in sets.train}
    assert not tested & trained
    assert ctx.facts["data/dropped_overlap"] > 0


def test_property_pieces_of_a_recording_stay_on_one_side_and_whole_ones_go_to_ctc(
    speech_fields: Fields, tmp_path: Path
) -> None:
    ctx = context(speech_fields, tmp_path / "run", max_seconds=0.55, mask_length=2)
    sides = [{clip.recording for clip in side} for side in (ctx.audio.train, ctx.audio.valid, ctx.audio.test)]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert max(clip.samples for clip in ctx.audio.train) <= 8800
    assert any("@" in clip.id for clip in ctx.audio.train)
    assert ctx.facts["data/labelled_too_long"] > 0
    assert not any("@" in clip.id for clip in ctx.labelled.train)


def test_property_short_clips_are_dropped_and_counted(speech_fields: Fields, tmp_path: Path) -> None:
    ctx = context(speech_fields, tmp_path / "run", mask_length=9)
    lengths = [clip.samples for side in (ctx.audio.train, ctx.audio.valid, ctx.audio.test) for clip in side]
    assert ctx.facts["data/audio_too_short"] == 40 - len(lengths) > 0
    assert ctx.frames.count(min(lengths)) >= 9
    assert "shorter than a masked span" in ctx.run.notes["warning/audio/too_short"]


def test_learns_to_spell(speech_fields: Fields, tmp_path: Path) -> None:
    ran(speech_fields, tmp_path / "run", shares=[0.0, 1.0], budget={"steps": 80}, fit={"precision": "fp32"})
    cer = json.loads((tmp_path / "run" / "trajectory.json").read_text())["series"]["valid/ctc_cer"]
    assert cer[-1][1] < cer[0][1] - 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shares": [0.8, 0.3]}, "sum to more than 0, at most 1"),
        ({"shares": [-0.1, 0.3]}, "shares must be >= 0"),
        ({"shares": [1.0, 0.0]}, "leaves nothing for CTC"),
        ({"labelled": None, "compare_start": True}, "need `labelled`"),
        ({"budget": {"flops": 1e9}}, "CTC's recursion has no count of FLOPs"),
        ({"mask_length": 1}, "mask_length"),
        ({"gumbel": {"start": 0.0}}, "gumbel.start"),
    ],
)
def test_rejects_when_built(speech_fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(speech_fields, **changes)


def test_rejects_models_that_cannot_be_continued(speech_fields: Fields, tiny_causal: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is of type 'llama'; this continues wav2vec2"):
        ran(speech_fields, tmp_path / "a", model=str(tiny_causal))
    stripped = tmp_path / "fine-tuned"
    shutil.copytree(speech_fields["model"], stripped)
    save_file(weights(stripped, "wav2vec2"), stripped / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks \d+ weights .* 'project_hid.bias': it was probably saved after fine"):
        ran(speech_fields, tmp_path / "b", model=str(stripped))


def test_rejects_data_that_measure_nothing(speech_fields: Fields, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="stands in the general set too"):
        ran(speech_fields, tmp_path / "a", general=speech_fields["audio"])
    with pytest.raises(CorpusError, match=r"audio: the held-out test set has \d clips; at least 8"):
        ran(speech_fields, tmp_path / "b", audio={"name": speech_fields["audio"], "limit": 10})
    with pytest.raises(CorpusError, match="labelled: no transcripts in"):
        ran(speech_fields, tmp_path / "c", labelled={"name": speech_fields["labelled"], "label_field": "words"})
    with pytest.raises(CorpusError, match="audio: all of 40 clips are shorter"):
        ran(speech_fields, tmp_path / "d", mask_length=400)


def test_rejects_an_impossible_transcript_before_anything_is_trained(speech_fields: Fields, tmp_path: Path) -> None:
    folder = tmp_path / "labelled"
    shutil.copytree(speech_fields["labelled"], folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] *= 40
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(CorpusError, match=r"the transcript of new-\d+ needs \d+ frames and its audio has"):
        ran(speech_fields, tmp_path / "run", labelled=str(folder))
    assert not (tmp_path / "run" / "checkpoints").exists()
