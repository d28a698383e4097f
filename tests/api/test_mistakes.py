"""What the checks of arguments say: the value that was given, its type where that is the mistake, and
what to give instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datadist import CacheDesc, CacheKey, CacheKeyByIdAndIndex, DataType, LLMException, LLMRole
from datadist.api import arguments, grant, link_information, llm_datadist, tasks, tensors
from datadist.base import checks
from datadist.base.hints import ADDRESSES
from datadist.caches.directory import KeyName
from datadist.engine import options
from datadist.transfers import block_lists

DESC = CacheDesc(2, [1, 8], DataType.DT_FLOAT16)
NAME = KeyName("request", 5, 0)
ARRAY = np.zeros((2, 3), np.float32)

MISTAKES: list[tuple[Callable[..., object], tuple[Any, ...], type[Exception], list[str]]] = [
    # How the check is called, what it raises, and what its text has.
    (checks.check_isinstance, ("role", "PROMPT", LLMRole), TypeError,
     ["role is a str ('PROMPT')", "only support LLMRole", "give LLMRole.PROMPT"]),
    (checks.check_isinstance, ("x", 3.0, int), TypeError,
     ["x is a float (3.0)", "only support int", "give int(...) of it"]),
    (checks.check_isinstance, ("x", "yes", bool), TypeError,
     ["x is a str ('yes')", "only support bool", "give True"]),
    (checks.check_json, ("rank_table", {"version": "1.0"}), TypeError,
     ["rank_table is a dict ({'version': '1.0'})", "JSON", "give text, json.dumps(...) of it"]),
    (checks.check_sequence_of, ("keys", range(2), int), TypeError,
     ["keys is a range (range(0, 2))", "only support list or tuple", "give list(...) of it"]),
    (checks.check_sequence_of, ("keys", [1, "2"], int), TypeError,
     ["keys[1] is a str ('2')", "only support int", "give int(...) of it"]),
    (checks.check_blocks, ("src_blocks", 4), TypeError,
     ["src_blocks is a int (4)", "list, tuple or NumPy array of integers"]),
    (checks.check_blocks, ("src_blocks", ARRAY), TypeError,
     ["src_blocks is an array of float32 of shape (2, 3)", "only support integers in one dimension"]),
    (checks.check_list_of_blocks, ("src_blocks", (1, 2)), TypeError,
     ["src_blocks is a tuple ((1, 2))", "only support list", "give list(...) of it"]),
    (checks.check_list_of_int, ("addrs", ARRAY, ADDRESSES), TypeError,
     ["addrs is a ndarray (shape [2, 3], float32)", "only support list", "array.ctypes.data"]),
    (checks.check_dict, ("clusters", None, int, int), AttributeError,
     ["clusters is None", "only support dict", "give one of int to int"]),
    (checks.check_dict, ("clusters", {"1": 0}, int, int), TypeError,
     ["a key of clusters is a str ('1')", "only support int", "give int(...) of it"]),
    (checks.check_range, ("port", 70000, 1, 65535), ValueError,
     ["port is 70000", "must be in [1, 65535]"]),
    (checks.check_uint16, ("x", -1), ValueError, ["x is -1", "[0, 65535]"]),
    (checks.check_uint32, ("x", 1 << 32), ValueError, ["x is 4294967296", "[0, 4294967295]"]),
    (checks.check_uint64, ("x", -1), ValueError, ["x is -1", "[0, 18446744073709551615]"]),
    (checks.check_int32, ("x", 1 << 31), ValueError, ["x is 2147483648", "2147483647]"]),
    (checks.check_int64, ("x", 1 << 63), ValueError, ["x is 9223372036854775808", "[-92233"]),
    (arguments.check_not_none, ("cache", None), AttributeError, ["cache is None", "must be given"]),
    (arguments.check_count, (DESC, [4096]), LLMException,
     ["2 tensors need as many addrs, not 1", "give one address per tensor"]),
    (arguments.check_addresses, ([0],), LLMException,
     ["addrs[0] is 0x0", "not a valid address", "array.ctypes.data"]),
    (arguments.check_key_count, ([(0, NAME), (1, NAME)], DESC), LLMException,
     ["2 cache keys for 1 batch slots", "give at most one key per slot"]),
    (arguments.check_one_id, (CacheKey(1, 2**64 - 1),), LLMException,
     ["exactly one of req_id and prefix_id", "CacheKey(", "give 18446744073709551615"]),
    (arguments.check_source_blocks, (CacheKeyByIdAndIndex(1, 1), [3]), LLMException,
     ["src_blocks must be empty with a CacheKeyByIdAndIndex"]),
    (arguments.check_per_layer, (0,), LLMException,
     ["tensor_num_per_layer is 0", "must be positive"]),
    (grant.check_lease, (0,), LLMException, ["lease_millis is 0", "at least one millisecond"]),
    (link_information.check_metadata, ("x",), TypeError,
     ["metadata is a str ('x')", "only support bytes"]),
    (tasks.check_uint64s, ("addrs", [1, -5]), ValueError, ["addrs[1] is -5", "[0, "]),
    (tasks.check_layer_range, ("src_layer_range", range(3, 3)), LLMException,
     ["src_layer_range is range(3, 3)", "must start at 0 or above and not be empty"]),
    (tensors.check_memory, ([ARRAY.tobytes()],), TypeError,
     ["addrs[0] is a bytes", "only support int", "give numpy.frombuffer"]),
    (options.check_is_options, ("options", None), AttributeError,
     ["options is None", "only support dict", "give config.generate_options()"]),
    (block_lists.check_blocks, ("dst_blocks", [1, 9], 4), ValueError, ["dst_blocks[1] is 9", "4"]),
    (block_lists.check_distinct, ("dst_blocks", [3, 1, 3]), ValueError,
     ["3", "dst_blocks[0]", "dst_blocks[2]"]),
    (llm_datadist._check_timeout, (0,), LLMException,
     ["timeout is 0", "must be positive (milliseconds)"]),
    (llm_datadist._check_name, ("",), LLMException, ["comm_name is empty", "give a name"]),
    (llm_datadist._check_mapping, ({1: -1},), ValueError,
     ["the rank of cluster 1 in cluster_rank_info is -1", "[0, 4294967295]"]),
    (llm_datadist._check_ranks, ({1: 1, 2: 0},), LLMException,
     ["cluster_rank_info is {1: 1, 2: 0}", "list the clusters in ascending order of rank"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "arguments", "raised", "parts"),
    MISTAKES,
    ids=[f"{check.__name__}-{number}" for number, (check, *_) in enumerate(MISTAKES)],
)
def test_a_mistake_is_named_with_its_value_and_its_remedy(
    check: Callable[..., object], arguments: tuple[Any, ...], raised: type[Exception],
    parts: list[str],
) -> None:  # fmt: skip
    with pytest.raises(raised) as caught:
        check(*arguments)
    text = str(caught.value)
    assert [part for part in parts if part not in text] == [], text
    assert "\n" not in text
    assert len(text) < 500


def test_every_check_of_a_type_or_range_is_in_the_table() -> None:
    source = Path(checks.__file__).read_text()
    defined = set(re.findall(r"^def (check_\w+)", source, re.MULTILINE))
    assert defined == {
        check.__name__ for check, *_ in MISTAKES if check.__module__ == checks.__name__
    }
