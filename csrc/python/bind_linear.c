/* Bindings of the packed layout and of csrc/linear. */
#include "core/memory.h"
#include "core/packed.h"
#include "linear/linear.h"
#include "python/code_args.h"
#include "python/module.h"

/* Gives the matrix its panels and levels, if they have its sizes. */
static lbq_status
attach(lbq_packed *packed, const lbq_array *panels, const lbq_array *levels)
{
    LBQ_TRY(lbq_packed_attach(packed, panels));
    LBQ_REQUIRE(!levels->data || levels->dims[0] == 1 << packed->bits,
                LBQ_BAD_SHAPE,
                "levels has %td values, expected %d for %d bits",
                levels->dims[0],
                1 << packed->bits,
                packed->bits);
    packed->levels = levels->data;
    return LBQ_OK;
}

/* codes (rows, cols); scale and offset, where given, (rows, groups). */
static lbq_status
check_unpacked(const lbq_packed *packed, const lbq_array *codes, const lbq_array *scale,
               const lbq_array *offset)
{
    const ptrdiff_t rows = packed->rows, cols = packed->cols, group = packed->group;
    const ptrdiff_t groups = group >= cols ? 1 : (cols + group - 1) / group;
    const lbq_array *const arrays[] = {codes, scale, offset};
    const char *const names[] = {"codes", "scale", "offset"};
    for (int i = 0; i < 3; i++) {
        if (!arrays[i]->data)
            continue;
        LBQ_TRY(lbq_check_axis(arrays[i], names[i], 0, "rows", rows));
        LBQ_TRY(i == 0 ? lbq_check_axis(arrays[i], names[i], 1, "cols", cols)
                       : lbq_check_axis(arrays[i], names[i], 1, "groups", groups));
    }
    return LBQ_OK;
}

LBQ_BINDING(packed_bytes)
{
    lbq_packed_args s;
    const lbq_arg spec[] = {LBQ_PACKED_ARGS(s)};
    LBQ_PARSE("packed_bytes", spec);
    const lbq_packed packed = lbq_packed_from_args(&s);
    lbq_packed_geometry geometry;
    const lbq_status status = lbq_packed_geometry_of(&packed, &geometry);
    return status == LBQ_OK ? PyLong_FromSsize_t(geometry.bytes) : lbq_result(module, status);
}

static lbq_status
pack(lbq_packed *packed, const lbq_array *codes, const lbq_array *scale, const lbq_array *offset,
     const lbq_array *panels)
{
    LBQ_TRY(lbq_packed_attach(packed, panels));
    LBQ_TRY(check_unpacked(packed, codes, scale, offset));
    LBQ_REQUIRE(scale->data || packed->scale_bits == 0,
                LBQ_BAD_VALUE,
                "scale is None, but scale_bits is %d",
                packed->scale_bits);
    LBQ_REQUIRE(offset->data || !packed->has_offset,
                LBQ_BAD_VALUE,
                "offset is None, but has_offset is True");
    return lbq_pack(packed, codes->data, scale->data, offset->data, panels->data);
}

LBQ_BINDING(pack)
{
    lbq_array codes, scale, offset, panels;
    lbq_packed_args s;
    const lbq_arg spec[] = {
        LBQ_IN("codes", &codes, NPY_UINT8, "rk"),
        LBQ_IN_OR_NONE("scale", &scale, NPY_FLOAT32, "rg"),
        LBQ_IN_OR_NONE("offset", &offset, NPY_FLOAT32, "rg"),
        LBQ_OUT("panels", &panels, NPY_UINT8, "b"),
        LBQ_PACKED_ARGS(s),
    };
    LBQ_PARSE("pack", spec);
    lbq_packed packed = lbq_packed_from_args(&s);
    LBQ_RUN(pack(&packed, &codes, &scale, &offset, &panels));
}

static lbq_status
unpack(lbq_packed *packed, const lbq_array *panels, const lbq_array *codes, const lbq_array *scale,
       const lbq_array *offset)
{
    LBQ_TRY(lbq_packed_attach(packed, panels));
    LBQ_TRY(check_unpacked(packed, codes, scale, offset));
    return lbq_unpack(packed, codes->data, scale->data, offset->data);
}

LBQ_BINDING(unpack)
{
    lbq_array panels, codes, scale, offset;
    lbq_packed_args s;
    const lbq_arg spec[] = {
        LBQ_IN("panels", &panels, NPY_UINT8, "b"),
        LBQ_OUT_OR_NONE("codes", &codes, NPY_UINT8, "rk"),
        LBQ_OUT_OR_NONE("scale", &scale, NPY_FLOAT32, "rg"),
        LBQ_OUT_OR_NONE("offset", &offset, NPY_FLOAT32, "rg"),
        LBQ_PACKED_ARGS(s),
    };
    LBQ_PARSE("unpack", spec);
    lbq_packed packed = lbq_packed_from_args(&s);
    LBQ_RUN(unpack(&packed, &panels, &codes, &scale, &offset));
}

static lbq_status
dequantize(lbq_packed *packed, const lbq_array *panels, const lbq_array *levels,
           const lbq_array *weight)
{
    LBQ_TRY(attach(packed, panels, levels));
    LBQ_TRY(lbq_check_axis(weight, "weight", 0, "rows", packed->rows));
    LBQ_TRY(lbq_check_axis(weight, "weight", 1, "cols", packed->cols));
    return lbq_packed_dequantize(packed, weight->data);
}

LBQ_BINDING(packed_dequantize)
{
    lbq_array panels, levels, weight;
    lbq_packed_args s;
    const lbq_arg spec[] = {
        LBQ_IN("panels", &panels, NPY_UINT8, "b"),
        LBQ_IN_OR_NONE("levels", &levels, NPY_FLOAT32, "l"),
        LBQ_OUT("weight", &weight, NPY_FLOAT32, "rk"),
        LBQ_PACKED_ARGS(s),
    };
    LBQ_PARSE("packed_dequantize", spec);
    lbq_packed packed = lbq_packed_from_args(&s);
    LBQ_RUN(dequantize(&packed, &panels, &levels, &weight));
}

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
    lbq_array panels, levels, bias;
    const lbq_rotation *rotation;
    lbq_packed_args s;
    Py_ssize_t activation_bits;
    const lbq_arg spec[] = {
        LBQ_IN("panels", &panels, NPY_UINT8, "b"),
        LBQ_IN_OR_NONE("levels", &levels, NPY_FLOAT32, "l"),
        LBQ_IN_OR_NONE("bias", &bias, NPY_FLOAT32, "r"),
        LBQ_HANDLE_OR_NONE("rotation", &rotation, "lowbitq.rotation"),
        LBQ_PACKED_ARGS(s),
        LBQ_INT("activation_bits", &activation_bits, 0, 8),
    };
    LBQ_PARSE("linear_packed", spec);
    lbq_linear layer = {
        .rows = s.rows,
        .cols = s.cols,
        .packed = lbq_packed_from_args(&s),
        .bias = bias.data,
        .rotation = rotation,
        .activation_bits = (int)activation_bits,
    };
    lbq_status status = attach(&layer.packed, &panels, &levels);
    if (status == LBQ_OK && bias.data)
        status = lbq_check_axis(&bias, "bias", 0, "rows", s.rows);
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
        LBQ_IN("x", &x, NPY_FLOAT32, "t*k"),
        LBQ_OUT("y", &y, NPY_FLOAT32, "t*r"),
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
        LBQ_IN("x", &x, NPY_FLOAT32, "t*k"),
        LBQ_OUT("y", &y, NPY_FLOAT32, "e*"),
    };
    LBQ_PARSE("linears_forward", spec);
    LBQ_RUN(forward_all(&layers, &x, &y));
}

/* clang-format off */
PyMethodDef lbq_methods_linear[] = {
    LBQ_METHOD(packed_bytes,
        "packed_bytes(*, " LBQ_PACKED_TEXT ")\n--\n\n"
        "Size of the panels of a packed matrix.")
    LBQ_METHOD(pack,
        "pack(codes, scale, offset, panels, /, *, " LBQ_PACKED_TEXT ")\n--\n\n"
        "Codes (rows, cols), scale and offset (rows, groups) into panels; inexact ones are refused.")
    LBQ_METHOD(unpack,
        "unpack(panels, codes, scale, offset, /, *, " LBQ_PACKED_TEXT ")\n--\n\n"
        "The inverse of pack; outputs may be None.")
    LBQ_METHOD(packed_dequantize,
        "packed_dequantize(panels, levels, weight, /, *, " LBQ_PACKED_TEXT ")\n--\n\n"
        "Values (rows, cols) of a packed matrix.")
    LBQ_METHOD(linear_dense,
        "linear_dense(weight, bias, rotation, /)\n--\n\n"
        "A handle of the layer y = W R x + b in float32.")
    LBQ_METHOD(linear_packed,
        "linear_packed(panels, levels, bias, rotation, /, *, " LBQ_PACKED_TEXT ", activation_bits)\n--\n\n"
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
