"""NIXL transport of datadist; entry point ``nixl``."""

from datadist_nixl.transport import NixlTransport

__all__ = ["NixlTransport"]
