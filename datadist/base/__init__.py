"""Helpers that do not depend on the rest of the package: texts, checks, numbers, addresses, workers."""
