/* The portable kernels: plain C, the specification of all others. */
#include "kernels/portable/portable.h"

#ifdef __AVX__
#error "the portable kernels must run on every machine: compile them without AVX flags"
#endif

void
lbq_table_portable(lbq_kernels *table)
{
#define ENTRY(name, result, parameters) .name = lbq_##name##_portable,
    *table = (lbq_kernels){LBQ_KERNELS(ENTRY)};
#undef ENTRY
}
