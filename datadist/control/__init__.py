"""Discovery of peers, sessions and messages between engines, and the control thread."""
