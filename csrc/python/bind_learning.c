/* Bindings of words that learn: latent weights and soft rounding. */
#include "codes/latent.h"
#include "codes/soft.h"
#include "python/code_args.h"
#include "python/module.h"

/* The arguments that all functions on a matrix share. */
typedef struct {
    const lbq_code *code;
    lbq_array scale, offset;
    Py_ssize_t group;
} grid_args;

#define GRID_ARGS(to)                                                                              \
    LBQ_IN("scale", &(to).scale, NPY_FLOAT32, "rg"),                                               \
        LBQ_IN_OR_NONE("offset", &(to).offset, NPY_FLOAT32, "rg")

typedef struct {
    lbq_array dscale, doffset, dlevels;
} gradient_args;

#define GRADIENT_ARGS(to)                                                                          \
    LBQ_OUT_OR_NONE("dscale", &(to).dscale, NPY_FLOAT32, "rg"),                                    \
        LBQ_OUT_OR_NONE("doffset", &(to).doffset, NPY_FLOAT32, "rg"),                              \
        LBQ_OUT_OR_NONE("dlevels", &(to).dlevels, NPY_FLOAT32, "l")

static lbq_status
grids_of(const grid_args *args, const lbq_array *matrix, lbq_grids *grids)
{
    const ptrdiff_t rows = matrix->dims[0], cols = matrix->dims[1];
    const lbq_packed layout = lbq_code_layout(args->code, rows, cols, args->group);
    LBQ_TRY(lbq_check_parts(&layout, &(lbq_array){0}, &args->scale, &args->offset));
    *grids = (lbq_grids){
        .code = args->code,
        .rows = rows,
        .cols = cols,
        .group = args->group,
        .scale = args->scale.data,
        .offset = args->offset.data,
    };
    return LBQ_OK;
}

static lbq_status
gradients_of(const lbq_code *code, const gradient_args *args, lbq_grid_gradients *gradients)
{
    LBQ_TRY(lbq_check_axis(&args->dlevels, "dlevels", 0, "levels", lbq_level_count(code)));
    *gradients = (lbq_grid_gradients){
        .dscale = args->dscale.data,
        .doffset = args->doffset.data,
        .dlevels = args->dlevels.data,
    };
    return LBQ_OK;
}

/* --- latent weights --------------------------------------------------------------------------- */

static lbq_status
latent_compose(const grid_args *args, const lbq_latent *how, const lbq_array *x,
               const lbq_array *unit, const lbq_array *weight)
{
    lbq_grids grids;
    LBQ_TRY(grids_of(args, x, &grids));
    return lbq_latent_compose(&grids, how, x->data, unit->data, weight->data);
}

LBQ_BINDING(latent_compose)
{
    grid_args grid;
    lbq_array x, unit, weight;
    double share;
    const lbq_arg spec[] = {
        LBQ_CODE(&grid.code),
        LBQ_IN("latent", &x, NPY_FLOAT32, "rk"),
        GRID_ARGS(grid),
        LBQ_IN("unit", &unit, NPY_FLOAT32, "rg"),
        LBQ_OUT("weight", &weight, NPY_FLOAT32, "rk"),
        LBQ_GROUP(&grid.group),
        LBQ_FLOAT("share", &share, 0, 1),
    };
    LBQ_PARSE("latent_compose", spec);
    const lbq_latent how = {.share = (float)share};
    LBQ_RUN(latent_compose(&grid, &how, &x, &unit, &weight));
}

static lbq_status
latent_words(const grid_args *args, const lbq_array *x, const lbq_array *unit,
             const lbq_array *words)
{
    lbq_grids grids;
    LBQ_TRY(grids_of(args, x, &grids));
    return lbq_latent_words(&grids, x->data, unit->data, words->data);
}

LBQ_BINDING(latent_words)
{
    grid_args grid;
    lbq_array x, unit, words;
    const lbq_arg spec[] = {
        LBQ_CODE(&grid.code),
        LBQ_IN("latent", &x, NPY_FLOAT32, "rk"),
        GRID_ARGS(grid),
        LBQ_IN("unit", &unit, NPY_FLOAT32, "rg"),
        LBQ_OUT("words", &words, NPY_UINT8, "rk"),
        LBQ_GROUP(&grid.group),
    };
    LBQ_PARSE("latent_words", spec);
    LBQ_RUN(latent_words(&grid, &x, &unit, &words));
}

static lbq_status
latent_gradient(const grid_args *args, const lbq_latent *how, const lbq_array *x,
                const lbq_array *unit, const lbq_array *dW, const lbq_array *dx,
                const gradient_args *found)
{
    lbq_grids grids;
    lbq_grid_gradients gradients;
    LBQ_TRY(grids_of(args, x, &grids));
    LBQ_TRY(gradients_of(args->code, found, &gradients));
    return lbq_latent_gradient(&grids, how, x->data, unit->data, dW->data, dx->data, &gradients);
}

LBQ_BINDING(latent_gradient)
{
    grid_args grid;
    gradient_args found;
    lbq_array x, unit, dW, dx;
    double share;
    int clipped;
    const lbq_arg spec[] = {
        LBQ_CODE(&grid.code),
        LBQ_IN("latent", &x, NPY_FLOAT32, "rk"),
        GRID_ARGS(grid),
        LBQ_IN("unit", &unit, NPY_FLOAT32, "rg"),
        LBQ_IN("dweight", &dW, NPY_FLOAT32, "rk"),
        LBQ_INOUT("dlatent", &dx, NPY_FLOAT32, "rk"),
        GRADIENT_ARGS(found),
        LBQ_GROUP(&grid.group),
        LBQ_FLOAT("share", &share, 0, 1),
        LBQ_BOOL("clipped", &clipped),
    };
    LBQ_PARSE("latent_gradient", spec);
    const lbq_latent how = {.share = (float)share, .clipped = clipped};
    LBQ_RUN(latent_gradient(&grid, &how, &x, &unit, &dW, &dx, &found));
}

static lbq_status
latent_start(const grid_args *args, const lbq_array *W, const lbq_array *words,
             const lbq_array *unit, const lbq_array *x)
{
    lbq_grids grids;
    LBQ_TRY(grids_of(args, W, &grids));
    return lbq_latent_start(&grids, W->data, words->data, unit->data, x->data);
}

LBQ_BINDING(latent_start)
{
    grid_args grid;
    lbq_array W, words, unit, x;
    const lbq_arg spec[] = {
        LBQ_CODE(&grid.code),
        LBQ_IN("weight", &W, NPY_FLOAT32, "rk"),
        LBQ_IN("words", &words, NPY_UINT8, "rk"),
        GRID_ARGS(grid),
        LBQ_IN("unit", &unit, NPY_FLOAT32, "rg"),
        LBQ_OUT("latent", &x, NPY_FLOAT32, "rk"),
        LBQ_GROUP(&grid.group),
    };
    LBQ_PARSE("latent_start", spec);
    LBQ_RUN(latent_start(&grid, &W, &words, &unit, &x));
}

/* --- soft rounding ---------------------------------------------------------------------------- */

typedef struct {
    int sampled;
    double temperature, noise;
    Py_ssize_t seed, stream;
} softness_args;

#define SOFTNESS_ARGS(to)                                                                          \
    LBQ_BOOL("sampled", &(to).sampled), LBQ_FLOAT("temperature", &(to).temperature, 0, 1e6),       \
        LBQ_FLOAT("noise", &(to).noise, 0, 1), LBQ_INT("seed", &(to).seed, 0, PY_SSIZE_T_MAX),     \
        LBQ_INT("stream", &(to).stream, 0, PY_SSIZE_T_MAX)
#define SOFTNESS_TEXT "sampled, temperature, noise, seed, stream"

static lbq_softness
softness_of(const softness_args *args)
{
    return (lbq_softness){
        .sampled = args->sampled,
        .temperature = args->temperature,
        .noise = args->noise,
        .seed = (uint64_t)args->seed,
        .stream = (uint64_t)args->stream,
    };
}

static lbq_status
soft_compose(const grid_args *args, const lbq_softness *how, const lbq_array *V,
             const lbq_array *lower, const lbq_array *weight)
{
    lbq_grids grids;
    LBQ_TRY(grids_of(args, V, &grids));
    return lbq_soft_compose(&grids, how, V->data, lower->data, weight->data);
}

LBQ_BINDING(soft_compose)
{
    grid_args grid;
    softness_args softness;
    lbq_array V, lower, weight;
    const lbq_arg spec[] = {
        LBQ_CODE(&grid.code),
        LBQ_IN("V", &V, NPY_FLOAT32, "rk"),
        LBQ_IN("lower", &lower, NPY_UINT8, "rk"),
        GRID_ARGS(grid),
        LBQ_OUT("weight", &weight, NPY_FLOAT32, "rk"),
        LBQ_GROUP(&grid.group),
        SOFTNESS_ARGS(softness),
    };
    LBQ_PARSE("soft_compose", spec);
    const lbq_softness how = softness_of(&softness);
    LBQ_RUN(soft_compose(&grid, &how, &V, &lower, &weight));
}

static lbq_status
soft_gradient(const grid_args *args, const lbq_softness *how, const lbq_array *V,
              const lbq_array *lower, const lbq_array *dW, const lbq_array *dV,
              const gradient_args *found)
{
    lbq_grids grids;
    lbq_grid_gradients gradients;
    LBQ_TRY(grids_of(args, V, &grids));
    LBQ_TRY(gradients_of(args->code, found, &gradients));
    return lbq_soft_gradient(&grids, how, V->data, lower->data, dW->data, dV->data, &gradients);
}

LBQ_BINDING(soft_gradient)
{
    grid_args grid;
    gradient_args found;
    softness_args softness;
    lbq_array V, lower, dW, dV;
    const lbq_arg spec[] = {
        LBQ_CODE(&grid.code),
        LBQ_IN("V", &V, NPY_FLOAT32, "rk"),
        LBQ_IN("lower", &lower, NPY_UINT8, "rk"),
        GRID_ARGS(grid),
        LBQ_IN("dweight", &dW, NPY_FLOAT32, "rk"),
        LBQ_INOUT("dV", &dV, NPY_FLOAT32, "rk"),
        GRADIENT_ARGS(found),
        LBQ_GROUP(&grid.group),
        SOFTNESS_ARGS(softness),
    };
    LBQ_PARSE("soft_gradient", spec);
    const lbq_softness how = softness_of(&softness);
    LBQ_RUN(soft_gradient(&grid, &how, &V, &lower, &dW, &dV, &found));
}

static lbq_status
soft_bracket(const grid_args *args, const lbq_softness *how, const lbq_array *W,
             const lbq_array *words, const lbq_array *V, const lbq_array *lower)
{
    lbq_grids grids;
    LBQ_TRY(grids_of(args, W, &grids));
    return lbq_soft_bracket(&grids, how, W->data, words->data, V->data, lower->data);
}

LBQ_BINDING(soft_bracket)
{
    grid_args grid;
    lbq_array W, words, V, lower;
    int sampled;
    const lbq_arg spec[] = {
        LBQ_CODE(&grid.code),
        LBQ_IN("weight", &W, NPY_FLOAT32, "rk"),
        LBQ_IN("words", &words, NPY_UINT8, "rk"),
        GRID_ARGS(grid),
        LBQ_OUT("V", &V, NPY_FLOAT32, "rk"),
        LBQ_OUT("lower", &lower, NPY_UINT8, "rk"),
        LBQ_GROUP(&grid.group),
        LBQ_BOOL("sampled", &sampled),
    };
    LBQ_PARSE("soft_bracket", spec);
    const lbq_softness how = {.sampled = sampled};
    LBQ_RUN(soft_bracket(&grid, &how, &W, &words, &V, &lower));
}

LBQ_BINDING(soft_words)
{
    lbq_array V, lower, words;
    const lbq_arg spec[] = {
        LBQ_IN("V", &V, NPY_FLOAT32, "rk"),
        LBQ_IN("lower", &lower, NPY_UINT8, "rk"),
        LBQ_OUT("words", &words, NPY_UINT8, "rk"),
    };
    LBQ_PARSE("soft_words", spec);
    LBQ_RUN(lbq_soft_words(V.dims[0] * V.dims[1], V.data, lower.data, words.data));
}

LBQ_BINDING(soft_penalty)
{
    lbq_array V, dV;
    double strength, beta;
    const lbq_arg spec[] = {
        LBQ_IN("V", &V, NPY_FLOAT32, "rk"),
        LBQ_INOUT("dV", &dV, NPY_FLOAT32, "rk"),
        LBQ_FLOAT("strength", &strength, 0, 1e6),
        LBQ_FLOAT("beta", &beta, 1, 100),
    };
    LBQ_PARSE("soft_penalty", spec);
    LBQ_RUN(lbq_soft_penalty(V.dims[0] * V.dims[1], V.data, strength, beta, dV.data));
}

PyMethodDef lbq_methods_learning[] = {
    LBQ_METHOD(latent_compose,
               "latent_compose(code, latent, scale, offset, unit, weight, /, *, group, share)\n"
               "--\n\n"
               "Weights (rows, cols) of the levels nearest to unit * latent; the part 1 - share of "
               "each is unit * latent itself. offset None: -zero * scale."),
    LBQ_METHOD(latent_words,
               "latent_words(code, latent, scale, offset, unit, words, /, *, group)\n--\n\n"
               "The words (rows, cols) of these levels."),
    LBQ_METHOD(latent_gradient,
               "latent_gradient(code, latent, scale, offset, unit, dweight, dlatent, dscale, "
               "doffset, dlevels, /, *, group, share, clipped)\n--\n\n"
               "From the gradient by the weights of latent_compose: add to dlatent (rows, cols), "
               "set dscale, doffset (rows, groups) and dlevels (l), which may be None. Rounding "
               "counts as the identity; clipped: only within the range of the levels."),
    LBQ_METHOD(latent_start,
               "latent_start(code, weight, words, scale, offset, unit, latent, /, *, group)\n--\n\n"
               "Latent weights for float ones and their words: weight / unit, moved where needed "
               "to where it is rounded to its word."),
    LBQ_METHOD(soft_compose,
               "soft_compose(code, V, lower, scale, offset, weight, /, *, group, " SOFTNESS_TEXT
               ")\n--\n\n"
               "Weights (rows, cols) between the levels of lower and lower + 1, where V says: by "
               "its rectified sigmoid or, sampled, by a relaxed Bernoulli distribution."),
    LBQ_METHOD(soft_gradient,
               "soft_gradient(code, V, lower, scale, offset, dweight, dV, dscale, doffset, "
               "dlevels, /, *, group, " SOFTNESS_TEXT ")\n--\n\n"
               "From the gradient by the weights of soft_compose: add to dV (rows, cols), set "
               "dscale, doffset (rows, groups) and dlevels (l), which may be None."),
    LBQ_METHOD(soft_bracket,
               "soft_bracket(code, weight, words, scale, offset, V, lower, /, *, group, sampled)\n"
               "--\n\n"
               "The levels around float weights that were rounded to words, and V for where they "
               "lie in between."),
    LBQ_METHOD(soft_words, "soft_words(V, lower, words, /)\n--\n\n"
                           "Final words (rows, cols): lower + 1 where V > 0, else lower."),
    LBQ_METHOD(soft_penalty,
               "soft_penalty(V, dV, /, *, strength, beta)\n--\n\n"
               "Add to dV (rows, cols) the derivatives of strength * rms(dV) * sum (1 - |2 h - "
               "1|^beta), h the rectified sigmoid of V."),
    LBQ_METHODS_END,
};
