"""Adapt: to a task: heads, PEFT, prompts, fine-tuning, few-shot."""
