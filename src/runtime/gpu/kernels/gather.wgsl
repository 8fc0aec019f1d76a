// Copy columns of every head from one matrix to another; a thread per element.

struct Params {
    rows: u32, heads: u32, width: u32, across: u32,
    from_columns: u32, from_start: u32, from_stride: u32, unused: u32,
    to_columns: u32, to_start: u32, to_stride: u32, unused2: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> from_: array<f32>;
@group(0) @binding(2) var<storage, read_write> to: array<f32>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let i = (group.y * p.across + group.x) * 128u + t;
    if (i >= p.rows * p.heads * p.width) {
        return;
    }
    let column = i % p.width;
    let head = (i / p.width) % p.heads;
    let row = i / (p.width * p.heads);
    to[row * p.to_columns + p.to_start + head * p.to_stride + column] =
        from_[row * p.from_columns + p.from_start + head * p.from_stride + column];
}
