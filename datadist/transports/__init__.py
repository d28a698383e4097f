"""Finding transports, reading their options, and what their faults become."""
