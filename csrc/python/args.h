/* Arguments of bound functions, checked by table.
 *
 * A binding lists what it accepts in one table and makes one call:
 *
 *     LBQ_BINDING(scale_rows)
 *     {
 *         lbq_array x;
 *         double factor;
 *         const lbq_arg spec[] = {
 *             LBQ_INOUT("x", &x, NPY_FLOAT32, "rc"),
 *             LBQ_FLOAT("factor", &factor, 0, 1e30),
 *         };
 *         LBQ_PARSE("scale_rows", spec);
 *         LBQ_RUN(lbq_scale_rows(x.data, x.dims[0], x.dims[1], (float)factor));
 *     }
 *
 * Arrays and handles are positional, in the order of the table, of the exact dtype and
 * C-contiguous: never converted, never copied, borrowed for the call. A shape is one letter per
 * axis, as in einsum; a letter has one size per call, at least 1, or at least 0 where '*' follows
 * it ("t*k": zero tokens are allowed); a digit is that size. No output shares memory with another
 * array, except that LBQ_OUT_OVER may be the very array it names. Numbers, flags and texts are
 * keyword-only and required, numbers within a closed range. If LBQ_..._OR_NONE gets None, the data
 * pointer is NULL and the letters of its shape stay unbound.
 *
 * Handles are capsules around a C struct whose pointers reach into the arrays it was made from;
 * the capsule keeps those arrays alive. */
#ifndef LBQ_ARGS_H
#define LBQ_ARGS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>

#define PY_ARRAY_UNIQUE_SYMBOL lbq_array_api
#ifndef LBQ_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "core/interrupt.h"
#include "core/status.h"

enum { LBQ_MAX_DIMS = 4, LBQ_MAX_ARGS = 32 };

enum { LBQ_FLOAT32_OR_64 = -1 /* a dtype: either; lbq_array.dtype says which was given */ };

typedef struct {
    void *data; /* NULL: None was given */
    ptrdiff_t dims[LBQ_MAX_DIMS];
    int dtype;
    size_t item_bytes;
} lbq_array;

/* A tuple of handles of one type. */
typedef struct {
    PyObject *tuple;
    const char *type;
    ptrdiff_t count;
} lbq_handles;

/* LBQ_BAD_SHAPE unless `axis` has the size `expected`, named `what` in the message; absent arrays
 * pass. */
lbq_status lbq_check_axis(const lbq_array *array, const char *name, int axis, const char *what,
                          ptrdiff_t expected);

void *lbq_handle_at(const lbq_handles *handles, ptrdiff_t index);

typedef enum {
    LBQ_ARG_IN,
    LBQ_ARG_OUT,
    LBQ_ARG_HANDLES,
    LBQ_ARG_HANDLE,
    LBQ_ARG_INT,
    LBQ_ARG_FLOAT,
    LBQ_ARG_BOOL,
    LBQ_ARG_TEXT,
} lbq_arg_kind;

typedef struct {
    const char *name;
    lbq_arg_kind kind;
    void *to;
    const char *text; /* shape of an array, type name of a handle */
    int dtype;
    int or_none;
    double low, high;
    const char *over; /* the input that an output may be; NULL: none */
} lbq_arg;

#define LBQ_IN(name, to, dtype, shape)                                                             \
    {name, LBQ_ARG_IN, (lbq_array *){to}, shape, dtype, 0, 0, 0, NULL}
#define LBQ_IN_OR_NONE(name, to, dtype, shape)                                                     \
    {name, LBQ_ARG_IN, (lbq_array *){to}, shape, dtype, 1, 0, 0, NULL}
#define LBQ_OUT(name, to, dtype, shape)                                                            \
    {name, LBQ_ARG_OUT, (lbq_array *){to}, shape, dtype, 0, 0, 0, NULL}
#define LBQ_OUT_OR_NONE(name, to, dtype, shape)                                                    \
    {name, LBQ_ARG_OUT, (lbq_array *){to}, shape, dtype, 1, 0, 0, NULL}
#define LBQ_OUT_OVER(name, to, dtype, shape, input)                                                \
    {name, LBQ_ARG_OUT, (lbq_array *){to}, shape, dtype, 0, 0, 0, input}
#define LBQ_INOUT LBQ_OUT
#define LBQ_HANDLE(name, to, type) {name, LBQ_ARG_HANDLE, (void *)(to), type, 0, 0, 0, 0, NULL}
#define LBQ_HANDLE_OR_NONE(name, to, type)                                                         \
    {name, LBQ_ARG_HANDLE, (void *)(to), type, 0, 1, 0, 0, NULL}
#define LBQ_HANDLES(name, to, type)                                                                \
    {name, LBQ_ARG_HANDLES, (lbq_handles *){to}, type, 0, 0, 0, 0, NULL}
#define LBQ_INT(name, to, low, high)                                                               \
    {name, LBQ_ARG_INT, (Py_ssize_t *){to}, NULL, 0, 0, (double)(low), (double)(high), NULL}
#define LBQ_FLOAT(name, to, low, high)                                                             \
    {name, LBQ_ARG_FLOAT, (double *){to}, NULL, 0, 0, low, high, NULL}
#define LBQ_BOOL(name, to) {name, LBQ_ARG_BOOL, (int *){to}, NULL, 0, 0, 0, 0, NULL}
#define LBQ_TEXT(name, to) {name, LBQ_ARG_TEXT, (const char **){to}, NULL, 0, 0, 0, 0, NULL}

#define LBQ_BINDING(name)                                                                          \
    PyObject *lbq_bind_##name(PyObject *module, PyObject *args, PyObject *kwargs);                 \
    PyObject *lbq_bind_##name(PyObject *module, PyObject *args, PyObject *kwargs)

/* Fills the variables in the table, or returns from the binding with an exception set. */
#define LBQ_PARSE(function, spec)                                                                  \
    (void)module;                                                                                  \
    if (lbq_parse(function, spec, sizeof(spec) / sizeof *(spec), args, kwargs) < 0)                \
    return NULL
int lbq_parse(const char *function, const lbq_arg *spec, size_t count, PyObject *args,
              PyObject *kwargs);

/* Makes the call without the GIL and returns from the binding: None, or the exception. */
#define LBQ_RUN(call)                                                                              \
    do {                                                                                           \
        lbq_status lbq_run_status;                                                                 \
        LBQ_CALL(lbq_run_status, call);                                                            \
        return lbq_result(module, lbq_run_status);                                                 \
    } while (0)

/* The same, but returns the object `value`, computed after the call, in place of None. */
#define LBQ_RUN_VALUE(call, value)                                                                 \
    do {                                                                                           \
        lbq_status lbq_run_status;                                                                 \
        LBQ_CALL(lbq_run_status, call);                                                            \
        return lbq_run_status == LBQ_OK ? (value) : lbq_result(module, lbq_run_status);            \
    } while (0)

/* Makes the call without the GIL. On the main thread Python's signal handlers run meanwhile, so
 * that Ctrl-C ends it. */
#define LBQ_CALL(status, call)                                                                     \
    do {                                                                                           \
        lbq_running lbq_call_running;                                                              \
        lbq_run_begin(&lbq_call_running);                                                          \
        status = (call);                                                                           \
        lbq_run_end(&lbq_call_running);                                                            \
    } while (0)

/* A call that runs without the GIL. */
typedef struct {
    lbq_watch watch; /* first, so that it has the address of the struct */
    lbq_watch *outer;
    PyThreadState *released;
    int outer_threads;
} lbq_running;

void lbq_run_begin(lbq_running *running);
void lbq_run_end(lbq_running *running);

/* None for LBQ_OK; otherwise sets the exception for the status and returns NULL. */
PyObject *lbq_result(PyObject *module, lbq_status status);

/* A capsule named `type` that owns `block` (freed by lbq_free) and keeps `args` alive. */
PyObject *lbq_handle_new(const char *type, void *block, PyObject *args);

#endif
