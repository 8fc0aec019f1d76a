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

// bf16, the upper half of an f32, to f32.
extern "C" __global__ void widen(const unsigned short* from, float* to, size_t n) {
    size_t i = element();
    if (i < n) {
        to[i] = __uint_as_float((unsigned int)from[i] << 16);
    }
}
