/* Bindings of the backward pass: csrc/linear/backward.h and csrc/transformer/decoder_backward.h. */
#include <float.h>

#include "core/memory.h"
#include "linear/backward.h"
#include "python/module.h"
#include "transformer/decoder_backward.h"
#include "transformer/head_backward.h"
#include "transformer/rmsnorm.h"
#include "transformer/swiglu.h"

#define DECODER "lowbitq.decoder"
#define ATTENTION_MAP "lowbitq.attention_map"
#define LINEAR "lowbitq.linear"
#define COPY_GRADIENT "lowbitq.copy_gradient"
#define LINEAR_GRADIENT "lowbitq.linear_gradient"
#define BLOCK_GRADIENT "lowbitq.block_gradient"

LBQ_BINDING(rmsnorm_backward)
{
    lbq_array x, gain, g, dgain, dx;
    double epsilon;
    const lbq_arg spec[] = {
        LBQ_IN("x", &x, NPY_FLOAT32, "r*c"),
        LBQ_IN_OR_NONE("gain", &gain, NPY_FLOAT32, "c"),
        LBQ_IN("g", &g, NPY_FLOAT32, "r*c"),
        LBQ_OUT_OR_NONE("dgain", &dgain, NPY_FLOAT32, "c"),
        LBQ_INOUT("dx", &dx, NPY_FLOAT32, "r*c"),
        LBQ_FLOAT("epsilon", &epsilon, 0, 1),
    };
    LBQ_PARSE("rmsnorm_backward", spec);
    LBQ_RUN(lbq_rmsnorm_backward(
        x.dims[0], x.dims[1], x.data, gain.data, (float)epsilon, g.data, dgain.data, dx.data));
}

LBQ_BINDING(swiglu_backward)
{
    lbq_array gate, up, g, dgate, dup;
    const lbq_arg spec[] = {
        LBQ_IN("gate", &gate, NPY_FLOAT32, "t*n"),
        LBQ_IN("up", &up, NPY_FLOAT32, "t*n"),
        LBQ_IN("g", &g, NPY_FLOAT32, "t*n"),
        LBQ_OUT_OVER("dgate", &dgate, NPY_FLOAT32, "t*n", "gate"),
        LBQ_OUT_OVER("dup", &dup, NPY_FLOAT32, "t*n", "up"),
    };
    LBQ_PARSE("swiglu_backward", spec);
    LBQ_RUN(lbq_swiglu_backward(
        gate.dims[0] * gate.dims[1], gate.data, up.data, g.data, dgate.data, dup.data));
}

typedef struct {
    ptrdiff_t rows, cols;
    float *dense, *weight, *fake, *input;
} copy_gradient;

LBQ_BINDING(copy_gradient)
{
    lbq_array dense, fusion, rounding, rotation;
    const lbq_arg spec[] = {
        LBQ_OUT_OR_NONE("dense", &dense, NPY_FLOAT32, "rk"),
        LBQ_OUT_OR_NONE("fusion", &fusion, NPY_FLOAT32, "r"),
        LBQ_OUT_OR_NONE("rounding", &rounding, NPY_FLOAT32, "3"),
        LBQ_OUT_OR_NONE("rotation", &rotation, NPY_FLOAT32, "kk"),
    };
    LBQ_PARSE("copy_gradient", spec);
    copy_gradient *made;
    const lbq_status status = lbq_allocate(sizeof *made, &made);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    *made = (copy_gradient){
        .rows = dense.data ? dense.dims[0] : fusion.dims[0],
        .cols = dense.data ? dense.dims[1] : rotation.dims[1],
        .dense = dense.data,
        .weight = fusion.data,
        .fake = rounding.data,
        .input = rotation.data,
    };
    return lbq_handle_new(COPY_GRADIENT, made, args);
}

/* A size that several arrays have: 0 if none is there, -1 if they differ. */
static ptrdiff_t
common(ptrdiff_t a, ptrdiff_t b)
{
    return a == 0 || a == b ? b : b == 0 ? a : -1;
}

static lbq_status
join(const lbq_handles *copies, const lbq_array *bias, const lbq_array *U, const lbq_array *V,
     lbq_linear_gradient *gradient)
{
    LBQ_REQUIRE(copies->count <= LBQ_COPIES,
                LBQ_BAD_SHAPE,
                "copies has %td gradients, expected at most %d",
                copies->count,
                LBQ_COPIES);
    *gradient = (lbq_linear_gradient){
        .rows = common(bias->dims[0], U->dims[0]),
        .cols = V->dims[0],
        .rank = common(U->dims[1], V->dims[1]),
        .bias = bias->data,
        .U = U->data,
        .V = V->data,
    };
    for (ptrdiff_t i = 0; i < copies->count; i++) {
        const copy_gradient *const copy = lbq_handle_at(copies, i);
        gradient->rows = common(gradient->rows, copy->rows);
        gradient->cols = common(gradient->cols, copy->cols);
        gradient->dense[i] = copy->dense;
        gradient->weight[i] = copy->weight;
        gradient->fake[i] = copy->fake;
        gradient->input[i] = copy->input;
    }
    LBQ_REQUIRE(gradient->rows >= 0 && gradient->cols >= 0 && gradient->rank >= 0,
                LBQ_BAD_SHAPE,
                "gradients of one layer have different numbers of rows, columns or ranks");
    return LBQ_OK;
}

LBQ_BINDING(linear_gradient)
{
    lbq_handles copies;
    lbq_array bias, U, V;
    const lbq_arg spec[] = {
        LBQ_HANDLES("copies", &copies, COPY_GRADIENT),
        LBQ_OUT_OR_NONE("bias", &bias, NPY_FLOAT32, "r"),
        LBQ_OUT_OR_NONE("U", &U, NPY_FLOAT32, "rn"),
        LBQ_OUT_OR_NONE("V", &V, NPY_FLOAT32, "kn"),
    };
    LBQ_PARSE("linear_gradient", spec);
    lbq_linear_gradient *made;
    lbq_status status = lbq_allocate(sizeof *made, &made);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    status = join(&copies, &bias, &U, &V, made);
    if (status == LBQ_OK)
        return lbq_handle_new(LINEAR_GRADIENT, made, args);
    lbq_free(made);
    return lbq_result(module, status);
}

static lbq_status
linear_backward(const lbq_linear *layer, const lbq_array *x, const lbq_array *g,
                const lbq_linear_gradient *gradient, const lbq_array *dx)
{
    LBQ_TRY(lbq_check_axis(x, "x", 1, "cols", layer->cols));
    LBQ_TRY(lbq_check_axis(g, "g", 1, "rows", layer->rows));
    return lbq_linear_backward(
        layer, x->dims[0], x->data, NULL, g->data, gradient, false, dx->data);
}

LBQ_BINDING(linear_backward)
{
    const lbq_linear *layer;
    const lbq_linear_gradient *gradient;
    lbq_array x, g, dx;
    const lbq_arg spec[] = {
        LBQ_HANDLE("layer", &layer, LINEAR),
        LBQ_IN("x", &x, NPY_FLOAT32, "tk"),
        LBQ_IN("g", &g, NPY_FLOAT32, "tr"),
        LBQ_HANDLE("gradient", &gradient, LINEAR_GRADIENT),
        LBQ_OUT_OR_NONE("dx", &dx, NPY_FLOAT32, "tk"),
    };
    LBQ_PARSE("linear_backward", spec);
    LBQ_RUN(linear_backward(layer, &x, &g, gradient, &dx));
}

LBQ_BINDING(block_gradient)
{
    lbq_array attention_norm, mlp_norm, query_norm, key_norm;
    const lbq_linear_gradient *layers[LBQ_SLOTS];
    const lbq_arg spec[] = {
        LBQ_OUT_OR_NONE("attention_norm", &attention_norm, NPY_FLOAT32, "h"),
        LBQ_OUT_OR_NONE("mlp_norm", &mlp_norm, NPY_FLOAT32, "h"),
        LBQ_OUT_OR_NONE("query_norm", &query_norm, NPY_FLOAT32, "d"),
        LBQ_OUT_OR_NONE("key_norm", &key_norm, NPY_FLOAT32, "d"),
        LBQ_HANDLE_OR_NONE("q_proj", &layers[LBQ_QUERY], LINEAR_GRADIENT),
        LBQ_HANDLE_OR_NONE("k_proj", &layers[LBQ_KEY], LINEAR_GRADIENT),
        LBQ_HANDLE_OR_NONE("v_proj", &layers[LBQ_VALUE], LINEAR_GRADIENT),
        LBQ_HANDLE_OR_NONE("o_proj", &layers[LBQ_OUTPUT], LINEAR_GRADIENT),
        LBQ_HANDLE_OR_NONE("gate_proj", &layers[LBQ_GATE], LINEAR_GRADIENT),
        LBQ_HANDLE_OR_NONE("up_proj", &layers[LBQ_UP], LINEAR_GRADIENT),
        LBQ_HANDLE_OR_NONE("down_proj", &layers[LBQ_DOWN], LINEAR_GRADIENT),
    };
    LBQ_PARSE("block_gradient", spec);
    lbq_block_gradient *made;
    const lbq_status status = lbq_allocate(sizeof *made, &made);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    *made = (lbq_block_gradient){
        .hidden = attention_norm.data ? attention_norm.dims[0] : mlp_norm.dims[0],
        .head_dim = query_norm.data ? query_norm.dims[0] : key_norm.dims[0],
        .attention_norm = attention_norm.data,
        .mlp_norm = mlp_norm.data,
        .query_norm = query_norm.data,
        .key_norm = key_norm.data,
    };
    for (int i = 0; i < LBQ_SLOTS; i++)
        if (layers[i])
            made->layers[i] = *layers[i];
    return lbq_handle_new(BLOCK_GRADIENT, made, args);
}

enum { O, LOG_SUM, MIDDLE, QUERY, KEY, VALUE, GATE, UP, PARTS }; /* of the way there */

static lbq_status
block_backward(const lbq_decoder *decoder, ptrdiff_t index, const lbq_array *x,
               const lbq_array *parts, const lbq_block_gradient *gradient, const lbq_array *outputs,
               const lbq_attention_target *target, const lbq_array *dx)
{
    const lbq_heads *const heads = &decoder->heads;
    const lbq_trace known = {
        .output = parts[O].data,
        .log_sum = parts[LOG_SUM].data,
        .middle = parts[MIDDLE].data,
        .query = parts[QUERY].data,
        .key = parts[KEY].data,
        .value = parts[VALUE].data,
        .gate = parts[GATE].data,
        .up = parts[UP].data,
    };
    LBQ_REQUIRE(index < decoder->block_count,
                LBQ_BAD_VALUE,
                "block is %td, expected 0 to %td",
                index,
                decoder->block_count - 1);
    const lbq_block *const block = decoder->blocks[index];
    const ptrdiff_t rows[LBQ_SLOTS] = {block->query->rows,
                                       block->key->rows,
                                       block->value->rows,
                                       block->output->rows,
                                       block->gate->rows,
                                       block->up->rows,
                                       block->down->rows};
    lbq_block_outputs seen;
    for (int i = 0; i < LBQ_SLOTS; i++) {
        LBQ_TRY(lbq_check_axis(&outputs[i], "an output's gradient", 1, "rows", rows[i]));
        seen.layers[i] = outputs[i].data;
    }
    LBQ_TRY(lbq_check_axis(x, "x", 1, "hidden", decoder->hidden));
    LBQ_TRY(lbq_check_axis(&parts[O], "o", 1, "heads * head_dim", block->output->cols));
    LBQ_TRY(lbq_check_axis(&parts[LOG_SUM], "log_sum", 1, "heads", heads->heads));
    LBQ_TRY(lbq_check_axis(&parts[QUERY], "query", 1, "rows", block->query->rows));
    LBQ_TRY(lbq_check_axis(&parts[KEY], "key", 1, "rows", block->key->rows));
    LBQ_TRY(lbq_check_axis(&parts[VALUE], "value", 1, "rows", block->value->rows));
    LBQ_TRY(lbq_check_axis(&parts[GATE], "gate", 1, "rows", block->gate->rows));
    LBQ_TRY(lbq_check_axis(&parts[UP], "up", 1, "rows", block->up->rows));
    return lbq_block_backward(
        decoder, index, x->dims[0], x->data, &known, gradient, &seen, target, dx->data);
}

LBQ_BINDING(block_backward)
{
    const lbq_decoder *decoder;
    const lbq_block_gradient *gradient;
    const lbq_attention_map *map;
    lbq_array x, parts[PARTS], dx, outputs[LBQ_SLOTS];
    Py_ssize_t index;
    double weight;
    const lbq_arg spec[] = {
        LBQ_HANDLE("decoder", &decoder, DECODER),
        LBQ_IN("x", &x, NPY_FLOAT32, "th"),
        LBQ_IN_OR_NONE("o", &parts[O], NPY_FLOAT32, "ta"),
        LBQ_IN_OR_NONE("log_sum", &parts[LOG_SUM], NPY_FLOAT32, "tn"),
        LBQ_IN_OR_NONE("middle", &parts[MIDDLE], NPY_FLOAT32, "th"),
        LBQ_IN_OR_NONE("query", &parts[QUERY], NPY_FLOAT32, "tq"),
        LBQ_IN_OR_NONE("key", &parts[KEY], NPY_FLOAT32, "tk"),
        LBQ_IN_OR_NONE("value", &parts[VALUE], NPY_FLOAT32, "tk"),
        LBQ_IN_OR_NONE("gate", &parts[GATE], NPY_FLOAT32, "ti"),
        LBQ_IN_OR_NONE("up", &parts[UP], NPY_FLOAT32, "ti"),
        LBQ_HANDLE("gradient", &gradient, BLOCK_GRADIENT),
        LBQ_OUT_OR_NONE("q_proj", &outputs[LBQ_QUERY], NPY_FLOAT32, "tq"),
        LBQ_OUT_OR_NONE("k_proj", &outputs[LBQ_KEY], NPY_FLOAT32, "tk"),
        LBQ_OUT_OR_NONE("v_proj", &outputs[LBQ_VALUE], NPY_FLOAT32, "tk"),
        LBQ_OUT_OR_NONE("o_proj", &outputs[LBQ_OUTPUT], NPY_FLOAT32, "th"),
        LBQ_OUT_OR_NONE("gate_proj", &outputs[LBQ_GATE], NPY_FLOAT32, "ti"),
        LBQ_OUT_OR_NONE("up_proj", &outputs[LBQ_UP], NPY_FLOAT32, "ti"),
        LBQ_OUT_OR_NONE("down_proj", &outputs[LBQ_DOWN], NPY_FLOAT32, "th"),
        LBQ_HANDLE_OR_NONE("target", &map, ATTENTION_MAP),
        LBQ_INOUT("dx", &dx, NPY_FLOAT32, "th"),
        LBQ_INT("block", &index, 0, INT32_MAX),
        LBQ_FLOAT("weight", &weight, 0, FLT_MAX),
    };
    LBQ_PARSE("block_backward", spec);
    lbq_attention_target target = {.weight = (float)weight};
    if (map)
        target.map = *map;
    LBQ_RUN(
        block_backward(decoder, index, &x, parts, gradient, outputs, map ? &target : NULL, &dx));
}

static lbq_status
embed_backward(const lbq_decoder *decoder, const lbq_array *tokens, const lbq_array *dx,
               const lbq_array *dense)
{
    LBQ_TRY(lbq_check_axis(dx, "dx", 1, "hidden", decoder->hidden));
    LBQ_TRY(lbq_check_axis(dense, "dense", 0, "vocab", decoder->vocab));
    return lbq_embed_backward(decoder, tokens->dims[0], tokens->data, dx->data, dense->data);
}

LBQ_BINDING(embed_backward)
{
    const lbq_decoder *decoder;
    lbq_array tokens, dx, dense;
    const lbq_arg spec[] = {
        LBQ_HANDLE("decoder", &decoder, DECODER),
        LBQ_IN("tokens", &tokens, NPY_INT32, "t"),
        LBQ_INOUT("dx", &dx, NPY_FLOAT32, "th"),
        LBQ_INOUT("dense", &dense, NPY_FLOAT32, "vh"),
    };
    LBQ_PARSE("embed_backward", spec);
    LBQ_RUN(embed_backward(decoder, &tokens, &dx, &dense));
}

static lbq_status
finish_backward(const lbq_decoder *decoder, const lbq_array *x, const lbq_array *g,
                const lbq_array *final_norm, const lbq_array *dx)
{
    LBQ_TRY(lbq_check_axis(x, "x", 1, "hidden", decoder->hidden));
    return lbq_finish_backward(decoder, x->dims[0], x->data, g->data, final_norm->data, dx->data);
}

LBQ_BINDING(finish_backward)
{
    const lbq_decoder *decoder;
    lbq_array x, g, final_norm, dx;
    const lbq_arg spec[] = {
        LBQ_HANDLE("decoder", &decoder, DECODER),
        LBQ_IN("x", &x, NPY_FLOAT32, "th"),
        LBQ_IN("g", &g, NPY_FLOAT32, "th"),
        LBQ_OUT_OR_NONE("final_norm", &final_norm, NPY_FLOAT32, "h"),
        LBQ_OUT("dx", &dx, NPY_FLOAT32, "th"),
    };
    LBQ_PARSE("finish_backward", spec);
    LBQ_RUN(finish_backward(decoder, &x, &g, &final_norm, &dx));
}

static lbq_status
head_backward(const lbq_decoder *decoder, const lbq_objective *objective, const lbq_array *y,
              const lbq_array *teacher_hidden, const lbq_linear_gradient *gradient,
              const lbq_array *loss, const lbq_array *dy)
{
    LBQ_TRY(lbq_check_axis(y, "y", 1, "hidden", decoder->hidden));
    LBQ_REQUIRE(!objective->teacher == !teacher_hidden->data,
                LBQ_BAD_VALUE,
                "only one of teacher and teacher_hidden is given");
    if (objective->teacher)
        LBQ_TRY(lbq_check_axis(
            teacher_hidden, "teacher_hidden", 1, "hidden", objective->teacher->hidden));
    LBQ_REQUIRE(!objective->target || !objective->uniform,
                LBQ_BAD_VALUE,
                "both target and uniform are given");
    return lbq_head_backward(
        decoder, objective, y->dims[0], y->data, gradient, loss->data, dy->data);
}

LBQ_BINDING(head_backward)
{
    const lbq_decoder *decoder, *teacher;
    const lbq_linear_gradient *gradient;
    lbq_array y, teacher_hidden, target, uniform, weight, loss, dy;
    lbq_objective objective;
    const lbq_arg spec[] = {
        LBQ_HANDLE("decoder", &decoder, DECODER),
        LBQ_IN("y", &y, NPY_FLOAT32, "th"),
        LBQ_HANDLE_OR_NONE("teacher", &teacher, DECODER),
        LBQ_IN_OR_NONE("teacher_hidden", &teacher_hidden, NPY_FLOAT32, "tk"),
        LBQ_IN_OR_NONE("target", &target, NPY_INT32, "t"),
        LBQ_IN_OR_NONE("uniform", &uniform, NPY_FLOAT64, "t"),
        LBQ_IN_OR_NONE("weight", &weight, NPY_FLOAT32, "t"),
        LBQ_HANDLE("gradient", &gradient, LINEAR_GRADIENT),
        LBQ_OUT("loss", &loss, NPY_FLOAT64, "t"),
        LBQ_OUT_OR_NONE("dy", &dy, NPY_FLOAT32, "th"),
        LBQ_FLOAT("forward", &objective.loss.forward, 0, 1e6),
        LBQ_FLOAT("reverse", &objective.loss.reverse, 0, 1e6),
        LBQ_FLOAT("jensen_shannon", &objective.loss.jensen_shannon, 0, 1e6),
        LBQ_FLOAT("cross_entropy", &objective.loss.cross_entropy, 0, 1e6),
        LBQ_FLOAT("temperature", &objective.loss.temperature, 1e-3, 1e3),
    };
    LBQ_PARSE("head_backward", spec);
    objective.target = target.data;
    objective.uniform = uniform.data;
    objective.teacher = teacher;
    objective.teacher_hidden = teacher_hidden.data;
    objective.weight = weight.data;
    LBQ_RUN(head_backward(decoder, &objective, &y, &teacher_hidden, gradient, &loss, &dy));
}

PyMethodDef lbq_methods_backward[] = {
    LBQ_METHOD(rmsnorm_backward, "rmsnorm_backward(x, gain, g, dgain, dx, /, *, epsilon)\n--\n\n"
                                 "Add the gradients of a norm, for g = dL/dy, to dgain and dx."),
    LBQ_METHOD(swiglu_backward, "swiglu_backward(gate, up, g, dgate, dup, /)\n--\n\n"
                                "Gradients of silu(gate) * up, for g = dL/dy."),
    LBQ_METHOD(
        copy_gradient,
        "copy_gradient(dense, fusion, rounding, rotation, /)\n--\n\n"
        "Handle of the arrays to which gradients of a copy's weights are added, of the values "
        "of copy_rounding, and of a dense input rotation."),
    LBQ_METHOD(linear_gradient,
               "linear_gradient(copies, bias, U, V, /)\n--\n\n"
               "Handle of the arrays to which gradients of a layer's parts are added."),
    LBQ_METHOD(linear_backward, "linear_backward(layer, x, g, gradient, dx, /)\n--\n\n"
                                "Gradients of a dense layer for g = dL/dy; dx is written."),
    LBQ_METHOD(block_gradient,
               "block_gradient(attention_norm, mlp_norm, query_norm, key_norm, q_proj, "
               "k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, /)\n--\n\n"
               "Handle of the arrays to which gradients of a block's parts are added."),
    LBQ_METHOD(
        block_backward,
        "block_backward(decoder, x, o, log_sum, middle, query, key, value, gate, up, gradient, "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, target, dx, /, *, block, "
        "weight)\n--\n\n"
        "Take dL/dx behind a block to that before it; gradients of its layers' outputs "
        "are written.\nWhat decoder_block has shown of it, or None, need not be computed "
        "again. Attention is pulled towards\nthe map `target`, or None, by `weight`."),
    LBQ_METHOD(embed_backward, "embed_backward(decoder, tokens, dx, dense, /)\n--\n\n"
                               "Add the gradient of looked-up rows to that of the embedding; dx is "
                               "overwritten."),
    LBQ_METHOD(finish_backward,
               "finish_backward(decoder, x, g, final_norm, dx, /)\n--\n\n"
               "Through the last norm, for g = dL/dy; the gradient of its gains is added."),
    LBQ_METHOD(head_backward,
               "head_backward(decoder, y, teacher, teacher_hidden, target, uniform, weight, "
               "gradient, loss, dy, /, *, forward, reverse, jensen_shannon, cross_entropy, "
               "temperature)\n--\n\n"
               "Loss of each token, dL/dy, and the head's gradients, which are added."),
    LBQ_METHODS_END,
};
