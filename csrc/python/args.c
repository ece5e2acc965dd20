/* Parses arguments by their tables; the only file that looks into Python objects. */
#include "python/args.h"

#include <string.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#include "core/memory.h"
#include "core/threads.h"
#include "python/module.h"

/* Sizes bound so far to the letters of shapes; -1: unbound. */
typedef struct {
    ptrdiff_t size[128];
} letters;

static const char *
dtype_name(int type)
{
    switch (type) {
    case NPY_FLOAT32:
        return "float32";
    case NPY_FLOAT64:
        return "float64";
    case NPY_UINT8:
        return "uint8";
    case NPY_INT8:
        return "int8";
    case NPY_UINT16:
        return "uint16";
    case NPY_INT16:
        return "int16";
    case NPY_FLOAT16:
        return "float16";
    case NPY_INT32:
        return "int32";
    case NPY_INT64:
        return "int64";
    case NPY_UINT64:
        return "uint64";
    case LBQ_FLOAT32_OR_64:
        return "float32 or float64";
    default:
        return "another dtype";
    }
}

static int
fits_dtype(int found, int expected)
{
    return expected == LBQ_FLOAT32_OR_64 ? found == NPY_FLOAT32 || found == NPY_FLOAT64
                                         : found == expected;
}

static int
check_size(const char *function, const lbq_arg *arg, int axis, unsigned char letter,
           int may_be_empty, ptrdiff_t size, letters *sizes)
{
    const int fixed = letter >= '0' && letter <= '9';
    ptrdiff_t *const bound = &sizes->size[letter];
    const ptrdiff_t expected = fixed ? letter - '0' : *bound < 0 ? size : *bound;
    if (size != expected) {
        PyErr_Format(PyExc_ValueError,
                     "%s: axis %d (%c) of %s has size %zd, expected %zd",
                     function,
                     axis,
                     letter,
                     arg->name,
                     (Py_ssize_t)size,
                     (Py_ssize_t)expected);
        return -1;
    }
    if (size == 0 && !may_be_empty) {
        PyErr_Format(PyExc_ValueError,
                     "%s: axis %d (%c) of %s has size 0, expected at least 1",
                     function,
                     axis,
                     letter,
                     arg->name);
        return -1;
    }
    *bound = size;
    return 0;
}

static int
check_dtype(const char *function, const lbq_arg *arg, PyArrayObject *array)
{
    if (fits_dtype(PyArray_TYPE(array), arg->dtype) && PyArray_ISNOTSWAPPED(array))
        return 0;
    PyErr_Format(PyExc_TypeError,
                 "%s: %s has dtype %s, expected %s",
                 function,
                 arg->name,
                 dtype_name(PyArray_TYPE(array)),
                 dtype_name(arg->dtype));
    return -1;
}

static int
check_rank(const char *function, const lbq_arg *arg, PyArrayObject *array)
{
    int rank = 0;
    for (const char *at = arg->text; *at; at++)
        rank += *at != '*';
    if (PyArray_NDIM(array) == rank)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "%s: %s has %d axes, expected %d (%s)",
                 function,
                 arg->name,
                 PyArray_NDIM(array),
                 rank,
                 arg->text);
    return -1;
}

static int
check_memory(const char *function, const lbq_arg *arg, PyArrayObject *array)
{
    if (!PyArray_IS_C_CONTIGUOUS(array) || !PyArray_ISALIGNED(array)) {
        PyErr_Format(PyExc_ValueError, "%s: %s is not C-contiguous", function, arg->name);
        return -1;
    }
    if (arg->kind == LBQ_ARG_OUT && !PyArray_ISWRITEABLE(array)) {
        PyErr_Format(PyExc_ValueError, "%s: %s is read-only", function, arg->name);
        return -1;
    }
    return 0;
}

/* Checks each axis against its letter and copies its size to `dims`. */
static int
bind_axes(const char *function, const lbq_arg *arg, PyArrayObject *array, letters *sizes,
          ptrdiff_t *dims)
{
    const char *text = arg->text;
    for (int axis = 0; axis < PyArray_NDIM(array); axis++) {
        const unsigned char letter = (unsigned char)*text++;
        const ptrdiff_t size = PyArray_DIM(array, axis);
        if (check_size(function, arg, axis, letter, *text == '*', size, sizes) < 0)
            return -1;
        text += *text == '*';
        dims[axis] = size;
    }
    return 0;
}

static int
parse_array(const char *function, const lbq_arg *arg, PyObject *value, letters *sizes)
{
    lbq_array *const to = arg->to;
    *to = (lbq_array){0};
    if (arg->or_none && value == Py_None)
        return 0;
    if (!PyArray_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: %s is not an ndarray", function, arg->name);
        return -1;
    }
    PyArrayObject *const array = (PyArrayObject *)value;
    if (check_dtype(function, arg, array) < 0 || check_rank(function, arg, array) < 0 ||
        check_memory(function, arg, array) < 0 ||
        bind_axes(function, arg, array, sizes, to->dims) < 0)
        return -1;
    to->data = PyArray_DATA(array);
    to->dtype = PyArray_TYPE(array);
    to->item_bytes = (size_t)PyArray_ITEMSIZE(array);
    return 0;
}

static int
parse_handles(const char *function, const lbq_arg *arg, PyObject *value)
{
    if (!PyTuple_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: %s is not a tuple", function, arg->name);
        return -1;
    }
    const lbq_handles handles = {.tuple = value, .type = arg->text, .count = PyTuple_Size(value)};
    for (ptrdiff_t i = 0; i < handles.count; i++)
        if (!PyCapsule_IsValid(PyTuple_GetItem(value, i), arg->text)) {
            PyErr_Format(PyExc_TypeError,
                         "%s: %s[%zd] is not a %s",
                         function,
                         arg->name,
                         (Py_ssize_t)i,
                         arg->text);
            return -1;
        }
    *(lbq_handles *)arg->to = handles;
    return 0;
}

static int
parse_handle(const char *function, const lbq_arg *arg, PyObject *value)
{
    void *pointer = NULL;
    if (!(arg->or_none && value == Py_None)) {
        if (!PyCapsule_IsValid(value, arg->text)) {
            PyErr_Format(PyExc_TypeError, "%s: %s is not a %s", function, arg->name, arg->text);
            return -1;
        }
        pointer = PyCapsule_GetPointer(value, arg->text);
    }
    memcpy(arg->to, &pointer, sizeof pointer);
    return 0;
}

static int
out_of_range(const char *function, const lbq_arg *arg, PyObject *value)
{
    const int whole = arg->kind == LBQ_ARG_INT;
    PyObject *const low = whole ? PyLong_FromDouble(arg->low) : PyFloat_FromDouble(arg->low);
    PyObject *const high = whole ? PyLong_FromDouble(arg->high) : PyFloat_FromDouble(arg->high);
    PyErr_Format(
        PyExc_ValueError, "%s: %s is %S, expected %S to %S", function, arg->name, value, low, high);
    Py_XDECREF(low);
    Py_XDECREF(high);
    return -1;
}

static int
parse_int(const char *function, const lbq_arg *arg, PyObject *value)
{
    if (PyFloat_Check(value) || PyBool_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: %s is not an integer", function, arg->name);
        return -1;
    }
    const Py_ssize_t number = PyNumber_AsSsize_t(value, PyExc_ValueError);
    if (number == -1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_ValueError)) /* not an integer at all */
            return -1;
        PyErr_Clear();
        return out_of_range(function, arg, value);
    }
    if ((double)number < arg->low || (double)number > arg->high)
        return out_of_range(function, arg, value);
    *(Py_ssize_t *)arg->to = number;
    return 0;
}

static int
parse_float(const char *function, const lbq_arg *arg, PyObject *value)
{
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred())
        return -1;
    if (!(number >= arg->low && number <= arg->high))
        return out_of_range(function, arg, value);
    *(double *)arg->to = number;
    return 0;
}

static int
parse_bool(const char *function, const lbq_arg *arg, PyObject *value)
{
    if (!PyBool_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: %s is not a bool", function, arg->name);
        return -1;
    }
    *(int *)arg->to = value == Py_True;
    return 0;
}

static int
parse_text(const char *function, const lbq_arg *arg, PyObject *value)
{
    if (!PyUnicode_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: %s is not a str", function, arg->name);
        return -1;
    }
    *(const char **)arg->to = PyUnicode_AsUTF8AndSize(value, NULL);
    return *(const char **)arg->to ? 0 : -1;
}

static int
parse_value(const char *function, const lbq_arg *arg, PyObject *value, letters *sizes)
{
    switch (arg->kind) {
    case LBQ_ARG_IN:
    case LBQ_ARG_OUT:
        return parse_array(function, arg, value, sizes);
    case LBQ_ARG_HANDLES:
        return parse_handles(function, arg, value);
    case LBQ_ARG_HANDLE:
        return parse_handle(function, arg, value);
    case LBQ_ARG_INT:
        return parse_int(function, arg, value);
    case LBQ_ARG_FLOAT:
        return parse_float(function, arg, value);
    case LBQ_ARG_BOOL:
        return parse_bool(function, arg, value);
    case LBQ_ARG_TEXT:
        return parse_text(function, arg, value);
    }
    return -1;
}

/* Bytes of the array given; 0 for None. */
static size_t
bytes_of(const lbq_arg *arg)
{
    const lbq_array *const array = arg->to;
    if (!array->data)
        return 0;
    size_t bytes = array->item_bytes;
    int axis = 0;
    for (const char *at = arg->text; *at; at++)
        if (*at != '*')
            bytes *= (size_t)array->dims[axis++];
    return bytes;
}

/* An output that shares memory with another array would change data that is still to be read or
 * already checked. */
static int
check_overlap(const char *function, const lbq_arg *out, const lbq_arg *other)
{
    const uintptr_t a = (uintptr_t)((lbq_array *)out->to)->data;
    const uintptr_t b = (uintptr_t)((lbq_array *)other->to)->data;
    const size_t a_bytes = bytes_of(out), b_bytes = bytes_of(other);
    if (a_bytes == 0 || b_bytes == 0 || a + a_bytes <= b || b + b_bytes <= a)
        return 0;
    if (out->over && strcmp(out->over, other->name) == 0 && a == b && a_bytes == b_bytes)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "%s: %s shares memory with %s, expected separate arrays",
                 function,
                 out->name,
                 other->name);
    return -1;
}

static int
is_array(const lbq_arg *arg)
{
    return arg->kind == LBQ_ARG_IN || arg->kind == LBQ_ARG_OUT;
}

static int
check_overlaps(const char *function, const lbq_arg *spec, size_t count)
{
    for (size_t i = 0; i < count; i++)
        for (size_t j = 0; spec[i].kind == LBQ_ARG_OUT && j < count; j++)
            if (j != i && is_array(&spec[j]) && check_overlap(function, &spec[i], &spec[j]) < 0)
                return -1;
    return 0;
}

int
lbq_parse(const char *function, const lbq_arg *spec, size_t count, PyObject *args, PyObject *kwargs)
{
    letters sizes;
    memset(&sizes, 0xff, sizeof sizes);
    const Py_ssize_t given = PyTuple_Size(args);
    Py_ssize_t positional = 0, keywords = 0;
    for (size_t i = 0; i < count; i++) {
        const lbq_arg *const arg = &spec[i];
        PyObject *value;
        if (arg->kind <= LBQ_ARG_HANDLE) {
            value = positional < given ? PyTuple_GetItem(args, positional) : NULL;
            positional++;
        } else {
            value = kwargs ? PyDict_GetItemString(kwargs, arg->name) : NULL;
            keywords += value != NULL;
        }
        if (!value) {
            PyErr_Format(PyExc_TypeError, "%s: %s is missing", function, arg->name);
            return -1;
        }
        if (parse_value(function, arg, value, &sizes) < 0)
            return -1;
    }
    if (given > positional || (kwargs && PyDict_Size(kwargs) > keywords)) {
        PyErr_Format(PyExc_TypeError, "%s: takes no further arguments", function);
        return -1;
    }
    return check_overlaps(function, spec, count);
}

lbq_status
lbq_check_axis(const lbq_array *array, const char *name, int axis, const char *what,
               ptrdiff_t expected)
{
    LBQ_REQUIRE(!array->data || array->dims[axis] == expected,
                LBQ_BAD_SHAPE,
                "axis %d of %s has size %td, expected %s = %td",
                axis,
                name,
                array->dims[axis],
                what,
                expected);
    return LBQ_OK;
}

void *
lbq_handle_at(const lbq_handles *handles, ptrdiff_t index)
{
    return PyCapsule_GetPointer(PyTuple_GetItem(handles->tuple, index), handles->type);
}

/* Python runs signal handlers on the main thread. Other threads must not wait for the GIL during a
 * call: at interpreter shutdown that would end them there. */
static bool
is_main_thread(void)
{
#ifdef __linux__
    return syscall(SYS_gettid) == getpid();
#else
    return true;
#endif
}

/* Runs the handlers of pending signals; the call ends if one of them raises. */
static bool
run_signal_handlers(lbq_watch *watch)
{
    lbq_running *const running = (lbq_running *)watch;
    if (!is_main_thread())
        return false;
    const pid_t process = getpid();
    PyEval_RestoreThread(running->released);
    bool raised = PyErr_CheckSignals() < 0;
    if (!raised && getpid() != process) {
        PyErr_SetString(PyExc_RuntimeError,
                        "a signal handler forked: the child does not have this call's threads");
        raised = true;
    }
    running->released = PyEval_SaveThread();
    return raised;
}

void
lbq_run_begin(lbq_running *running)
{
    running->outer_threads = lbq_settle_threads(lbq_threads());
    running->released = PyEval_SaveThread();
    running->outer = lbq_watch_open(&running->watch, run_signal_handlers);
}

void
lbq_run_end(lbq_running *running)
{
    lbq_watch_join(running->outer);
    PyEval_RestoreThread(running->released);
    lbq_settle_threads(running->outer_threads);
}

PyObject *
lbq_result(PyObject *module, lbq_status status)
{
    const lbq_module_state *const state = PyModule_GetState(module);
    switch (status) {
    case LBQ_OK:
        Py_RETURN_NONE;
    case LBQ_BAD_VALUE:
    case LBQ_BAD_SHAPE:
        PyErr_SetString(PyExc_ValueError, lbq_message());
        return NULL;
    case LBQ_NO_MEMORY:
        PyErr_SetString(PyExc_MemoryError, lbq_message());
        return NULL;
    case LBQ_NOT_POSITIVE_DEFINITE:
        PyErr_SetString(state->numerical_error, lbq_message());
        return NULL;
    case LBQ_BAD_FORMAT:
        PyErr_SetString(state->format_error, lbq_message());
        return NULL;
    case LBQ_INTERRUPTED: /* a signal handler has raised */
        return NULL;
    }
    PyErr_SetString(PyExc_SystemError, "unknown status");
    return NULL;
}

static void
handle_free(PyObject *capsule)
{
    PyObject *const owned = PyCapsule_GetContext(capsule);
    lbq_free(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
    Py_XDECREF(owned);
}

PyObject *
lbq_handle_new(const char *type, void *block, PyObject *args)
{
    PyObject *const capsule = PyCapsule_New(block, type, handle_free);
    if (!capsule) {
        lbq_free(block);
        return NULL;
    }
    Py_INCREF(args);
    PyCapsule_SetContext(capsule, args);
    return capsule;
}
