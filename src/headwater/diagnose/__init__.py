"""Diagnose: predict and explain transfer before paying for it."""
