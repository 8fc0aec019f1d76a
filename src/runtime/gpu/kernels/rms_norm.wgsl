// y = x / sqrt(mean(x^2) + eps) * gain over the columns of a head, a workgroup per row and head.
// Set from outside: the bindings of gain and y, and input(), the elements of x.

struct Params { rows: u32, columns: u32, heads: u32, start: u32, stride: u32, width: u32, eps: f32, across: u32 }

@group(0) @binding(0) var<uniform> p: Params;

const THREADS = 128u;
var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let number = group.y * p.across + group.x;
    let row = number / p.heads;
    let first = min(row, p.rows - 1u) * p.columns + p.start + number % p.heads * p.stride;
    var sum = 0.0;
    for (var c = t; c < p.width; c += THREADS) {
        let value = input(first + c);
        sum += value * value;
    }
    sums[t] = sum;
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (t < half) {
            sums[t] += sums[t + half];
        }
    }
    workgroupBarrier();
    // Not inverseSqrt, which may be two bits short.
    let factor = 1.0 / sqrt(sums[0] / f32(p.width) + p.eps);
    if (row < p.rows) {
        for (var c = t; c < p.width; c += THREADS) {
            y[first + c] = input(first + c) * factor * gain[c];
        }
    }
}
