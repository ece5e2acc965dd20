/* Loops over the peers' functions of one row, so that Python's calls are not in the time. */
#include <stddef.h>

typedef void (*vec_dot)(int n, float *s, size_t bs, const void *x, size_t bx, const void *y,
                        size_t by, int rows);
typedef int (*transform)(float *x, int log_n);

/* y[r] = row r of a matrix of ggml's blocks times the vector x, as ggml's own product does it. */
void
dot_rows(vec_dot dot, int cols, int rows, const char *matrix, size_t row_bytes, const void *x,
         float *y)
{
    for (int r = 0; r < rows; r++)
        dot(cols, y + r, 0, matrix + (size_t)r * row_bytes, 0, x, 0, 1);
}

/* FFHT of `rows` rows of 2^log_n numbers, in place. */
void
transform_rows(transform fht, int rows, int log_n, float *x)
{
    for (int r = 0; r < rows; r++)
        fht(x + ((size_t)r << log_n), log_n);
}
