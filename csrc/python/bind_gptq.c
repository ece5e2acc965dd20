/* Bindings of csrc/gptq. */
#include "core/blas.h"
#include "gptq/adaround.h"
#include "gptq/eigen.h"
#include "gptq/factor.h"
#include "gptq/gptq.h"
#include "gptq/hessian.h"
#include "gptq/refine.h"
#include "gptq/ridge.h"
#include "gptq/sensitivity.h"
#include "python/code_args.h"
#include "python/module.h"

LBQ_BINDING(hessian_add)
{
    lbq_array X, weights, H;
    const lbq_arg spec[] = {
        LBQ_IN("x", &X, NPY_FLOAT32, "t*k"),
        LBQ_IN_OR_NONE("weights", &weights, NPY_FLOAT32, "t*"),
        LBQ_INOUT("hessian", &H, NPY_FLOAT64, "kk"),
    };
    LBQ_PARSE("hessian_add", spec);
    LBQ_RUN(lbq_hessian_add(X.dims[0], X.dims[1], X.data, weights.data, H.data));
}

LBQ_BINDING(hessian_error)
{
    lbq_array H, E;
    const lbq_arg spec[] = {
        LBQ_IN("hessian", &H, NPY_FLOAT64, "kk"),
        LBQ_IN("error", &E, NPY_FLOAT32, "r*k"),
    };
    LBQ_PARSE("hessian_error", spec);
    double value;
    LBQ_RUN_VALUE(lbq_hessian_error(E.dims[0], E.dims[1], H.data, E.data, &value),
                  PyFloat_FromDouble(value));
}

LBQ_BINDING(moment_add)
{
    lbq_array Y, X, weights, M;
    const lbq_arg spec[] = {
        LBQ_IN("y", &Y, NPY_FLOAT32, "t*r"),
        LBQ_IN("x", &X, NPY_FLOAT32, "t*k"),
        LBQ_IN_OR_NONE("weights", &weights, NPY_FLOAT32, "t*"),
        LBQ_INOUT("moment", &M, NPY_FLOAT64, "rk"),
    };
    LBQ_PARSE("moment_add", spec);
    LBQ_RUN(lbq_moment_add(X.dims[0], Y.dims[1], X.dims[1], Y.data, X.data, weights.data, M.data));
}

LBQ_BINDING(ridge_solve)
{
    lbq_array H, B;
    double ridge;
    const lbq_arg spec[] = {
        LBQ_IN("hessian", &H, NPY_FLOAT64, "kk"),
        LBQ_INOUT("b", &B, NPY_FLOAT64, "r*k"),
        LBQ_FLOAT("ridge", &ridge, 0, 1e300),
    };
    LBQ_PARSE("ridge_solve", spec);
    LBQ_RUN(lbq_ridge_solve(B.dims[0], B.dims[1], H.data, ridge, B.data));
}

LBQ_BINDING(product)
{
    lbq_array a, b, c;
    const lbq_arg spec[] = {
        LBQ_IN("a", &a, NPY_FLOAT64, "mk"),
        LBQ_IN("b", &b, NPY_FLOAT64, "nk"),
        LBQ_OUT("c", &c, NPY_FLOAT64, "mn"),
    };
    LBQ_PARSE("product", spec);
    const ptrdiff_t m = a.dims[0], n = b.dims[0], k = a.dims[1];
    LBQ_RUN(lbq_dgemm(CblasNoTrans, CblasTrans, m, n, k, 1, a.data, k, b.data, k, 0, c.data, n));
}

LBQ_BINDING(leading_eigenvectors)
{
    lbq_array A, B, values, vectors;
    const lbq_arg spec[] = {
        LBQ_INOUT("matrix", &A, NPY_FLOAT64, "nn"),
        LBQ_OUT_OR_NONE("metric", &B, NPY_FLOAT64, "nn"),
        LBQ_OUT("values", &values, NPY_FLOAT64, "r"),
        LBQ_OUT("vectors", &vectors, NPY_FLOAT64, "rn"),
    };
    LBQ_PARSE("leading_eigenvectors", spec);
    LBQ_RUN(lbq_leading_eigenvectors(
        A.dims[0], A.data, B.data, values.dims[0], values.data, vectors.data));
}

static PyObject *
report_dict(const lbq_gptq_report *report)
{
    return Py_BuildValue("{s:d,s:i,s:n,s:N}",
                         "damping",
                         report->damping,
                         "retries",
                         report->retries,
                         "dead",
                         (Py_ssize_t)report->dead,
                         "float64",
                         PyBool_FromLong(report->float64));
}

LBQ_BINDING(gptq_factor)
{
    lbq_array H, order, R;
    double damping;
    int median;
    const lbq_arg spec[] = {
        LBQ_IN("hessian", &H, NPY_FLOAT64, "kk"),
        LBQ_IN_OR_NONE("order", &order, NPY_INT64, "k"),
        LBQ_OUT("factor", &R, LBQ_FLOAT32_OR_64, "kk"),
        LBQ_FLOAT("damping", &damping, 0, 1e30),
        LBQ_BOOL("median", &median),
    };
    LBQ_PARSE("gptq_factor", spec);
    const bool float64 = R.dtype == NPY_FLOAT64;
    lbq_gptq_report report;
    LBQ_RUN_VALUE(
        lbq_gptq_factor(H.dims[0], H.data, order.data, damping, median, float64, R.data, &report),
        report_dict(&report));
}

static lbq_status
gptq(lbq_gptq_problem *problem, const lbq_search_args *found, const lbq_array *W,
     const lbq_array *codes, const lbq_array *scale, const lbq_array *offset)
{
    lbq_search search;
    const lbq_packed layout =
        lbq_code_layout(problem->code, problem->rows, problem->cols, problem->group);
    LBQ_TRY(lbq_search_from_args(found, &search));
    LBQ_TRY(lbq_check_parts(&layout, codes, scale, offset));
    problem->search = &search;
    return lbq_gptq(problem, W->data, codes->data, scale->data, offset->data);
}

static lbq_status
check_start(const lbq_array *start, const lbq_array *factor)
{
    LBQ_REQUIRE(!start->data || start->dtype == factor->dtype,
                LBQ_BAD_VALUE,
                "start and factor are of different dtypes");
    return LBQ_OK;
}

LBQ_BINDING(gptq)
{
    const lbq_code *code;
    lbq_array R, order, start, W, importance, codes, scale, offset;
    lbq_search_args search;
    Py_ssize_t group, block;
    int fixed;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("factor", &R, LBQ_FLOAT32_OR_64, "kk"),
        LBQ_IN_OR_NONE("order", &order, NPY_INT64, "k"),
        LBQ_IN_OR_NONE("start", &start, LBQ_FLOAT32_OR_64, "kr"),
        LBQ_IN("weight", &W, NPY_FLOAT32, "rk"),
        LBQ_IN_OR_NONE("importance", &importance, NPY_FLOAT32, "k"),
        LBQ_OUT("codes", &codes, NPY_UINT8, "RK"),
        LBQ_INOUT("scale", &scale, NPY_FLOAT32, "rg"),
        LBQ_INOUT("offset", &offset, NPY_FLOAT32, "rg"),
        LBQ_GROUP(&group),
        LBQ_BOOL("fixed", &fixed),
        LBQ_INT("block", &block, 1, 1 << 20),
        LBQ_SEARCH_ARGS(search),
    };
    LBQ_PARSE("gptq", spec);
    const lbq_status status = check_start(&start, &R);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    lbq_gptq_problem problem = {
        .code = code,
        .rows = W.dims[0],
        .cols = W.dims[1],
        .group = group,
        .order = order.data,
        .R = R.data,
        .start = start.data,
        .importance = importance.data,
        .fixed = fixed,
        .float64 = R.dtype == NPY_FLOAT64,
        .block = block,
    };
    LBQ_RUN(gptq(&problem, &search, &W, &codes, &scale, &offset));
}

LBQ_BINDING(adaround)
{
    const lbq_code *code;
    lbq_array H, W, scale, offset, codes;
    Py_ssize_t group, steps;
    double rate, strength, softness;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("hessian", &H, NPY_FLOAT64, "kk"),
        LBQ_IN("weight", &W, NPY_FLOAT32, "rk"),
        LBQ_IN("scale", &scale, NPY_FLOAT32, "rg"),
        LBQ_IN("offset", &offset, NPY_FLOAT32, "rg"),
        LBQ_OUT("codes", &codes, NPY_UINT8, "rk"),
        LBQ_GROUP(&group),
        LBQ_INT("steps", &steps, 0, 1000000),
        LBQ_FLOAT("rate", &rate, 0, 100),
        LBQ_FLOAT("strength", &strength, 0, 1e6),
    };
    LBQ_PARSE("adaround", spec);
    const ptrdiff_t rows = W.dims[0], cols = W.dims[1];
    const lbq_packed layout = lbq_code_layout(code, rows, cols, group);
    const lbq_adaround_options options = {.steps = (int)steps, .rate = rate, .strength = strength};
    const lbq_status status = lbq_check_parts(&layout, &codes, &scale, &offset);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    LBQ_RUN_VALUE(lbq_adaround(code,
                               &options,
                               rows,
                               cols,
                               group,
                               W.data,
                               H.data,
                               scale.data,
                               offset.data,
                               codes.data,
                               &softness),
                  PyFloat_FromDouble(softness));
}

LBQ_BINDING(refine)
{
    const lbq_code *code;
    lbq_array H, W, scale, offset, codes;
    Py_ssize_t group, sweeps;
    double damping;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("hessian", &H, NPY_FLOAT64, "kk"),
        LBQ_IN("weight", &W, NPY_FLOAT32, "rk"),
        LBQ_IN("scale", &scale, NPY_FLOAT32, "rg"),
        LBQ_IN("offset", &offset, NPY_FLOAT32, "rg"),
        LBQ_INOUT("codes", &codes, NPY_UINT8, "rk"),
        LBQ_GROUP(&group),
        LBQ_FLOAT("damping", &damping, 0, 1e300),
        LBQ_INT("sweeps", &sweeps, 0, 1000000),
    };
    LBQ_PARSE("refine", spec);
    const ptrdiff_t rows = W.dims[0], cols = W.dims[1];
    const lbq_packed layout = lbq_code_layout(code, rows, cols, group);
    const lbq_status status = lbq_check_parts(&layout, &codes, &scale, &offset);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    ptrdiff_t moved;
    LBQ_RUN_VALUE(lbq_refine(code,
                             rows,
                             cols,
                             group,
                             W.data,
                             H.data,
                             damping,
                             (int)sweeps,
                             scale.data,
                             offset.data,
                             codes.data,
                             &moved),
                  PyLong_FromSsize_t(moved));
}

LBQ_BINDING(weight_sums)
{
    lbq_array W, Q, h, G;
    const lbq_arg spec[] = {
        LBQ_IN("weight", &W, NPY_FLOAT32, "rk"),
        LBQ_IN("quantized", &Q, NPY_FLOAT32, "rk"),
        LBQ_IN_OR_NONE("importance", &h, NPY_FLOAT32, "k"),
        LBQ_IN_OR_NONE("gradient", &G, NPY_FLOAT32, "rk"),
    };
    LBQ_PARSE("weight_sums", spec);
    lbq_weight_sums sums;
    LBQ_RUN_VALUE(lbq_weights_sum(W.dims[0], W.dims[1], W.data, Q.data, h.data, G.data, &sums),
                  Py_BuildValue("{s:d,s:d,s:d,s:d,s:d,s:d}",
                                "error",
                                sums.error,
                                "weight",
                                sums.weight,
                                "weighted_error",
                                sums.weighted_error,
                                "weighted_weight",
                                sums.weighted_weight,
                                "gradient",
                                sums.gradient,
                                "fisher",
                                sums.fisher));
}

LBQ_BINDING(input_sums)
{
    lbq_array x;
    double tau;
    const lbq_arg spec[] = {
        LBQ_IN("x", &x, NPY_FLOAT32, "t*k"),
        LBQ_FLOAT("tau", &tau, 0, 1e300),
    };
    LBQ_PARSE("input_sums", spec);
    lbq_input_sums sums;
    LBQ_RUN_VALUE(lbq_inputs_sum(x.dims[0], x.dims[1], x.data, tau, &sums),
                  Py_BuildValue("{s:n,s:d,s:d,s:d,s:d}",
                                "above",
                                (Py_ssize_t)sums.above,
                                "magnitude",
                                sums.magnitude,
                                "squares",
                                sums.squares,
                                "squares_above",
                                sums.squares_above,
                                "largest",
                                sums.largest));
}

static lbq_status
magnitude_counts(const lbq_array *x, const lbq_array *counts)
{
    LBQ_TRY(lbq_check_axis(counts, "counts", 0, "magnitudes", LBQ_MAGNITUDES));
    return lbq_magnitudes_count(x->dims[0], x->dims[1], x->data, counts->data);
}

LBQ_BINDING(magnitude_counts)
{
    lbq_array x, counts;
    const lbq_arg spec[] = {
        LBQ_IN("x", &x, NPY_FLOAT32, "t*k"),
        LBQ_INOUT("counts", &counts, NPY_INT64, "b"),
    };
    LBQ_PARSE("magnitude_counts", spec);
    LBQ_RUN(magnitude_counts(&x, &counts));
}

PyMethodDef lbq_methods_gptq[] = {
    LBQ_METHOD(
        refine,
        "refine(code, hessian, weight, scale, offset, codes, /, *, group, damping, sweeps)\n--\n\n"
        "Move codes (r, k) to neighbouring levels while that lowers the outputs' error; "
        "returns how many moves it made."),
    LBQ_METHOD(weight_sums,
               "weight_sums(weight, quantized, importance, gradient, /)\n--\n\n"
               "Sums over weight W, quantized Q and gradient G (r, k) with importance h (k): error "
               "(W - Q)^2, weight W^2, both weighted by h, gradient G^2 and fisher G^2 (W - Q)^2."),
    LBQ_METHOD(input_sums,
               "input_sums(x, /, *, tau)\n--\n\n"
               "Count |x| > tau in x (t, k); sum |x|, x^2 and those x^2; find the largest |x|."),
    LBQ_METHOD(magnitude_counts,
               "magnitude_counts(x, counts, /)\n--\n\n"
               "Add to counts (32768) how many x (t, k) have each magnitude, as the upper 16 bits "
               "of |x|."),
    LBQ_METHOD(adaround,
               "adaround(code, hessian, weight, scale, offset, codes, /, *, group, steps, rate, "
               "strength)\n--\n\n"
               "Choose between each weight's neighbours by the outputs; returns the largest "
               "distance from 0 or 1 that the soft bits kept."),
    LBQ_METHOD(hessian_add,
               "hessian_add(x, weights, hessian, /)\n--\n\n"
               "Add x^T diag(weights) x of x (t, k) to the upper triangle of hessian (k, k)."),
    LBQ_METHOD(hessian_error,
               "hessian_error(hessian, error, /)\n--\n\n"
               "tr(E H E^T) for error E (r, k) and the upper triangle of hessian (k, k)."),
    LBQ_METHOD(moment_add, "moment_add(y, x, weights, moment, /)\n--\n\n"
                           "Add y^T diag(weights) x of y (t, r) and x (t, k) to moment (r, k)."),
    LBQ_METHOD(ridge_solve,
               "ridge_solve(hessian, b, /, *, ridge)\n--\n\n"
               "b (r, k) becomes b (H + ridge I)^-1, from the upper triangle of hessian (k, k)."),
    LBQ_METHOD(product, "product(a, b, c, /)\n--\n\nc (m, n) = a (m, k) times b (n, k)^T."),
    LBQ_METHOD(leading_eigenvectors,
               "leading_eigenvectors(matrix, metric, values, vectors, /)\n--\n\n"
               "Largest values (r), ascending, and vectors (r, n) of matrix (n, n), or of matrix "
               "metric with x^T metric x = 1, from the upper triangles, which are destroyed."),
    LBQ_METHOD(
        gptq_factor,
        "gptq_factor(hessian, order, factor, /, *, damping, median)\n--\n\n"
        "Fill factor (k, k), of float32 or float64, for gptq; returns damping, retries, dead "
        "columns and whether it took float64 as a dict."),
    LBQ_METHOD(
        gptq,
        "gptq(code, factor, order, start, weight, importance, codes, scale, offset, /, *, group, "
        "fixed, block, " LBQ_SEARCH_TEXT ")\n--\n\n"
        "Round weight (r, k) with error feedback, in the arithmetic of factor: codes (r, k), "
        "scale and offset (r, g)."),
    LBQ_METHODS_END,
};
