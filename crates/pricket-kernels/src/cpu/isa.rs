//! The instruction sets of the kernels, and a macro that compiles a function for each of them.

#![cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code, unused_variables, unused_unsafe, reason = "other architectures use the scalar kernels only")
)]

use std::cmp::Ordering;

/// An instruction set. Later variants are faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum InstructionSet {
    /// Plain Rust, for every processor.
    Scalar,
    /// NEON with the dot products of Armv8.2.
    Neon,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
    /// `Avx512` with AMX tiles of bfloat16, if the system permits their use.
    Amx,
}

impl InstructionSet {
    /// All instruction sets, the slowest first.
    pub const ALL: [Self; 5] = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512, Self::Amx];

    /// Returns the name, as `PRICKET_CPU` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }
}

/// An instruction set that this processor has. Only detection creates values of this type, so a value is a proof, which
/// kernels ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(InstructionSet);

impl Isa {
    /// Creates the proof without detection.
    ///
    /// # Safety
    /// The processor has the instruction set.
    pub(crate) unsafe fn assume(set: InstructionSet) -> Self {
        Self(set)
    }

    /// Returns the instruction set's name, as `PRICKET_CPU` spells it.
    pub const fn name(self) -> &'static str {
        self.0.name()
    }
}

impl PartialEq<InstructionSet> for Isa {
    fn eq(&self, set: &InstructionSet) -> bool {
        self.0 == *set
    }
}

impl PartialOrd<InstructionSet> for Isa {
    fn partial_cmp(&self, set: &InstructionSet) -> Option<Ordering> {
        self.0.partial_cmp(set)
    }
}

/// Defines a function that takes an [`Isa`] as its first argument and calls `$body::<L, ..>` with the best vectors `L`
/// up to that instruction set. Below all of them it calls `$plain::<..>` if that is given, and otherwise `$body` with
/// scalar lanes.
///
/// `$body` is unsafe because it is compiled for instructions that a processor may lack. A `fn` declares that `$body`
/// has no other condition. An `unsafe fn` has other conditions, which it documents.
macro_rules! by_isa {
    (
        $(#[$doc:meta])* $vis:vis unsafe fn $name:ident $(<$(const $n:ident: $kind:ty),+>)?
        ($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? = $body:ident $(or $plain:ident)?
    ) => {
        crate::cpu::isa::by_isa! {
            @function [$(#[$doc])* $vis unsafe] $name [$($(const $n: $kind),+)?] ($($arg: $type),*) [$($out)?] $body [$($plain)?]
        }
    };
    (
        $(#[$doc:meta])* $vis:vis fn $name:ident $(<$(const $n:ident: $kind:ty),+>)?
        ($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? = $body:ident $(or $plain:ident)?
    ) => {
        crate::cpu::isa::by_isa! {
            @function [$(#[$doc])* $vis] $name [$($(const $n: $kind),+)?] ($($arg: $type),*) [$($out)?] $body [$($plain)?]
        }
    };
    (
        @function [$($head:tt)*] $name:ident [$($(const $n:ident: $kind:ty),+)?] ($($arg:ident: $type:ty),*) [$($out:ty)?]
        $body:ident [$($plain:ident)?]
    ) => {
        $($head)* fn $name $(<$(const $n: $kind),+>)? (isa: crate::cpu::isa::Isa, $($arg: $type),*) $(-> $out)? {
            macro_rules! with_instructions {
                ($features:literal, $least:ident, $lanes:ident) => {
                    #[target_feature(enable = $features)]
                    #[allow(clippy::too_many_arguments, reason = "the same arguments as its caller")]
                    unsafe fn with $(<$(const $n: $kind),+>)? ($($arg: $type),*) $(-> $out)? {
                        // SAFETY: these are the instructions of the lanes. The caller promises the other conditions of
                        // `$body`.
                        unsafe { $body::<crate::cpu::lanes::$lanes $(, $($n),+)?>($($arg),*) }
                    }
                    if isa >= crate::cpu::isa::InstructionSet::$least {
                        // SAFETY: an `Isa` proves that the processor has its instructions. The caller promises the
                        // other conditions of `$body`.
                        return unsafe { with $(::<$($n),+>)? ($($arg),*) };
                    }
                };
            }
            #[cfg(target_arch = "x86_64")]
            {
                {
                    with_instructions!("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,f16c,fma", Avx512, Avx512);
                }
                with_instructions!("avx2,f16c,fma", Avx2, Avx2);
            }
            #[cfg(target_arch = "aarch64")]
            {
                with_instructions!("neon,dotprod", Neon, Neon);
            }
            let _ = isa;
            // SAFETY: every processor has the instructions. The caller promises the other conditions of `$body`.
            unsafe { crate::cpu::isa::by_isa!(@scalar $body $($plain)? [$($($n),+)?] ($($arg),*)) }
        }
    };
    (@scalar $body:ident [$($n:ident),*] ($($arg:ident),*)) => { $body::<crate::cpu::lanes::Scalar $(, $n)*>($($arg),*) };
    (@scalar $body:ident $plain:ident [$($n:ident),*] ($($arg:ident),*)) => { $plain($($arg),*) };
}
pub(crate) use by_isa;
