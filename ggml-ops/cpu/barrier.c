#if defined(__linux__)

#    include "barrier.h"

#    include "ggml.h"

#    include <limits.h>
#    include <linux/futex.h>
#    include <stdbool.h>
#    include <stdint.h>
#    include <sys/syscall.h>
#    include <unistd.h>

#    define SPIN_US     50  // longer than the waits that an even share of the work leaves
#    define SPIN_ROUNDS 64  // between two looks at the clock

static inline void relax(void) {
#    if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#    elif defined(__aarch64__)
    __asm__ volatile("yield" ::: "memory");
#    endif
}

static bool spin(atomic_int * passed, int before) {
    const int64_t end = ggml_time_us() + SPIN_US;
    do {
        for (int i = 0; i < SPIN_ROUNDS; i++) {
            if (atomic_load_explicit(passed, memory_order_acquire) != before) {
                return true;
            }
            relax();
        }
    } while (ggml_time_us() < end);
    return false;
}

void ggml_barrier_wait(atomic_int * passed, int before, atomic_int * sleeping) {
    if (spin(passed, before)) {
        return;
    }
    // either the waker sees the count, or the kernel sees that *passed has changed and returns at once
    atomic_fetch_add(sleeping, 1);
    while (atomic_load(passed) == before) {
        syscall(SYS_futex, passed, FUTEX_WAIT_PRIVATE, before, NULL, NULL, 0);
    }
    atomic_fetch_sub(sleeping, 1);
}

void ggml_barrier_wake(atomic_int * passed, atomic_int * sleeping) {
    if (atomic_load(sleeping) > 0) {
        syscall(SYS_futex, passed, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    }
}

#endif
