"""The structures of DLPack (dlpack.h), as far as they are read here."""

from __future__ import annotations

import ctypes
from typing import cast

__all__ = ["BFLOAT", "IS_COPIED", "READ_ONLY", "DLTensor", "flags_in", "tensor_in"]

BFLOAT = 4
"""Type code of bfloat16."""
READ_ONLY, IS_COPIED = 1, 2
"""Flags of a tensor."""


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class DLTensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensorVersioned(ctypes.Structure):
    """The head of DLManagedTensorVersioned; the unversioned one begins with the tensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    )


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype = ctypes.c_int
_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)


def tensor_in(capsule: object) -> DLTensor:
    """The tensor of a capsule, valid as long as that. Raises ``ValueError`` for what is no capsule."""
    versioned = _versioned_in(capsule)
    if versioned is not None:
        return cast("DLTensor", versioned.tensor)
    return DLTensor.from_address(_get_pointer(capsule, b"dltensor"))


def flags_in(capsule: object) -> int:
    """The flags of the tensor of a capsule; none before the first version of the protocol."""
    versioned = _versioned_in(capsule)
    return 0 if versioned is None else int(versioned.flags)


def _versioned_in(capsule: object) -> _DLManagedTensorVersioned | None:
    name = b"dltensor_versioned"
    if not _is_valid(capsule, name):
        return None
    return _DLManagedTensorVersioned.from_address(_get_pointer(capsule, name))
