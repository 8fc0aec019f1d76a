// Products of up to 16 rows, which are bound by reading the weight: every element of it is read once. The rest is cuBLAS's.

struct Product {
    // Rows of x, outputs and inputs of a head.
    unsigned int m, n, k;
    // Elements from one row, or one head, to the next.
    size_t x_stride, x_batch, w_first, w_batch, y_stride, y_batch;
};

static __device__ float value(const float* w, size_t i) {
    return w[i];
}

static __device__ float value(const unsigned short* w, size_t i) {
    return __uint_as_float((unsigned int)w[i] << 16);
}

static __device__ float4 values(const float* w, size_t i) {
    return *(const float4*)(w + i);
}

static __device__ float4 values(const unsigned short* w, size_t i) {
    ushort4 four = *(const ushort4*)(w + i);
    return make_float4(__uint_as_float((unsigned int)four.x << 16), __uint_as_float((unsigned int)four.y << 16),
                       __uint_as_float((unsigned int)four.z << 16), __uint_as_float((unsigned int)four.w << 16));
}

// y = x W^T + bias, W [n, k] per head: 4 outputs per block of 128 threads, 32 threads each. R is m rounded up.
template <int R, typename W>
static __device__ void outputs(const float* x, const W* w, const float* bias, float* y, const Product& p) {
    const unsigned int LANES = 32;
    unsigned int lane = threadIdx.x % LANES;
    size_t column = (size_t)blockIdx.x * 4 + threadIdx.x / LANES;
    x += blockIdx.y * p.x_batch;
    w += p.w_first + blockIdx.y * p.w_batch + column * p.k;
    float own[R];
    for (int r = 0; r < R; r++) {
        own[r] = 0.0f;
    }
    if (column < p.n) {
        // Four at a time where every row begins at a multiple of four.
        bool fours = (p.k | p.x_stride | p.x_batch | p.w_first | p.w_batch) % 4 == 0;
        if (fours) {
            for (unsigned int k = 4 * lane; k < p.k; k += 4 * LANES) {
                float4 b = values(w, k);
#pragma unroll
                for (int r = 0; r < R; r++) {
                    if (r < p.m) {
                        float4 a = *(const float4*)(x + r * p.x_stride + k);
                        own[r] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
                    }
                }
            }
        } else {
            for (unsigned int k = lane; k < p.k; k += LANES) {
                float b = value(w, k);
#pragma unroll
                for (int r = 0; r < R; r++) {
                    if (r < p.m) {
                        own[r] += x[r * p.x_stride + k] * b;
                    }
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int d = LANES / 2; d > 0; d /= 2) {
            own[r] += __shfl_xor_sync(0xffffffffu, own[r], d);
        }
    }
    if (lane == 0 && column < p.n) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            if (r >= p.m) {
                break;
            }
            float sum = bias ? own[r] + bias[column] : own[r];
            y[r * p.y_stride + blockIdx.y * p.y_batch + column] = sum;
        }
    }
}

// y = x W, W [k, n] per head, then the `tail` elements that follow those k in x: 32 outputs per block of 128 threads, each
// the sum of four threads. sums [R, 128].
template <int R, typename W>
static __device__ void absorbed(const float* x, const W* w, float* y, const Product& p, unsigned int tail,
                                float* sums) {
    unsigned int lane = threadIdx.x % 32;
    unsigned int part = threadIdx.x / 32;
    size_t column = (size_t)blockIdx.x * 32 + lane;
    x += blockIdx.y * p.x_batch;
    y += blockIdx.y * p.y_batch;
    w += p.w_first + blockIdx.y * p.w_batch + column;
    float own[R];
    for (int r = 0; r < R; r++) {
        own[r] = 0.0f;
    }
    if (column < p.n) {
#pragma unroll 8
        for (unsigned int k = part; k < p.k; k += 4) {
            float b = value(w, (size_t)k * p.n);
#pragma unroll
            for (int r = 0; r < R; r++) {
                if (r < p.m) {
                    own[r] += x[r * p.x_stride + k] * b;
                }
            }
        }
    }
    for (int r = 0; r < R; r++) {
        sums[r * 128 + threadIdx.x] = own[r];
    }
    __syncthreads();
    for (unsigned int r = part; r < p.m; r += 4) {
        const float* four = sums + r * 128 + lane;
        if (column < p.n) {
            y[r * p.y_stride + column] = (four[0] + four[32]) + (four[64] + four[96]);
        } else if (column < p.n + tail) {
            y[r * p.y_stride + column] = x[r * p.x_stride + p.k + (column - p.n)];
        }
    }
}

template <typename W>
static __device__ void outputs_of(const float* x, const W* w, const float* bias, float* y, const Product& p) {
    if (p.m == 1) {
        outputs<1>(x, w, bias, y, p);
    } else if (p.m == 2) {
        outputs<2>(x, w, bias, y, p);
    } else if (p.m <= 4) {
        outputs<4>(x, w, bias, y, p);
    } else if (p.m <= 8) {
        outputs<8>(x, w, bias, y, p);
    } else {
        outputs<16>(x, w, bias, y, p);
    }
}

template <typename W>
static __device__ void absorbed_of(const float* x, const W* w, float* y, const Product& p, unsigned int tail,
                                   float* sums) {
    if (p.m == 1) {
        absorbed<1>(x, w, y, p, tail, sums);
    } else if (p.m == 2) {
        absorbed<2>(x, w, y, p, tail, sums);
    } else if (p.m <= 4) {
        absorbed<4>(x, w, y, p, tail, sums);
    } else if (p.m <= 8) {
        absorbed<8>(x, w, y, p, tail, sums);
    } else {
        absorbed<16>(x, w, y, p, tail, sums);
    }
}

extern "C" __global__ void outputs_f32(const float* x, const float* w, const float* bias, float* y, unsigned int m,
                                       unsigned int n, unsigned int k, size_t x_stride, size_t x_batch, size_t w_first,
                                       size_t w_batch, size_t y_stride, size_t y_batch) {
    Product p = {m, n, k, x_stride, x_batch, w_first, w_batch, y_stride, y_batch};
    outputs_of(x, w, bias, y, p);
}

extern "C" __global__ void outputs_bf16(const float* x, const unsigned short* w, const float* bias, float* y,
                                        unsigned int m, unsigned int n, unsigned int k, size_t x_stride, size_t x_batch,
                                        size_t w_first, size_t w_batch, size_t y_stride, size_t y_batch) {
    Product p = {m, n, k, x_stride, x_batch, w_first, w_batch, y_stride, y_batch};
    outputs_of(x, w, bias, y, p);
}

extern "C" __global__ void absorbed_f32(const float* x, const float* w, float* y, unsigned int m, unsigned int n,
                                        unsigned int k, size_t x_stride, size_t x_batch, size_t w_first, size_t w_batch,
                                        size_t y_stride, size_t y_batch, unsigned int tail) {
    __shared__ float sums[16 * 128];
    Product p = {m, n, k, x_stride, x_batch, w_first, w_batch, y_stride, y_batch};
    absorbed_of(x, w, y, p, tail, sums);
}

extern "C" __global__ void absorbed_bf16(const float* x, const unsigned short* w, float* y, unsigned int m,
                                         unsigned int n, unsigned int k, size_t x_stride, size_t x_batch,
                                         size_t w_first, size_t w_batch, size_t y_stride, size_t y_batch,
                                         unsigned int tail) {
    __shared__ float sums[16 * 128];
    Product p = {m, n, k, x_stride, x_batch, w_first, w_batch, y_stride, y_batch};
    absorbed_of(x, w, y, p, tail, sums);
}
