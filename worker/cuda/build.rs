//! Empty libraries with the names that the tensor library links. The functions that it calls are
//! in `src/table.rs`, so linkers leave out these libraries: they leave out shared libraries
//! without used symbols.

use std::path::Path;
use std::process::Command;

/// `moe` is the tensor library's own library, for products that are not used: see `nvcc.sh`.
const WANTED: [&str; 7] = ["cuda", "cublas", "cublasLt", "curand", "nvrtc", "cudart", "moe"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return;
    }
    let folder = std::env::var("OUT_DIR").expect("cargo sets it");
    let folder = Path::new(&folder);
    let nothing = folder.join("nothing.c");
    std::fs::write(&nothing, "").expect("the folder is writable");
    let compiler = cc::Build::new().warnings(false).get_compiler();
    for name in WANTED {
        let mut command: Command = compiler.to_command();
        command.args(["-shared", "-nostdlib", "-o"]).arg(folder.join(format!("lib{name}.so"))).arg(&nothing);
        let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert!(status.success(), "{command:?} ended with {status}");
    }
    println!("cargo:rustc-link-search=native={}", folder.display());
}
