/* Bindings of csrc/linear. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "linear/linear.h"
#include "python/code_args.h"
#include "python/module.h"

#define COPY "lowbitq.copy"

/* A copy, and values of its rounding that belong to it. */
typedef struct {
    lbq_copy copy;
    float values[LBQ_FAKE_VALUES];
} copy_block;

/* A handle that owns a copy of `copy`, and of its values if `own`; `args` keeps alive the arrays
 * that it points to. */
static PyObject *
copy_handle(PyObject *module, const lbq_copy *copy, bool own, PyObject *args)
{
    copy_block *block;
    lbq_status status = lbq_copy_check(copy);
    if (status == LBQ_OK)
        status = lbq_allocate(sizeof *block, &block);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    block->copy = *copy;
    if (own)
        block->copy.fake.values = memcpy(block->values, copy->fake.values, sizeof block->values);
    return lbq_handle_new(COPY, block, args);
}

/* The same for a packed copy that rounds in the basis T: its activation becomes the rounding, and
 * the product takes what that gives in 8 bits. */
static PyObject *
turned_handle(PyObject *module, lbq_copy copy, const lbq_rotation *basis, PyObject *args)
{
    const lbq_activation how = copy.activation;
    const float values[LBQ_FAKE_VALUES] = {how.clip, how.scale, how.zero};
    copy.fake = (lbq_fake){how.bits, lbq_packed_step(&copy.matrix.packed), values, basis};
    copy.activation = (lbq_activation){.bits = 8, .clip = 1};
    return copy_handle(module, &copy, true, args);
}

LBQ_BINDING(copy_dense)
{
    lbq_array weight, fusion;
    const lbq_rotation *input, *output;
    const lbq_arg spec[] = {
        LBQ_IN("weight", &weight, NPY_FLOAT32, "rk"),
        LBQ_HANDLE_OR_NONE("input", &input, "lowbitq.rotation"),
        LBQ_HANDLE_OR_NONE("output", &output, "lowbitq.rotation"),
        LBQ_IN_OR_NONE("fusion", &fusion, NPY_FLOAT32, "r"),
    };
    LBQ_PARSE("copy_dense", spec);
    const lbq_copy copy = {
        .rows = weight.dims[0],
        .cols = weight.dims[1],
        .dense = weight.data,
        .input = input,
        .output = output,
        .weight = fusion.data,
    };
    return copy_handle(module, &copy, false, args);
}

LBQ_BINDING(copy_rounding)
{
    lbq_array weight, fusion, values;
    const lbq_rotation *input, *output;
    const lbq_copy *packed;
    const lbq_arg spec[] = {
        LBQ_IN("weight", &weight, NPY_FLOAT32, "rk"),
        LBQ_HANDLE_OR_NONE("input", &input, "lowbitq.rotation"),
        LBQ_HANDLE_OR_NONE("output", &output, "lowbitq.rotation"),
        LBQ_IN_OR_NONE("fusion", &fusion, NPY_FLOAT32, "r"),
        LBQ_HANDLE("packed", &packed, COPY),
        LBQ_IN("values", &values, NPY_FLOAT32, "3"),
    };
    LBQ_PARSE("copy_rounding", spec);
    const lbq_copy copy = {
        .rows = weight.dims[0],
        .cols = weight.dims[1],
        .dense = weight.data,
        .input = input,
        .output = output,
        .weight = fusion.data,
        .fake = {packed->fake.values ? packed->fake.bits : packed->activation.bits,
                 lbq_packed_step(&packed->matrix.packed),
                 values.data,
                 packed->fake.basis},
    };
    return copy_handle(module, &copy, false, args);
}

LBQ_BINDING(round_inputs)
{
    lbq_array x, values, y;
    Py_ssize_t bits, step;
    const lbq_arg spec[] = {
        LBQ_IN("x", &x, NPY_FLOAT32, "t*k"),
        LBQ_IN("values", &values, NPY_FLOAT32, "3"),
        LBQ_OUT("y", &y, NPY_FLOAT32, "tk"),
        LBQ_INT("bits", &bits, 4, 8),
        LBQ_INT("step", &step, 1, PY_SSIZE_T_MAX),
    };
    LBQ_PARSE("round_inputs", spec);
    const lbq_fake fake = {(int)bits, step, values.data, NULL};
    const lbq_status status = lbq_fake_check(&fake);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    LBQ_RUN(lbq_fake_forward(&fake, x.dims[0], x.dims[1], x.data, y.data));
}

LBQ_BINDING(copy_packed)
{
    const lbq_code *code;
    lbq_array panels, fusion, sums;
    const lbq_rotation *input, *output, *basis;
    Py_ssize_t rows, cols, group, bits;
    double clip, scale, zero;
    int per_token;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("panels", &panels, NPY_UINT8, "b"),
        LBQ_HANDLE_OR_NONE("input", &input, "lowbitq.rotation"),
        LBQ_HANDLE_OR_NONE("output", &output, "lowbitq.rotation"),
        LBQ_IN_OR_NONE("fusion", &fusion, NPY_FLOAT32, "r"),
        LBQ_IN_OR_NONE("sums", &sums, NPY_FLOAT32, "r"),
        LBQ_HANDLE_OR_NONE("basis", &basis, "lowbitq.rotation"),
        LBQ_INT("rows", &rows, 1, INT32_MAX),
        LBQ_INT("cols", &cols, 1, INT32_MAX),
        LBQ_GROUP(&group),
        LBQ_INT("activation_bits", &bits, 0, 8),
        LBQ_FLOAT("activation_clip", &clip, 1e-3, 1),
        LBQ_FLOAT("activation_scale", &scale, 0, FLT_MAX),
        LBQ_FLOAT("activation_zero", &zero, -FLT_MAX, FLT_MAX),
        LBQ_BOOL("zero_per_token", &per_token),
    };
    LBQ_PARSE("copy_packed", spec);
    lbq_copy copy = {
        .rows = rows,
        .cols = cols,
        .input = input,
        .output = output,
        .activation = {(int)bits, (float)clip, (float)scale, per_token ? NAN : (float)zero},
        .weight = fusion.data,
        .sums = sums.data,
    };
    lbq_status status = lbq_matrix_of(code, rows, cols, group, &panels, &copy.matrix);
    if (status == LBQ_OK && fusion.data)
        status = lbq_check_axis(&fusion, "fusion", 0, "rows", rows);
    if (status == LBQ_OK && sums.data)
        status = lbq_check_axis(&sums, "sums", 0, "rows", rows);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    return basis ? turned_handle(module, copy, basis, args)
                 : copy_handle(module, &copy, false, args);
}

/* A layer and the copies that it sums. */
typedef struct {
    lbq_linear layer;
    lbq_copy copies[];
} layer_block;

static lbq_status
check_parts(const lbq_linear *layer, const lbq_array *bias, const lbq_array *U, const lbq_array *V)
{
    LBQ_TRY(lbq_linear_check(layer));
    LBQ_REQUIRE(!U->data == !V->data, LBQ_BAD_VALUE, "only one of U and V is given");
    if (bias->data)
        LBQ_TRY(lbq_check_axis(bias, "bias", 0, "rows", layer->rows));
    if (!U->data)
        return LBQ_OK;
    LBQ_TRY(lbq_check_axis(U, "U", 0, "rows", layer->rows));
    return lbq_check_axis(V, "V", 0, "cols", layer->cols);
}

LBQ_BINDING(linear)
{
    lbq_handles copies;
    lbq_array bias, U, V;
    const lbq_arg spec[] = {
        LBQ_HANDLES("copies", &copies, COPY),
        LBQ_IN_OR_NONE("bias", &bias, NPY_FLOAT32, "r"),
        LBQ_IN_OR_NONE("U", &U, NPY_FLOAT32, "rn"),
        LBQ_IN_OR_NONE("V", &V, NPY_FLOAT32, "kn"),
    };
    LBQ_PARSE("linear", spec);
    layer_block *block;
    const size_t count = (size_t)copies.count;
    lbq_status status = lbq_allocate(sizeof *block + count * sizeof(lbq_copy), &block);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    for (size_t i = 0; i < count; i++)
        block->copies[i] = *(const lbq_copy *)lbq_handle_at(&copies, (ptrdiff_t)i);
    block->layer = (lbq_linear){
        .rows = count ? block->copies[0].rows : 0,
        .cols = count ? block->copies[0].cols : 0,
        .count = copies.count,
        .copies = block->copies,
        .bias = bias.data,
        .rank = U.data ? U.dims[1] : 0,
        .U = U.data,
        .V = V.data,
    };
    status = check_parts(&block->layer, &bias, &U, &V);
    if (status == LBQ_OK)
        return lbq_handle_new("lowbitq.linear", block, args);
    lbq_free(block);
    return lbq_result(module, status);
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
        LBQ_IN("x", &x, NPY_FLOAT32, "t*k"),
        LBQ_OUT("y", &y, NPY_FLOAT32, "t*r"),
    };
    LBQ_PARSE("linear_forward", spec);
    LBQ_RUN(forward(layer, &x, &y));
}

static lbq_status
layers_of(const lbq_handles *handles, const lbq_linear *layers[LBQ_LAYERS])
{
    const ptrdiff_t count = handles->count;
    LBQ_REQUIRE(
        count <= LBQ_LAYERS, LBQ_BAD_VALUE, "%td layers, expected at most %d", count, LBQ_LAYERS);
    for (ptrdiff_t i = 0; i < count; i++)
        layers[i] = lbq_handle_at(handles, i);
    return LBQ_OK;
}

LBQ_BINDING(linears_inputs)
{
    lbq_handles handles;
    const lbq_linear *layers[LBQ_LAYERS];
    const lbq_arg spec[] = {LBQ_HANDLES("layers", &handles, "lowbitq.linear")};
    LBQ_PARSE("linears_inputs", spec);
    const lbq_status status = layers_of(&handles, layers);
    return status == LBQ_OK ? PyLong_FromSsize_t(lbq_linears_inputs(handles.count, layers))
                            : lbq_result(module, status);
}

/* Outputs (tokens, rows) lie in y one after the other. */
static lbq_status
forward_all(const lbq_handles *handles, const lbq_array *x, const lbq_array *y)
{
    const lbq_linear *layers[LBQ_LAYERS];
    float *outputs[LBQ_LAYERS];
    const ptrdiff_t count = handles->count, tokens = x->dims[0];
    LBQ_TRY(layers_of(handles, layers));
    ptrdiff_t floats = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
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
        LBQ_IN("x", &x, NPY_FLOAT32, "t*k"),
        LBQ_OUT("y", &y, NPY_FLOAT32, "e*"),
    };
    LBQ_PARSE("linears_forward", spec);
    LBQ_RUN(forward_all(&layers, &x, &y));
}

PyMethodDef lbq_methods_linear[] = {
    LBQ_METHOD(copy_dense,
               "copy_dense(weight, input, output, fusion, /)\n--\n\n"
               "A handle of fusion * P^T W R in float32, W = weight, R = input, P = output."),
    LBQ_METHOD(
        copy_rounding,
        "copy_rounding(weight, input, output, fusion, packed, values, /)\n--\n\n"
        "A handle like that of copy_dense that rounds its input, in the bits and steps of a "
        "packed copy; values (clip, scale, zero) are read in place, scale 0 and zero NaN: by "
        "each token."),
    LBQ_METHOD(round_inputs,
               "round_inputs(x, values, y, /, *, bits, step)\n--\n\n"
               "y (t, k): x as a packed copy rounds it, in float32; values as for copy_rounding."),
    LBQ_METHOD(
        copy_packed,
        "copy_packed(code, panels, input, output, fusion, sums, basis, /, *, rows, cols, "
        "group, activation_bits, activation_clip, activation_scale, activation_zero, "
        "zero_per_token)\n--\n\n"
        "A handle of fusion * P^T W act(R x) with packed W; activation_bits 0, 4 or 8. With a "
        "basis T, act rounds T R x, and T^T takes back what it gives."),
    LBQ_METHOD(linear, "linear(copies, bias, U, V, /)\n--\n\n"
                       "A handle of the layer y = sum of copies + U V^T x + bias."),
    LBQ_METHOD(linear_forward, "linear_forward(layer, x, y, /)\n--\n\n"
                               "y (tokens, rows) of a layer for x (tokens, cols)."),
    LBQ_METHOD(linears_forward,
               "linears_forward(layers, x, y, /)\n--\n\n"
               "Outputs (tokens, rows) of a tuple of layers for one x, one after the other in y."),
    LBQ_METHOD(linears_inputs, "linears_inputs(layers, /)\n--\n\n"
                               "How often linears_forward rotates and quantizes its x."),
    LBQ_METHODS_END,
};
