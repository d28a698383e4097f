"""A small serving stack: one process prefills, another one decodes, and pulls the KV blocks."""
