"""Finding and choosing transports, their options, and reporting their errors."""
