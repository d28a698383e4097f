/* Lists of int as vectors, by the limited API alone: a wheel for all versions of Python has no other. */
#include "module_lists.h"

#include <stdint.h>

/* So many items are fetched ahead: the numbers of a long list are seldom in the processor's cache. */
enum { AHEAD = 64, WORD_BITS = 64 };

const char convert_list_doc[] =
    "convert_list(values, limit, stride, base, vector, distinct) -> how many numbers are the one before them\n"
    "plus 1; vector, a writable buffer of int64, now holds base + stride * number for each. -1 unless there\n"
    "are as many, each exactly an int from 0 to limit - 1 and, if distinct, listed once. Raises MemoryError.";

/* Where numbers go, and which are allowed. */
typedef struct {
    int64_t *vector;
    uint64_t stride, base; /* unsigned, whose overflow is defined */
    long long limit;
    uint64_t *seen; /* a bit per possible number, or NULL */
} Target;

static int is_new(uint64_t *seen, long long number)
{
    uint64_t *word = &seen[number / WORD_BITS], bit = UINT64_C(1) << (number % WORD_BITS);
    int found = (*word & bit) == 0;
    *word |= bit;
    return found;
}

/* Nothing here runs code of others, so that the list stays as it is. May leave an exception. */
static Py_ssize_t convert(PyObject *list, Py_ssize_t n, const Target *target)
{
    PyObject *items[AHEAD];
    Py_ssize_t fetched = 0, following = 0;
    long long before = -2;
    for (Py_ssize_t i = 0; i < n; i++) {
        for (; fetched < n && fetched < i + AHEAD; fetched++) {
            items[fetched % AHEAD] = PyList_GetItem(list, fetched);
            __builtin_prefetch(items[fetched % AHEAD]);
        }
        PyObject *item = items[i % AHEAD];
        if (item == NULL || !PyLong_CheckExact(item))
            return -1;
        long long number = PyLong_AsLongLong(item);
        if (number < 0 || number >= target->limit)
            return -1;
        if (target->seen != NULL && !is_new(target->seen, number))
            return -1;
        target->vector[i] = (int64_t)(target->base + target->stride * (uint64_t)number);
        following += number == before + 1;
        before = number;
    }
    return following;
}

PyObject *py_convert_list(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    if (nargs != 6 || !PyList_CheckExact(args[0])) {
        PyErr_SetString(PyExc_TypeError, "convert_list takes 6 arguments, the first one a list");
        return NULL;
    }
    Target target = {.limit = PyLong_AsLongLong(args[1])};
    target.stride = (uint64_t)PyLong_AsLongLong(args[2]);
    target.base = (uint64_t)PyLong_AsLongLong(args[3]);
    int distinct = PyObject_IsTrue(args[5]);
    Py_buffer view;
    if (PyErr_Occurred() ||
        PyObject_GetBuffer(args[4], &view, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0)
        return NULL;
    Py_ssize_t n = PyList_Size(args[0]), following = -1;
    int fits = view.len == n * 8, failed = 0;
    target.vector = view.buf;
    if (fits && distinct && target.limit > 0) {
        target.seen = PyMem_Calloc((size_t)(target.limit / WORD_BITS + 1), sizeof(*target.seen));
        failed = target.seen == NULL;
    }
    if (fits && !failed) {
        following = convert(args[0], n, &target);
        PyErr_Clear(); /* of a number that is too large */
    }
    PyMem_Free(target.seen);
    PyBuffer_Release(&view);
    return failed ? PyErr_NoMemory() : PyLong_FromSsize_t(following);
}
