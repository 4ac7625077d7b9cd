"""Foundations that know no method and no modality."""
