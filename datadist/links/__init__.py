"""Communication domains: forming them, building their links, waiting for them, lost members."""
