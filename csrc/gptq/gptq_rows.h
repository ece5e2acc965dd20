/* The rounding of one tile of rows, in the arithmetic REAL; included once for each by gptq.c.
 *
 * Everything is transposed, a column's rows being neighbours, so that sums run over whole vectors
 * of rows. The blocks of columns are halved: the left half is rounded, one matrix product adds its
 * errors to what the right half is fed, and the right half is rounded; so most products are large.
 * In a block LANES rows go together and what is summed stays in the first-level cache. */

/* Scratch of one thread, in bytes; and its parts. */
typedef struct {
    REAL *errors;   /* (cols, pitch): w - q, and before that the feedback, errors times R */
    REAL *square;   /* (width, width): the block's own part of R */
    REAL *w, *x;    /* (width, LANES) */
    float *values;  /* (width, LANES) */
    uint8_t *codes; /* (width, LANES) */
} NAME(scratch);

static size_t
NAME(scratch_of)(const run_state *state, char *base, NAME(scratch) * scratch)
{
    const size_t width = (size_t)state->width, real = sizeof(REAL);
    const size_t tile = (size_t)state->problem->cols * (size_t)state->pitch * real;
    const size_t strip = width * LANES * real;
    const size_t sizes[] = {
        tile, width * width * real, strip, strip, width * LANES * sizeof(float), width * LANES};
    size_t at[7] = {0};
    for (int i = 0; i < 6; i++)
        at[i + 1] = at[i] + lbq_padded(sizes[i]);
    if (scratch)
        *scratch = (NAME(scratch)){
            .errors = (REAL *)(base + at[0]),
            .square = (REAL *)(base + at[1]),
            .w = (REAL *)(base + at[2]),
            .x = (REAL *)(base + at[3]),
            .values = (float *)(base + at[4]),
            .codes = (uint8_t *)(base + at[5]),
        };
    return at[6];
}

/* Takes back what is fed to a column of groups that absorb nothing. */
static void
NAME(keep_still)(const run_state *state, const lanes *at, ptrdiff_t group, REAL *shift)
{
    for (ptrdiff_t l = 0; l < at->rows; l++)
        if (state->still[(at->row + l) * state->groups + group])
            shift[l] = 0;
}

/* Scale and offset of the columns [begin, end) of the block, for each row of the lanes, from the
 * weights as published GPTQ would have changed them by now: w + x with x R_gg = feedback, R_gg
 * the group's own square of R. */
static lbq_status
NAME(fit_group)(const run_state *state, const lanes *at, ptrdiff_t begin, ptrdiff_t end,
                const REAL *e, const NAME(scratch) * s)
{
    const lbq_gptq_problem *const p = state->problem;
    const ptrdiff_t group = state->group_of[at->column + begin], count = end - begin;
    const REAL *const R = s->square + begin * state->width + begin;
    for (ptrdiff_t j = 0; j < count; j++)
        memcpy(s->x + j * LANES, e + (begin + j) * state->pitch, LANES * sizeof(REAL));
    SOLVE(count, R, state->width, s->x);
    for (ptrdiff_t j = 0; j < count && state->still; j++)
        NAME(keep_still)(state, at, group, s->x + j * LANES);
    for (ptrdiff_t i = 0; i < count * LANES; i++)
        s->values[i] = (float)(s->w[begin * LANES + i] + s->x[i]);
    float scale[LANES], offset[LANES], low[LANES], high[LANES];
    lbq_kernel.lanes_range_f32(s->values, count, low, high);
    const lbq_groups groups = {
        .w = s->values,
        .importance = state->importance ? state->importance + (at->column + begin) * LANES : NULL,
        .count = count,
        .low = low,
        .high = high,
    };
    lbq_code_fit(p->code, p->range, &groups, scale, offset);
    LBQ_TRY(check_fit(state, at, group, &groups, scale, offset));
    for (ptrdiff_t l = 0; l < at->rows; l++) {
        state->scale[(at->row + l) * state->groups + group] = scale[l];
        state->offset[(at->row + l) * state->groups + group] = offset[l];
    }
    return LBQ_OK;
}

/* The grids of one group, for lbq_kernels.round_f32. */
static void
NAME(load_grid)(const run_state *state, const lanes *at, ptrdiff_t group, REAL *grid)
{
    for (int l = 0; l < LANES; l++) {
        const ptrdiff_t from = (at->row + l) * state->groups + group;
        grid[l] = l < at->rows ? (REAL)state->scale[from] : 1;
        grid[LANES + l] = l < at->rows ? (REAL)state->offset[from] : 0;
        grid[2 * LANES + l] = grid[l] != 0 ? 1 / grid[l] : 0;
    }
}

/* Like lbq_kernels.round_f32, to the levels of a table. */
static void
NAME(round_to_levels)(const lbq_code *code, const REAL *grid, const REAL *w, const REAL *shift,
                      uint8_t *codes, REAL *e)
{
    for (int l = 0; l < LANES; l++) {
        const double scale = (double)grid[l], offset = (double)grid[LANES + l];
        codes[l] = lbq_code_encode(code, (double)(w[l] + shift[l]), scale, offset);
        e[l] = w[l] - (REAL)lbq_code_decode(code, codes[l], scale, offset);
    }
}

/* Rounds the columns [begin, end) of the block, a few at a time: sums over all columns before
 * those few stay in registers. */
static void
NAME(round_columns)(const run_state *state, const lanes *at, ptrdiff_t begin, ptrdiff_t end,
                    REAL *e, const NAME(scratch) * s)
{
    const lbq_gptq_problem *const p = state->problem;
    const int64_t *const group_of = state->group_of + at->column;
    const ptrdiff_t width = state->width, pitch = state->pitch;
    ptrdiff_t group = -1;
    REAL grid[3 * LANES];
    for (ptrdiff_t first = begin, last; first < end; first = last) {
        last = lbq_smaller(first + FEW, end);
        FEEDBACK(first - begin,
                 last - first,
                 s->square + begin * width + first,
                 width,
                 e + begin * pitch,
                 pitch,
                 e + first * pitch);
        for (ptrdiff_t j = first; j < last; j++) {
            if (group != group_of[j]) {
                group = group_of[j];
                NAME(load_grid)(state, at, group, grid);
            }
            if (state->still)
                NAME(keep_still)(state, at, group, e + j * pitch);
            const REAL *const w = s->w + j * LANES, *const shift = e + j * pitch;
            uint8_t *const codes = s->codes + j * LANES;
            if (p->code->levels)
                NAME(round_to_levels)(p->code, grid, w, shift, codes, e + j * pitch);
            else
                ROUND(grid, p->code->count - 1, w, shift, codes, e + j * pitch);
            FEEDBACK(1,
                     last - j - 1,
                     s->square + j * width + j + 1,
                     width,
                     e + j * pitch,
                     pitch,
                     e + (j + 1) * pitch);
        }
    }
}

/* One block for the rows of the lanes. */
static lbq_status
NAME(round_lanes)(const run_state *state, const lanes *at, ptrdiff_t width, REAL *e,
                  const NAME(scratch) * s)
{
    const lbq_gptq_problem *const p = state->problem;
    const int64_t *const group_of = state->group_of + at->column;
    const int64_t *const columns = state->ascending + at->column;
    const int64_t *const place = state->place + at->column;
    const ptrdiff_t first = at->row * p->cols;
    lbq_kernel.to_lanes_f32(state->W + first, p->cols, at->rows, columns, place, width, s->values);
    for (ptrdiff_t i = 0; i < width * LANES; i++)
        s->w[i] = (REAL)s->values[i];
    for (ptrdiff_t begin = 0, end; begin < width; begin = end) {
        end = width;
        if (state->refit) {
            for (end = begin + 1; end < width && group_of[end] == group_of[begin];)
                end++;
            FEEDBACK(begin,
                     end - begin,
                     s->square + begin,
                     state->width,
                     e,
                     state->pitch,
                     e + begin * state->pitch);
            LBQ_TRY(NAME(fit_group)(state, at, begin, end, e, s));
        }
        NAME(round_columns)(state, at, begin, end, e, s);
    }
    lbq_kernel.from_lanes_u8(
        s->codes, columns, place, width, at->rows, p->cols, state->codes + first);
    return LBQ_OK;
}

/* The columns from the block `first` up to the block `last`, for `rows` rows from `row` on. */
static lbq_status
NAME(round_blocks)(const run_state *state, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t first,
                   ptrdiff_t last, const NAME(scratch) * s)
{
    const ptrdiff_t cols = state->problem->cols, pitch = state->pitch;
    const REAL *const R = state->problem->R;
    const ptrdiff_t begin = state->block_begin[first], end = state->block_begin[last];
    if (last - first > 1) {
        const ptrdiff_t half = first + (last - first) / 2, middle = state->block_begin[half];
        LBQ_TRY(NAME(round_blocks)(state, row, rows, first, half, s));
        LBQ_TRY(GEMM(CblasTrans,
                     CblasNoTrans,
                     end - middle,
                     rows,
                     middle - begin,
                     1,
                     R + begin * cols + middle,
                     cols,
                     s->errors + begin * pitch,
                     pitch,
                     1,
                     s->errors + middle * pitch,
                     pitch));
        return NAME(round_blocks)(state, row, rows, half, last, s);
    }
    for (ptrdiff_t i = begin; i < end; i++)
        memcpy(s->square + (i - begin) * state->width,
               R + i * cols + begin,
               (size_t)(end - begin) * sizeof(REAL));
    for (ptrdiff_t l = 0; l < rows; l += LANES) {
        LBQ_TRY(lbq_interrupted());
        const lanes at = {row + l, lbq_smaller(LANES, rows - l), begin};
        LBQ_TRY(NAME(round_lanes)(state, &at, end - begin, s->errors + begin * pitch + l, s));
    }
    return LBQ_OK;
}

static lbq_status
NAME(round_rows)(void *context, ptrdiff_t index, int worker)
{
    const run_state *const state = context;
    const ptrdiff_t first = index * state->tile;
    const ptrdiff_t rows = lbq_smaller(state->tile, state->problem->rows - first);
    NAME(scratch) s;
    NAME(scratch_of)(state, state->scratch + (size_t)worker * state->scratch_bytes, &s);
    memset(s.errors, 0, (size_t)(state->problem->cols * state->pitch) * sizeof(REAL));
    return NAME(round_blocks)(state, first, rows, 0, state->blocks, &s);
}
