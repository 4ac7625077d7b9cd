"""Speed and memory against named peers, each question in one run: ``python -m benchmarks.QUESTION``."""
