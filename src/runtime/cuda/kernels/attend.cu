// What both kinds of attention and `combine` share.
// Set from outside: DV, the width of a value; TR, the rows of a thread; ROWS, the rows of a tile; FOURS, whether every row
// begins at a multiple of four elements and is one long.

#define LOWEST (-3.0e38f)

static __device__ float4 four(const float* x) {
    return *(const float4*)x;
}

// Four elements of a row from column d, zero from `width` on.
static __device__ float4 fetch(const float* row, unsigned int d, unsigned int width) {
#if FOURS
    return d < width ? four(row + d) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#else
    return make_float4(d < width ? row[d] : 0.0f, d + 1 < width ? row[d + 1] : 0.0f, d + 2 < width ? row[d + 2] : 0.0f,
                       d + 3 < width ? row[d + 3] : 0.0f);
#endif
}

// The largest, or the sum, of as many neighbouring threads, a power of two.
template <int N> static __device__ float largest(float x) {
#pragma unroll
    for (int d = 1; d < N; d *= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    }
    return x;
}

template <int N> static __device__ float sum_of(float x) {
#pragma unroll
    for (int d = 1; d < N; d *= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, d);
    }
    return x;
}
