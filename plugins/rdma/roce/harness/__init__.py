"""Small virtual machines with soft-RoCE, on a host that has no RDMA hardware."""
