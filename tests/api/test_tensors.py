"""Caches over tensors of other libraries: what is checked, taken, kept (tensors.py)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMException,
    LLMStatusCode,
    Placement,
)
from datadist.tensors import memory_of
from tests import nodes
from tests.in_process_engine import Engine
from tests.nodes import Here, Node

Start = Callable[..., Node]
INVALID = LLMStatusCode.LLM_PARAM_INVALID
FLOAT16 = DataType.DT_FLOAT16


class Exported:
    """Only DLPack, as other libraries have it."""

    def __init__(self, array: Any, device: int | None = None) -> None:
        self._array, self._device = array, device
        self.shape = array.shape

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self._device or 1, 0)


class Converted(Exported):
    """Gives its memory in another type, which is a copy."""

    copies: Any = None

    def __dlpack__(self, **options: Any) -> Any:
        copy = self._array.astype(np.float16).view(_Array)
        self.copies = weakref.ref(copy)
        return copy.__dlpack__()


class Passed(Exported):
    """Knows all of the protocol."""

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)


class Honest(Exported):
    """Says that it gives a copy."""

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**{**options, "copy": True})


class Shapeless(Exported):
    """Cannot say how large it is, nor give its memory, as tensors that are not yet made."""

    shape = property(lambda _: 1 // 0)

    def __init__(self) -> None:
        self._device = None

    def __dlpack__(self, **options: Any) -> Any:
        raise RuntimeError("not yet made")


class OnDevice:
    """Only the interface of CUDA."""

    def __init__(self, array: Any) -> None:
        self.shape = array.shape
        self.__cuda_array_interface__ = array.__array_interface__

    __cuda_array_interface__: Any = None


class _Array(np.ndarray[Any, Any]):
    """One that can be referenced weakly."""


def _read_only(array: Any) -> Any:
    array.setflags(write=False)
    return array


def _arrays(*shape: int, dtype: Any = np.float16, count: int = 2) -> list[Any]:
    return [np.zeros(shape, dtype) for _ in range(count)]


def _refused(call: Callable[..., object], *args: Any, **options: Any) -> str:
    with pytest.raises(LLMException) as caught:
        call(*args, **options)
    assert caught.value.status_code is INVALID
    return str(caught.value)


def test_arrays_instead_of_addresses(engine: Engine) -> None:
    manager = engine.api.cache_manager
    arrays = _arrays(3, 4)
    desc = CacheDesc.from_tensors(arrays)
    assert (desc.num_tensors, list(desc.shape), desc.data_type) == (2, [3, 4], FLOAT16)
    cache = manager.register_blocks_cache(desc, [arrays[0], int(arrays[1].ctypes.data)])
    assert cache.tensor_addrs == [array.ctypes.data for array in arrays]
    cache.numpy()[0][:] = 5
    assert (arrays[0] == 5).all()


@pytest.mark.parametrize("export", [Exported, lambda array: Exported(array, 3)])
def test_what_speaks_dlpack(engine: Engine, export: Callable[[Any], Any]) -> None:
    array = np.zeros((3, 8), np.int32)
    cache = engine.api.cache_manager.register_cache(
        CacheDesc(1, [3, 4], DataType.DT_INT32), [export(array[:, :4])]
    )
    assert cache.tensor_addrs == [array.ctypes.data]
    assert cache.numpy()[0].strides == (32, 4)


def test_strides_give_the_stride_of_blocks(engine: Engine) -> None:
    manager = engine.api.cache_manager
    buffer = np.zeros((5, 2, 6), np.int32)
    layers = [buffer[:, 0], buffer[:, 1]]
    desc = CacheDesc.from_tensors(layers, Placement.DEVICE, tensors_per_layer=1)
    assert (desc.block_stride, desc.tensors_per_layer) == (48, 1)
    for each in (desc, CacheDesc(2, [5, 6], DataType.DT_INT32, block_stride=48)):
        manager.register_blocks_cache(each, layers)
    taken = manager.register_blocks_cache(CacheDesc(2, [5, 6], DataType.DT_INT32), layers)
    taken.numpy()[1][4] = 7
    assert (buffer[4, 1] == 7).all()
    assert buffer.sum() == 42
    text = _refused(
        manager.register_blocks_cache,
        CacheDesc(2, [5, 6], DataType.DT_INT32, block_stride=96),
        layers,
    )
    assert "lie 48 bytes apart, and the description says block_stride 96" in text
    assert CacheDesc.from_tensors([np.zeros((1, 4), np.int8)[:, :2]]).block_stride is None


WRONG: list[tuple[Any, str]] = [
    (np.zeros((4, 3), np.float16), r"addrs\[0\] has shape \[4, 3\], and the description says \[3, 4\]"),
    (np.zeros((0, 4), np.float16), r"has shape \[0, 4\]"),
    (np.zeros((3, 4), np.float32), r"type float32 \(4 bytes\), and the description says DT_FLOAT16"),
    (np.zeros((3, 4), np.int16), "type int16"),
    (np.zeros((3, 4), ">f2"), "byte order"),
    (np.zeros((4, 3), np.float16).T, r"strides \[2, 6\] \(bytes\)"),
    (np.zeros((3, 8), np.float16)[:, ::2], "only the first dimension may lie apart"),
    (np.zeros((3, 4), np.float16)[::-1], "block_stride is -8"),
    (np.broadcast_to(np.zeros((1, 4), np.float16), (3, 4)), "block_stride is 0"),
    (Exported(np.zeros((3, 4), np.float16), 2), r"memory of a device \(DLPack type 2\)"),
    (OnDevice(np.zeros((3, 4), np.float16)), r"memory of a device \(DLPack type 2\)"),
    (_read_only(np.zeros((3, 4), np.float16)), r"addrs\[0\] is read-only, and caches are written"),
    (np.frombuffer(bytes(24), np.float16).reshape(3, 4), "is read-only"),
    (Passed(_read_only(np.zeros((3, 4), np.float16))), "read-?only"),
    (Honest(np.zeros((3, 4), np.float16)), "a Honest that gives (a copy|.*'copy')"),
    (Shapeless(), "a Shapeless that gives no memory: RuntimeError: not yet made"),
    (np.zeros((3, 4), object), "objects of Python"),
]  # fmt: skip


@pytest.mark.parametrize(("tensor", "words"), WRONG, ids=range(len(WRONG)))
def test_what_does_not_agree_is_refused(engine: Engine, tensor: Any, words: str) -> None:
    manager = engine.api.cache_manager
    with pytest.raises(LLMException, match=words) as caught:
        manager.register_cache(CacheDesc(1, [3, 4], FLOAT16), [tensor])
    assert caught.value.status_code is INVALID
    manager.register_cache(CacheDesc(1, [3, 4], FLOAT16), [np.zeros((3, 4), np.float16)])


@pytest.mark.parametrize("value", [1.5, np.float16(1), np.int64(4096), np.zeros(()), "x", None])
def test_what_is_neither_address_nor_tensor(engine: Engine, value: Any) -> None:
    arrays = _arrays(3, 4)
    with pytest.raises(TypeError, match=r"addrs\[1\] is"):
        engine.api.cache_manager.register_cache(CacheDesc.from_tensors(arrays), [arrays[0], value])


def test_descriptions_of_tensors_that_differ() -> None:
    first = np.zeros((3, 4), np.float16)
    for other, words in (
        (np.zeros((3, 5), np.float16), r"tensors\[1\] has shape \[3, 5\] of float16"),
        (np.zeros((3, 4), np.int16), "of int16"),
        (np.zeros((3, 8), np.float16)[:, :4], r"tensors\[1\] has strides \[16, 2\]"),
    ):
        assert words.replace("\\", "") in _refused(CacheDesc.from_tensors, [first, other])
    no_dimensions = Exported(np.zeros(()))
    del no_dimensions.shape
    for value, words in (
        (no_dimensions, "tensors[0] is a Exported without dimensions"),
        (Shapeless(), "tensors[0] is a Shapeless that gives no memory"),
    ):
        assert words in _refused(CacheDesc.from_tensors, [value])
    assert "tensors is empty" in _refused(CacheDesc.from_tensors, [])
    assert "complex64" in _refused(CacheDesc.from_tensors, [np.zeros((2, 2), np.complex64)])
    with pytest.raises(TypeError, match=r"tensors\[0\] is a int"):
        CacheDesc.from_tensors([4096])
    with pytest.raises(TypeError, match=r"tensors is a ndarray .*: give a list with one tensor"):
        CacheDesc.from_tensors(first)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_tensors_without_elements(engine: Engine, shape: tuple[int, ...]) -> None:
    arrays = [np.zeros(shape, np.float16)]
    text = _refused(
        lambda: engine.api.cache_manager.register_cache(CacheDesc.from_tensors(arrays), arrays)
    )
    assert "every dimension must be positive" in text


def test_tensors_are_kept_until_the_cache_is_unregistered(engine: Engine) -> None:
    manager = engine.api.cache_manager
    array = np.zeros((3, 4), np.float16).view(_Array)
    alive = weakref.ref(array)
    cache = manager.register_cache(CacheDesc.from_tensors([array]), [array])
    del array
    gc.collect()
    assert alive() is not None
    view = cache.numpy()[0]
    manager.unregister_cache(cache.cache_id)
    gc.collect()
    assert alive() is not None, "a view keeps it"
    del view
    gc.collect()
    assert alive() is None


def test_memory_that_a_tensor_gives_is_kept_whatever_becomes_of_the_tensor(engine: Engine) -> None:
    manager = engine.api.cache_manager
    tensor = Converted(np.ones((3, 4), np.float32))
    cache = manager.register_cache(CacheDesc(1, [3, 4], FLOAT16), [tensor])
    gc.collect()
    assert tensor.copies() is not None
    manager.unregister_cache(cache.cache_id)
    gc.collect()
    assert tensor.copies() is None


def test_tensors_are_kept_no_longer_than_the_engine(engine: Engine) -> None:
    array = np.zeros((3, 4), np.float16).view(_Array)
    alive = weakref.ref(array)
    cache = engine.api.cache_manager.register_cache(CacheDesc.from_tensors([array]), [array])
    del array
    engine.api.finalize()
    gc.collect()
    assert alive() is None
    assert isinstance(cache, Cache)


def test_tensors_of_a_cache_that_is_refused_are_not_kept(engine: Engine) -> None:
    array = np.zeros((3, 4), np.float16).view(_Array)
    alive = weakref.ref(array)
    with pytest.raises(LLMException):
        engine.api.cache_manager.register_cache(CacheDesc(1, [4, 4], FLOAT16), [array])
    del array
    gc.collect()
    assert alive() is None


# -- torch ---------------------------------------------------------------------------------------


def _with_torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


def test_tensors_of_torch(engine: Engine) -> None:
    torch = _with_torch()
    manager = engine.api.cache_manager
    buffer = torch.zeros(6, 2, 8, dtype=torch.bfloat16)
    layers = [buffer[:, 0], buffer[:, 1].requires_grad_()]
    desc = CacheDesc.from_tensors(layers)
    assert (desc.data_type, desc.block_stride) == (DataType.DT_BF16, 32)
    cache = manager.register_blocks_cache(desc, layers)
    assert cache.tensor_addrs == [layer.data_ptr() for layer in layers]
    torch.from_dlpack(cache.tensors[1])[5] = 3
    assert buffer[5, 1].tolist() == [3] * 8
    eight = torch.zeros(2, 4, dtype=torch.float8_e4m3fn)
    manager.register_cache(CacheDesc(1, [2, 4], DataType.DT_UINT8), [eight.view(torch.uint8)])
    text = _refused(manager.register_cache, CacheDesc(1, [2, 4], FLOAT16), [eight])
    assert "float8_e4m3fn" in text
    meta = torch.zeros(2, 4, dtype=torch.float16, device="meta")
    assert "gives no memory" in _refused(
        manager.register_cache, CacheDesc(1, [2, 4], FLOAT16), [meta]
    )


def test_a_tensor_of_torch_that_gets_other_memory(engine: Engine) -> None:
    torch = _with_torch()
    manager, array = engine.api.cache_manager, np.zeros((3, 4), np.float16).view(_Array)
    alive, tensor = weakref.ref(array), torch.from_numpy(array)
    cache = manager.register_cache(CacheDesc.from_tensors([tensor]), [tensor])
    del array
    tensor.data = torch.zeros(1, dtype=torch.float16)
    gc.collect()
    assert alive() is not None
    manager.unregister_cache(cache.cache_id)
    gc.collect()
    assert alive() is None


def _register(here: Here, label: str, key: Any) -> None:
    torch = _with_torch()
    buffer = torch.zeros(6, 2, 8, dtype=torch.int32)
    cache = here.live.cache_manager.register_blocks_cache(
        CacheDesc.from_tensors([buffer[:, 0], buffer[:, 1]], tensors_per_layer=1),
        [buffer[:, 0], buffer[:, 1]],
        key,
    )
    here.caches[label], here.arrays[label] = cache, cache.numpy()


@pytest.mark.parametrize("one_sided", [False, True])
def test_tensors_of_torch_are_pulled(start_node: Start, one_sided: bool) -> None:
    _with_torch()
    options = {"pool": 0, "enable_remote_cache_accessible": one_sided}
    owner, user = start_node(1, **options), start_node(2, **options)
    owner.do(_register, "theirs", BlocksCacheKey(1))
    owner.do(nodes.fill, "theirs", 1)
    user.do(_register, "mine", None)
    nodes.link_pair(owner, user)
    user.do(nodes.pull_blocks, BlocksCacheKey(1), "mine", [0, 5], [5, 1])
    for n, array in enumerate(user.do(nodes.read, "mine")):
        np.testing.assert_array_equal(array[[5, 1]], nodes.pattern(1, n, (6, 8))[[0, 5]])


def test_memory_of_a_tensor_of_one_dimension() -> None:
    array = np.zeros(5, np.bool_)
    found = memory_of("x", array)
    assert (found.type_name, found.block_bytes, found.block_stride) == ("bool", 1, None)
