"""Domain: continued pretraining toward a domain, a language, a context length."""
