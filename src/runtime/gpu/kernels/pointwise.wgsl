// x = f(x, y), element by element. Set from outside: `f`.

struct Params { count: u32, across: u32, unused1: u32, unused2: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> y: array<f32>;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let i = (group.y * p.across + group.x) * 128u + t;
    if (i < p.count) {
        x[i] = f(x[i], y[i]);
    }
}
