//! Detection of the processor's instruction sets, and the choice of the one that kernels use. Both are made once.

use std::sync::OnceLock;

use crate::cpu::isa::{InstructionSet, Isa};

impl Isa {
    /// Returns the instruction set `set`, or `None` if this processor does not have it.
    pub fn new(set: InstructionSet) -> Option<Self> {
        // SAFETY: `is_detected` detected the instruction set.
        is_detected(set).then(|| unsafe { Self::assume(set) })
    }

    /// Returns the best instruction set of this processor.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().expect("every processor has scalar instructions"))
    }

    /// Returns the instruction sets of this processor, the best last.
    pub fn available() -> impl Iterator<Item = Self> {
        InstructionSet::ALL.into_iter().filter_map(Self::new)
    }
}

#[cfg(target_arch = "x86_64")]
fn is_detected(set: InstructionSet) -> bool {
    match set {
        InstructionSet::Scalar => true,
        InstructionSet::Neon => false,
        InstructionSet::Avx2 => {
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
        }
        InstructionSet::Avx512 => {
            is_detected(InstructionSet::Avx2)
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni")
        }
        InstructionSet::Amx => is_detected(InstructionSet::Avx512) && crate::cpu::bf16::has_tiles(),
    }
}

#[cfg(target_arch = "aarch64")]
fn is_detected(set: InstructionSet) -> bool {
    match set {
        InstructionSet::Scalar => true,
        InstructionSet::Neon => std::arch::is_aarch64_feature_detected!("dotprod"),
        InstructionSet::Avx2 | InstructionSet::Avx512 | InstructionSet::Amx => false,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn is_detected(set: InstructionSet) -> bool {
    set == InstructionSet::Scalar
}

/// Returns the instruction set that kernels use: the one that the environment variable `PRICKET_CPU` names, or else the
/// best. An invalid value of the variable is ignored here; [`selected_isa`] reports it.
pub(crate) fn isa() -> Isa {
    selected_isa().unwrap_or_else(|_| Isa::best())
}

/// Returns the instruction set that kernels use: the one that the environment variable `PRICKET_CPU` names, or else the
/// best. The variable is read once.
///
/// # Errors
/// Returns a message if the variable names an unknown instruction set, or one that this processor does not have.
pub fn selected_isa() -> Result<Isa, String> {
    static CHOSEN: OnceLock<Result<Isa, String>> = OnceLock::new();
    let choose = || {
        let Ok(name) = std::env::var("PRICKET_CPU") else { return Ok(Isa::best()) };
        let names = |names: Vec<&str>| names.join(", ");
        match InstructionSet::ALL.into_iter().find(|set| set.name() == name) {
            None => {
                let known = names(InstructionSet::ALL.into_iter().map(InstructionSet::name).collect());
                Err(format!("PRICKET_CPU is {name:?}; it can be {known}"))
            }
            Some(set) => Isa::new(set).ok_or_else(|| {
                let own = names(Isa::available().map(Isa::name).collect());
                format!("PRICKET_CPU is {name}; this processor has {own}")
            }),
        }
    };
    CHOSEN.get_or_init(choose).clone()
}
