"""Blocks of the documents that this folder does not run: what runs them, or why nothing does."""

from __future__ import annotations

import re

VLLM_LINE = "request cmpl-74c4...: 770 tokens (3.5 MiB) came from 85574d6c-... over shm in 4.9 ms"
VLLM_METRIC = 'vllm:datadist_bytes_total{engine="0",model_name="m"} 262144.0'
TESTED = {
    ("README.md", "cd examples/first"): "tests/test_readme.py",
    ("docs/ci.md", "from datadist import BlocksCacheKey, CacheDesc, DataType"):
        "integrations/pytest/tests/test_pytest_plugin.py",
    ("docs/transports.md", "import os, socket"): "tests/messaging/test_messaging_transport.py",
    ("examples/grants/README.md", "cd examples/grants"): "tests/grants/test_examples.py",
    ("integrations/pytest/README.md", "from datadist import BlocksCacheKey, CacheDesc, DataType"):
        "integrations/pytest/tests/test_pytest_plugin.py",
}  # fmt: skip
"""A block, by its page and its first line; and the test that runs it."""

TESTED_PAGES = {"docs/several_hosts.md": "tests/test_several_hosts.py"}
"""Pages all of whose blocks are run by one test, which knows where and in which order."""

SHOWN = {
    ("docs/ci.md", "test_stack.py::test_restart left behind, and it was cleaned:"):
        "what pytest prints: integrations/pytest/tests/test_pytest_plugin.py looks for such lines",
    ("docs/ci.md", "name: kv-transfer"): "a workflow of GitHub Actions",
    ("docs/operations.md", "datadist top, 15:35:14: 2 engines, 2 links, 2 OK"):
        "what datadist top prints: tests/cli/test_top.py has its columns",
    ("docs/operations.md", "spec:"): "a pod of Kubernetes; its rows: tests/links/test_containers.py",
    ("docs/vllm.md", VLLM_LINE): "a line of the log of vLLM",
    ("docs/vllm.md", VLLM_METRIC): "what servers of vLLM print: make test-vllm looks for these metrics",
}  # fmt: skip
"""Blocks that are read, not run."""

NOT_HERE = {
    r"(\.venv/bin/)?pip (install|uninstall) ": "changes the environment: .ci/run installs what is built",
    r"(python3|python) -m venv |\. \S+/bin/activate": "makes an environment",
    r"apt-get ": "changes the machine",
    r"\.venv/bin/(python -m build|twine )": "builds for a package index, and uploads",
    r"make ": "each target is looked for in the Makefile; .ci/run and people make them",
    r"\.ci/run": "is what CI does",
    r"datadist bench": "takes minutes; tests/cli/test_bench.py measures; the arguments are checked",
    r"(\.venv/bin/)?datadist conformance ": "takes a minute; tests/testing; the arguments are checked",
    r"datadist run script\.py": "tests/cli/test_drop_in.py runs programs so",
    r"docker ": "needs docker",
    r"(source /usr/local/Ascend|hccn_tool|python -m datadist_hccl\.verify)": "needs NPUs",
    r"python -m datadist_rdma\.verify|export DATADIST_RENDEZVOUS=10": "needs RoCE; see plugins/rdma/roce",
    r"python -m datadist_nixl\.verify": "needs NIXL; plugins/nixl/tests run it",
    r"python -m pytest (examples/datadist-ucx|plugins/nixl)": "needs ucxx or NIXL; a step of .ci/run",
    r"pytest -n 4": "integrations/pytest/tests/test_pytest_sample.py runs the sample",
    r"PYTHONPATH=integrations/vllm |export OMP_NUM_THREADS|python -m vllm|vllm serve": "needs vLLM",
    r"CONNECTOR=|export DATADIST_AUTH_KEY=\.\.\.": "needs vLLM",
    r"UCX_TLS=tcp python compare\.py": "needs vLLM and NIXL, and takes minutes",
    r"python -m datadist_vllm\.proxy|curl ": "needs servers of vLLM; make test-vllm",
}
"""Commands that are not run here, as patterns of how they begin, and why."""


def reason(command: str) -> str | None:
    """Why a command is not run here; None where it is."""
    return next((why for how, why in NOT_HERE.items() if re.match(how, command)), None)
