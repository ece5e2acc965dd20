/* Bindings of what training needs: losses, the optimizer. */
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
    LBQ_METHODS_END,
};
