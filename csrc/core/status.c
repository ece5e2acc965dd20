/* The failure message of each thread. */
#include "core/status.h"

#include <stdarg.h>
#include <stdio.h>

/* Short: loaders reserve little space for a library's thread-local variables. */
static _Thread_local char message[256];

lbq_status
lbq_fail(lbq_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status;
}

const char *
lbq_message(void)
{
    return message;
}
