"""The C layouts, checked everywhere, and against the header where there is one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from datadist_rdma import chains, verbs

HEADER = Path("/usr/include/infiniband/verbs.h")

C_NAMES = {
    verbs.GlobalRoute: "ibv_global_route",
    verbs.AddressHandleAttr: "ibv_ah_attr",
    verbs.QpInitAttr: "ibv_qp_init_attr",
    verbs.QpAttr: "ibv_qp_attr",
    verbs.MemoryRegion: "ibv_mr",
    verbs.ScatterGather: "ibv_sge",
    verbs.SendRequest: "ibv_send_wr",
    verbs.Completion: "ibv_wc",
    verbs.AsyncEvent: "ibv_async_event",
}


@pytest.mark.parametrize("structure", list(verbs.SIZES), ids=lambda s: s.__name__)
def test_sizes(structure: type[ctypes.Structure]) -> None:
    assert ctypes.sizeof(structure) == verbs.SIZES[structure]


@pytest.mark.parametrize(
    ("structure", "offsets"),
    [
        (
            verbs.SendRequest,
            {"wr_id": 0, "next": 8, "sg_list": 16, "num_sge": 24, "opcode": 28, "send_flags": 32,
             "imm_data": 36, "rdma": 40},
        ),
        (verbs.MemoryRegion, {"addr": 16, "length": 24, "lkey": 36, "rkey": 40}),
        (verbs.QueuePair, {"qp_num": 52}),
        (verbs.Completion, {"wr_id": 0, "status": 8, "vendor_err": 16, "qp_num": 28}),
        (verbs.PortAttr, {"active_mtu": 8, "max_msg_sz": 20}),
        (verbs.DeviceAttr, {"max_qp_wr": 112, "max_qp_rd_atom": 144, "max_qp_init_rd_atom": 156}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_offsets(structure: type[ctypes.Structure], offsets: dict[str, int]) -> None:
    assert {name: getattr(structure, name).offset for name in offsets} == offsets


def test_the_arrays_have_the_layout_of_the_structures() -> None:
    assert chains.REQUEST.itemsize == ctypes.sizeof(verbs.SendRequest)
    assert chains.ELEMENT.itemsize == ctypes.sizeof(verbs.ScatterGather)
    fields = chains.REQUEST.fields
    assert fields is not None
    for name in ("wr_id", "next", "sg_list", "num_sge", "opcode", "send_flags"):
        assert fields[name][1] == getattr(verbs.SendRequest, name).offset
    assert fields["remote_addr"][1] == verbs.SendRequest.rdma.offset
    assert fields["rkey"][1] == verbs.SendRequest.rdma.offset + 8


def test_the_masks_name_what_the_states_need() -> None:
    assert (verbs.INIT_MASK, verbs.RTR_MASK, verbs.RTS_MASK) == (0x39, 0x129181, 0x12E01)


def test_the_header_agrees(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not HEADER.exists():
        pytest.skip("needs a C compiler and libibverbs-dev")
    prints = [f'printf("{name} %zu\\n", sizeof(struct {name}));' for name in C_NAMES.values()] + [
        'printf("poll_cq %zu\\n", offsetof(struct ibv_context, ops.poll_cq));',
        'printf("req_notify_cq %zu\\n", offsetof(struct ibv_context, ops.req_notify_cq));',
        'printf("post_send %zu\\n", offsetof(struct ibv_context, ops.post_send));',
        'printf("async_fd %zu\\n", offsetof(struct ibv_context, async_fd));',
        'printf("max_qp_init_rd_atom %zu\\n",'
        " offsetof(struct ibv_device_attr, max_qp_init_rd_atom));",
        'printf("INIT %d RTR %d RTS %d\\n",'
        " IBV_QP_STATE|IBV_QP_PKEY_INDEX|IBV_QP_PORT|IBV_QP_ACCESS_FLAGS,"
        " IBV_QP_STATE|IBV_QP_AV|IBV_QP_PATH_MTU|IBV_QP_DEST_QPN|IBV_QP_RQ_PSN"
        "|IBV_QP_MAX_DEST_RD_ATOMIC|IBV_QP_MIN_RNR_TIMER,"
        " IBV_QP_STATE|IBV_QP_SQ_PSN|IBV_QP_TIMEOUT|IBV_QP_RETRY_CNT|IBV_QP_RNR_RETRY"
        "|IBV_QP_MAX_QP_RD_ATOMIC);",
    ]
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <infiniband/verbs.h>\n"
        f"int main(void) {{ {' '.join(prints)} return 0; }}\n"
    )
    program = tmp_path / "layout"
    subprocess.run([compiler, "-o", program, source], check=True)
    told = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    expected = [f"{C_NAMES[s]} {ctypes.sizeof(s)}" for s in C_NAMES]
    ops = verbs._Context.ops.offset
    for name, place in (
        ("poll_cq", verbs._POLL_CQ),
        ("req_notify_cq", verbs._REQ_NOTIFY_CQ),
        ("post_send", verbs._POST_SEND),
    ):
        expected.append(f"{name} {ops + 8 * place}")
    expected.append(f"async_fd {verbs._Context.async_fd.offset}")
    expected.append(f"max_qp_init_rd_atom {verbs.DeviceAttr.max_qp_init_rd_atom.offset}")
    expected.append(f"INIT {verbs.INIT_MASK} RTR {verbs.RTR_MASK} RTS {verbs.RTS_MASK}")
    assert told.splitlines() == expected
