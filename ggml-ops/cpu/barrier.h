// How a thread waits at the barrier between two nodes, on Linux: it spins for a while, then sleeps until it is woken.
//
// libgomp's barrier does the same, but spins for 100 rounds only once all its teams together have more threads
// than the machine has cores. A team belongs to the thread that starts it: a program that computes from two threads, or
// that multiplies with torch as well, has two, and then puts its threads to sleep at most of the barriers of a graph.
#pragma once

#include <stdatomic.h>

// Returns once *passed is no longer `before`. `sleeping` counts the threads that wait in the kernel.
void ggml_barrier_wait(atomic_int * passed, int before, atomic_int * sleeping);

// Wakes them, after *passed has changed.
void ggml_barrier_wake(atomic_int * passed, atomic_int * sleeping);
