"""Measuring transfers: workloads of real models, compared with the limits of the machine."""
