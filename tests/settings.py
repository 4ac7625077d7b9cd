"""Fields with which each recipe of the catalogue runs in seconds: the one table behind the contract suite.

A new method adds nothing here if its family's default will do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "FAMILIES",
    "Setting",
    "opens_as_an_adapter_on_a_classifier",
    "opens_as_json",
    "opens_as_language_model",
    "opens_as_safetensors",
    "opens_as_speech",
    "opens_as_the_class_its_readme_names",
    "opens_beside_a_classifier",
    "opens_beside_its_image_processor",
    "runs_the_code_of_its_readme",
    "setting",
]


def opens_as_language_model(model: Path) -> None:
    """The directory opens in transformers and gives finite logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True)
    tokens = AutoTokenizer.from_pretrained(model)("graph path", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        assert torch.isfinite(opened(input_ids=tokens["input_ids"]).logits).all()


def opens_beside_a_classifier(model: Path) -> None:
    """The language model opens, and the classifier in the folder beside it as the class its README names."""
    opens_as_language_model(model)
    opens_as_the_class_its_readme_names(model.with_name("classifier"))


def opens_as_safetensors(model: Path) -> None:
    """Its weights open in safetensors and are finite."""
    import numpy as np
    from safetensors.numpy import load_file

    files = list(model.glob("*.safetensors"))
    assert files
    for path in files:
        assert all(np.isfinite(tensor).all() for tensor in load_file(path).values())


def opens_beside_its_image_processor(model: Path) -> None:
    """Its weights open in safetensors, and the image processor beside them in transformers."""
    import numpy as np
    from transformers import AutoImageProcessor

    opens_as_safetensors(model)
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels = AutoImageProcessor.from_pretrained(model)(image, return_tensors="np")["pixel_values"]
    assert pixels.ndim == 4
    assert np.isfinite(pixels).all()


def opens_as_the_class_its_readme_names(model: Path) -> None:
    """The directory opens in transformers, as its README says, and gives finite logits."""
    import re

    import torch
    import transformers

    named = re.search(r"import (AutoModel\w*)", (model / "README.md").read_text(encoding="utf-8"))
    assert named
    opened = getattr(transformers, named[1]).from_pretrained(model, use_safetensors=True)
    ids = transformers.AutoTokenizer.from_pretrained(model)("sum mean", return_tensors="pt", add_special_tokens=False)
    inputs = {"input_ids": ids["input_ids"]}
    if opened.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids["input_ids"][:, :1]
    with torch.no_grad():
        assert torch.isfinite(opened(**inputs).logits).all()


def opens_as_an_adapter_on_a_classifier(model: Path) -> None:
    """The code of its README opens one LoRA adapter on a classifier, with a head that is not the base's."""
    import re

    import torch

    code = re.search(r"```python\n(.*?)```", (model / "README.md").read_text(encoding="utf-8"), re.S)
    assert code
    names: dict[str, Any] = {"DIR": str(model)}
    exec(code[1], names)
    opened, tokenizer = names["model"], names["tokenizer"]
    assert list(opened.peft_config) == ["default"]
    inputs = tokenizer(["sum mean", "graph"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = opened(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        with opened.disable_adapter():
            before = opened(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits, before)


def runs_the_code_of_its_readme(model: Path) -> None:
    """The code under "Without" runs as it stands, in that directory, with transformers alone."""
    import contextlib
    import re

    import torch

    code = re.search(r"## Without\n\n```python\n(.*?)```", (model / "README.md").read_text(encoding="utf-8"), re.S)
    assert code
    assert "headwater" not in code[1].split("models = {")[0]
    names: dict[str, Any] = {}
    with contextlib.chdir(model):
        exec(code[1], names)
    assert names["ids"].shape[1] > 40
    assert torch.isfinite(names["log_p"]).all()


def opens_as_speech(model: Path) -> None:
    """The adapted model opens in transformers and gives a finite loss; the recogniser beside it gives text."""
    import numpy as np
    import torch
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining, Wav2Vec2Processor

    samples = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    inputs = Wav2Vec2FeatureExtractor.from_pretrained(model)(samples, sampling_rate=16_000, return_tensors="pt")
    adapted = Wav2Vec2ForPreTraining.from_pretrained(model, use_safetensors=True)
    mask = torch.ones(1, 23, dtype=torch.bool)
    others = torch.arange(23).roll(1)[None, :, None].repeat(1, 1, 3)
    with torch.no_grad():
        assert torch.isfinite(adapted(**inputs, mask_time_indices=mask, sampled_negative_indices=others).loss)
    processor = Wav2Vec2Processor.from_pretrained(model.parent / "ctc")
    recogniser = Wav2Vec2ForCTC.from_pretrained(model.parent / "ctc", use_safetensors=True)
    with torch.no_grad():
        logits = recogniser(**processor(samples, sampling_rate=16_000, return_tensors="pt")).logits
    assert logits.shape == (1, 23, len(processor.tokenizer))
    assert isinstance(processor.batch_decode(logits.argmax(-1))[0], str)


def opens_as_json(model: Path) -> None:
    """Every file but the README is JSON."""
    import json

    files = list(model.glob("*.json"))
    assert files
    for path in files:
        json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Setting:
    """How the contract suite runs one family or method.

    Attributes:
        fixture: name of the pytest fixture that gives the fields.
        opens: opens ``model/`` without Headwater and checks something about it.
        extra: fields of single methods, by id.
        seeded: whether another seed must give another result; closed forms on fixed data need not.
    """

    fixture: str
    opens: Callable[[Path], None]
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)
    unseeded: frozenset[str] = frozenset()


FAMILIES: dict[str, Setting] = {
    "corpora": Setting(
        fixture="corpora_fields",
        opens=opens_as_language_model,
        extra={
            "meco": {"metadata_field": "source", "conditional_evals": ["s1"]},
            "curated": {"curation": {"steps": [{"kind": "sample", "rate": 0.8}]}},
            "arithmetic": {"digits": 2, "n_train": 400, "test_size": 40, "valid_size": 20},
            "stratified": {"skill_field": "source"},
            "skill_it": {"skill_field": "source", "rounds": 2, "graph": {"steps": 2}},
            "pints": {"positives": "headwater:topics", "keep": {"share": 0.8}, "review": "skip"},
            "pretrainers_guide": {"axes": [{"kind": "domain", "field": "source", "values": ["s0"]}]},
        },
    ),
    "domain": Setting(
        fixture="domain_fields",
        opens=opens_as_language_model,
        extra={"stability_gap": {"keep_fraction": 0.5}, "long_context": {"target_length": 128}},
        unseeded=frozenset({"frozen"}),
    ),
    "efficient": Setting(
        fixture="efficient_fields",
        opens=opens_as_language_model,
        extra={"low_rank": {"optim": {"lr": 3e-3, "states": "8bit"}}},  # so that resume is held to those states too
    ),
    "pretrain": Setting(fixture="pretrain_fields", opens=opens_as_the_class_its_readme_names),
    "diagnose": Setting(fixture="diagnose_fields", opens=opens_as_json),
    "compose": Setting(
        fixture="compose_fields",
        opens=opens_as_language_model,
        unseeded=frozenset({"single_part", "average", "instruction_vector"}),
    ),
    "adapt": Setting(fixture="adapt_fields", opens=opens_as_safetensors),
    "continual": Setting(
        fixture="continual_fields",
        opens=opens_as_safetensors,
        extra={
            "adam_cil": {
                "peft": {"kind": "lora"},
                "first_task": {"epochs": 2, "batch_size": 8, "optim": {"lr": 0.1}},
                "fit": {"precision": "fp32", "checkpoint_every": 2, "log_every": 1},
            },
            **{
                method: {
                    "epochs": 2,
                    "train_batch_size": 8,
                    "optim": {"lr": 0.1},
                    "fit": {"precision": "fp32", "checkpoint_every": 2, "log_every": 1},
                }
                for method in ("slca", "sequential_finetuning")
            },
            "lae": {
                "pet": {"kind": "lora", "r": 2},
                "epochs": 2,
                "train_batch_size": 8,
                "decay": "task:1",
                "fit": {"precision": "fp32", "checkpoint_every": 2, "log_every": 1},
            },
        },
    ),
    "align": Setting(fixture="align_fields", opens=opens_as_the_class_its_readme_names),
}


METHODS: dict[str, Setting] = {
    "imported": Setting(fixture="imported_fields", opens=opens_as_json, unseeded=("imported",)),
    "finetuning": Setting(fixture="tuned_fields", opens=opens_as_the_class_its_readme_names),
    "pego": Setting(
        fixture="tuned_fields",
        opens=opens_as_an_adapter_on_a_classifier,
        extra={"pego": {"r": 2, "n": 2, "domain_field": "label"}},
    ),
    "text_finetuning": Setting(fixture="text_to_text_fields", opens=opens_as_language_model),
    "promot": Setting(
        fixture="text_to_text_fields",
        opens=opens_as_language_model,
        extra={"promot": {"prompt_tokens": 4, "prompt_steps": 0.5}},
    ),
    "demonstration_retrieval": Setting(
        fixture="text_to_text_fields",
        opens=opens_as_language_model,
        extra={"demonstration_retrieval": {"k": 2, "mode": "token", "temperature": 0.1}},
    ),
    "claps": Setting(
        fixture="seq2seq_fields",
        opens=opens_as_the_class_its_readme_names,
        extra={"claps": {"num_beams": 2, "warm_start": 0.5}},
    ),
    "meta_tuning": Setting(fixture="meta_fields", opens=opens_as_language_model),
    "prox": Setting(fixture="prox_fields", opens=opens_as_language_model),
    "arte": Setting(fixture="arte_fields", opens=opens_as_language_model),
    "entigraph": Setting(fixture="entigraph_fields", opens=opens_as_language_model),
    "skill_mix": Setting(fixture="skill_mix_fields", opens=opens_as_language_model),
    "levi": Setting(fixture="levi_fields", opens=opens_as_safetensors),
    "sobert": Setting(fixture="sobert_fields", opens=opens_as_the_class_its_readme_names),
    "instruction_balance": Setting(fixture="instruction_balance_fields", opens=opens_as_language_model),
    "domain_stream": Setting(fixture="stream_fields", opens=opens_as_language_model),
    "fine_tuned": Setting(fixture="labelled_domain_fields", opens=opens_beside_a_classifier),
    "self_training": Setting(
        fixture="labelled_domain_fields",
        opens=opens_beside_a_classifier,
        extra={"self_training": {"shares": [0.25, 0.5, 0.25]}},
    ),
    "prompt_continued": Setting(
        fixture="labelled_domain_fields",
        opens=opens_beside_a_classifier,
        extra={
            "prompt_continued": {
                "shares": [0.25, 0.5, 0.25],
                "template": "{text} :{mask}",
                "verbaliser": {"graph": "a", "node": "b", "edge": "c", "path": "d", "tree": "e", "flow": "f"},
            }
        },
    ),
    "emulated_finetuning": Setting(
        fixture="emulated_fields",
        opens=runs_the_code_of_its_readme,
        unseeded=frozenset({"emulated_finetuning"}),
    ),
    "skill_localization": Setting(fixture="localization_fields", opens=opens_as_language_model),
    "speech_continued": Setting(fixture="speech_fields", opens=opens_as_speech),
    "natural_instructions": Setting(fixture="instructed_fields", opens=opens_as_language_model),
    "specialist_generalist": Setting(fixture="specialist_fields", opens=opens_as_language_model),
    "gram": Setting(fixture="pairs_fields", opens=opens_as_safetensors),
    "phatgoose": Setting(fixture="routed_fields", opens=runs_the_code_of_its_readme),
    "preprocessing": Setting(fixture="image_fields", opens=opens_beside_its_image_processor),
}
"""Methods whose fields or results have another form than their family's."""


def setting(stage: str, method: str) -> Setting:
    """The setting of a method; a stage without one is a family whose methods no contract holds."""
    return METHODS.get(method) or FAMILIES[stage]
