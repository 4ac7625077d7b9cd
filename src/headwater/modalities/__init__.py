"""Foundations per kind of data; they know no method."""
