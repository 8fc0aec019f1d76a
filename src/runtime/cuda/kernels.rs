//! The kernels in CUDA C, and compiling them.

use std::ffi::{CStr, CString};

use cudarc::nvrtc::{result, sys};

/// Threads of a block of the kernels that take an element each.
pub(super) const THREADS: usize = 256;
/// Threads of a block of `rms_norm`.
pub(super) const NORM_THREADS: usize = 128;
/// Threads of a block of products and attention.
pub(super) const BLOCK_THREADS: usize = 128;
/// Outputs of a block of `outputs_f32` and `outputs_bf16`.
pub(super) const BLOCK_OUTPUTS: usize = 4;
/// Outputs of a block of `absorbed_f32` and `absorbed_bf16`.
pub(super) const ABSORBED_OUTPUTS: usize = 32;

/// What attention is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct AttentionConstants {
    /// For few rows and many keys, or for many rows.
    pub(super) few: bool,
    /// Width of a value.
    pub(super) width: u32,
    /// Rows of a thread.
    pub(super) rows: u32,
    /// Whether rows of queries, keys and values may be read by fours.
    pub(super) fours: bool,
}

impl AttentionConstants {
    /// Rows of a block.
    pub(super) fn tile(self) -> u32 {
        self.rows * if self.few { 4 } else { 16 }
    }
}

/// A source text with its constants; what is compiled at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    /// Everything that has no constants.
    Basic,
    /// Attention, and adding up its runs.
    Attention(AttentionConstants),
}

impl Source {
    /// CUDA C.
    pub(super) fn text(self) -> String {
        match self {
            Self::Basic => format!(
                "#define NORM_THREADS {NORM_THREADS}\n{}{}{}",
                include_str!("kernels/elementwise.cu"),
                include_str!("kernels/rows.cu"),
                include_str!("kernels/products.cu")
            ),
            Self::Attention(constants) => {
                let AttentionConstants { few, width, rows, fours } = constants;
                let (tile, fours) = (constants.tile(), u32::from(fours));
                let defined = format!(
                    "#define DV {width}\n#define TR {rows}\n#define ROWS {tile}\n#define FOURS {fours}\n{}",
                    include_str!("kernels/attend.cu")
                );
                let own = if few { include_str!("kernels/decode.cu") } else { include_str!("kernels/attention.cu") };
                defined + own + include_str!("kernels/combine.cu")
            }
        }
    }
}

/// What to compile for, from the compute capability of a card and those NVRTC knows, each `10 major + minor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// The card's own machine code, which any driver of it takes.
    Machine(i32),
    /// PTX of an older card, which the driver translates.
    Portable(i32),
}

impl Target {
    pub(super) fn choose(card: i32, known: &[i32]) -> Option<Self> {
        if known.contains(&card) {
            return Some(Self::Machine(card));
        }
        known.iter().copied().filter(|k| *k < card).max().map(Self::Portable)
    }

    fn option(self) -> String {
        match self {
            Self::Machine(n) => format!("--gpu-architecture=sm_{n}"),
            Self::Portable(n) => format!("--gpu-architecture=compute_{n}"),
        }
    }
}

/// Compute capabilities that NVRTC compiles for.
pub(super) fn known_targets() -> Result<Vec<i32>, String> {
    let failed = |e: result::NvrtcError| format!("NVRTC does not tell what it compiles for: {e}");
    let mut count = 0;
    // SAFETY: writes one number.
    unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) }.result().map_err(failed)?;
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: writes as many numbers as it just said.
    unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result().map_err(failed)?;
    Ok(known)
}

/// Compile to what a driver loads: machine code, or PTX with a zero at its end.
pub(super) fn compile(source: Source, target: Target) -> Result<Vec<u8>, String> {
    let text = CString::new(source.text()).map_err(|e| e.to_string())?;
    let program = result::create_program(&text, None).map_err(|e| e.to_string())?;
    // SAFETY: the program was made above and is destroyed below, after its last use; `text` outlives it.
    unsafe {
        let compiled = result::compile_program(program, &[target.option(), "--std=c++17".to_owned()]);
        let image = match compiled {
            Ok(()) => image(program, target).map_err(|e| e.to_string()),
            Err(e) => {
                let log = result::get_program_log(program).unwrap_or_default();
                let log: Vec<u8> = log.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
                Err(format!("{source:?} does not compile: {e}: {}", String::from_utf8_lossy(&log).trim()))
            }
        };
        let _ = result::destroy_program(program);
        image
    }
}

/// # Safety
/// A program that was compiled for `target`.
unsafe fn image(program: sys::nvrtcProgram, target: Target) -> Result<Vec<u8>, result::NvrtcError> {
    if let Target::Portable(_) = target {
        // SAFETY: as promised by the caller.
        return Ok(unsafe { result::get_ptx(program) }?.into_iter().map(|c| c as u8).collect());
    }
    let mut size = 0;
    // SAFETY: as promised by the caller; writes one number, then as many bytes as it said.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &raw mut size).result()?;
        let mut image = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result()?;
        Ok(image)
    }
}

/// Every kernel by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kernel {
    Gated,
    Activated,
    Add,
    AddBias,
    Softcap,
    Split,
    Round,
    SumParts,
    CopyHeads,
    WriteRows,
    GatherRows,
    ScatterAdd,
    Rope,
    RmsNorm,
    Outputs { packed: bool },
    Absorbed { packed: bool },
    Attention(AttentionConstants),
    Combine(AttentionConstants),
}

impl Kernel {
    /// Where it is.
    pub(super) fn source(self) -> Source {
        match self {
            Self::Attention(constants) | Self::Combine(constants) => Source::Attention(constants),
            _ => Source::Basic,
        }
    }

    /// Its name there.
    pub(super) fn name(self) -> &'static CStr {
        match self {
            Self::Gated => c"gated",
            Self::Activated => c"activated",
            Self::Add => c"add",
            Self::AddBias => c"add_bias",
            Self::Softcap => c"softcap",
            Self::Split => c"split",
            Self::Round => c"round_to_bf16",
            Self::SumParts => c"sum_parts",
            Self::CopyHeads => c"copy_heads",
            Self::WriteRows => c"write_rows",
            Self::GatherRows => c"gather_rows",
            Self::ScatterAdd => c"scatter_add",
            Self::Rope => c"rope",
            Self::RmsNorm => c"rms_norm",
            Self::Outputs { packed: false } => c"outputs_f32",
            Self::Outputs { packed: true } => c"outputs_bf16",
            Self::Absorbed { packed: false } => c"absorbed_f32",
            Self::Absorbed { packed: true } => c"absorbed_bf16",
            Self::Attention(AttentionConstants { few: false, .. }) => c"attention",
            Self::Attention(AttentionConstants { few: true, .. }) => c"decode",
            Self::Combine(_) => c"combine",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_card_gets_its_own_code_or_that_of_an_older_one() {
        let known = [75, 80, 86, 90];
        assert_eq!(Target::choose(90, &known), Some(Target::Machine(90)));
        assert_eq!(Target::choose(89, &known), Some(Target::Portable(86)));
        assert_eq!(Target::choose(120, &known), Some(Target::Portable(90)));
        assert_eq!(Target::choose(61, &known), None);
    }

    #[test]
    fn every_kernel_compiles() {
        // SAFETY: opens the library and closes it again.
        if !unsafe { sys::is_culib_present() } {
            // Past the harness, which keeps what passing tests print to itself.
            let _ = writeln!(std::io::stderr(), "skipped: libnvrtc was not found (LD_LIBRARY_PATH)");
            return;
        }
        let attention = |few, width, rows, fours| Source::Attention(AttentionConstants { few, width, rows, fours });
        let mut sources = vec![Source::Basic, attention(false, 1, 1, false), attention(false, 30, 2, false)];
        sources.extend([20, 64, 128].into_iter().flat_map(|w| [1, 2, 4].map(|rows| attention(false, w, rows, true))));
        sources.extend([(448, 2), (512, 1), (512, 2), (1024, 1)].map(|(w, rows)| attention(false, w, rows, true)));
        sources.extend(
            [(64, 4), (128, 8), (512, 8), (1024, 4), (2048, 1)].map(|(w, rows)| attention(true, w, rows, true)),
        );
        sources.push(attention(true, 30, 4, false));
        for source in sources {
            for target in [80, 90].into_iter().flat_map(|n| [Target::Portable(n), Target::Machine(n)]) {
                let image = compile(source, target).unwrap();
                assert!(!image.is_empty());
                let text = String::from_utf8_lossy(&image);
                // PTX is text. No float may ever be added atomically: sums would depend on luck.
                if text.contains(".version") {
                    let atomic = |word: &str| word.starts_with("atom.") || word.starts_with("red.");
                    assert!(text.contains(".entry") && !text.split_whitespace().any(atomic), "{source:?}");
                }
            }
        }
    }
}
