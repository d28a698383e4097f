"""Families of conformance tests, one class per file and concern."""
