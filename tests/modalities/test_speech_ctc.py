"""Characters in, text out, and how wrong it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Processor

from headwater.modalities.speech.audio import Clip
from headwater.modalities.speech.ctc import character_vocab, ctc_processor, encode, error_rates, transcribe
from headwater.modalities.speech.stream import Frames
from headwater.modalities.speech.tiny import tiny_feature_extractor
from headwater.modalities.text.docs import CorpusError

FRAMES = Frames((400,), (320,), tiny_feature_extractor())


def clip(text: str | None, samples: int = 16_000, path: str = "") -> Clip:
    return Clip("a-1", "a-1", text, path, 0, samples, 1.0, "")


def test_equation_the_vocabulary_is_the_characters_after_blank_unknown_and_space() -> None:
    assert character_vocab(["ba c", "éb"]) == {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4, "c": 5, "é": 6}
    with pytest.raises(ValueError, match="no character"):
        character_vocab(["  "])
    with pytest.raises(ValueError, match="stands for the space"):
        character_vocab(["a|b"])


def test_oracle_ids_are_the_tokenizers_own_and_the_processor_opens_again(tmp_path: Path) -> None:
    processor = ctc_processor(character_vocab(["ab cd"]), tiny_feature_extractor())
    ids = encode([clip("ab  dc"), clip("axb")], processor, FRAMES, role="labelled")
    assert ids == [processor.tokenizer("ab dc").input_ids, processor.tokenizer("axb").input_ids]
    assert ids[1][1] == processor.tokenizer.unk_token_id
    processor.save_pretrained(tmp_path)
    opened = Wav2Vec2Processor.from_pretrained(tmp_path)
    assert opened.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert opened.tokenizer.pad_token_id == 0


def test_rejects_a_transcript_that_ctc_cannot_spell_in_the_clips_frames() -> None:
    processor = ctc_processor(character_vocab(["abc"]), tiny_feature_extractor())
    # 1040 samples are 3 frames. "abc" needs 3, "abb" 4: a blank between the equal ones.
    assert encode([clip("abc", 1040)], processor, FRAMES, role="labelled") == [[3, 4, 5]]
    with pytest.raises(CorpusError, match="the transcript of a-1 needs 4 frames and its audio has 3"):
        encode([clip("abb", 1040)], processor, FRAMES, role="labelled")
    with pytest.raises(CorpusError, match="a-1 has no transcript"):
        encode([clip(None)], processor, FRAMES, role="labelled")


def test_equation_greedy_decoding_takes_out_repeats_and_blanks(tmp_path: Path) -> None:
    processor = ctc_processor(character_vocab(["ab cd"]), tiny_feature_extractor())
    (np.sin(np.arange(3000)) * 9000).astype("<i2").tofile(tmp_path / "samples")
    said = [3, 3, 0, 3, 4, 2, 2, 0, 5]  # a a - a b | | - c

    class Fixed(torch.nn.Linear):
        def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
            self.attention_mask = attention_mask
            return SimpleNamespace(logits=torch.eye(7)[torch.tensor([said])])

    model = Fixed(1, 1)
    some = [clip(None, 3000, str(tmp_path / "samples"))]
    assert transcribe(model, processor, some, FRAMES, attention_mask=False) == ["aab c"]
    assert model.attention_mask is None
    transcribe(model, processor, some, FRAMES, attention_mask=True)
    assert model.attention_mask is not None
    assert model.attention_mask.sum() == 3000


def test_equation_error_rates_by_hand() -> None:
    # abcd -> abed: 1 of 4; "one two" -> "one": 4 of 7 characters, 1 of 2 words. Words together: 2 of 3.
    found = error_rates(["abcd", "one two"], ["abed", "one"])
    assert found.characters.tolist() == [[1, 4], [4, 7]]
    assert found.cer == pytest.approx(5 / 11)
    assert found.wer == pytest.approx(2 / 3)


def test_degenerate_error_rates() -> None:
    assert error_rates(["ab"], [""]).cer == 1.0
    assert error_rates(["a  b"], ["a b"]).cer == 0.0  # spaces are not counted twice
    assert error_rates(["a"], ["abcd"]).cer == 3.0
    for references, hypotheses in (([], []), ([" "], ["a"]), (["a"], [])):
        with pytest.raises(ValueError, match="references must be at least one"):
            error_rates(references, hypotheses)
