//! Links the program for a machine without an operating system: no start files, no libraries, at an address above 1 MiB.

fn main() {
    println!("cargo::rerun-if-changed=link.ld");
    let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let script = format!("-Wl,-T,{folder}/link.ld");
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none,-z,max-page-size=4096",
        script.as_str(),
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
