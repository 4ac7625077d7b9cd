"""Continual: tasks that arrive one after another."""
