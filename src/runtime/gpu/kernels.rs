//! The compute shaders, and what is set in them from outside.

/// A shader with its constants. Equal kernels share a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kernel {
    /// Products in tiles, large or small; weights of two bf16 to a word or of f32.
    Matmul {
        large: bool,
        packed: bool,
    },
    /// Products of up to `rows` rows.
    Matvec {
        rows: u32,
        packed: bool,
    },
    /// Norms of heads in place, or of one matrix to another.
    RmsNorm {
        in_place: bool,
    },
    Rope,
    Gather,
    Scatter,
    SiluMul,
    Add,
    /// Values are `width` wide.
    Attention {
        width: u32,
    },
    /// As [`Kernel::Attention`].
    Combine {
        width: u32,
    },
}

/// Threads of a workgroup of the kernels that take an element each.
pub(super) const THREADS: usize = 128;
/// Rows of q that a workgroup of [`Kernel::Attention`] takes.
pub(super) const ATTENTION_ROWS: usize = 16;
/// Output columns of a workgroup of [`Kernel::Matvec`].
pub(super) const MATVEC_OUTS: usize = 4;

impl Kernel {
    /// Side of the output tile of a workgroup of [`Kernel::Matmul`].
    pub(super) fn tile(large: bool) -> usize {
        if large { 128 } else { 32 }
    }

    /// WGSL text.
    pub(super) fn source(self) -> String {
        let (text, constants) = match self {
            Kernel::Matmul { large, packed } => {
                let (tile, own) = (Self::tile(large), if large { 8 } else { 2 });
                let constants = format!(
                    "const BM = {tile}u;\nconst BN = {tile}u;\nconst BK = 8u;\nconst TM = {own}u;\nconst TN = {own}u;\n"
                );
                return constants + weight(packed) + &written_out(include_str!("kernels/matmul.wgsl"), own);
            }
            Kernel::Matvec { rows, packed } => {
                (include_str!("kernels/matvec.wgsl"), format!("const R = {rows}u;\n") + weight(packed))
            }
            Kernel::RmsNorm { in_place } => (include_str!("kernels/rms_norm.wgsl"), norm_bindings(in_place).to_owned()),
            Kernel::Rope => (include_str!("kernels/rope.wgsl"), String::new()),
            Kernel::Gather => (include_str!("kernels/gather.wgsl"), String::new()),
            Kernel::Scatter => (include_str!("kernels/scatter.wgsl"), String::new()),
            Kernel::SiluMul => (include_str!("kernels/pointwise.wgsl"), SILU_MUL.to_owned()),
            Kernel::Add => (include_str!("kernels/pointwise.wgsl"), ADD.to_owned()),
            Kernel::Attention { width } => (include_str!("kernels/attention.wgsl"), format!("const DV = {width}u;\n")),
            Kernel::Combine { width } => (include_str!("kernels/combine.wgsl"), format!("const DV = {width}u;\n")),
        };
        constants + text
    }

    /// For every buffer after the parameters, whether the kernel only reads it.
    pub(super) fn reads(self) -> &'static [bool] {
        match self {
            Kernel::Matmul { .. } | Kernel::Matvec { .. } => &[true, true, true, false],
            Kernel::RmsNorm { in_place: false } | Kernel::Rope | Kernel::Scatter => &[true, true, false],
            Kernel::RmsNorm { in_place: true } | Kernel::Gather | Kernel::SiluMul | Kernel::Add => &[true, false],
            Kernel::Attention { .. } => &[true, true, true, true, true, false, false],
            Kernel::Combine { .. } => &[true, true, true, true, false],
        }
    }
}

/// `matmul.wgsl` with the code for each of the `own` x `own` results of a thread.
fn written_out(text: &str, own: usize) -> String {
    let (mut accumulators, mut products, mut results) = (String::new(), String::new(), String::new());
    for j in 0..own {
        products += &format!("let b{j} = ws[k * (BN + 1u) + tx + {j}u * ACROSS];\n");
    }
    for i in 0..own {
        products += &format!("let a{i} = xs[k * (BM + 1u) + ty * TM + {i}u];\n");
        for j in 0..own {
            accumulators += &format!("var acc{i}_{j} = 0.0;\n");
            products += &format!("acc{i}_{j} += a{i} * b{j};\n");
            results += &format!("store(row0 + ty * TM + {i}u, col0 + tx + {j}u * ACROSS, group.z, acc{i}_{j});\n");
        }
    }
    text.replace("//accumulators", &accumulators).replace("//products", &products).replace("//results", &results)
}

fn weight(packed: bool) -> &'static str {
    match packed {
        // WGSL has no bf16: it is the upper half of an f32.
        true => {
            "alias WORD = u32;\nfn weight(i: u32) -> f32 {\n    let word = w[i / 2u];\n    \
             return bitcast<f32>(select(word << 16u, word & 0xffff0000u, i % 2u == 1u));\n}\n"
        }
        false => "alias WORD = f32;\nfn weight(i: u32) -> f32 {\n    return w[i];\n}\n",
    }
}

/// A buffer must not be bound twice where it is written.
fn norm_bindings(in_place: bool) -> &'static str {
    match in_place {
        true => {
            "@group(0) @binding(1) var<storage, read> gain: array<f32>;\n\
             @group(0) @binding(2) var<storage, read_write> y: array<f32>;\n\
             fn input(i: u32) -> f32 {\n    return y[i];\n}\n"
        }
        false => {
            "@group(0) @binding(1) var<storage, read> x: array<f32>;\n\
             @group(0) @binding(2) var<storage, read> gain: array<f32>;\n\
             @group(0) @binding(3) var<storage, read_write> y: array<f32>;\n\
             fn input(i: u32) -> f32 {\n    return x[i];\n}\n"
        }
    }
}

const SILU_MUL: &str = "fn f(gate: f32, up: f32) -> f32 {\n    return gate / (1.0 + exp(-gate)) * up;\n}\n";
const ADD: &str = "fn f(x: f32, y: f32) -> f32 {\n    return x + y;\n}\n";
