"""Builds the distributions of a release, tries them, and checks what would be uploaded."""
