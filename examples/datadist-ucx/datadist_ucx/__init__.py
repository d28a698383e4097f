"""An example transport of datadist: TCP between hosts, by UCX."""

from datadist_ucx.transport import UcxTransport

__all__ = ["UcxTransport"]
