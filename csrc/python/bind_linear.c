/* Bindings of csrc/linear. */
#include "core/memory.h"
#include "linear/linear.h"
#include "python/code_args.h"
#include "python/module.h"

/* A handle that owns a copy of `layer`, whose pointers `args` keeps alive. */
static PyObject *
new_handle(PyObject *module, const lbq_linear *layer, PyObject *args)
{
    lbq_linear *block;
    lbq_status status = lbq_linear_check(layer);
    if (status == LBQ_OK)
        status = lbq_allocate(sizeof *block, &block);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    *block = *layer;
    return lbq_handle_new("lowbitq.linear", block, args);
}

LBQ_BINDING(linear_dense)
{
    lbq_array weight, bias;
    const lbq_rotation *rotation;
    const lbq_arg spec[] = {
        LBQ_IN("weight", &weight, NPY_FLOAT32, "rk"),
        LBQ_IN_OR_NONE("bias", &bias, NPY_FLOAT32, "r"),
        LBQ_HANDLE_OR_NONE("rotation", &rotation, "lowbitq.rotation"),
    };
    LBQ_PARSE("linear_dense", spec);
    const lbq_linear layer = {
        .rows = weight.dims[0],
        .cols = weight.dims[1],
        .dense = weight.data,
        .bias = bias.data,
        .rotation = rotation,
    };
    return new_handle(module, &layer, args);
}

LBQ_BINDING(linear_packed)
{
    const lbq_code *code;
    lbq_array panels, bias;
    const lbq_rotation *rotation;
    Py_ssize_t rows, cols, group, activation_bits;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("panels", &panels, NPY_UINT8, "b"),
        LBQ_IN_OR_NONE("bias", &bias, NPY_FLOAT32, "r"),
        LBQ_HANDLE_OR_NONE("rotation", &rotation, "lowbitq.rotation"),
        LBQ_INT("rows", &rows, 1, INT32_MAX),
        LBQ_INT("cols", &cols, 1, INT32_MAX),
        LBQ_GROUP(&group),
        LBQ_INT("activation_bits", &activation_bits, 0, 8),
    };
    LBQ_PARSE("linear_packed", spec);
    lbq_linear layer = {
        .rows = rows,
        .cols = cols,
        .bias = bias.data,
        .rotation = rotation,
        .activation_bits = (int)activation_bits,
    };
    lbq_status status = lbq_matrix_of(code, rows, cols, group, &panels, &layer.matrix);
    if (status == LBQ_OK && bias.data)
        status = lbq_check_axis(&bias, "bias", 0, "rows", rows);
    return status == LBQ_OK ? new_handle(module, &layer, args) : lbq_result(module, status);
}

static lbq_status
forward(const lbq_linear *layer, const lbq_array *x, const lbq_array *y)
{
    LBQ_TRY(lbq_check_axis(x, "x", 1, "cols", layer->cols));
    LBQ_TRY(lbq_check_axis(y, "y", 1, "rows", layer->rows));
    return lbq_linear_forward(layer, x->dims[0], x->data, y->data);
}

LBQ_BINDING(linear_forward)
{
    const lbq_linear *layer;
    lbq_array x, y;
    const lbq_arg spec[] = {
        LBQ_HANDLE("layer", &layer, "lowbitq.linear"),
        LBQ_IN("x", &x, NPY_FLOAT32, "tk"),
        LBQ_OUT("y", &y, NPY_FLOAT32, "tr"),
    };
    LBQ_PARSE("linear_forward", spec);
    LBQ_RUN(forward(layer, &x, &y));
}

/* Outputs (tokens, rows) lie in y one after the other. */
static lbq_status
forward_all(const lbq_handles *handles, const lbq_array *x, const lbq_array *y)
{
    enum { MOST = 8 };
    const lbq_linear *layers[MOST];
    float *outputs[MOST];
    const ptrdiff_t count = handles->count, tokens = x->dims[0];
    LBQ_REQUIRE(count <= MOST, LBQ_BAD_VALUE, "%td layers, expected at most %d", count, MOST);
    ptrdiff_t floats = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        layers[i] = lbq_handle_at(handles, i);
        LBQ_TRY(lbq_check_axis(x, "x", 1, "cols", layers[i]->cols));
        outputs[i] = (float *)y->data + floats;
        floats += tokens * layers[i]->rows;
    }
    LBQ_TRY(lbq_check_axis(y, "y", 0, "tokens times all rows", floats));
    return lbq_linears_forward(count, layers, tokens, x->data, outputs);
}

LBQ_BINDING(linears_forward)
{
    lbq_handles layers;
    lbq_array x, y;
    const lbq_arg spec[] = {
        LBQ_HANDLES("layers", &layers, "lowbitq.linear"),
        LBQ_IN("x", &x, NPY_FLOAT32, "tk"),
        LBQ_OUT("y", &y, NPY_FLOAT32, "e"),
    };
    LBQ_PARSE("linears_forward", spec);
    LBQ_RUN(forward_all(&layers, &x, &y));
}

/* clang-format off */
PyMethodDef lbq_methods_linear[] = {
    LBQ_METHOD(linear_dense,
        "linear_dense(weight, bias, rotation, /)\n--\n\n"
        "A handle of the layer y = W R x + b in float32.")
    LBQ_METHOD(linear_packed,
        "linear_packed(code, panels, bias, rotation, /, *, rows, cols, group, activation_bits)\n--\n\n"
        "A handle of the layer y = W act(R x) + b with packed W; activation_bits 0, 4 or 8.")
    LBQ_METHOD(linear_forward,
        "linear_forward(layer, x, y, /)\n--\n\n"
        "y (tokens, rows) of a layer for x (tokens, cols).")
    LBQ_METHOD(linears_forward,
        "linears_forward(layers, x, y, /)\n--\n\n"
        "Outputs (tokens, rows) of a tuple of layers for one x, one after the other in y.")
    LBQ_METHODS_END,
};
/* clang-format on */
