/* Bindings of csrc/rotate. */
#include <string.h>

#include "core/memory.h"
#include "python/module.h"
#include "rotate/hadamard.h"
#include "rotate/procrustes.h"
#include "rotate/rotation.h"

LBQ_BINDING(hadamard_orders)
{
    lbq_array orders;
    Py_ssize_t n;
    const lbq_arg spec[] = {
        LBQ_OUT("orders", &orders, NPY_INT64, "8"),
        LBQ_INT("n", &n, 1, PY_SSIZE_T_MAX),
    };
    LBQ_PARSE("hadamard_orders", spec);
    LBQ_RUN(lbq_hadamard_orders(n, orders.data));
}

LBQ_BINDING(hadamard_base)
{
    lbq_array base;
    const lbq_arg spec[] = {LBQ_OUT("base", &base, NPY_FLOAT32, "cc")};
    LBQ_PARSE("hadamard_base", spec);
    LBQ_RUN(lbq_hadamard_base(base.dims[0], base.data));
}

LBQ_BINDING(orthogonal)
{
    lbq_array q;
    Py_ssize_t seed, stream;
    const lbq_arg spec[] = {
        LBQ_OUT("q", &q, NPY_FLOAT64, "nn"),
        LBQ_INT("seed", &seed, 0, PY_SSIZE_T_MAX),
        LBQ_INT("stream", &stream, 0, PY_SSIZE_T_MAX),
    };
    LBQ_PARSE("orthogonal", spec);
    LBQ_RUN(lbq_orthogonal((uint64_t)seed, (uint64_t)stream, q.dims[0], q.data));
}

LBQ_BINDING(polar)
{
    lbq_array matrix, q, values;
    const lbq_arg spec[] = {
        LBQ_IN("matrix", &matrix, NPY_FLOAT64, "nn"),
        LBQ_OUT("q", &q, NPY_FLOAT64, "nn"),
        LBQ_OUT("values", &values, NPY_FLOAT64, "n"),
    };
    LBQ_PARSE("polar", spec);
    LBQ_RUN(lbq_polar(q.dims[0], matrix.data, q.data, values.data));
}

static PyObject *
handle_of(PyObject *module, PyObject *args, const lbq_rotation *rotation)
{
    lbq_rotation *block;
    const lbq_status status = lbq_allocate(sizeof *block, &block);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    *block = *rotation;
    lbq_rotation_identify(block);
    return lbq_handle_new("lowbitq.rotation", block, args);
}

LBQ_BINDING(hadamard_rotation)
{
    lbq_array orders, bases, diagonal;
    const lbq_arg spec[] = {
        LBQ_IN("orders", &orders, NPY_INT64, "m*"),
        LBQ_IN("bases", &bases, NPY_FLOAT32, "b*"),
        LBQ_IN("diagonal", &diagonal, NPY_FLOAT32, "n"),
    };
    LBQ_PARSE("hadamard_rotation", spec);
    if (orders.dims[0] > LBQ_MAX_FACTORS)
        return PyErr_Format(PyExc_ValueError,
                            "hadamard_rotation: %zd orders, expected at most %d",
                            (Py_ssize_t)orders.dims[0],
                            LBQ_MAX_FACTORS);
    lbq_rotation rotation = {.n = diagonal.dims[0]};
    lbq_hadamard *const hadamard = &rotation.hadamard;
    hadamard->n = diagonal.dims[0];
    hadamard->factors = (int)orders.dims[0];
    hadamard->bases = bases.data;
    hadamard->diagonal = diagonal.data;
    const int64_t *const order = orders.data;
    ptrdiff_t size = 0;
    for (int j = 0; j < hadamard->factors; j++)
        hadamard->orders[j] = (ptrdiff_t)order[j];
    const lbq_status status = lbq_hadamard_prepare(hadamard);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    for (int j = 0; j < hadamard->factors; j++)
        size += 2 * hadamard->orders[j] * hadamard->orders[j];
    if (bases.dims[0] != size)
        return PyErr_Format(PyExc_ValueError,
                            "hadamard_rotation: bases has size %zd, expected %zd",
                            (Py_ssize_t)bases.dims[0],
                            (Py_ssize_t)size);
    return handle_of(module, args, &rotation);
}

LBQ_BINDING(dense_rotation)
{
    lbq_array matrix;
    const lbq_arg spec[] = {LBQ_IN("matrix", &matrix, NPY_FLOAT32, "nn")};
    LBQ_PARSE("dense_rotation", spec);
    const lbq_rotation rotation = {.n = matrix.dims[0], .dense = matrix.data};
    return handle_of(module, args, &rotation);
}

typedef lbq_status (*rotate)(const lbq_rotation *, ptrdiff_t, float *);

static PyObject *
rotate_rows(PyObject *module, PyObject *args, PyObject *kwargs, const char *name, rotate function)
{
    const lbq_rotation *rotation;
    lbq_array x;
    const lbq_arg spec[] = {
        LBQ_HANDLE("rotation", &rotation, "lowbitq.rotation"),
        LBQ_INOUT("x", &x, NPY_FLOAT32, "t*n"),
    };
    LBQ_PARSE(name, spec);
    if (x.dims[1] != rotation->n)
        return PyErr_Format(PyExc_ValueError,
                            "%s: x has %zd columns, expected %zd",
                            name,
                            (Py_ssize_t)x.dims[1],
                            (Py_ssize_t)rotation->n);
    LBQ_RUN(function(rotation, x.dims[0], x.data));
}

LBQ_BINDING(rotate)
{
    return rotate_rows(module, args, kwargs, "rotate", lbq_rotate);
}

LBQ_BINDING(rotate_back)
{
    return rotate_rows(module, args, kwargs, "rotate_back", lbq_rotate_back);
}

/* clang-format off */
PyMethodDef lbq_methods_rotate[] = {
    LBQ_METHOD(hadamard_orders,
               "hadamard_orders(orders, /, *, n)\n--\n\n"
               "Fill orders (8) int64 with those of the base matrices that make n, then zeros."),
    LBQ_METHOD(hadamard_base,
               "hadamard_base(base, /)\n--\n\n"
               "Fill base (c, c) with Paley's Hadamard matrix, or else with Hartley's matrix."),
    LBQ_METHOD(orthogonal,
               "orthogonal(q, /, *, seed, stream)\n--\n\n"
               "Fill q (n, n) with a Haar-distributed orthogonal matrix."),
    LBQ_METHOD(polar,
               "polar(matrix, q, values, /)\n--\n\n"
               "Fill q (n, n) with the orthogonal matrix nearest to matrix, values (n) with its "
               "singular values."),
    LBQ_METHOD(hadamard_rotation,
               "hadamard_rotation(orders, bases, diagonal, /)\n--\n\n"
               "Handle of (B_1 (x) ... (x) H) diag(diagonal); bases holds B_1, B_1^T, B_2, B_2^T, ..."),
    LBQ_METHOD(dense_rotation,
               "dense_rotation(matrix, /)\n--\n\nHandle of an orthogonal matrix (n, n)."),
    LBQ_METHOD(rotate,
               "rotate(rotation, x, /)\n--\n\nEach row of x (t, n) becomes R times it."),
    LBQ_METHOD(rotate_back,
               "rotate_back(rotation, x, /)\n--\n\nEach row of x (t, n) becomes R^T times it."),
    LBQ_METHODS_END,
};
/* clang-format on */
