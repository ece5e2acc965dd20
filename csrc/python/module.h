/* State of the module, and the list of bound functions. */
#ifndef LBQ_MODULE_H
#define LBQ_MODULE_H

#include "python/args.h"

typedef struct {
    PyObject *numerical_error;
    PyObject *format_error;
} lbq_module_state;

/* An entry of a method table; the docstring's first line is its signature. */
#define LBQ_METHOD(name, doc)                                                                      \
    {#name, (PyCFunction)(void (*)(void))lbq_bind_##name, METH_VARARGS | METH_KEYWORDS, doc}
#define LBQ_METHODS_END {NULL, NULL, 0, NULL}

/* The methods of each binding file, ended by LBQ_METHODS_END. */
extern PyMethodDef lbq_methods_core[];
extern PyMethodDef lbq_methods_codes[];
extern PyMethodDef lbq_methods_linear[];
extern PyMethodDef lbq_methods_gptq[];
extern PyMethodDef lbq_methods_transformer[];
extern PyMethodDef lbq_methods_training[];
extern PyMethodDef lbq_methods_learning[];
extern PyMethodDef lbq_methods_rotate[];
extern PyMethodDef lbq_methods_backward[];
extern PyMethodDef lbq_methods_attention[];

#endif
