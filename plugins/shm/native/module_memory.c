#include "module_memory.h"

#include <errno.h>
#include <stdint.h>

#include "huge.h"
#include "memory.h"
#include "pages.h"

PyDoc_STRVAR(map_doc, "map(fd, size, writable, huge) -> address of a shared mapping. Raises OSError.");

static PyObject *py_map(PyObject *self, PyObject *args)
{
    (void)self;
    int fd, writable, huge, failed;
    Py_ssize_t size;
    void *memory;
    if (!PyArg_ParseTuple(args, "inpp", &fd, &size, &writable, &huge))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = map_shared(fd, size, writable, huge, &memory);
    Py_END_ALLOW_THREADS
    return failed ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromVoidPtr(memory);
}

PyDoc_STRVAR(populate_doc,
"populate(address, size, threads, file, offset, stop): make all pages, of a file unless that is -1. stop: writable\n"
"int64 buffer, which ends it early once it is not 0; with both the program's threads go first. Raises OSError.");

static PyObject *py_populate(PyObject *self, PyObject *args)
{
    (void)self;
    long long address, offset;
    Py_ssize_t size;
    Py_buffer stop = {.obj = NULL};
    int threads, file, failed;
    if (!PyArg_ParseTuple(args, "LniiL|w*", &address, &size, &threads, &file, &offset, &stop))
        return NULL;
    if (stop.obj != NULL && stop.len < (Py_ssize_t)sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "stop is too small");
        PyBuffer_Release(&stop);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    failed = populate((char *)(intptr_t)address, size, threads, file, offset, stop.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&stop);
    if (failed)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(huge_make_doc,
"huge_make(address, size, file, offset, left, stop, careful=False) -> (HUGE_MADE and the like, careful), see huge.h.\n"
"left: a byte for each huge page of the file. stop: writable int64 buffer, which ends it early once it is not 0.");

static PyObject *py_huge_make(PyObject *self, PyObject *args)
{
    (void)self;
    long long address, offset;
    Py_ssize_t size;
    Py_buffer left, stop;
    int file, careful = 0, more = HUGE_REFUSED, valid;
    if (!PyArg_ParseTuple(args, "LniLw*w*|p", &address, &size, &file, &offset, &left, &stop, &careful))
        return NULL;
    valid = size >= 0 && offset >= 0 && left.len >= (offset + size) / HUGE_PAGE &&
            stop.len >= (Py_ssize_t)sizeof(int64_t);
    if (valid) {
        Py_BEGIN_ALLOW_THREADS
        more = huge_make((char *)(intptr_t)address, size, file, offset, left.buf, stop.buf, &careful);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&left);
    PyBuffer_Release(&stop);
    return valid ? Py_BuildValue("iO", more, careful ? Py_True : Py_False)
                 : PyErr_Format(PyExc_ValueError, "left or stop is too small");
}

PyDoc_STRVAR(huge_merge_doc,
"huge_merge(address, left, stop, careful=False): make huge pages of the small ones of those that are left, while a\n"
"processor is spare.");

static PyObject *py_huge_merge(PyObject *self, PyObject *args)
{
    (void)self;
    long long address;
    Py_buffer left, stop;
    int careful = 0, valid;
    if (!PyArg_ParseTuple(args, "Lw*w*|p", &address, &left, &stop, &careful))
        return NULL;
    valid = stop.len >= (Py_ssize_t)sizeof(int64_t);
    if (valid) {
        Py_BEGIN_ALLOW_THREADS
        huge_merge((char *)(intptr_t)address, left.buf, left.len, stop.buf, careful);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&left);
    PyBuffer_Release(&stop);
    if (!valid)
        return PyErr_Format(PyExc_ValueError, "stop is too small");
    Py_RETURN_NONE;
}

PyDoc_STRVAR(map_peer_doc,
"map_peer(fd, size, writable, huge, stays, search) -> (pages, address) of a mapping of a peer's memory.\n"
"stays: what exists of it cannot be taken away. search: soon have all that exists in the page table, in the\n"
"background. Raises OSError.");

static PyObject *py_map_peer(PyObject *self, PyObject *args)
{
    (void)self;
    int fd, writable, huge, stays, search;
    Py_ssize_t size;
    Pages *pages;
    if (!PyArg_ParseTuple(args, "inpppp", &fd, &size, &writable, &huge, &stays, &search))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    pages = pages_map(fd, size, writable, huge, stays, search);
    Py_END_ALLOW_THREADS
    if (pages == NULL)
        return PyErr_SetFromErrno(PyExc_OSError);
    return Py_BuildValue("LL", (long long)(intptr_t)pages, (long long)(intptr_t)pages_address(pages));
}

/* What map_peer has returned; NULL with an exception for anything else that is not a pointer. */
static Pages *get_pages(PyObject *argument)
{
    Pages *pages = PyLong_AsVoidPtr(argument);
    if (pages == NULL && !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "pages is 0");
    return pages;
}

PyDoc_STRVAR(unmap_peer_doc, "unmap_peer(pages): undo map_peer.");

static PyObject *py_unmap_peer(PyObject *self, PyObject *argument)
{
    (void)self;
    Pages *pages = get_pages(argument);
    if (pages == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    pages_unmap(pages);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(leave_peer_doc, "leave_peer(pages): in a forked child; unmap_peer frees the rest.");

static PyObject *py_leave_peer(PyObject *self, PyObject *argument)
{
    (void)self;
    Pages *pages = get_pages(argument);
    if (pages == NULL)
        return NULL;
    pages_leave(pages);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(unmap_doc, "unmap(address, size). Raises OSError.");

static PyObject *py_unmap(PyObject *self, PyObject *args)
{
    (void)self;
    long long address;
    Py_ssize_t size;
    int failed;
    if (!PyArg_ParseTuple(args, "Ln", &address, &size))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = unmap((char *)(intptr_t)address, size);
    Py_END_ALLOW_THREADS
    if (failed)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

PyMethodDef memory_methods[] = {
    {"map", py_map, METH_VARARGS, map_doc},
    {"map_peer", py_map_peer, METH_VARARGS, map_peer_doc},
    {"unmap_peer", py_unmap_peer, METH_O, unmap_peer_doc},
    {"leave_peer", py_leave_peer, METH_O, leave_peer_doc},
    {"populate", py_populate, METH_VARARGS, populate_doc},
    {"huge_make", py_huge_make, METH_VARARGS, huge_make_doc},
    {"huge_merge", py_huge_merge, METH_VARARGS, huge_merge_doc},
    {"unmap", py_unmap, METH_VARARGS, unmap_doc},
    {NULL, NULL, 0, NULL},
};
