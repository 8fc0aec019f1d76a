// Kernels that take an element per thread, of n.

static __device__ size_t element() {
    return (size_t)blockIdx.x * blockDim.x + threadIdx.x;
}

// As in arch::Activation: silu, gelu, gelu by tanh, relu, relu squared.
static __device__ float activation(float x, unsigned int kind) {
    switch (kind) {
    case 0:
        return x / (1.0f + expf(-x));
    case 1:
        return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case 2:
        return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    default: {
        // NaN stays NaN, which fmaxf would not let it.
        float positive = x < 0.0f ? 0.0f : x;
        return kind == 3 ? positive : positive * positive;
    }
    }
}

// x = act(x) * y
extern "C" __global__ void gated(float* x, const float* y, size_t n, unsigned int kind) {
    size_t i = element();
    if (i < n) {
        x[i] = activation(x[i], kind) * y[i];
    }
}

// x = act(x)
extern "C" __global__ void activated(float* x, size_t n, unsigned int kind) {
    size_t i = element();
    if (i < n) {
        x[i] = activation(x[i], kind);
    }
}

// x += y
extern "C" __global__ void add(float* x, const float* y, size_t n) {
    size_t i = element();
    if (i < n) {
        x[i] += y[i];
    }
}

// x [rows, columns] += bias [columns]
extern "C" __global__ void add_bias(float* x, const float* bias, size_t n, size_t columns) {
    size_t i = element();
    if (i < n) {
        x[i] += bias[i % columns];
    }
}

// x = cap tanh(x / cap)
extern "C" __global__ void softcap(float* x, size_t n, float cap) {
    size_t i = element();
    if (i < n) {
        x[i] = cap * tanhf(x[i] / cap);
    }
}

// x as a sum of three bf16, the upper halves of f32, each the leading bits of what is left: to [3, n]. Cut, not rounded,
// so that nothing overflows, and what is left is exact. Of infinity and NaN nothing is left.
extern "C" __global__ void split(const float* x, unsigned short* to, size_t n) {
    size_t i = element();
    if (i < n) {
        float left = x[i];
        for (int part = 0; part < 3; part++) {
            unsigned int bits = __float_as_uint(left);
            if (left != left) {
                // The bits that make it one may be the lower.
                bits |= 0x400000;
            }
            bits &= 0xffff0000;
            to[part * n + i] = bits >> 16;
            bool finite = (bits & 0x7f800000) != 0x7f800000;
            left = finite ? left - __uint_as_float(bits) : 0.0f;
        }
    }
}

// x to the nearest bf16, halves to even.
extern "C" __global__ void round_to_bf16(const float* x, unsigned short* to, size_t n) {
    size_t i = element();
    if (i < n) {
        unsigned int bits = __float_as_uint(x[i]);
        bool nan = x[i] != x[i];
        to[i] = nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

// y [rows, columns], rows y_stride apart, = the sum of three parts, the least first, + bias [columns]
extern "C" __global__ void sum_parts(const float* parts, const float* bias, float* y, size_t n, size_t columns,
                                     size_t y_stride) {
    size_t i = element();
    if (i < n) {
        float sum = parts[2 * n + i] + parts[n + i] + parts[i];
        size_t column = i % columns;
        y[i / columns * y_stride + column] = bias ? sum + bias[column] : sum;
    }
}
