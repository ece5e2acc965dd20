/* Fills the kernel table, portable first, each stronger instruction set over it. */
#include "kernels/kernels.h"

#include <string.h>

const char *const lbq_kernel_names[] = {
#define X(name, result, parameters) #name,
#include "kernels/list.h"
};
const int lbq_kernel_count = sizeof lbq_kernel_names / sizeof *lbq_kernel_names;

lbq_kernels lbq_kernel;
static lbq_isa in_use;
static lbq_isa isa_of[sizeof lbq_kernel_names / sizeof *lbq_kernel_names];

typedef void (*fill)(lbq_kernels *);

static const fill FILL[LBQ_ISA_COUNT] = {
    lbq_table_portable,
#ifdef LBQ_X86
    lbq_table_avx2,
    lbq_table_avx512,
#endif
};

lbq_status
lbq_use_isa(lbq_isa isa)
{
    LBQ_REQUIRE(isa <= lbq_cpu_isa(),
                LBQ_BAD_VALUE,
                "isa is '%s', but this machine runs at most '%s'",
                lbq_isa_name(isa),
                lbq_isa_name(lbq_cpu_isa()));
    for (lbq_isa level = LBQ_PORTABLE; level <= isa; level++) {
        const lbq_kernels before = lbq_kernel;
        FILL[level](&lbq_kernel);
        for (int i = 0; i < lbq_kernel_count; i++) {
            const size_t at = (size_t)i * sizeof(void (*)(void));
            const char *const old = (const char *)&before + at;
            if (level == LBQ_PORTABLE || memcmp(old, (char *)&lbq_kernel + at, sizeof(fill)) != 0)
                isa_of[i] = level;
        }
    }
    in_use = isa;
    return LBQ_OK;
}

lbq_isa
lbq_isa_in_use(void)
{
    return in_use;
}

lbq_isa
lbq_kernel_isa(int kernel)
{
    return isa_of[kernel];
}
