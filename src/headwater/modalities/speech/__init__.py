"""Speech: readers of audio, synthetic languages with exact phone labels, masks, batches, CTC, small backbones."""
