"""What every room uses and which uses none: texts, checks, numbers, addresses, calls, workers."""
