/* The data path of the shm transport: vectored copies between local memory and a peer's memory,
 * which is either mapped here or reached with process_vm_readv/writev.
 *
 * Addresses come as three int64 vectors (local, remote, bytes). Remote addresses are the owner's; the
 * windows say what the owner offered and where it is mapped here. Every segment is checked before
 * the first byte moves. The GIL is released while bytes move. */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

enum { CHUNK = 1 << 20, PEER_CHECK_BYTES = 16 << 20, IOVECS = 64 };

/* Results of transfer(): what the Python side turns into errors. */
enum { DONE = 0, BAD_ADDRESS = 1, TIMED_OUT = 2, ABORTED = 3, PEER_GONE = 4, REVOKED = 5, FAILED = 6 };

/* A range of the owner's memory. mapped is 0 where it has to be reached through the process. */
typedef struct {
    int64_t base;
    int64_t size;
    int64_t mapped;
} Window;

/* One page per direction, shared by writer and owner: see fence.py. */
typedef struct {
    _Atomic int64_t active;
    _Atomic int64_t revoked;
} Fence;

typedef struct {
    int write;
    const Window *windows;
    Py_ssize_t n_windows;
    pid_t pid;
    int pidfd;
    const int64_t *local, *remote, *length;
    Py_ssize_t n;
    _Atomic int64_t *abort_flag;
    Fence *fence;
    int64_t deadline_ns;
    int64_t unchecked; /* bytes since the peer's process was looked at */
    int error;         /* errno of FAILED and BAD_ADDRESS */
    Py_ssize_t index;  /* segment of BAD_ADDRESS */
} Job;

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int peer_is_gone(int pidfd)
{
    struct pollfd p = {.fd = pidfd, .events = POLLIN};
    return pidfd >= 0 && poll(&p, 1, 0) > 0;
}

/* The window that holds [address, address + length), or NULL; windows are sorted by base. */
static const Window *find_window(const Job *job, int64_t address, int64_t length)
{
    Py_ssize_t low = 0, high = job->n_windows;
    while (low < high) {
        Py_ssize_t middle = (low + high) / 2;
        if (job->windows[middle].base <= address)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0)
        return NULL;
    const Window *w = &job->windows[low - 1];
    int64_t offset = address - w->base;
    return length <= w->size && offset <= w->size - length ? w : NULL;
}

static int check_segments(Job *job)
{
    const Window *w = NULL;
    for (Py_ssize_t i = 0; i < job->n; i++) {
        int64_t remote = job->remote[i], length = job->length[i];
        job->index = i;
        if (length <= 0 || job->local[i] <= 0 || remote <= 0)
            return BAD_ADDRESS;
        if (w == NULL || remote < w->base || length > w->size || remote - w->base > w->size - length)
            w = find_window(job, remote, length);
        if (w == NULL)
            return BAD_ADDRESS;
    }
    return DONE;
}

/* To be asked before every chunk. */
static int may_go_on(Job *job)
{
    if (atomic_load_explicit(job->abort_flag, memory_order_relaxed))
        return ABORTED;
    if (job->fence && atomic_load(&job->fence->revoked))
        return REVOKED;
    if (now_ns() >= job->deadline_ns)
        return TIMED_OUT;
    if (job->unchecked >= PEER_CHECK_BYTES) {
        job->unchecked = 0;
        if (peer_is_gone(job->pidfd))
            return PEER_GONE;
    }
    return DONE;
}

static int result_of_errno(Job *job)
{
    job->error = errno;
    if (errno == ESRCH)
        return PEER_GONE;
    return errno == EFAULT ? BAD_ADDRESS : FAILED;
}

/* Move a batch of pieces through the peer's process; a short count is continued. */
static int move_foreign(Job *job, struct iovec *mine, struct iovec *theirs, int count, int64_t bytes)
{
    int at = 0;
    while (bytes > 0) {
        ssize_t moved = job->write
            ? process_vm_writev(job->pid, mine + at, count - at, theirs + at, count - at, 0)
            : process_vm_readv(job->pid, mine + at, count - at, theirs + at, count - at, 0);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0)
            return result_of_errno(job);
        bytes -= moved;
        while (at < count && (size_t)moved >= mine[at].iov_len)
            moved -= mine[at++].iov_len;
        if (bytes > 0) {
            mine[at].iov_base = (char *)mine[at].iov_base + moved;
            mine[at].iov_len -= moved;
            theirs[at].iov_base = (char *)theirs[at].iov_base + moved;
            theirs[at].iov_len -= moved;
        }
    }
    return DONE;
}

/* Pieces that wait for one call into the peer's process. */
typedef struct {
    struct iovec mine[IOVECS], theirs[IOVECS];
    int count;
    int64_t bytes;
} Batch;

static int flush(Job *job, Batch *batch)
{
    int result = move_foreign(job, batch->mine, batch->theirs, batch->count, batch->bytes);
    batch->count = 0;
    batch->bytes = 0;
    return result;
}

static int move_piece(Job *job, Batch *batch, const Window *w, int64_t local, int64_t remote,
                      int64_t bytes)
{
    char *mine = (char *)(intptr_t)local;
    if (w->mapped) {
        char *theirs = (char *)(intptr_t)(w->mapped + (remote - w->base));
        memmove(job->write ? theirs : mine, job->write ? mine : theirs, bytes);
        return DONE;
    }
    batch->mine[batch->count] = (struct iovec){mine, bytes};
    batch->theirs[batch->count++] = (struct iovec){(void *)(intptr_t)remote, bytes};
    batch->bytes += bytes;
    return batch->count == IOVECS ? flush(job, batch) : DONE;
}

/* All segments, cut at chunk boundaries; between chunks it is asked whether to go on. */
static int move_all(Job *job)
{
    Batch batch = {.count = 0, .bytes = 0};
    const Window *w = NULL;
    int64_t room = CHUNK;
    int result = DONE;
    for (Py_ssize_t i = 0; i < job->n && result == DONE; i++) {
        int64_t local = job->local[i], remote = job->remote[i], left = job->length[i];
        if (w == NULL || remote < w->base || left > w->size || remote - w->base > w->size - left)
            w = find_window(job, remote, left);
        job->index = i;
        while (left > 0 && result == DONE) {
            int64_t piece = left < room ? left : room;
            result = move_piece(job, &batch, w, local, remote, piece);
            local += piece;
            remote += piece;
            left -= piece;
            room -= piece;
            job->unchecked += piece;
            if (room == 0 && result == DONE) {
                room = CHUNK;
                result = flush(job, &batch);
                if (result == DONE)
                    result = may_go_on(job);
            }
        }
    }
    return result == DONE ? flush(job, &batch) : result;
}

static int run(Job *job)
{
    int result = check_segments(job);
    if (result != DONE)
        return result;
    if (peer_is_gone(job->pidfd))
        return PEER_GONE;
    if (job->fence)
        atomic_fetch_add(&job->fence->active, 1); /* announced before "revoked" is read: fence.py */
    result = may_go_on(job);
    if (result == DONE)
        result = move_all(job);
    if (job->fence)
        atomic_fetch_sub(&job->fence->active, 1);
    if (result == DONE && atomic_load(job->abort_flag))
        return ABORTED;
    if (result == DONE && peer_is_gone(job->pidfd))
        return PEER_GONE;
    return result;
}

/* -- Python ---------------------------------------------------------------------------------- */

static int get_buffer(PyObject *object, Py_buffer *view, int flags)
{
    return PyObject_GetBuffer(object, view, flags | PyBUF_C_CONTIGUOUS);
}

/* Three vectors of equal length; returns the number of items, or -1 with an exception. */
static Py_ssize_t get_vectors(PyObject *const *objects, Py_buffer *views, int *taken)
{
    for (*taken = 0; *taken < 3; ++*taken)
        if (get_buffer(objects[*taken], &views[*taken], PyBUF_SIMPLE) < 0)
            return -1;
    if (views[0].len != views[1].len || views[0].len != views[2].len || views[0].len % 8 ||
        views[0].len == 0) {
        PyErr_SetString(PyExc_ValueError, "expected three int64 buffers of equal length, not empty");
        return -1;
    }
    return views[0].len / 8;
}

static void release(Py_buffer *views, int taken)
{
    while (taken-- > 0)
        PyBuffer_Release(&views[taken]);
}

PyDoc_STRVAR(transfer_doc,
"transfer(write, windows, pid, pidfd, local, remote, length, state, fence, deadline_ns)\n"
"-> (code, segment, errno). windows: int64 triples (owner's base, size, mapped base or 0) sorted by\n"
"base; state: writable buffer whose first int64 aborts when not 0; fence: address of the page, or 0;\n"
"deadline_ns: of CLOCK_MONOTONIC.");

static PyObject *py_transfer(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    Job job = {.index = 0};
    Py_buffer windows, state, vectors[3];
    int taken = 0;
    PyObject *answer = NULL;
    if (nargs != 10) {
        PyErr_SetString(PyExc_TypeError, "transfer takes 10 arguments");
        return NULL;
    }
    job.write = PyObject_IsTrue(args[0]);
    job.pid = (pid_t)PyLong_AsLong(args[2]);
    job.pidfd = (int)PyLong_AsLong(args[3]);
    job.fence = (Fence *)(intptr_t)PyLong_AsLongLong(args[8]);
    job.deadline_ns = PyLong_AsLongLong(args[9]);
    if (PyErr_Occurred() || get_buffer(args[1], &windows, PyBUF_SIMPLE) < 0)
        return NULL;
    if (get_buffer(args[7], &state, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&windows);
        return NULL;
    }
    job.n = get_vectors(args + 4, vectors, &taken);
    if (job.n > 0 && (state.len < 8 || windows.len % sizeof(Window))) {
        PyErr_SetString(PyExc_ValueError, "state needs 8 bytes, windows triples of int64");
    } else if (job.n > 0) {
        job.windows = windows.buf;
        job.n_windows = windows.len / sizeof(Window);
        job.abort_flag = state.buf;
        job.local = vectors[0].buf;
        job.remote = vectors[1].buf;
        job.length = vectors[2].buf;
        int code;
        Py_BEGIN_ALLOW_THREADS
        code = run(&job);
        Py_END_ALLOW_THREADS
        answer = Py_BuildValue("ini", code, job.index, job.error);
    }
    release(vectors, taken);
    PyBuffer_Release(&state);
    PyBuffer_Release(&windows);
    return answer;
}

PyDoc_STRVAR(copy_doc, "copy(dst, src, length): local copies, int64 vectors; ranges may overlap.");

static PyObject *py_copy(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    Py_buffer vectors[3];
    int taken = 0;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "copy takes 3 arguments");
        return NULL;
    }
    Py_ssize_t n = get_vectors(args, vectors, &taken);
    if (n > 0) {
        const int64_t *dst = vectors[0].buf, *src = vectors[1].buf, *length = vectors[2].buf;
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < n; i++)
            memmove((void *)(intptr_t)dst[i], (void *)(intptr_t)src[i], length[i]);
        Py_END_ALLOW_THREADS
    }
    release(vectors, taken);
    if (n < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* Without MADV_POPULATE (Linux before 5.14) the pages are touched one by one. */
static int touch(volatile char *memory, size_t size, int write)
{
    for (size_t at = 0; at < size; at += 4096) {
        char value = memory[at];
        if (write)
            memory[at] = value;
    }
    return 0;
}

PyDoc_STRVAR(map_doc,
"map(fd, size, writable, populate) -> address of a shared mapping. Raises OSError.");

static PyObject *py_map(PyObject *self, PyObject *args)
{
    (void)self;
    int fd, writable, populate, failed = 0;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "inpp", &fd, &size, &writable, &populate))
        return NULL;
    void *memory;
    Py_BEGIN_ALLOW_THREADS
    memory = mmap(NULL, size, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
    if (memory != MAP_FAILED && populate) {
        failed = madvise(memory, size, writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
        if (failed && errno == EINVAL)
            failed = touch(memory, size, writable);
        if (failed) {
            int error = errno == EFAULT ? ENOMEM : errno;
            munmap(memory, size);
            errno = error;
        }
    }
    Py_END_ALLOW_THREADS
    if (memory == MAP_FAILED || failed)
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromVoidPtr(memory);
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
    failed = munmap((void *)(intptr_t)address, size);
    Py_END_ALLOW_THREADS
    if (failed)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(revoke_doc, "revoke(fence): writers that have not begun will not begin.");

static PyObject *py_revoke(PyObject *self, PyObject *argument)
{
    (void)self;
    Fence *fence = PyLong_AsVoidPtr(argument);
    if (fence == NULL)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "fence is 0");
    atomic_store(&fence->revoked, 1);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(active_doc, "active(fence) -> number of writers inside.");

static PyObject *py_active(PyObject *self, PyObject *argument)
{
    (void)self;
    Fence *fence = PyLong_AsVoidPtr(argument);
    if (fence == NULL)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "fence is 0");
    return PyLong_FromLongLong(atomic_load(&fence->active));
}

static PyMethodDef methods[] = {
    {"transfer", (PyCFunction)(void (*)(void))py_transfer, METH_FASTCALL, transfer_doc},
    {"copy", (PyCFunction)(void (*)(void))py_copy, METH_FASTCALL, copy_doc},
    {"map", py_map, METH_VARARGS, map_doc},
    {"unmap", py_unmap, METH_VARARGS, unmap_doc},
    {"revoke", py_revoke, METH_O, revoke_doc},
    {"active", py_active, METH_O, active_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "datadist_shm._native",
    .m_doc = "Vectored copies, mappings and the fence of the shm transport.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *m = PyModule_Create(&module);
    if (m == NULL || PyModule_AddIntConstant(m, "DONE", DONE) < 0 ||
        PyModule_AddIntConstant(m, "BAD_ADDRESS", BAD_ADDRESS) < 0 ||
        PyModule_AddIntConstant(m, "TIMED_OUT", TIMED_OUT) < 0 ||
        PyModule_AddIntConstant(m, "ABORTED", ABORTED) < 0 ||
        PyModule_AddIntConstant(m, "PEER_GONE", PEER_GONE) < 0 ||
        PyModule_AddIntConstant(m, "REVOKED", REVOKED) < 0 ||
        PyModule_AddIntConstant(m, "FAILED", FAILED) < 0) {
        Py_XDECREF(m);
        return NULL;
    }
    return m;
}
