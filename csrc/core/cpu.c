/* CPU detection through the compiler's builtins, which ask CPUID and XGETBV. */
#include "core/cpu.h"

#include <string.h>

static const char *const NAMES[LBQ_ISA_COUNT] = {"portable", "avx2", "avx512"};

const char *
lbq_isa_name(lbq_isa isa)
{
    return NAMES[isa];
}

int
lbq_isa_find(const char *name)
{
    for (int isa = 0; isa < LBQ_ISA_COUNT; isa++)
        if (strcmp(name, NAMES[isa]) == 0)
            return isa;
    return -1;
}

lbq_isa
lbq_cpu_isa(void)
{
#ifdef LBQ_X86
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
          __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2")))
        return LBQ_PORTABLE;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vnni")))
        return LBQ_AVX2;
    return LBQ_AVX512;
#else
    return LBQ_PORTABLE;
#endif
}
