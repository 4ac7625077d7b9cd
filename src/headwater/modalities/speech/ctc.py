"""From transcripts to a character vocabulary, and from frames back to text and its error rates."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from headwater.modalities.speech.audio import Clip
from headwater.modalities.speech.stream import Frames, Masking, collate
from headwater.modalities.text.docs import CorpusError

__all__ = ["ErrorRates", "character_vocab", "ctc_processor", "encode", "error_rates", "transcribe"]

PAD, UNKNOWN, SPACE = "<pad>", "<unk>", "|"


def character_vocab(texts: Iterable[str]) -> dict[str, int]:
    """Ids of the blank (0, also the padding), of unknown characters, of the space ``|``, and of every character.

    Raises:
        ValueError: no character, or a text with the character ``|``, which stands for the space.
    """
    characters = sorted(set("".join(itertools.chain.from_iterable(text.split() for text in texts))))
    if not characters:
        raise ValueError("the transcripts hold no character.")
    if SPACE in characters:
        raise ValueError(f"a transcript holds {SPACE!r}, which stands for the space in the vocabulary; remove it.")
    return {token: id for id, token in enumerate((PAD, UNKNOWN, SPACE, *characters))}


def ctc_processor(vocab: dict[str, int], extractor: Wav2Vec2FeatureExtractor) -> Wav2Vec2Processor:
    """The processor of a CTC model: a character tokenizer and the model's feature extractor."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocab), encoding="utf-8")
        tokenizer = Wav2Vec2CTCTokenizer(
            str(path), bos_token=None, eos_token=None, unk_token=UNKNOWN, pad_token=PAD, word_delimiter_token=SPACE
        )
    return Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)


def encode(clips: Sequence[Clip], processor: Wav2Vec2Processor, frames: Frames, *, role: str) -> list[list[int]]:
    """Ids of each clip's transcript.

    Raises:
        CorpusError: a clip without a transcript, or one that is longer than CTC can spell in the clip's frames, two
            equal characters in a row needing a blank between them. The clip is named.
    """
    vocab = processor.tokenizer.get_vocab()
    found = []
    for clip in clips:
        text = "|".join((clip.text or "").split())
        if not text:
            raise CorpusError(f"{role}: {clip.id} has no transcript. Remove it, or name the column in label_field.")
        ids = [vocab.get(character, vocab[UNKNOWN]) for character in text]
        needed = len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
        if needed > (room := int(frames.count(clip.samples))):
            raise CorpusError(
                f"{role}: the transcript of {clip.id} needs {needed} frames and its audio has {room}. Is it the "
                f"transcript of another recording? It begins {text[:40]!r}."
            )
        found.append(ids)
    return found


def transcribe(
    model: nn.Module, processor: Wav2Vec2Processor, clips: Sequence[Clip], frames: Frames, *, attention_mask: bool
) -> list[str]:
    """The likeliest character of every frame, repeats and blanks taken out: greedy CTC decoding, clip by clip.

    Args:
        model: a ``Wav2Vec2ForCTC``, in ``eval()``.
        processor: of the model.
        clips: alone in their batch, so that no padding bears on them.
        frames: the model's front end.
        attention_mask: whether the model expects one.
    """
    device = next(model.parameters()).device
    texts = []
    for clip in clips:
        batch = collate([clip], frames, rows=np.zeros(1, dtype=np.int64), masking=Masking(0.0, 1), seed=0)
        inside = batch["attention_mask"].to(device) if attention_mask else None
        with torch.inference_mode():
            logits = model(batch["input_values"].to(device), attention_mask=inside).logits
        texts += processor.batch_decode(logits.argmax(dim=-1).cpu())
    return texts


@dataclass(frozen=True)
class ErrorRates:
    """Edits over length, of all texts together; above 1 where more is said than there is.

    Attributes:
        cer, wer: by characters and by words.
        characters: edits and length of each text in characters, ``(texts, 2)``.
    """

    cer: float
    wer: float
    characters: np.ndarray


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Character and word error rate.

    Args:
        references: what was said; none is empty.
        hypotheses: what was understood, one for each.

    Raises:
        ImportError: jiwer is not installed.
        ValueError: no reference, an empty one, or other numbers of texts.
    """
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("error rates need jiwer: pip install 'headwater[speech]'.") from error
    if not references or len(references) != len(hypotheses) or not all(text.strip() for text in references):
        raise ValueError(
            f"references must be at least one, none empty, with a hypothesis each; got {len(references)} and "
            f"{len(hypotheses)}."
        )
    pairs = [(" ".join(a.split()), " ".join(b.split())) for a, b in zip(references, hypotheses, strict=True)]
    done = [jiwer.process_characters(a, b) for a, b in pairs]
    edits = np.array(
        [[d.substitutions + d.deletions + d.insertions, d.hits + d.substitutions + d.deletions] for d in done]
    )
    words = jiwer.wer([a for a, _ in pairs], [b for _, b in pairs])
    return ErrorRates(float(edits[:, 0].sum() / edits[:, 1].sum()), float(words), edits)
