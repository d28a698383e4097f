"""The hccl transport of datadist: memory of Ascend NPUs, moved by the vendor's own libraries."""

from datadist_hccl.transport import HcclTransport

__all__ = ["HcclTransport"]
