/* Converts arguments that several bindings share. */
#include "python/code_args.h"

lbq_status
lbq_search_from_args(const lbq_search_args *args, lbq_search *search)
{
    *search = (lbq_search){
        .clip = args->clip,
        .percentile = args->percentile,
        .candidates = (int)args->candidates,
        .shrink = args->shrink,
        .norm = args->norm,
    };
    return lbq_range_method_find(args->method, &search->method);
}

lbq_status
lbq_check_parts(const lbq_packed *layout, const lbq_array *codes, const lbq_array *scale,
                const lbq_array *offset)
{
    const ptrdiff_t groups = (layout->cols - 1) / layout->group + 1;
    LBQ_TRY(lbq_check_axis(codes, "codes", 0, "rows", lbq_packed_code_rows(layout)));
    LBQ_TRY(lbq_check_axis(codes, "codes", 1, "cols", lbq_packed_code_cols(layout)));
    LBQ_TRY(lbq_check_axis(scale, "scale", 0, "rows", layout->rows));
    LBQ_TRY(lbq_check_axis(scale, "scale", 1, "groups", groups));
    LBQ_TRY(lbq_check_axis(offset, "offset", 0, "rows", layout->rows));
    return lbq_check_axis(offset, "offset", 1, "groups", groups);
}

lbq_status
lbq_matrix_of(const lbq_code *code, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t group,
              const lbq_array *panels, lbq_matrix *matrix)
{
    lbq_packed_geometry geometry;
    *matrix = (lbq_matrix){lbq_code_layout(code, rows, cols, group), code};
    LBQ_TRY(lbq_packed_geometry_of(&matrix->packed, &geometry));
    LBQ_REQUIRE(panels->dims[0] == geometry.bytes,
                LBQ_BAD_SHAPE,
                "panels has %td bytes, expected %td for %td x %td codes of %d bits",
                panels->dims[0],
                geometry.bytes,
                rows,
                cols,
                code->bits);
    matrix->packed.panels = panels->data;
    return LBQ_OK;
}
