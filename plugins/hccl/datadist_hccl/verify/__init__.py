"""Verifies the transport on two real NPUs and prints a report."""
