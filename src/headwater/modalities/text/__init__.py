"""Text: documents, tokenizers, packing, small models, scores."""
