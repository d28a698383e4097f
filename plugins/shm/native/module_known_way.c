/* Few blocks over a route that core has looked up: conditions, plan, transfer and last look in one call,
 * which holds the GIL throughout. By the limited API alone, as module_lists.c. */
#include "module_known_way.h"

#include <stdint.h>

#include "module_path.h"
#include "transfer.h"

const char known_way_doc[] =
    "known_way(path, numbers, attributes, keys) -> call(theirs, ours, seconds) -> seconds that it took, or None.\n"
    "See KnownWay and Link.known_way. path: as of transfer. numbers, int64 in bytes: whether to write, address\n"
    "of the fence or 0, bytes of a block, tensors, stride and number of our blocks, of the peer's, bases of our\n"
    "tensors, of the peer's. attributes: (object, name, value, ...). keys: (dictionary, key, whether it is there, ...).";

/* What `numbers` holds. */
typedef struct {
    int64_t write, fence, block_bytes, tensors;
    int64_t local_stride, local_count, remote_stride, remote_count;
    int64_t bases[]; /* of ours, then of the peer's */
} Way;

enum { HEAD = sizeof(Way) / sizeof(int64_t), GROUP = 3 };

/* What is moved. */
typedef struct {
    int64_t local[BRIEF_SEGMENTS], remote[BRIEF_SEGMENTS], length[BRIEF_SEGMENTS];
    Py_ssize_t n;
} Segments;

/* The tuple that a call has as its self. */
enum { PATH, NUMBERS, ATTRIBUTES, KEYS, PARTS };

/* -- conditions ------------------------------------------------------------------------------ */

static int is_same(PyObject *found, PyObject *wanted)
{
    return found == wanted || (PyLong_CheckExact(found) && PyLong_CheckExact(wanted) &&
                               PyObject_RichCompareBool(found, wanted, Py_EQ) == 1);
}

/* 1, 0, or -1 with an exception. */
static int have_values(PyObject *attributes)
{
    for (Py_ssize_t i = 0; i < PyTuple_Size(attributes); i += GROUP) {
        PyObject *found =
            PyObject_GetAttr(PyTuple_GetItem(attributes, i), PyTuple_GetItem(attributes, i + 1));
        if (found == NULL)
            return -1;
        int same = is_same(found, PyTuple_GetItem(attributes, i + 2));
        Py_DECREF(found);
        if (!same)
            return 0;
    }
    return 1;
}

/* 1, 0, or -1 with an exception. */
static int have_keys(PyObject *keys)
{
    for (Py_ssize_t i = 0; i < PyTuple_Size(keys); i += GROUP) {
        int found = PyDict_Contains(PyTuple_GetItem(keys, i), PyTuple_GetItem(keys, i + 1));
        if (found < 0)
            return -1;
        if (found != (PyTuple_GetItem(keys, i + 2) == Py_True))
            return 0;
    }
    return 1;
}

/* -- plan ------------------------------------------------------------------------------------ */

/* Whether every item is exactly an int from 0 to count - 1; blocks then has them. */
static int read_blocks(PyObject *list, Py_ssize_t n, int64_t count, int64_t *blocks)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PyList_GetItem(list, i);
        if (item == NULL || !PyLong_CheckExact(item))
            return 0;
        blocks[i] = PyLong_AsLongLong(item); /* -1 with an exception where it is too large */
        if (blocks[i] < 0 || blocks[i] >= count)
            return 0;
    }
    return 1;
}

static int has_repeated(const int64_t *blocks, Py_ssize_t n)
{
    for (Py_ssize_t i = 1; i < n; i++)
        for (Py_ssize_t j = 0; j < i; j++)
            if (blocks[i] == blocks[j])
                return 1;
    return 0;
}

static void place(int64_t *segments, const int64_t *blocks, Py_ssize_t n, const int64_t *bases,
                  int64_t tensors, int64_t stride)
{
    for (Py_ssize_t i = 0; i < n; i++)
        for (int64_t tensor = 0; tensor < tensors; tensor++)
            *segments++ = bases[tensor] + blocks[i] * stride;
}

/* Whether two lists are in order, and so few that they are moved here; may leave an exception. */
static int plan(const Way *way, PyObject *theirs, PyObject *ours, Segments *segments)
{
    int64_t remote[BRIEF_SEGMENTS], local[BRIEF_SEGMENTS];
    if (!PyList_CheckExact(theirs) || !PyList_CheckExact(ours))
        return 0;
    Py_ssize_t n = PyList_Size(ours);
    if (n == 0 || n != PyList_Size(theirs) || n > BRIEF_SEGMENTS / way->tensors)
        return 0;
    if (!read_blocks(theirs, n, way->remote_count, remote) ||
        !read_blocks(ours, n, way->local_count, local) || has_repeated(way->write ? remote : local, n))
        return 0;
    place(segments->local, local, n, way->bases, way->tensors, way->local_stride);
    place(segments->remote, remote, n, way->bases + way->tensors, way->tensors, way->remote_stride);
    segments->n = n * way->tensors;
    for (Py_ssize_t i = 0; i < segments->n; i++)
        segments->length[i] = way->block_bytes;
    return 1;
}

/* -- the call -------------------------------------------------------------------------------- */

/* Whether everything was moved, and nothing was heard that may change what that means. */
static int move(Job *job, const Way *way, const Segments *segments)
{
    job->write = way->write != 0;
    job->fence = (Fence *)(intptr_t)way->fence;
    job->local = segments->local;
    job->remote = segments->remote;
    job->length = segments->length;
    job->n = segments->n;
    if (check(job) != DONE || !is_brief(job) || !is_safe(job) ||
        (job->write && is_control_readable(job)))
        return 0;
    return transfer(job) == DONE && (job->write || !job->control_readable);
}

/* Seconds, or None; NULL with an exception where the path is not valid. */
static PyObject *move_over(PyObject *path, const Way *way, const Segments *segments, double seconds)
{
    Job job = {.index = 0};
    Py_buffer view;
    int64_t began = now_ns();
    job.deadline_ns = deadline_after(seconds);
    if (PyObject_GetBuffer(path, &view, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0)
        return NULL;
    int valid = read_path(&job, &view), moved = valid && move(&job, way, segments);
    PyBuffer_Release(&view);
    if (moved)
        return PyFloat_FromDouble((double)(now_ns() - began) * 1e-9);
    return valid ? Py_NewRef(Py_None) : NULL;
}

static PyObject *call(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    const Way *way = (const Way *)PyBytes_AsString(PyTuple_GetItem(self, NUMBERS));
    Segments segments;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "expected two lists of blocks, and seconds");
        return NULL;
    }
    double seconds = PyFloat_AsDouble(args[2]);
    if (PyErr_Occurred())
        return NULL;
    if (!plan(way, args[0], args[1], &segments)) {
        PyErr_Clear(); /* of a number that is too large */
        Py_RETURN_NONE;
    }
    int holds = have_values(PyTuple_GetItem(self, ATTRIBUTES));
    if (holds == 1)
        holds = have_keys(PyTuple_GetItem(self, KEYS));
    if (holds < 0)
        return NULL;
    if (holds == 0)
        Py_RETURN_NONE;
    return move_over(PyTuple_GetItem(self, PATH), way, &segments, seconds);
}

static PyMethodDef call_method = {
    "known_way", (PyCFunction)(void (*)(void))call, METH_FASTCALL,
    "call(theirs, ours, seconds) -> seconds that it took, or None",
};

/* Whether a tuple is one of groups of three. */
static int is_grouped(PyObject *tuple)
{
    return PyTuple_CheckExact(tuple) && PyTuple_Size(tuple) % GROUP == 0;
}

static int are_dictionaries(PyObject *keys)
{
    for (Py_ssize_t i = 0; i < PyTuple_Size(keys); i += GROUP)
        if (!PyDict_Check(PyTuple_GetItem(keys, i)))
            return 0;
    return 1;
}

static int are_valid(PyObject *numbers)
{
    if (!PyBytes_CheckExact(numbers) || PyBytes_Size(numbers) < (Py_ssize_t)sizeof(Way))
        return 0;
    const Way *way = (const Way *)PyBytes_AsString(numbers);
    return way->tensors > 0 && way->tensors <= BRIEF_SEGMENTS && way->block_bytes > 0 &&
           PyBytes_Size(numbers) == (HEAD + 2 * way->tensors) * (Py_ssize_t)sizeof(int64_t);
}

PyObject *py_known_way(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    if (nargs != PARTS || !are_valid(args[NUMBERS]) || !is_grouped(args[ATTRIBUTES]) ||
        !is_grouped(args[KEYS]) || !are_dictionaries(args[KEYS])) {
        PyErr_SetString(PyExc_TypeError, "known_way takes a path, numbers, attributes and keys");
        return NULL;
    }
    PyObject *parts = PyTuple_Pack(PARTS, args[PATH], args[NUMBERS], args[ATTRIBUTES], args[KEYS]);
    if (parts == NULL)
        return NULL;
    PyObject *made = PyCFunction_NewEx(&call_method, parts, NULL);
    Py_DECREF(parts);
    return made;
}
