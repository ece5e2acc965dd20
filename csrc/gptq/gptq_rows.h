/* Rounds one tile of rows in REAL arithmetic; gptq.c includes it for float and for double.
 *
 * Everything is transposed: a column's rows are adjacent, so that sums run over whole vectors of
 * rows. The sequence of blocks is halved recursively: the left half is rounded, one matrix product
 * adds its errors to the feedback of the right half, and the right half is rounded; so most
 * products are large. Within a block the rows of a strip are rounded together, and the sums stay in
 * the first-level cache. */

/* Scratch of one thread, in bytes; and its parts. */
typedef struct {
    REAL *errors;   /* (cols, pitch): first the feedback, errors times R; then w - q */
    REAL *square;   /* (width, width): the diagonal block of R */
    REAL *w;        /* (width, strip) */
    REAL *x;        /* (width, LANES) */
    float *values;  /* (width, LANES) */
    uint8_t *codes; /* (width, strip) */
    void *encoding; /* for the code's kind */
} NAME(scratch);

static size_t
NAME(scratch_of)(const run_state *state, char *base, NAME(scratch) * scratch)
{
    const size_t width = (size_t)state->width, real = sizeof(REAL);
    const size_t tile = (size_t)state->problem->cols * (size_t)state->pitch * real;
    const size_t strip = width * (size_t)state->strip, panel = width * LANES;
    const size_t sizes[] = {tile,
                            width * width * real,
                            strip * real,
                            panel * real,
                            panel * sizeof(float),
                            strip,
                            state->encoding_bytes};
    size_t at[8] = {0};
    for (int i = 0; i < 7; i++)
        at[i + 1] = at[i] + lbq_padded(sizes[i]);
    if (scratch)
        *scratch = (NAME(scratch)){
            .errors = (REAL *)(base + at[0]),
            .square = (REAL *)(base + at[1]),
            .w = (REAL *)(base + at[2]),
            .x = (REAL *)(base + at[3]),
            .values = (float *)(base + at[4]),
            .codes = (uint8_t *)(base + at[5]),
            .encoding = base + at[6],
        };
    return at[7];
}

/* Clears the feedback to a column of groups that absorb no errors, in rows starting at `row`. */
static void
NAME(keep_still)(const run_state *state, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t group,
                 REAL *shift)
{
    for (ptrdiff_t l = 0; l < rows; l++)
        if (state->still[(row + l) * state->groups + group])
            shift[l] = 0;
}

/* Fits scale and offset of columns [begin, end) of the block, for each row of a panel of the strip,
 * to the weights as published GPTQ would have updated them by now: w + x with x R_gg = feedback,
 * where R_gg is the group's diagonal block of R. */
static lbq_status
NAME(fit_group)(const run_state *state, const lanes *at, ptrdiff_t panel, ptrdiff_t begin,
                ptrdiff_t end, const REAL *e, const NAME(scratch) * s)
{
    const lbq_gptq_problem *const p = state->problem;
    const ptrdiff_t group = state->group_of[at->column + begin], count = end - begin;
    const ptrdiff_t first = panel * LANES, rows = lbq_smaller(LANES, at->rows - first);
    const REAL *const R = s->square + begin * state->width + begin;
    for (ptrdiff_t j = 0; j < count; j++)
        memcpy(s->x + j * LANES, e + (begin + j) * state->pitch + first, LANES * sizeof(REAL));
    SOLVE(count, R, state->width, s->x);
    for (ptrdiff_t j = 0; j < count && state->still; j++)
        NAME(keep_still)(state, at->row + first, rows, group, s->x + j * LANES);
    for (ptrdiff_t j = 0; j < count; j++)
        for (int l = 0; l < LANES; l++)
            s->values[j * LANES + l] =
                (float)(s->w[(begin + j) * state->strip + first + l] + s->x[j * LANES + l]);
    float scale[LANES], offset[LANES], low[LANES], high[LANES];
    lbq_kernel.lanes_range_f32(s->values, count, low, high);
    const lbq_groups groups = {
        .w = s->values,
        .importance = state->importance ? state->importance + (at->column + begin) * LANES : NULL,
        .count = count,
        .low = low,
        .high = high,
    };
    p->code->kind->fit(p->code, p->search, &groups, scale, offset);
    LBQ_TRY(check_fit(state, at->row + first, rows, group, &groups, scale, offset));
    for (ptrdiff_t l = 0; l < rows; l++) {
        state->scale[(at->row + first + l) * state->groups + group] = scale[l];
        state->offset[(at->row + first + l) * state->groups + group] = offset[l];
    }
    return LBQ_OK;
}

/* Loads the grids of one group in the layout of lbq_grid. */
static void
NAME(load_grid)(const run_state *state, const lanes *at, ptrdiff_t group, REAL *grid)
{
    for (ptrdiff_t l = 0; l < state->strip; l++) {
        const ptrdiff_t from = (at->row + l) * state->groups + group;
        grid[l] = l < at->rows ? (REAL)state->scale[from] : 1;
        grid[state->strip + l] = l < at->rows ? (REAL)state->offset[from] : 0;
        grid[2 * state->strip + l] = grid[l] != 0 ? 1 / grid[l] : 0;
    }
}

/* Adds the errors of columns [begin, end) of the block to the feedback of [first, last). */
static void
NAME(feed)(const run_state *state, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t first, ptrdiff_t last,
           REAL *e, const NAME(scratch) * s)
{
    const ptrdiff_t width = state->width, pitch = state->pitch;
    for (ptrdiff_t l = 0; l < state->strip; l += LANES)
        FEEDBACK(end - begin,
                 last - first,
                 s->square + begin * width + first,
                 width,
                 e + begin * pitch + l,
                 pitch,
                 e + first * pitch + l);
}

/* Rounds columns [begin, end) of the block, a few at a time, so that sums over all earlier columns
 * stay in registers. Nothing is fed forward within a run. */
static void
NAME(round_columns)(const run_state *state, const lanes *at, ptrdiff_t begin, ptrdiff_t end,
                    REAL *e, const NAME(scratch) * s)
{
    const int64_t *const group_of = state->group_of + at->column;
    const ptrdiff_t strip = state->strip, run = state->run, pitch = state->pitch;
    const ptrdiff_t few = run > FEW ? run : FEW;
    ptrdiff_t group = -1;
    REAL grid[3 * LBQ_STRIP];
    for (ptrdiff_t first = begin, last; first < end; first = last) {
        last = lbq_smaller(first + few, end);
        NAME(feed)(state, begin, first, first, last, e, s);
        for (ptrdiff_t j = first; j < last; j += run) {
            if (group != group_of[j]) {
                group = group_of[j];
                NAME(load_grid)(state, at, group, grid);
            }
            for (ptrdiff_t c = j; c < j + run && state->still; c++)
                NAME(keep_still)(state, at->row, at->rows, group, e + c * pitch);
            NAME(encode)(state,
                         at->rows,
                         grid,
                         s->w + j * strip,
                         s->codes + j * strip,
                         e + j * pitch,
                         s->encoding);
            NAME(feed)(state, j, j + run, j + run, last, e, s);
        }
    }
}

/* Rounds one block of columns for the rows of the strip. */
static lbq_status
NAME(round_strip)(const run_state *state, const lanes *at, ptrdiff_t width, REAL *e,
                  const NAME(scratch) * s)
{
    const lbq_gptq_problem *const p = state->problem;
    const int64_t *const group_of = state->group_of + at->column;
    const int64_t *const columns = state->ascending + at->column;
    const int64_t *const place = state->place + at->column;
    const ptrdiff_t strip = state->strip;
    for (ptrdiff_t l = 0; l < strip; l += LANES) {
        const float *const W = state->W + (at->row + l) * p->cols;
        const ptrdiff_t rows = at->rows > l ? lbq_smaller(LANES, at->rows - l) : 0;
        if (rows)
            lbq_kernel.to_lanes_f32(W, p->cols, rows, columns, place, width, s->values);
        for (ptrdiff_t i = 0; i < width; i++)
            for (int lane = 0; lane < LANES; lane++)
                s->w[i * strip + l + lane] = rows ? (REAL)s->values[i * LANES + lane] : 0;
    }
    for (ptrdiff_t begin = 0, end; begin < width; begin = end) {
        end = width;
        if (state->refit) {
            for (end = begin + 1; end < width && group_of[end] == group_of[begin];)
                end++;
            NAME(feed)(state, 0, begin, begin, end, e, s);
            for (ptrdiff_t panel = 0; panel * LANES < at->rows; panel++)
                LBQ_TRY(NAME(fit_group)(state, at, panel, begin, end, e, s));
        }
        NAME(round_columns)(state, at, begin, end, e, s);
    }
    for (ptrdiff_t l = 0; l < strip; l += LANES) {
        const uint8_t *codes = s->codes;
        uint8_t *const panel = (uint8_t *)s->values;
        for (ptrdiff_t i = 0; i < width && strip > LANES; i++)
            memcpy(panel + i * LANES, s->codes + i * strip + l, LANES);
        if (strip > LANES)
            codes = panel;
        lbq_kernel.from_lanes_u8(codes,
                                 columns,
                                 place,
                                 width,
                                 lbq_smaller(LANES, state->code_rows - at->row - l),
                                 p->cols,
                                 state->codes + (at->row + l) * p->cols);
    }
    return LBQ_OK;
}

/* Rounds the blocks [first, last) for `rows` rows starting at `row`. */
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
    for (ptrdiff_t l = 0; l < rows; l += state->strip) {
        LBQ_TRY(lbq_interrupted());
        const lanes at = {row + l, lbq_smaller(state->strip, rows - l), begin};
        LBQ_TRY(NAME(round_strip)(state, &at, end - begin, s->errors + begin * pitch + l, s));
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
    const REAL *const start = state->problem->start;
    for (ptrdiff_t k = 0; k < state->problem->cols && start; k++)
        memcpy(s.errors + k * state->pitch,
               start + k * state->problem->rows + first,
               (size_t)rows * sizeof(REAL));
    return NAME(round_blocks)(state, first, rows, 0, state->blocks, &s);
}
