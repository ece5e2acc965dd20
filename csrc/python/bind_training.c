/* Bindings of what training needs: losses, the optimizer, gradients of codes. */
#include "codes/gradient.h"
#include "python/code_args.h"
#include "python/module.h"
#include "transformer/adamw.h"
#include "transformer/loss.h"

LBQ_BINDING(loss_gradient)
{
    lbq_array logits, teacher, target, weight, loss;
    lbq_loss how;
    const lbq_arg spec[] = {
        LBQ_INOUT("logits", &logits, NPY_FLOAT32, "t*v"),
        LBQ_IN_OR_NONE("teacher", &teacher, NPY_FLOAT32, "t*v"),
        LBQ_IN_OR_NONE("target", &target, NPY_INT32, "t*"),
        LBQ_IN_OR_NONE("weight", &weight, NPY_FLOAT32, "t*"),
        LBQ_OUT("loss", &loss, NPY_FLOAT64, "t*"),
        LBQ_FLOAT("forward", &how.forward, 0, 1e6),
        LBQ_FLOAT("reverse", &how.reverse, 0, 1e6),
        LBQ_FLOAT("jensen_shannon", &how.jensen_shannon, 0, 1e6),
        LBQ_FLOAT("cross_entropy", &how.cross_entropy, 0, 1e6),
        LBQ_FLOAT("temperature", &how.temperature, 1e-3, 1e3),
    };
    LBQ_PARSE("loss_gradient", spec);
    LBQ_RUN(lbq_loss_gradient(&how,
                              logits.dims[0],
                              logits.dims[1],
                              logits.data,
                              teacher.data,
                              target.data,
                              weight.data,
                              loss.data));
}

LBQ_BINDING(draw)
{
    lbq_array logits, uniform, target;
    const lbq_arg spec[] = {
        LBQ_IN("logits", &logits, NPY_FLOAT32, "t*v"),
        LBQ_IN("uniform", &uniform, NPY_FLOAT64, "t*"),
        LBQ_OUT("target", &target, NPY_INT32, "t*"),
    };
    LBQ_PARSE("draw", spec);
    LBQ_RUN(lbq_draw(logits.dims[0], logits.dims[1], logits.data, uniform.data, target.data));
}

LBQ_BINDING(adamw)
{
    lbq_array param, gradient, first, second;
    lbq_adamw how;
    Py_ssize_t step;
    const lbq_arg spec[] = {
        LBQ_INOUT("param", &param, NPY_FLOAT32, "n*"),
        LBQ_IN("gradient", &gradient, NPY_FLOAT32, "n*"),
        LBQ_INOUT("first", &first, NPY_FLOAT32, "n*"),
        LBQ_INOUT("second", &second, NPY_FLOAT32, "n*"),
        LBQ_FLOAT("lr", &how.rate, 0, 1e6),
        LBQ_FLOAT("beta1", &how.beta1, 0, 1),
        LBQ_FLOAT("beta2", &how.beta2, 0, 1),
        LBQ_FLOAT("epsilon", &how.epsilon, 0, 1),
        LBQ_FLOAT("decay", &how.decay, 0, 1e6),
        LBQ_INT("step", &step, 1, INT32_MAX),
    };
    LBQ_PARSE("adamw", spec);
    LBQ_RUN(lbq_adamw_step(
        &how, step, param.dims[0], param.data, gradient.data, first.data, second.data));
}

LBQ_BINDING(square_sum)
{
    lbq_array x;
    const lbq_arg spec[] = {
        LBQ_IN("x", &x, NPY_FLOAT32, "n*"),
    };
    LBQ_PARSE("square_sum", spec);
    double sum;
    lbq_status status;
    LBQ_CALL(status, lbq_square_sum(x.dims[0], x.data, &sum));
    return status == LBQ_OK ? PyFloat_FromDouble(sum) : lbq_result(module, status);
}

static lbq_status
code_gradient(const lbq_matrix *matrix, const lbq_array *dW, const lbq_array *scale,
              const lbq_array *dscale, const lbq_array *doffset, const lbq_array *dlevels)
{
    LBQ_TRY(lbq_check_parts(&matrix->packed, &(lbq_array){0}, scale, scale));
    const ptrdiff_t levels = lbq_level_count(matrix->code);
    LBQ_TRY(lbq_check_axis(dlevels, "dlevels", 0, "levels", levels));
    return lbq_code_gradient(
        matrix, dW->data, scale->data, dscale->data, doffset->data, dlevels->data);
}

LBQ_BINDING(code_gradient)
{
    const lbq_code *code;
    lbq_array panels, dW, scale, dscale, doffset, dlevels;
    Py_ssize_t group;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("panels", &panels, NPY_UINT8, "b"),
        LBQ_IN("dweight", &dW, NPY_FLOAT32, "rk"),
        LBQ_IN("scale", &scale, NPY_FLOAT32, "rg"),
        LBQ_OUT_OR_NONE("dscale", &dscale, NPY_FLOAT32, "rg"),
        LBQ_OUT_OR_NONE("doffset", &doffset, NPY_FLOAT32, "rg"),
        LBQ_OUT_OR_NONE("dlevels", &dlevels, NPY_FLOAT32, "l"),
        LBQ_GROUP(&group),
    };
    LBQ_PARSE("code_gradient", spec);
    lbq_matrix matrix;
    const lbq_status status = lbq_matrix_of(code, dW.dims[0], dW.dims[1], group, &panels, &matrix);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    LBQ_RUN(code_gradient(&matrix, &dW, &scale, &dscale, &doffset, &dlevels));
}

static lbq_status
compose(const lbq_matrix *matrix, const lbq_array *scale, const lbq_array *offset,
        const lbq_array *weight)
{
    LBQ_TRY(lbq_check_parts(&matrix->packed, &(lbq_array){0}, scale, offset));
    return lbq_matrix_compose(matrix, scale->data, offset->data, weight->data);
}

LBQ_BINDING(compose)
{
    const lbq_code *code;
    lbq_array panels, scale, offset, weight;
    Py_ssize_t group;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("panels", &panels, NPY_UINT8, "b"),
        LBQ_IN("scale", &scale, NPY_FLOAT32, "rg"),
        LBQ_IN_OR_NONE("offset", &offset, NPY_FLOAT32, "rg"),
        LBQ_OUT("weight", &weight, NPY_FLOAT32, "rk"),
        LBQ_GROUP(&group),
    };
    LBQ_PARSE("compose", spec);
    lbq_matrix matrix;
    const lbq_status status =
        lbq_matrix_of(code, weight.dims[0], weight.dims[1], group, &panels, &matrix);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    LBQ_RUN(compose(&matrix, &scale, &offset, &weight));
}

PyMethodDef lbq_methods_training[] = {
    LBQ_METHOD(loss_gradient,
               "loss_gradient(logits, teacher, target, weight, loss, /, *, forward, reverse, "
               "jensen_shannon, cross_entropy, temperature)\n--\n\n"
               "Set loss (t) to weighted divergences of logits (t, v) from those of a teacher and "
               "the cross entropy at target (t; -1: none), and logits to the gradient of their sum "
               "by weight (t)."),
    LBQ_METHOD(draw, "draw(logits, uniform, target, /)\n--\n\n"
                     "Set target (t) to tokens of softmax(logits (t, v)), by inverting its "
                     "cumulative distribution at uniform (t)."),
    LBQ_METHOD(adamw,
               "adamw(param, gradient, first, second, /, *, lr, beta1, beta2, epsilon, decay, "
               "step)\n--\n\n"
               "Step number step of AdamW: move param (n) and its moments first and second (n) by "
               "gradient (n)."),
    LBQ_METHOD(square_sum, "square_sum(x, /)\n--\n\n"
                           "The sum of squares of x (n), added in float64."),
    LBQ_METHOD(code_gradient,
               "code_gradient(code, panels, dweight, scale, dscale, doffset, dlevels, /, *, "
               "group)\n--\n\n"
               "Set dscale, doffset (rows, groups) and dlevels (l) to the gradients that dweight "
               "(rows, cols), by the values of a packed matrix, is by them; outputs may be None."),
    LBQ_METHOD(compose, "compose(code, panels, scale, offset, weight, /, *, group)\n--\n\n"
                        "Values (rows, cols) of a packed matrix with other scales and offsets "
                        "(rows, groups), not rounded to what can be stored; offset None: -zero * "
                        "scale."),
    LBQ_METHODS_END,
};
