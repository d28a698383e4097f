"""Transfers of caches: planning, resolving keys, pulls, pushes, layer by layer, copies, checksums."""
