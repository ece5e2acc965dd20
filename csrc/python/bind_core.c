/* Bindings of csrc/core and of the choice of kernels. */
#include "core/blas.h"
#include "core/cpu.h"
#include "core/half.h"
#include "core/memory.h"
#include "core/random.h"
#include "core/threads.h"
#include "kernels/kernels.h"
#include "python/module.h"

LBQ_BINDING(set_num_threads)
{
    Py_ssize_t threads;
    const lbq_arg spec[] = {LBQ_INT("threads", &threads, 1, 256)};
    LBQ_PARSE("set_num_threads", spec);
    LBQ_RUN(lbq_set_threads((int)threads));
}

LBQ_BINDING(use_isa)
{
    const char *name;
    const lbq_arg spec[] = {LBQ_TEXT("isa", &name)};
    LBQ_PARSE("use_isa", spec);
    const int isa = lbq_isa_find(name);
    if (isa < 0)
        return PyErr_Format(
            PyExc_ValueError, "isa is '%s', expected 'portable', 'avx2' or 'avx512'", name);
    return lbq_result(module, lbq_use_isa((lbq_isa)isa));
}

LBQ_BINDING(config)
{
    (void)module;
    if (lbq_parse("config", NULL, 0, args, kwargs) < 0)
        return NULL;
    PyObject *const kernels = PyDict_New();
    if (!kernels)
        return NULL;
    for (int i = 0; i < lbq_kernel_count; i++) {
        PyObject *const isa = PyUnicode_FromString(lbq_isa_name(lbq_kernel_isa(i)));
        if (!isa || PyDict_SetItemString(kernels, lbq_kernel_names[i], isa) < 0) {
            Py_XDECREF(isa);
            Py_DECREF(kernels);
            return NULL;
        }
        Py_DECREF(isa);
    }
    return Py_BuildValue("{s:s,s:s,s:i,s:i,s:s,s:s,s:N}",
                         "isa",
                         lbq_isa_name(lbq_isa_in_use()),
                         "cpu_isa",
                         lbq_isa_name(lbq_cpu_isa()),
                         "threads",
                         lbq_threads(),
                         "cpus",
                         lbq_cpus(),
                         "blas",
                         BLAS(openblas_get_config)(),
                         "blas_core",
                         BLAS(openblas_get_corename)(),
                         "kernels",
                         kernels);
}

LBQ_BINDING(half_to_float)
{
    lbq_array x, y;
    const lbq_arg spec[] = {
        LBQ_IN("x", &x, NPY_UINT16, "n*"),
        LBQ_OUT("y", &y, NPY_FLOAT32, "n*"),
    };
    LBQ_PARSE("half_to_float", spec);
    LBQ_RUN(lbq_half_to_float(x.data, x.dims[0], y.data));
}

LBQ_BINDING(bfloat_to_float)
{
    lbq_array x, y;
    const lbq_arg spec[] = {
        LBQ_IN("x", &x, NPY_UINT16, "n*"),
        LBQ_OUT("y", &y, NPY_FLOAT32, "n*"),
    };
    LBQ_PARSE("bfloat_to_float", spec);
    LBQ_RUN(lbq_bfloat_to_float(x.data, x.dims[0], y.data));
}

LBQ_BINDING(float_to_half)
{
    lbq_array x, y;
    const lbq_arg spec[] = {
        LBQ_IN("x", &x, NPY_FLOAT32, "n*"),
        LBQ_OUT("y", &y, NPY_UINT16, "n*"),
    };
    LBQ_PARSE("float_to_half", spec);
    LBQ_RUN(lbq_float_to_half(x.data, x.dims[0], y.data));
}

enum { RANDOM_RUN = 1 << 16 }; /* numbers between checks for interrupts */

static lbq_status
random_bits(uint64_t seed, uint64_t stream, ptrdiff_t count, uint64_t *out)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        if (i % RANDOM_RUN == 0)
            LBQ_TRY(lbq_interrupted());
        out[i] = lbq_random_bits(seed, stream, (uint64_t)i);
    }
    return LBQ_OK;
}

LBQ_BINDING(random_bits)
{
    lbq_array out;
    Py_ssize_t seed, stream;
    const lbq_arg spec[] = {
        LBQ_OUT("out", &out, NPY_UINT64, "n*"),
        LBQ_INT("seed", &seed, 0, PY_SSIZE_T_MAX),
        LBQ_INT("stream", &stream, 0, PY_SSIZE_T_MAX),
    };
    LBQ_PARSE("random_bits", spec);
    LBQ_RUN(random_bits((uint64_t)seed, (uint64_t)stream, out.dims[0], out.data));
}

static lbq_status
random_normal(uint64_t seed, uint64_t stream, ptrdiff_t count, double *out)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        if (i % RANDOM_RUN == 0)
            LBQ_TRY(lbq_interrupted());
        out[i] = lbq_random_normal(seed, stream, (uint64_t)i);
    }
    return LBQ_OK;
}

LBQ_BINDING(random_normal)
{
    lbq_array out;
    Py_ssize_t seed, stream;
    const lbq_arg spec[] = {
        LBQ_OUT("out", &out, NPY_FLOAT64, "n*"),
        LBQ_INT("seed", &seed, 0, PY_SSIZE_T_MAX),
        LBQ_INT("stream", &stream, 0, PY_SSIZE_T_MAX),
    };
    LBQ_PARSE("random_normal", spec);
    LBQ_RUN(random_normal((uint64_t)seed, (uint64_t)stream, out.dims[0], out.data));
}

static void
free_aligned(PyObject *capsule)
{
    lbq_free(PyCapsule_GetPointer(capsule, "lowbitq.aligned"));
}

/* The one binding that makes an array: NumPy itself guarantees only 16-byte alignment. */
LBQ_BINDING(aligned_empty)
{
    Py_ssize_t count;
    const lbq_arg spec[] = {LBQ_INT("bytes", &count, 0, PY_SSIZE_T_MAX)};
    LBQ_PARSE("aligned_empty", spec);
    void *block;
    const lbq_status status = lbq_allocate((size_t)count, &block);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    const npy_intp dims[1] = {count};
    PyObject *const array = PyArray_SimpleNewFromData(1, dims, NPY_UINT8, block);
    PyObject *const owner = array ? PyCapsule_New(block, "lowbitq.aligned", free_aligned) : NULL;
    if (!owner || PyArray_SetBaseObject((PyArrayObject *)array, owner) < 0) {
        if (!owner)
            lbq_free(block);
        Py_XDECREF(array);
        return NULL;
    }
    return array;
}

PyMethodDef lbq_methods_core[] = {
    LBQ_METHOD(set_num_threads,
               "set_num_threads(*, threads)\n--\n\nThreads of the pool, 1 to 256."),
    LBQ_METHOD(use_isa,
               "use_isa(*, isa)\n--\n\nUse the kernels up to 'portable', 'avx2' or 'avx512'."),
    LBQ_METHOD(config,
               "config()\n--\n\nInstruction set, kernels, threads and BLAS in use, as a dict."),
    LBQ_METHOD(half_to_float,
               "half_to_float(x, y, /)\n--\n\nWiden float16 bits (n) to float32 (n)."),
    LBQ_METHOD(bfloat_to_float,
               "bfloat_to_float(x, y, /)\n--\n\nWiden bfloat16 bits (n) to float32 (n)."),
    LBQ_METHOD(float_to_half, "float_to_half(x, y, /)\n--\n\nNarrow float32 "
                              "(n) to float16 bits, ties to even."),
    LBQ_METHOD(random_bits, "random_bits(out, /, *, seed, stream)\n--\n\n"
                            "Fill out (n) with 64 random bits each, a "
                            "function of seed, stream and index."),
    LBQ_METHOD(random_normal, "random_normal(out, /, *, seed, stream)\n--\n\n"
                              "Fill out (n) with standard normal numbers, a function "
                              "of seed, stream and index."),
    LBQ_METHOD(aligned_empty, "aligned_empty(*, bytes)\n--\n\nAn uninitialised "
                              "uint8 array at a 64-byte boundary."),
    LBQ_METHODS_END,
};
