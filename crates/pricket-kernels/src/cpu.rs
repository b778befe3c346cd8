//! Instruction sets, and functions that are compiled for each of them.

#![cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code, unused_variables, unused_unsafe, reason = "no vectors there")
)]

/// An instruction set that the kernels have a form for, the later the faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Path {
    /// What every processor has.
    Scalar,
    /// NEON with the dot products of Armv8.2.
    Neon,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
    /// The same with AMX tiles of bfloat16, which the system allowed us to use.
    Amx,
}

impl Path {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512, Self::Amx];

    /// As `PRICKET_CPU` spells it.
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

/// Makes a function that calls `$body::<L, ..>` with the best instructions up to its first argument; `$plain::<..>` where there
/// are none, if it is named.
macro_rules! by_path {
    (
        $(#[$doc:meta])* $vis:vis fn $name:ident $(<$(const $n:ident: $kind:ty),+>)? ($($arg:ident: $type:ty),* $(,)?)
        $(-> $out:ty)? = $body:ident $(or $plain:ident)?
    ) => {
        $(#[$doc])*
        $vis unsafe fn $name $(<$(const $n: $kind),+>)? (path: crate::cpu::Path, $($arg: $type),*) $(-> $out)? {
            macro_rules! with_instructions {
                ($features:literal, $least:ident, $lanes:ident) => {
                    #[target_feature(enable = $features)]
                    #[allow(clippy::too_many_arguments, reason = "as its caller")]
                    unsafe fn with $(<$(const $n: $kind),+>)? ($($arg: $type),*) $(-> $out)? {
                        // SAFETY: as the caller's caller promises.
                        unsafe { $body::<crate::lanes::$lanes $(, $($n),+)?>($($arg),*) }
                    }
                    if path >= crate::cpu::Path::$least {
                        // SAFETY: the processor has the instructions; the rest is the caller's.
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
            let _ = path;
            // SAFETY: promised by the caller; every processor has the instructions.
            unsafe { crate::cpu::by_path!(@scalar $body $($plain)? [$($($n),+)?] ($($arg),*)) }
        }
    };
    (@scalar $body:ident [$($n:ident),*] ($($arg:ident),*)) => { $body::<crate::lanes::Scalar $(, $n)*>($($arg),*) };
    (@scalar $body:ident $plain:ident [$($n:ident),*] ($($arg:ident),*)) => { $plain($($arg),*) };
}
pub(crate) use by_path;
