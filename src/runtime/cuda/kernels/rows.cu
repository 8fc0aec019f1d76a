// Kernels that move or turn rows and columns, and norms of rows. element() is in elementwise.cu.

// Copy columns of every head from one matrix to another; n = rows heads width.
extern "C" __global__ void copy_heads(const float* from, float* to, size_t n, size_t heads, size_t width,
                                      size_t from_columns, size_t from_start, size_t from_stride, size_t to_columns,
                                      size_t to_start, size_t to_stride) {
    size_t i = element();
    if (i >= n) {
        return;
    }
    size_t column = i % width;
    size_t head = i / width % heads;
    size_t row = i / width / heads;
    to[row * to_columns + to_start + head * to_stride + column] =
        from[row * from_columns + from_start + head * from_stride + column];
}

// Row i of `from` becomes row rows[i] of `to`. No row occurs twice.
extern "C" __global__ void write_rows(const float* from, const unsigned int* rows, float* to, size_t n,
                                      size_t columns) {
    size_t i = element();
    if (i < n) {
        to[rows[i / columns] * columns + i % columns] = from[i];
    }
}

// Row rows[i] of `from` becomes row i of `to`.
extern "C" __global__ void gather_rows(const float* from, const unsigned int* rows, float* to, size_t n,
                                       size_t columns) {
    size_t i = element();
    if (i < n) {
        to[i] = from[rows[i / columns] * columns + i % columns];
    }
}

// Row rows[i] of `to` gets weights[i] times row i of `from` added. No row occurs twice.
extern "C" __global__ void scatter_add(const float* from, const unsigned int* rows, const float* weights, float* to,
                                       size_t n, size_t columns) {
    size_t i = element();
    if (i < n) {
        to[rows[i / columns] * columns + i % columns] += weights[i / columns] * from[i];
    }
}

// Turn pairs of columns of every head in place; n = rows heads pairs. `angles` has cosine and sine of every pair,
// position after position from `first`.
extern "C" __global__ void rope(float* x, const float2* angles, const unsigned int* positions, size_t n, size_t columns,
                                size_t heads, size_t pairs, size_t start, size_t stride, unsigned int interleaved,
                                size_t first) {
    size_t i = element();
    if (i >= n) {
        return;
    }
    size_t pair = i % pairs;
    size_t head = i / pairs % heads;
    size_t row = i / pairs / heads;
    float2 angle = angles[(positions[row] - first) * pairs + pair];
    size_t base = row * columns + start + head * stride;
    size_t left = interleaved ? base + 2 * pair : base + pair;
    size_t right = interleaved ? left + 1 : left + pairs;
    float a = x[left];
    float b = x[right];
    x[left] = a * angle.x - b * angle.y;
    x[right] = b * angle.x + a * angle.y;
}

// y = x / sqrt(mean(x^2) + eps) * gain over the columns of one head; a block of NORM_THREADS per row and head. y may be x.
extern "C" __global__ void rms_norm(const float* x, const float* gain, float* y, size_t columns, size_t heads,
                                    size_t start, size_t stride, size_t width, float eps) {
    __shared__ float sums[NORM_THREADS];
    unsigned int t = threadIdx.x;
    size_t first = blockIdx.x / heads * columns + start + blockIdx.x % heads * stride;
    float sum = 0.0f;
    for (size_t c = t; c < width; c += NORM_THREADS) {
        float value = x[first + c];
        sum += value * value;
    }
    sums[t] = sum;
    for (unsigned int half = NORM_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) {
            sums[t] += sums[t + half];
        }
    }
    __syncthreads();
    float factor = 1.0f / sqrtf(sums[0] / (float)width + eps);
    for (size_t c = t; c < width; c += NORM_THREADS) {
        y[first + c] = x[first + c] * factor * gain[c];
    }
}
