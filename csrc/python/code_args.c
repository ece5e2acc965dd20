/* What arguments that several bindings share stand for. */
#include "python/code_args.h"

lbq_status
lbq_range_from_args(const lbq_range_args *args, lbq_range *range)
{
    *range = (lbq_range){
        .clip = args->clip,
        .percentile = args->percentile,
        .candidates = (int)args->candidates,
        .shrink = args->shrink,
        .norm = args->norm,
    };
    return lbq_range_method_find(args->method, &range->method);
}

lbq_status
lbq_check_levels(const lbq_array *levels, Py_ssize_t count)
{
    LBQ_REQUIRE(!levels->data || levels->dims[0] == count,
                LBQ_BAD_SHAPE,
                "%td levels for %zd codes",
                levels->dims[0],
                count);
    return LBQ_OK;
}

/* A table of levels is fitted by its scale alone. */
lbq_status
lbq_check_fit(const lbq_array *levels, int has_offset, int fixed)
{
    LBQ_REQUIRE(fixed || !has_offset || !levels->data,
                LBQ_BAD_VALUE,
                "levels have scales, but no offsets: expected symmetric codes");
    return LBQ_OK;
}

lbq_status
lbq_check_groups(const lbq_array *levels, Py_ssize_t count, const lbq_array *scale, ptrdiff_t cols,
                 Py_ssize_t group)
{
    const ptrdiff_t groups = (cols - 1) / group + 1;
    LBQ_TRY(lbq_check_levels(levels, count));
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
    LBQ_TRY(lbq_range_from_args(&args->range, range));
    LBQ_TRY(lbq_check_fit(&args->levels, !args->symmetric, args->fixed));
    return lbq_check_groups(&args->levels, args->count, &args->scale, cols, args->group);
}

lbq_packed
lbq_packed_from_args(const lbq_packed_args *args)
{
    return (lbq_packed){
        .rows = args->rows,
        .cols = args->cols,
        .group = args->group,
        .bits = (int)args->bits,
        .scale_bits = (int)args->scale_bits,
        .has_offset = args->has_offset,
        .gamma = (float)args->gamma,
        .zero = (float)args->zero,
    };
}

lbq_status
lbq_packed_attach(lbq_packed *packed, const lbq_array *panels)
{
    lbq_packed_geometry geometry;
    LBQ_TRY(lbq_packed_geometry_of(packed, &geometry));
    LBQ_REQUIRE(panels->dims[0] == geometry.bytes,
                LBQ_BAD_SHAPE,
                "panels has %td bytes, expected %td for %td x %td codes of %d bits",
                panels->dims[0],
                geometry.bytes,
                packed->rows,
                packed->cols,
                packed->bits);
    packed->panels = panels->data;
    return LBQ_OK;
}
