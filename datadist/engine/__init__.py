"""How the API works inside: links, key directory, memory, planning, transfers, backend choice."""
