//! Which instruction sets the processor has; one answer for every kernel, found once.

use std::sync::OnceLock;

use crate::cpu::Path;

impl Path {
    /// The best that this processor has.
    pub fn best() -> Self {
        static BEST: OnceLock<Path> = OnceLock::new();
        *BEST.get_or_init(|| Self::ALL.into_iter().rev().find(|path| path.is_there()).unwrap_or(Self::Scalar))
    }

    /// Those that this processor has.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|path| path.is_there())
    }

    #[cfg(target_arch = "x86_64")]
    fn is_there(self) -> bool {
        match self {
            Self::Scalar => true,
            Self::Neon => false,
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            Self::Avx512 => {
                Self::Avx2.is_there()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
            }
            Self::Amx => Self::Avx512.is_there() && crate::brain::has_tiles(),
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn is_there(self) -> bool {
        match self {
            Self::Scalar => true,
            Self::Neon => std::arch::is_aarch64_feature_detected!("dotprod"),
            Self::Avx2 | Self::Avx512 | Self::Amx => false,
        }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn is_there(self) -> bool {
        self == Self::Scalar
    }
}

/// The path that kernels take: the best, or the one that the environment variable `PRICKET_CPU` names.
pub(crate) fn path() -> Path {
    chosen().unwrap_or_else(|_| Path::best())
}

/// As the kernels choose: the best path, or the one that the environment variable `PRICKET_CPU` names.
///
/// # Errors
/// A sentence, if the variable names no path, or one that this processor does not have.
pub fn chosen() -> Result<Path, String> {
    static CHOSEN: OnceLock<Result<Path, String>> = OnceLock::new();
    CHOSEN
        .get_or_init(|| {
            let Ok(name) = std::env::var("PRICKET_CPU") else { return Ok(Path::best()) };
            let names = |paths: &mut dyn Iterator<Item = Path>| paths.map(Path::name).collect::<Vec<_>>().join(", ");
            match Path::ALL.into_iter().find(|path| path.name() == name) {
                None => Err(format!("PRICKET_CPU is {name:?}; it can be {}", names(&mut Path::ALL.into_iter()))),
                Some(path) if !path.is_there() => {
                    Err(format!("PRICKET_CPU is {name}, this processor has {}", names(&mut Path::available())))
                }
                Some(path) => Ok(path),
            }
        })
        .clone()
}
