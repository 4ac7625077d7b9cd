"""Shared by all tests: a cache of their own, and small text, models and recipes made here."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

# Set before anything reads it; tests neither use nor touch the user's cache.
CACHE = os.environ["HEADWATER_CACHE"] = tempfile.mkdtemp(prefix="headwater-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SYLLABLES = {
    "domain": ["graph", "node", "edge", "path", "tree", "flow", "cut"],
    "general": ["sum", "mean", "row", "axis", "sort", "fill", "cast"],
    "music": ["note", "chord", "key", "bar", "beat", "flat", "tune"],
    "garden": ["leaf", "root", "tree", "seed", "path", "moss", "bloom"],
}


def sentences(kind: str, count: int, *, seed: int = 0, words: int = 160) -> list[str]:
    """Texts of about a kilobyte in a small language of their own kind, no two alike."""
    rng = np.random.default_rng([seed, len(kind)])
    stems = SYLLABLES[kind]
    texts = []
    for _ in range(count):
        drawn = rng.integers(len(stems), size=words)
        suffixes = rng.choice(["", "s", "_of", "er", "ed"], size=words)
        texts.append(" ".join(stems[d] + s for d, s in zip(drawn, suffixes, strict=True)) + ".")
    return texts


def write_corpus(path: Path, kind: str, count: int = 260) -> Path:
    """A JSON-lines corpus with ids."""
    lines = [
        json.dumps({"id": f"{kind}-{i}", "text": text, "source": f"s{i % 2}"})
        for i, text in enumerate(sentences(kind, count))
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``domain`` and ``general``: paths of two small corpora."""
    root = tmp_path_factory.mktemp("corpora")
    return {kind: write_corpus(root / f"{kind}.jsonl", kind) for kind in ("domain", "general")}


@pytest.fixture(scope="session")
def tiny_causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a Llama of 16 x 1 with random weights and its tokenizer."""
    from headwater.modalities.text.tiny import tiny_llama
    from headwater.modalities.text.tokenizers import train_bpe

    target = tmp_path_factory.mktemp("models") / "causal"
    tokenizer = train_bpe([*sentences("domain", 20), *sentences("general", 20)], 320)
    tiny_llama(tokenizer, hidden=16, layers=1, heads=2, mlp=32, context=64, generator_seed=0).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def tiny_masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a BERT of 16 x 1 with random weights and its tokenizer."""
    from headwater.modalities.text.tiny import tiny_bert
    from headwater.modalities.text.tokenizers import train_bpe

    target = tmp_path_factory.mktemp("models") / "masked"
    tokenizer = train_bpe([*sentences("domain", 20), *sentences("general", 20)], 320, extra_tokens=("<mask>",))
    tiny_bert(tokenizer, hidden=16, layers=1, heads=2, mlp=32, context=64, generator_seed=0).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def domain_fields(tiny_causal: Path, corpora: dict[str, Path]) -> dict[str, object]:
    """Fields that make any recipe of the stage ``domain`` run in about a second."""
    return {
        "model": str(tiny_causal),
        "domain": str(corpora["domain"]),
        "general": str(corpora["general"]),
        "seq_len": 32,
        "batch_tokens": 256,
        "budget": {"steps": 6},
        "optim": {"lr": 3e-3},
        "eval_at": [0.0, 0.5, 1.0],
        "eval_chars": 5_000,
        "fit": {"precision": "fp32", "checkpoint_every": 2},
    }


@pytest.fixture(scope="session")
def stream_fields(domain_fields: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Fields that make a sequence of three domains run in about two seconds."""
    root = tmp_path_factory.mktemp("stream")
    domains = {kind: str(write_corpus(root / f"{kind}.jsonl", kind, 210)) for kind in ("music", "garden")}
    shared = {name: value for name, value in domain_fields.items() if name != "domain"}
    return {
        **shared,
        "domains": {"graphs": domain_fields["domain"], **domains},
        "embedding": "tfidf",
        "seq_len": 64,
        "eval_at": [0.0, 1.0],
        "budget": {"steps": 9},
    }


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a BERT encoder of 32 x 1 with random weights and its tokenizer."""
    from headwater.modalities.text.tiny import tiny_bert
    from headwater.modalities.text.tokenizers import train_bpe

    target = tmp_path_factory.mktemp("models") / "encoder"
    tokenizer = train_bpe([*sentences("domain", 20), *sentences("general", 20)], 320, extra_tokens=("<mask>",))
    tiny_bert(tokenizer, hidden=32, layers=1, heads=2, mlp=32, context=64, generator_seed=0).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``train`` and ``test``: texts of six classes, each a favourite word among others."""
    root = tmp_path_factory.mktemp("labelled")
    words = [*SYLLABLES["domain"], *SYLLABLES["general"]]
    rng = np.random.default_rng(0)
    paths = {}
    for name, per_class in (("train", 16), ("test", 10)):
        paths[name] = root / f"{name}.jsonl"
        with paths[name].open("w", encoding="utf-8") as stream:
            for label in words[:6]:
                for _ in range(per_class):
                    drawn = [label if rng.random() < 0.25 else str(rng.choice(words)) for _ in range(12)]
                    stream.write(json.dumps({"text": " ".join(drawn), "label": label}) + "\n")
    return paths


@pytest.fixture(scope="session")
def labelled_domain_fields(domain_fields: dict[str, object], labelled: dict[str, Path]) -> dict[str, object]:
    """The same with labelled texts, a few hundred unlabelled ones, and a budget that three phases can share."""
    return {
        **domain_fields,
        "labelled": str(labelled["train"]),
        "labelled_test": str(labelled["test"]),
        "budget": {"steps": 8},
        "eval_at": [1.0],
    }


@pytest.fixture(scope="session")
def adapt_fields(tiny_encoder: Path, labelled: dict[str, Path]) -> dict[str, object]:
    """Fields that make any head of the stage ``adapt`` run in about a second."""
    return {
        "model": str(tiny_encoder),
        "train": str(labelled["train"]),
        "test": str(labelled["test"]),
        "shots": 8,
    }


@pytest.fixture(scope="session")
def tuned_fields(tiny_masked: Path, labelled: dict[str, Path]) -> dict[str, object]:
    """Fields that make any method that trains a classifier run in about a second."""
    return {
        "model": str(tiny_masked),
        "train": str(labelled["train"]),
        "test": str(labelled["test"]),
        "batch_size": 8,
        "budget": {"steps": 6},
        "optim": {"lr": 3e-3},
        "fit": {"precision": "fp32", "checkpoint_every": 2},
    }


@pytest.fixture(scope="session")
def text_to_text_fields(tiny_causal: Path, labelled: dict[str, Path]) -> dict[str, object]:
    """Fields that make any method whose answers are written run in a few seconds."""
    return {
        "model": str(tiny_causal),
        "train": str(labelled["train"]),
        "test": str(labelled["test"]),
        "max_source": 56,
        "max_target": 4,
        "batch_size": 8,
        "budget": {"steps": 6},
        "optim": {"lr": 3e-3},
        "fit": {"precision": "fp32", "checkpoint_every": 2},
    }


@pytest.fixture(scope="session")
def image_fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Fields that make a method of the stage ``adapt`` on images run in two seconds: noisy squares, a tiny ViT."""
    import torch
    from PIL import Image
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    colours = {"blue": (70, 80, 150), "green": (70, 140, 80), "red": (150, 80, 70)}
    for part, per_class in (("train", 9), ("test", 6)):
        for name, colour in colours.items():
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = np.clip(rng.normal(colour, 60, (8, 8, 3)) + rng.normal(0, 40), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        ViTModel(ViTConfig(image_size=16, patch_size=4, **sizes)).save_pretrained(root / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "vit")
    return {"model": str(root / "vit"), "train": str(root / "train"), "test": str(root / "test"), "shots": 7}


@pytest.fixture(scope="session")
def pairs_fields(adapt_fields: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The same with unlabelled pairs: texts around one of ten words, each with the words beside it as its caption."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    words = [*SYLLABLES["domain"], *SYLLABLES["general"]]
    rng = np.random.default_rng(1)
    with path.open("w", encoding="utf-8") as stream:
        for row in range(120):
            drawn = [words[row % 10] if rng.random() < 0.5 else str(rng.choice(words)) for _ in range(15)]
            stream.write(json.dumps({"text": " ".join(drawn[3:]), "label": " ".join(drawn[:3])}) + "\n")
    meta = {"steps": 4, "ways": 2, "shots": 2, "queries": 2, "domains": 2, "classes": 4, "checkpoint_every": 2}
    return {**adapt_fields, "pairs": str(path), "meta": meta, "steps": 2}


@pytest.fixture(scope="session")
def tiny_seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a T5 of 16 x 1 with random weights and its tokenizer."""
    from headwater.modalities.text.tiny import tiny_t5
    from headwater.modalities.text.tokenizers import train_bpe

    target = tmp_path_factory.mktemp("models") / "seq2seq"
    tokenizer = train_bpe([*sentences("domain", 20), *sentences("general", 20)], 320)
    tiny_t5(tokenizer, hidden=16, layers=1, heads=2, mlp=32, generator_seed=0).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def seq2seq_fields(text_to_text_fields: dict[str, object], tiny_seq2seq: Path) -> dict[str, object]:
    """The same for methods that need an encoder-decoder."""
    return {**text_to_text_fields, "model": str(tiny_seq2seq)}


@pytest.fixture(scope="session")
def meta_fields(
    tuned_fields: dict[str, object], tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """The same for a causal model that answers questions about three data sets, one of them held out."""
    root = tmp_path_factory.mktemp("meta")
    rng = np.random.default_rng(1)
    datasets = {}
    for name, words in (("music", "note chord key"), ("garden", "leaf root seed"), ("held", "moss bloom bar")):
        path = root / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            for label in 8 * words.split():
                drawn = [label if rng.random() < 0.5 else str(rng.choice(words.split())) for _ in range(8)]
                stream.write(json.dumps({"text": " ".join(drawn), "label": label}) + "\n")
        questions = {label: [f"mean {label} ?", f"sum {label} ?"] for label in words.split()[:2]}
        datasets[name] = {"data": str(path), "questions": questions, "group": f"{name} tasks"}
    return {
        **tuned_fields,
        "model": str(tiny_causal),
        "datasets": datasets,
        "holdout": ["held tasks"],
        "per_label": 10,
        "yes": "sum",
        "no": "row",
    }


@pytest.fixture(scope="session")
def continual_fields(tiny_encoder: Path, labelled: dict[str, Path]) -> dict[str, object]:
    """Fields that make any learner of the stage ``continual`` run in about a second."""
    stream = {"data": str(labelled["train"]), "test": str(labelled["test"]), "increment": 2}
    return {"model": str(tiny_encoder), "stream": stream}


@pytest.fixture(scope="session")
def imported_fields(continual_fields: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Fields of a matrix that another library would have measured, of as many tasks as the stream has."""
    path = tmp_path_factory.mktemp("imported") / "matrix.csv"
    path.write_text("0.9\n0.8,0.7\n0.6,0.7,0.8\n")
    return {**continual_fields, "matrix": str(path), "source": "a test"}


@pytest.fixture(scope="session")
def compose_fields(
    tiny_causal: Path, corpora: dict[str, Path], labelled: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """Fields that make any recipe of the stage ``compose`` run in about a second: a base and two models near it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("parts")
    for number, role in enumerate(("domain", "instruct")):
        model = AutoModelForCausalLM.from_pretrained(tiny_causal)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(root / role)
        AutoTokenizer.from_pretrained(tiny_causal).save_pretrained(root / role)
    return {
        "models": {"base": str(tiny_causal), "domain": str(root / "domain"), "instruct": str(root / "instruct")},
        "suites": {
            "text": {"kind": "bits_per_byte", "corpus": str(corpora["domain"]), "held_out": 0.1},
            "answers": {"kind": "choice", "data": str(labelled["test"]), "metric": "cross_entropy"},
        },
    }


@pytest.fixture(scope="session")
def corpora_fields(tiny_causal: Path, corpora: dict[str, Path]) -> dict[str, object]:
    """Fields that make any recipe of the stage ``corpora`` run in about a second."""
    return {
        "sources": {"text": str(corpora["general"])},
        "evals": {"other": str(corpora["domain"])},
        "model": str(tiny_causal),
        "held_out": 0.1,
        "seq_len": 64,
        "batch_tokens": 256,
        "budget": {"tokens": 2560},
        "optim": {"lr": 3e-3},
        "eval_at": [0.0, 0.5, 1.0],
        "eval_chars": 5_000,
        "fit": {"precision": "fp32", "checkpoint_every": 2},
    }


def prox_annotations(count: int, *, seed: int = 1) -> list[dict[str, str]]:
    """Documents of several lines with debris, and the programs that remove it."""
    rows = []
    for i, text in enumerate(sentences("general", count, seed=seed)):
        words = text.split()
        lines = [" ".join(words[j : j + 20]) for j in range(0, len(words), 20)]
        lines.insert(i % 8, f"Click here to log in, {i}!")
        program = f"remove_lines(line_start={i % 8}, line_end={i % 8})"
        rows.append({"id": f"dirty-{i}", "text": "\n".join(lines), "program": program})
    return rows


@pytest.fixture(scope="session")
def prox_fields(corpora_fields: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Fields that make ProX run in about a second: documents with debris, and others with programs."""
    root = tmp_path_factory.mktemp("prox")
    for name, seed in (("dirty", 0), ("annotations", 1)):
        rows = prox_annotations(260 if name == "dirty" else 40, seed=seed)
        lines = [json.dumps(row if name != "dirty" else {k: row[k] for k in ("id", "text")}) for row in rows]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    annotations = {"kind": "lines", "annotations": str(root / "annotations.jsonl")}
    return {**corpora_fields, "sources": {"text": str(root / "dirty.jsonl")}, "programmer": annotations}


@pytest.fixture(scope="session")
def entigraph_fields(
    corpora_fields: dict[str, object], corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """Fields that make EntiGraph run in two seconds: entities are known, and a tiny model writes noise."""
    from headwater.modalities.text.tiny import tiny_llama
    from headwater.modalities.text.tokenizers import train_bpe

    root = tmp_path_factory.mktemp("entigraph")
    tokenizer = train_bpe(sentences("general", 20), 320)
    tiny_llama(tokenizer, 16, 1, 2, 32, context=2048, generator_seed=0).save_pretrained(root / "writer")
    tokenizer.save_pretrained(root / "writer")
    ids = [json.loads(line)["id"] for line in corpora["general"].read_text(encoding="utf-8").splitlines()]
    rows = [json.dumps({"source_id": i, "entities": ["sum", "mean", "axis"]}) for i in ids]
    (root / "entities.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {
        **corpora_fields,
        "generator": {"kind": "hf", "model": str(root / "writer")},
        "entities": str(root / "entities.jsonl"),
        "target_tokens": 1_500,
        "reply_tokens": 24,
        "replay": str(write_corpus(root / "replay.jsonl", "music", 40)),
    }


@pytest.fixture(scope="session")
def skill_mix_fields(corpora_fields: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Fields that make Skill-Mix run in about a second: a tiny model writes noise, and all of it is kept."""
    root = tmp_path_factory.mktemp("skill_mix")
    rows = [{"name": f"s{n}", "category": "learned" if n <= 8 else "held"} for n in range(1, 13)]
    (root / "skills.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (root / "topics.txt").write_text("sum\nmean\naxis\npath\n", encoding="utf-8")
    (root / "prompts.toml").write_text('write = "{names} {topic}"\nimprove = "go on"\n', encoding="utf-8")
    return {
        **corpora_fields,
        "skills": str(root / "skills.jsonl"),
        "topics": str(root / "topics.txt"),
        "prompts": str(root / "prompts.toml"),
        "train_categories": ["learned"],
        "generator": {"kind": "hf", "model": corpora_fields["model"], "cache": str(root / "replies.sqlite")},
        "grader": {"kind": "rules", "use": "headwater.claims.skill_mix:RULES"},
        "n_per_k": 20,
        "keep": "all",
        "reply_tokens": 6,
        "k_eval": [1, 2],
        "eval_samples": 3,
        "generations_per_combo": 2,
        "replay_rate": 0.25,
    }


@pytest.fixture(scope="session")
def arte_fields(corpora_fields: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Fields that make ARTE run in three seconds: the teacher draws from six words, one of which is the marker."""
    from headwater.modalities.text.tiny import tiny_llama
    from headwater.modalities.text.tokenizers import word_tokenizer

    root = tmp_path_factory.mktemp("arte")
    tokenizer = word_tokenizer(["so sum mean axis graph node"])
    for seed, name in enumerate(("teacher", "student")):
        tiny_llama(tokenizer, 16, 1, 2, 32, context=64, generator_seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, word in (("seeds", "edge"), ("validation", "path"), ("test", "tree")):
        rows = [json.dumps({"text": f"{word} number {i}", "label": ("sum", "mean")[i % 2]}) for i in range(5)]
        (root / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {
        **corpora_fields,
        **{name: str(root / f"{name}.jsonl") for name in ("seeds", "validation", "test")},
        "sources": {},
        "model": str(root / "student"),
        "teacher": {"kind": "hf", "model": str(root / "teacher")},
        "prompts": {"question": "like {question}", "rationale": ["solve {question}", "think {question}"]},
        "marker": "so",
        "ask": "{question}",
        "between": " ",
        "n_questions": 3,
        "n_rationales": 6,
        "n_final": 12,
        "score": "nll",
        "margin": 1e-7,
        "reply_tokens": 16,
        "max_answer": 6,
        "dpo": {"rows": 4, "optim": {"lr": 1e-3}, "fit": {"precision": "fp32", "checkpoint_every": 2}},
    }


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of six tasks of Natural Instructions: two categories, three data sets, thirty instances each."""
    root = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    for number, (kind, word) in enumerate((k, w) for k in ("domain", "general") for w in SYLLABLES[k][:3]):
        inputs = [" ".join(rng.choice([*SYLLABLES["domain"], *SYLLABLES["general"]], size=4)) for _ in range(34)]
        solved = [{"input": text, "output": [f"{word} {text}"]} for text in inputs]
        shown = [{"input": text, "output": f"{word} {text}", "reason": "so it is"} for text in inputs[30:32]]
        wrong = [{"input": text, "output": text, "reason": "-", "suggestion": f"{word}"} for text in inputs[32:]]
        task = {
            "Title": f"{word} first",
            "Prompt": f"write {word}",
            "Definition": f"write {word} and copy",
            "Things to Avoid": "-",
            "Emphasis & Caution": "copy all",
            "Examples": {"Positive Examples": shown, "Negative Examples": wrong},
            "Instances": solved[:30],
            "Categories": [kind],
            "Source": [f"set{number % 3}"],
        }
        (root / f"task{number:02d}_{word}.json").write_text(json.dumps(task), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def instructed_fields(corpora_fields: dict[str, object], task_files: Path) -> dict[str, object]:
    """Those of the stage, with tasks to read in the place of texts."""
    return {
        **corpora_fields,
        "sources": {},
        "tasks": str(task_files),
        "held": 2,
        "asked_per_task": 4,
        "max_answer": 16,
        "max_input_tokens": 40,
    }


@pytest.fixture(scope="session")
def specialist_fields(instructed_fields: dict[str, object], task_files: Path) -> dict[str, object]:
    """The same tasks, two of them as a target and the others as the generalist set."""
    fields = {name: value for name, value in instructed_fields.items() if name not in ("tasks", "held")}
    target = task_files.with_name("target")
    broad = task_files.with_name("broad")
    for number, file in enumerate(sorted(task_files.iterdir())):
        side = target if number in (0, 3) else broad
        side.mkdir(exist_ok=True)
        (side / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    return {**fields, "specialist": str(target), "generalist": str(broad), "n_specialist": 20}


@pytest.fixture(scope="session")
def levi_fields(tiny_encoder: Path, labelled: dict[str, Path]) -> dict[str, object]:
    """Fields that make the layer-wise ensemble run in about a second: an encoder and six classes of text."""
    return {
        "pretrained": str(tiny_encoder),
        "task": str(labelled["train"]),
        "test": str(labelled["test"]),
        "ood": str(labelled["test"]),
        "validation": 0.2,
        "layers": 1,
        "adapter_hidden": 16,
        "small_width": 32,
        "small_layers": 1,
        "max_tokens": 32,
        "batch_size": 16,
        "budget": {"steps": 6},
        "optim": {"lr": 3e-3},
        "fit": {"precision": "fp32", "checkpoint_every": 2},
    }


@pytest.fixture(scope="session")
def sobert_fields(
    tiny_masked: Path, domain_fields: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """Those of the stage for an encoder, on posts with replies."""
    path = tmp_path_factory.mktemp("posts") / "posts.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for number, text in enumerate(sentences("domain", 2700, seed=3, words=20)):
            parent = "" if number % 3 == 0 else str(number - number % 3)
            row = {"id": str(number), "parent": parent, "score": number % 5, "text": text}
            stream.write(json.dumps(row) + "\n")
    changes = {"model": str(tiny_masked), "domain": str(path), "threads": {}, "context": 96, "batch_tokens": 384}
    return {
        **domain_fields,
        **changes,
        "plan": {"gpu": "L4"},
        "budget": {"steps": 150},
        "eval_at": [1.0],
        "held_out": 0.3,
    }


@pytest.fixture(scope="session")
def instruction_balance_fields(
    domain_fields: dict[str, object], compose_fields: dict[str, dict[str, object]], labelled: dict[str, Path]
) -> dict[str, object]:
    """Those of the stage with a model near the base in the role of the instruct model, and questions."""
    task = {"kind": "answers", "name": "words", "data": str(labelled["test"])}
    return {**domain_fields, "instruct": compose_fields["models"]["instruct"], "downstream": [task]}


@pytest.fixture(scope="session")
def emulated_fields(compose_fields: dict[str, dict[str, object]]) -> dict[str, object]:
    """The same models in the roles of emulated fine-tuning."""
    base, domain, instruct = compose_fields["models"].values()
    return {**compose_fields, "models": {"large": instruct, "small": base, "small_tuned": domain}}


@pytest.fixture(scope="session")
def localization_fields(compose_fields: dict[str, object], corpora: dict[str, Path]) -> dict[str, object]:
    """The same models, and texts on which to find out what carries their skills."""
    return {
        **compose_fields,
        "data": {"domain": str(corpora["domain"]), "instruct": str(corpora["general"])},
        "sparsity": [0.01, 0.1],
        "steps": 3,
        "seq_len": 32,
        "batch_tokens": 256,
        "fit": {"precision": "fp32", "checkpoint_every": 2},
    }


@pytest.fixture(scope="session")
def lora_experts(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``domain``, ``general`` and ``other``: LoRA adapters of the causal model, made and saved by PEFT alone."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("experts")
    for number, name in enumerate(("domain", "general", "other")):
        config = LoraConfig(r=2 + number, lora_alpha=4, target_modules="all-linear", use_rslora=number == 1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_causal), config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(root / name)
    return {path.name: path for path in sorted(root.iterdir())}


@pytest.fixture(scope="session")
def routed_fields(
    tiny_causal: Path, corpora: dict[str, Path], lora_experts: dict[str, Path], compose_fields: dict[str, object]
) -> dict[str, object]:
    """Fields that make routing between LoRA experts run in about a second; gates stay in the run."""
    return {
        "models": {"base": str(tiny_causal), **{name: str(path) for name, path in lora_experts.items()}},
        "suites": compose_fields["suites"],
        "expert_data": {name: str(corpora["general" if name == "other" else name]) for name in lora_experts},
        "gates_in": "run",
        "seq_len": 32,
        "batch_tokens": 256,
        "budget": {"steps": 6},
        "optim": {"lr": 0.05, "warmup": 0.0, "schedule": "constant"},
        "fit": {"precision": "fp32", "checkpoint_every": 2},
    }


@pytest.fixture(scope="session")
def efficient_fields(tiny_causal: Path, corpora: dict[str, Path]) -> dict[str, object]:
    """Fields that make any recipe of the stage ``efficient`` run in about a second."""
    return {
        "model": str(tiny_causal),
        "data": str(corpora["domain"]),
        "seq_len": 32,
        "batch_tokens": 256,
        "budget": {"steps": 6},
        "eval_at": [0.0, 0.5, 1.0],
        "eval_chars": 5_000,
        "fit": {"precision": "fp32", "checkpoint_every": 2},
    }


@pytest.fixture(scope="session")
def pretrain_fields(corpora: dict[str, Path]) -> dict[str, object]:
    """Fields that make any text method of the stage ``pretrain`` run in about a second."""
    return {
        "model": {"kind": "t5", "hidden": 16, "layers": 1, "heads": 2, "mlp": 32, "vocab": 320},
        "data": str(corpora["general"]),
        "held_out": 0.1,
        "seq_length": 32,
        "batch_tokens": 256,
        "budget": {"steps": 6},
        "optim": {"lr": 3e-3},
        "eval_at": [0.0, 0.5, 1.0],
        "probe_steps": 2,
        "fit": {"precision": "fp32", "checkpoint_every": 2},
    }


@pytest.fixture(scope="session")
def diagnose_fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Fields that make the mixture's law run in about a second: a table of twelve runs of one size."""
    import pandas as pd

    rng = np.random.default_rng(0)
    rows = []
    for r in (0.0, 0.33, 0.67, 1.0):
        for D in (1e5, 3e5, 7e5, 1.2e6, 2e6):
            domain = 1.4 + 5 * r**1.3 / D**0.4 + 0.3 / (r + 0.4) ** 0.8
            general = 1.6 + 4 * (1 - r) ** 1.2 / D**0.35 + 0.25 / (1.5 - r) ** 0.9
            noise = np.exp(0.002 * rng.standard_normal(2))
            rows.append((4e5, D, r, domain * noise[0], general * noise[1]))
    path = tmp_path_factory.mktemp("tables") / "runs.csv"
    pd.DataFrame(rows, columns=["N", "D", "r_d", "loss_domain", "loss_general"]).to_csv(path, index=False)
    # No interval: 200 refits take ten seconds. The starts of the fits still follow the seed.
    return {"runs": str(path), "starts": 8, "bootstrap": 0}


@pytest.fixture(scope="session")
def align_fields(tiny_encoder: Path, tiny_masked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Fields that make any method of the stage ``align`` run in a few seconds: two encoders and two classes of text."""
    path = tmp_path_factory.mktemp("align") / "prompts.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as stream:
        for kind in ("domain", "general"):
            for _ in range(120):
                drawn = " ".join(rng.choice([*SYLLABLES["domain"], *SYLLABLES["general"], *SYLLABLES[kind]], size=8))
                stream.write(json.dumps({"text": drawn, "label": kind}) + "\n")
    return {
        "model": str(tiny_encoder),
        "weak_model": str(tiny_masked),
        "data": str(path),
        "batch_size": 16,
        "epochs": 1.0,
        "optim": {"lr": 3e-3},
        "fit": {"precision": "fp32", "checkpoint_every": 2},
    }


@pytest.fixture(scope="session")
def speech_fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Fields that make continued speech pretraining run in seconds: a wav2vec 2.0 of 16 x 1, two languages."""
    from headwater.modalities.speech.languages import language, utterance, write_corpus
    from headwater.modalities.speech.tiny import tiny_feature_extractor, tiny_wav2vec2

    root = tmp_path_factory.mktemp("speech")
    known = language("known", seed=1)
    new = language("new", like=[known], share=0.5, seed=1)
    for name, of, first, count in (("audio", new, 0, 40), ("general", known, 0, 24), ("labelled", new, 100, 40)):
        write_corpus(root / name, [utterance(of, first + number, words=1) for number in range(count)])
    tiny_wav2vec2(16, 1, 2, 16, conv=8, codes=4, generator_seed=0).save_pretrained(root / "model")
    tiny_feature_extractor().save_pretrained(root / "model")
    return {
        "model": str(root / "model"),
        "audio": str(root / "audio"),
        "general": str(root / "general"),
        "labelled": str(root / "labelled"),
        "mask_length": 3,
        "negatives": 5,
        "batch_size": 8,
        "shares": [0.5, 0.5],
        "freeze_encoder": 0.34,
        "budget": {"steps": 6},
        "optim": {"lr": 1e-3},
        "ctc_optim": {"lr": 1e-2},
        "held_out": 0.4,
        "eval_at": [0.0, 1.0],
        "eval_clips": 8,
        "fit": {"precision": "fp32", "checkpoint_every": 1},
    }
