/* The module lowbitq._core: its exceptions, its functions, its start. */
#define LBQ_IMPORTS_NUMPY
#include "python/module.h"

#include <stdlib.h>

#include "core/threads.h"
#include "kernels/kernels.h"

static PyMethodDef *const METHODS[] = {
    lbq_methods_core,
    lbq_methods_codes,
    lbq_methods_linear,
    lbq_methods_gptq,
    lbq_methods_transformer,
    lbq_methods_training,
    lbq_methods_learning,
    lbq_methods_rotate,
    lbq_methods_backward,
    lbq_methods_attention,
};

/* LOWBITQ_ISA chooses a weaker instruction set, LOWBITQ_NUM_THREADS the number of threads. */
static int
read_environment(PyObject *module)
{
    lbq_isa isa = lbq_cpu_isa();
    const char *const name = getenv("LOWBITQ_ISA");
    if (name && *name) {
        const int found = lbq_isa_find(name);
        if (found < 0) {
            PyErr_Format(PyExc_ValueError,
                         "LOWBITQ_ISA is '%s', expected 'portable', 'avx2' or 'avx512'",
                         name);
            return -1;
        }
        isa = (lbq_isa)found;
    }
    int threads = lbq_cpus();
    const char *const text = getenv("LOWBITQ_NUM_THREADS");
    if (text && *text) {
        char *end;
        const long number = strtol(text, &end, 10);
        if (*end || number < 1 || number > 256) {
            PyErr_Format(PyExc_ValueError, "LOWBITQ_NUM_THREADS is '%s', expected 1 to 256", text);
            return -1;
        }
        threads = (int)number;
    }
    lbq_status status = lbq_use_isa(isa);
    if (status == LBQ_OK) /* without the GIL: another interpreter may be computing */
        LBQ_CALL(status, lbq_set_threads(threads));
    PyObject *const result = lbq_result(module, status);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int
add_exception(PyObject *module, PyObject **to, const char *name, const char *doc, PyObject *base)
{
    *to = PyErr_NewExceptionWithDoc(name, doc, base, NULL);
    return *to ? PyModule_AddObjectRef(module, name + sizeof "lowbitq." - 1, *to) : -1;
}

static int
module_exec(PyObject *module)
{
    lbq_module_state *const state = PyModule_GetState(module);
    import_array1(-1);
    if (add_exception(module,
                      &state->numerical_error,
                      "lowbitq.NumericalError",
                      "A computation broke down, such as a matrix that is not positive definite.",
                      PyExc_ArithmeticError) < 0 ||
        add_exception(module,
                      &state->format_error,
                      "lowbitq.FormatError",
                      "A file is damaged or is not what it says; the message names file and byte.",
                      PyExc_ValueError) < 0)
        return -1;
    for (size_t i = 0; i < sizeof METHODS / sizeof *METHODS; i++)
        if (PyModule_AddFunctions(module, METHODS[i]) < 0)
            return -1;
    return read_environment(module);
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    lbq_module_state *const state = PyModule_GetState(module);
    Py_VISIT(state->numerical_error);
    Py_VISIT(state->format_error);
    return 0;
}

static int
module_clear(PyObject *module)
{
    lbq_module_state *const state = PyModule_GetState(module);
    Py_CLEAR(state->numerical_error);
    Py_CLEAR(state->format_error);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "lowbitq._core",
    .m_doc = "The arithmetic of lowbitq, in C.",
    .m_size = sizeof(lbq_module_state),
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__core(void);

PyMODINIT_FUNC
PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
