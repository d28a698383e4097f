"""Memory, the own caches and their keys, and what is known of those of peers."""
