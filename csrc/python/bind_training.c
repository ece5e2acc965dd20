/* Bindings of what training needs: losses. */
#include "python/module.h"
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
    LBQ_METHODS_END,
};
