"""The rdma transport of datadist: RoCE v2 through libibverbs."""

from datadist_rdma.transport import RdmaTransport

__all__ = ["RdmaTransport"]
