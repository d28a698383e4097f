"""Measuring transfers: workloads of real models, next to what the machine can do at best."""
