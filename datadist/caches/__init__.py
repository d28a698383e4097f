"""Memory, own caches and keys, and the caches and keys of peers."""
