"""Pretraining for less: sparse, low-rank, binary, grown and distilled models."""
