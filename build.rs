//! Sets `cfg(pricket_unoptimized)` if the library is compiled without optimization, which makes it about fifty times
//! slower. Loaded models then carry a note about it.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(pricket_unoptimized)");
    if std::env::var("OPT_LEVEL").is_ok_and(|level| level == "0") {
        println!("cargo:rustc-cfg=pricket_unoptimized");
    }
}
