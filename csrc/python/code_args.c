/* What the arguments of a code stand for. */
#include "python/code_args.h"

lbq_status
lbq_check_groups(const lbq_array *levels, Py_ssize_t count, const lbq_array *scale, ptrdiff_t cols,
                 Py_ssize_t group)
{
    const ptrdiff_t groups = (cols - 1) / group + 1;
    LBQ_REQUIRE(!levels->data || levels->dims[0] == count,
                LBQ_BAD_SHAPE,
                "%td levels for %zd codes",
                levels->dims[0],
                count);
    LBQ_REQUIRE(groups == scale->dims[1],
                LBQ_BAD_SHAPE,
                "scale has %td groups, expected %td",
                scale->dims[1],
                groups);
    return LBQ_OK;
}

lbq_status
lbq_code_from_args(const lbq_code_args *args, ptrdiff_t cols, lbq_code *code, lbq_range *range)
{
    *code = (lbq_code){
        .count = (int)args->count,
        .symmetric = args->symmetric,
        .zero = (float)args->zero,
        .levels = args->levels.data,
        .scale_bits = (int)args->scale_bits,
        .gamma = (float)args->gamma,
    };
    *range = (lbq_range){
        .clip = args->clip,
        .percentile = args->percentile,
        .candidates = (int)args->candidates,
        .shrink = args->shrink,
        .norm = args->norm,
    };
    LBQ_TRY(lbq_range_method_find(args->method, &range->method));
    return lbq_check_groups(&args->levels, args->count, &args->scale, cols, args->group);
}
