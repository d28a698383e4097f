"""The shm transport of datadist: memory of processes on one host."""

from datadist_shm.transport import ShmTransport

__all__ = ["ShmTransport"]
