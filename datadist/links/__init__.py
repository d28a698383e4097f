"""Domains: how engines agree on one, build its links, wait for it, and lose members."""
