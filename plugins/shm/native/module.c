/* The Python module datadist_shm._native: vectored copies, mappings and the fence.
 *
 * Addresses come as int64 vectors. The GIL is released while more than a few bytes move, and while pages
 * are made. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "copy.h"
#include "flight.h"
#include "huge.h"
#include "module_known_way.h"
#include "module_lists.h"
#include "module_memory.h"
#include "module_path.h"
#include "parallel.h"
#include "transfer.h"
#include "tuning.h"

/* Three vectors of equal length; returns the number of items, or -1 with an exception. */
static Py_ssize_t get_vectors(PyObject *const *objects, Py_buffer *views, int *taken)
{
    for (*taken = 0; *taken < 3; ++*taken)
        if (PyObject_GetBuffer(objects[*taken], &views[*taken], PyBUF_C_CONTIGUOUS) < 0)
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

/* The two arguments that say how to copy; 0 with an exception where they are not valid. */
static int get_copy_mode(PyObject *const *args, int *threads, int *kernel)
{
    *threads = (int)PyLong_AsLong(args[0]);
    *kernel = (int)PyLong_AsLong(args[1]);
    if (PyErr_Occurred())
        return 0;
    if (!is_number_of_threads(*threads) || copy_kernel(*kernel) == NULL) {
        PyErr_SetString(PyExc_ValueError, "threads or kernel out of range");
        return 0;
    }
    return 1;
}

PyDoc_STRVAR(transfer_doc,
"transfer(write, path, local, remote, length, fence, seconds, flights) -> whether control was readable\n"
"at the end, or (code, segment, errno) of a failure. A transfer that goes on is put into the list\n"
"flights before this returns, so that no handler of a signal can lose it. Any thread; several at a time.\n"
"path: writable int64 buffer of abort (not 0 ends what is in flight), pid, pidfd or -1, control (a\n"
"descriptor) or -1, threads as tuned if negative, kernel of KERNELS or AUTO, descriptors of our and the peer's pagemap or -1,\n"
"number of own pools, these as pairs (base, size), then (owner's base, size, mapped base or 0, pages of\n"
"map_peer or 0) sorted by base; fence: address of the page, or 0; seconds: how long it may take, from now.");

/* What a transfer uses, for as long as it goes on. */
typedef struct {
    Py_buffer path, vectors[3];
    int taken;
    Flight *flight; /* NULL: it has ended */
} Used;

static const char FLIGHT[] = "datadist_shm flight";

static void thread_state(Used *used)
{
    release(used->vectors, used->taken);
    PyBuffer_Release(&used->path);
}

/* One that nobody asks about any more keeps what it uses, for good if need be. */
static void forget_flight(PyObject *capsule)
{
    Used *used = PyCapsule_GetPointer(capsule, FLIGHT);
    if (used->flight != NULL && !settle(used->flight))
        return;
    if (used->flight != NULL)
        thread_state(used);
    PyMem_Free(used);
}

/* The capsule of a transfer that goes on, which takes over what it uses; NULL with an exception. */
static PyObject *keep(const Used *used)
{
    Used *kept = PyMem_Malloc(sizeof(*kept));
    if (kept == NULL)
        return PyErr_NoMemory();
    *kept = *used;
    return PyCapsule_New(kept, FLIGHT, forget_flight);
}

PyDoc_STRVAR(settled_doc, "settled(flight) -> whether a transfer that went on has ended by now.");

static PyObject *py_settled(PyObject *self, PyObject *capsule)
{
    (void)self;
    Used *used = PyCapsule_GetPointer(capsule, FLIGHT);
    if (used == NULL)
        return NULL;
    if (used->flight != NULL && settle(used->flight)) {
        used->flight = NULL;
        thread_state(used);
    }
    return PyBool_FromLong(used->flight == NULL);
}

/* Move what was checked: here where no page can keep us waiting, else by another thread. */
static int move(Job *job, Flight **left)
{
    int brief = is_brief(job), safe = is_safe(job);
    /* Another thread that computes would keep the GIL for 5 ms, where a block takes 1 us. */
    PyThreadState *without_gil = brief && safe ? NULL : PyEval_SaveThread();
    int code = safe ? transfer(job) : fly(job, left);
    if (without_gil != NULL)
        PyEval_RestoreThread(without_gil);
    return code;
}

static PyObject *py_transfer(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    Job job = {.index = 0};
    Used used = {.taken = 0};
    PyObject *answer = NULL;
    if (nargs != 8 || !PyList_CheckExact(args[7])) {
        PyErr_SetString(PyExc_TypeError, "transfer takes 8 arguments, the last one a list");
        return NULL;
    }
    job.write = PyObject_IsTrue(args[0]);
    job.fence = (Fence *)(intptr_t)PyLong_AsLongLong(args[5]);
    job.deadline_ns = deadline_after(PyFloat_AsDouble(args[6]));
    if (PyErr_Occurred() ||
        PyObject_GetBuffer(args[1], &used.path, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0)
        return NULL;
    if (read_path(&job, &used.path) && (job.n = get_vectors(args + 2, used.vectors, &used.taken)) > 0) {
        job.local = used.vectors[0].buf;
        job.remote = used.vectors[1].buf;
        job.length = used.vectors[2].buf;
        int code = check(&job);
        if (code == DONE)
            code = move(&job, &used.flight);
        if (used.flight != NULL) {
            PyObject *flight = keep(&used); /* without memory for it, what it uses stays for good */
            int noted = flight != NULL && PyList_Append(args[7], flight) == 0;
            Py_XDECREF(flight);
            return noted ? Py_BuildValue("ini", code, (Py_ssize_t)job.index, job.error) : NULL;
        }
        answer = code == DONE ? PyBool_FromLong(job.control_readable)
                              : Py_BuildValue("ini", code, (Py_ssize_t)job.index, job.error);
    }
    thread_state(&used);
    return answer;
}

PyDoc_STRVAR(copy_doc,
"copy(dst, src, length, threads, kernel): local copies, int64 vectors. Ranges may overlap; segments\n"
"are then moved in order. threads, at most; if negative, as many as tuning chose, at most so many.\n"
"kernel: of KERNELS, or AUTO.");

static PyObject *py_copy(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    Py_buffer vectors[3];
    int taken = 0, threads, kernel;
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "copy takes 5 arguments");
        return NULL;
    }
    if (!get_copy_mode(args + 3, &threads, &kernel))
        return NULL;
    Py_ssize_t n = get_vectors(args, vectors, &taken);
    if (n > 0) {
        Py_BEGIN_ALLOW_THREADS
        copy_local(vectors[0].buf, vectors[1].buf, vectors[2].buf, n, threads, kernel);
        Py_END_ALLOW_THREADS
    }
    release(vectors, taken);
    if (n < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(tune_doc,
"tune(threads) -> (kernel, threads) that are chosen, {kernel: bytes per second}, the threads of these\n"
"figures, [(threads, bytes per second)] of the chosen kernel. threads: at most. Raises OSError.");

static PyObject *speeds_of_kernels(const Tuning *tuning)
{
    PyObject *found = PyDict_New();
    for (int kernel = 0; found != NULL && kernel < KERNELS; kernel++) {
        if (tuning->kernels[kernel] == 0)
            continue;
        PyObject *speed = PyFloat_FromDouble(tuning->kernels[kernel]);
        if (speed == NULL || PyDict_SetItemString(found, find_kernel(kernel)->name, speed) < 0)
            Py_CLEAR(found);
        Py_XDECREF(speed);
    }
    return found;
}

static PyObject *speeds_of_threads(const Tuning *tuning)
{
    PyObject *found = PyList_New(0);
    for (int step = 0; found != NULL && step < tuning->steps; step++) {
        PyObject *pair = Py_BuildValue("id", tuning->threads[step], tuning->scaling[step]);
        if (pair == NULL || PyList_Append(found, pair) < 0)
            Py_CLEAR(found);
        Py_XDECREF(pair);
    }
    return found;
}

static PyObject *py_tune(PyObject *self, PyObject *argument)
{
    (void)self;
    Tuning tuning;
    int error, most = (int)PyLong_AsLong(argument);
    if (PyErr_Occurred())
        return NULL;
    if (most < 1 || most > MAX_THREADS)
        return PyErr_Format(PyExc_ValueError, "%d threads are out of range", most);
    Py_BEGIN_ALLOW_THREADS
    error = tune(most, &tuning);
    Py_END_ALLOW_THREADS
    errno = error;
    if (error)
        return PyErr_SetFromErrno(PyExc_OSError);
    return Py_BuildValue("(si)NiN", find_kernel(tuning.chosen_kernel)->name, tuning.chosen_threads,
                         speeds_of_kernels(&tuning), tuning.kernel_threads,
                         speeds_of_threads(&tuning));
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
    {"convert_list", (PyCFunction)(void (*)(void))py_convert_list, METH_FASTCALL, convert_list_doc},
    {"known_way", (PyCFunction)(void (*)(void))py_known_way, METH_FASTCALL, known_way_doc},
    {"tune", py_tune, METH_O, tune_doc},
    {"settled", py_settled, METH_O, settled_doc},
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

static const struct {
    const char *name;
    int value;
} constants[] = {
    {"DONE", DONE},           {"BAD_ADDRESS", BAD_ADDRESS}, {"TIMED_OUT", TIMED_OUT},
    {"ABORTED", ABORTED},     {"PEER_GONE", PEER_GONE},     {"REVOKED", REVOKED},
    {"FAILED", FAILED},       {"MAX_THREADS", MAX_THREADS}, {"AUTO", KERNEL_AUTO},
    {"BRIEF_SEGMENTS", BRIEF_SEGMENTS},
    {"HUGE_REFUSED", HUGE_REFUSED}, {"HUGE_SHORT", HUGE_SHORT}, {"HUGE_MADE", HUGE_MADE},
};

/* KERNELS: the kernels that this machine has, by name. */
static int add_kernels(PyObject *m)
{
    PyObject *found = PyDict_New();
    if (found == NULL)
        return -1;
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        const Kernel *here = find_kernel(kernel);
        PyObject *number = here ? PyLong_FromLong(kernel) : NULL;
        int failed = number && PyDict_SetItemString(found, here->name, number) < 0;
        Py_XDECREF(number);
        if (failed || PyErr_Occurred()) {
            Py_DECREF(found);
            return -1;
        }
    }
    if (PyModule_AddObject(m, "KERNELS", found) < 0) {
        Py_DECREF(found);
        return -1;
    }
    return 0;
}

/* For tests: the environment is read once, before anything can copy. */
static void read_environment(void)
{
    const char *text = getenv("DATADIST_ALWAYS_HELP");
    always_help = text != NULL && strcmp(text, "1") == 0;
}

PyMODINIT_FUNC PyInit__native(void)
{
    read_environment();
    PyObject *m = PyModule_Create(&module);
    int failed = m == NULL || PyModule_AddFunctions(m, memory_methods) < 0;
    for (size_t i = 0; !failed && i < sizeof(constants) / sizeof(*constants); i++)
        failed = PyModule_AddIntConstant(m, constants[i].name, constants[i].value) < 0;
    if (failed || add_kernels(m) < 0) {
        Py_XDECREF(m);
        return NULL;
    }
    return m;
}
