// CUDA C as C++: what a kernel source sees instead of CUDA when `emulator.cpp` compiles it.
//
// Threads of a block are fibers that run one after the other from barrier to barrier, in another order every time. What
// depends on that order on a card, a race, gives other results here. Shared memory is NaN when a block begins.

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <ucontext.h>
#include <vector>

using std::max;
using std::min;

struct uint3 { unsigned int x, y, z; };
struct dim3 { unsigned int x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned int x, y, z, w; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };

static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static float __uint_as_float(unsigned int bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static unsigned int __float_as_uint(float x) {
    unsigned int bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

#define __global__
#define __device__
#define __shared__ __attribute__((section("shared_memory"))) static
#define __launch_bounds__(n)
#define __align__(n) __attribute__((aligned(n)))

// There is always some shared memory, so that the section exists.
__shared__ __attribute__((used)) float always[1];
extern "C" char __start_shared_memory[], __stop_shared_memory[];

namespace emulation {

struct Fiber {
    ucontext_t context;
    jmp_buf state;
    std::vector<char> stack = std::vector<char>(1 << 17);
    bool started, ended;
};

static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static unsigned int current;
static void (*body)(void**);
static void** arguments;

[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "CUDA emulator: %s\n", what);
    abort();
}

static void enter() {
    body(arguments);
    fibers[current].ended = true;
    _longjmp(scheduler, 1);
}

// Run a fiber to its next barrier or end.
static void step(unsigned int t) {
    current = t;
    threadIdx = {t, 0, 0};
    Fiber& fiber = fibers[t];
    if (_setjmp(scheduler)) {
        return;
    }
    if (fiber.started) {
        _longjmp(fiber.state, 1);
    }
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
    setcontext(&fiber.context);
}

static void block(unsigned int threads, std::mt19937& random) {
    memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
    if (fibers.size() < threads) {
        fibers.resize(threads);
    }
    for (unsigned int t = 0; t < threads; t++) {
        fibers[t].started = fibers[t].ended = false;
    }
    std::vector<unsigned int> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    unsigned int ended = 0;
    while (ended == 0) {
        std::shuffle(order.begin(), order.end(), random);
        for (unsigned int t : order) {
            step(t);
            ended += fibers[t].ended;
        }
        // A card would wait for ever, or read what is not there yet.
        if (ended != 0 && ended != threads) {
            fail("some threads of a block wait at a barrier that others never reach");
        }
    }
}

static void launch(void (*kernel)(void**), void** params, const unsigned int* grid, unsigned int threads,
                   unsigned int seed) {
    std::mt19937 random(seed);
    body = kernel;
    arguments = params;
    blockDim = {threads, 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    for (unsigned int z = 0; z < grid[2]; z++) {
        for (unsigned int y = 0; y < grid[1]; y++) {
            for (unsigned int x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                block(threads, random);
            }
        }
    }
}

template <typename... A, size_t... I>
static void call(void (*kernel)(A...), void** params, std::index_sequence<I...>) {
    kernel(*(A*)params[I]...);
}

// Parameters are as cuLaunchKernel takes them: a pointer to each.
template <typename... A> static void call(void (*kernel)(A...), void** params) {
    call(kernel, params, std::index_sequence_for<A...>{});
}

}  // namespace emulation

static void __syncthreads() {
    emulation::Fiber& fiber = emulation::fibers[emulation::current];
    unsigned int own = emulation::current;
    if (!_setjmp(fiber.state)) {
        _longjmp(emulation::scheduler, 1);
    }
    if (own != emulation::current) {
        emulation::fail("the wrong thread was woken");
    }
}

// Of all threads of a block at once, not only of those of a warp: kernels must not depend on less.
static float __shfl_xor_sync(unsigned int, float x, unsigned int mask) {
    static float values[1024];
    values[threadIdx.x] = x;
    __syncthreads();
    float other = values[threadIdx.x ^ mask];
    __syncthreads();
    return other;
}
