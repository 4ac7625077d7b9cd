"""Compose: merge, graft, route, ensemble models that exist already."""
