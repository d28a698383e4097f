"""Real vLLM servers with models made on the spot: for the demo, the tests and the comparison."""
