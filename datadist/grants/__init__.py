"""Grants: a request's blocks, open to its readers until they have them, or the owner takes them back."""
