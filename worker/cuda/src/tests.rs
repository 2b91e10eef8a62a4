//! Tests with fake drivers and libraries. Each runs in its own process, because libraries are
//! loaded once per process.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use flate2::write::ZlibEncoder;
use sha2::{Digest, Sha256};

use super::*;
use crate::assembled::{Archive, MAGIC};
use crate::table::NAMES;

/// Set in the process that loads the libraries.
const LOOKS: &str = "OUTLIERS_CUDA_TEST";

/// One GPU of 40 GiB under a driver for CUDA 12.4, unless a test changes them.
const GPU: [(&str, &str); 7] = [
    ("cuDriverGetVersion", "(int *v) { *v = 12040; return 0; }"),
    ("cuDeviceGetCount", "(int *n) { *n = 1; return 0; }"),
    ("cuDeviceGet", "(int *device, int ordinal) { *device = 7 + ordinal; return 0; }"),
    (
        "cuDeviceGetName",
        "(char *name, int len, int device) { name[0] = 'G'; name[1] = '0' + device; name[2] = 0; return 0; }",
    ),
    ("cuDeviceTotalMem_v2", "(unsigned long *bytes, int device) { *bytes = 40ul << 30; return 0; }"),
    ("cuDeviceGetAttribute", "(int *value, int which, int device) { *value = which == 75 ? 9 : 0; return 0; }"),
    (
        "cuLaunchKernel",
        "(long a, int b, int c, int d, int e, int f, int g, int h, long i, long j, long k) \
        { return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i + 10 * j + 11 * k; }",
    ),
];

/// Compiles a library that has every function of `of` in `folder`; `special` ones do something. A
/// cuBLAS with grouped products has all others too.
fn library(folder: &Path, name: &str, of: Of, special: &[(&str, &str)]) {
    let mut source = String::new();
    let has = |whose: Of| whose == of || (whose == Of::Blas && of == Of::GroupedBlas);
    for (_, function) in NAMES.iter().filter(|(whose, _)| has(*whose)) {
        let body = special.iter().find(|(name, _)| name == function).map_or("(void) { return 0; }", |(_, body)| body);
        source.push_str(&format!("int {function}{body}\n"));
    }
    let file = folder.join("source.c");
    std::fs::write(&file, source).unwrap();
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-w", "-o"]).arg(folder.join(name)).arg(&file);
    assert!(compile.status().unwrap().success());
}

/// Output of a process that loads its libraries from `folder`.
fn found_in(folder: &Path) -> String {
    test_output("tests::find_and_print", &[("LD_LIBRARY_PATH", &folder.to_string_lossy()), (LOOKS, "1")])
}

/// Output of an ignored test in its own process.
pub(crate) fn test_output(test: &str, environment: &[(&str, &str)]) -> String {
    program_output(&std::env::current_exe().unwrap(), test, environment)
}

/// The same, from a copy of the test program.
fn program_output(program: &Path, test: &str, environment: &[(&str, &str)]) -> String {
    let mut process = Command::new(program);
    process.args(["--exact", test, "--ignored", "--nocapture"]).envs(environment.iter().copied());
    let output = process.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let said = text.lines().find_map(|line| line.split_once("said: ")).map(|(_, said)| said.to_owned());
    said.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
#[ignore = "the process that the others start"]
fn find_and_print() {
    if std::env::var_os(LOOKS).is_none() {
        return;
    }
    unsafe extern "C" {
        fn cuLaunchKernel(
            a: usize,
            b: c_uint,
            c: c_uint,
            d: c_uint,
            e: c_uint,
            f: c_uint,
            g: c_uint,
            h: c_uint,
            i: usize,
            j: usize,
            k: usize,
        ) -> c_int;
    }
    // SAFETY: a made-up function of these arguments, or one that ignores them.
    let launch = || unsafe { cuLaunchKernel(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11) };
    let before = launch();
    let found = match find() {
        Ok(DriverInfo { driver, gpus, grouped_products }) => {
            format!("{driver} {gpus:?}, grouped products: {grouped_products}")
        }
        Err(why) => format!("{why} (wasted: {})", why.wastes_a_gpu()),
    };
    println!("said: {before} then {} {found}", launch());
}

#[test]
fn without_a_driver_every_call_reports_no_device() {
    let empty = folder();
    let said = found_in(empty.path());
    // This machine may have a driver.
    assert!(said.starts_with("100 then "), "{said}");
    if !Path::new("/proc/driver/nvidia").exists() {
        assert!(said.starts_with("100 then 100 no NVIDIA driver: ") && said.ends_with("(wasted: false)"), "{said}");
    }
}

#[test]
fn driver_and_libraries_get_all_arguments() {
    let gpus = [Gpu { name: "G7".to_owned(), memory_bytes: 40 << 30, compute: (9, 0) }];
    let sum = (1..=11).map(|n| n * n).sum::<i32>();
    for (of, grouped) in [(Of::Blas, false), (Of::GroupedBlas, true)] {
        let folder = folder();
        library(folder.path(), "libcuda.so.1", Of::Driver, &GPU);
        library(folder.path(), "libcublas.so.12", of, &[]);
        let said = found_in(folder.path());
        assert_eq!(said, format!("100 then {sum} 12.4 {gpus:?}, grouped products: {grouped}"));
    }
}

#[test]
#[ignore = "the process that another starts"]
fn copy_and_tell() {
    if std::env::var_os(LOOKS).is_none() {
        return;
    }
    unsafe extern "C" {
        fn cuMemcpyHtoDAsync_v2(to: usize, from: usize, bytes: usize, stream: usize) -> c_int;
        fn cuMemcpyDtoHAsync_v2(to: usize, from: usize, bytes: usize, stream: usize) -> c_int;
    }
    let found = find().is_ok();
    // SAFETY: made-up functions that touch no memory, or one that ignores its arguments.
    let codes = unsafe {
        [cuMemcpyHtoDAsync_v2(1, 2, 30, 4), cuMemcpyHtoDAsync_v2(1, 2, 31, 4), cuMemcpyDtoHAsync_v2(5, 6, 700, 8)]
    };
    println!("said: {found} {codes:?} {:?}", traffic());
}

#[test]
fn copied_bytes_are_counted_by_direction() {
    let copies = [
        (
            "cuMemcpyHtoDAsync_v2",
            "(long to, long from, long bytes, long stream) \
            { return to == 1 && from == 2 && stream == 4 ? bytes - 30 : 99; }",
        ),
        (
            "cuMemcpyDtoHAsync_v2",
            "(long to, long from, long bytes, long stream) { return to == 5 && from == 6 && stream == 8 ? 0 : 99; }",
        ),
    ];
    let folder = folder();
    library(folder.path(), "libcuda.so.1", Of::Driver, &[&GPU[..], &copies[..]].concat());
    library(folder.path(), "libcublas.so.12", Of::Blas, &[]);
    let said =
        test_output("tests::copy_and_tell", &[("LD_LIBRARY_PATH", &folder.path().to_string_lossy()), (LOOKS, "1")]);
    // A copy that the driver refused is not counted.
    assert_eq!(said, format!("true [0, 1, 0] {:?}", Traffic { to_gpus: 30, from_gpus: 700 }));
}

/// PTX, ten times a compute capability and a cubin, as appended to a program.
fn archive(of: &[(&str, u64, &str)]) -> Vec<u8> {
    let (mut kernels, mut index) = (Vec::new(), Vec::new());
    for (ptx, compute, cubin) in of {
        let mut packer = ZlibEncoder::new(Vec::new(), flate2::Compression::default());
        packer.write_all(cubin.as_bytes()).unwrap();
        let packed = packer.finish().unwrap();
        index.extend(Sha256::digest(ptx));
        index.extend([*compute, kernels.len() as u64, packed.len() as u64].map(u64::to_le_bytes).concat());
        kernels.extend(packed);
    }
    let all = kernels.len() + index.len() + 24;
    let end = [of.len() as u64, all as u64].map(u64::to_le_bytes).concat();
    [kernels, index, end, MAGIC.to_vec()].concat()
}

#[test]
fn newest_supported_kernel_is_found_behind_a_program() {
    let folder = folder();
    let file = folder.path().join("program");
    let of = [("one", 80, "one for 8.0"), ("one", 89, "one for 8.9"), ("one", 100, "one for 10"), ("two", 80, "two")];
    let whole = [&b"a program"[..], &archive(&of)[..]].concat();
    std::fs::write(&file, &whole).unwrap();
    let found = Archive::open(&file).unwrap();
    let cubin = |ptx: &str, compute| {
        let cubin = found.cubin(&Sha256::digest(ptx).into(), compute);
        cubin.map(|cubin| String::from_utf8(cubin).unwrap())
    };
    assert_eq!(cubin("one", (8, 0)).as_deref(), Some("one for 8.0"));
    assert_eq!(cubin("one", (8, 6)).as_deref(), Some("one for 8.0"));
    assert_eq!(cubin("one", (8, 9)).as_deref(), Some("one for 8.9"));
    assert_eq!(cubin("one", (10, 3)).as_deref(), Some("one for 10"));
    assert_eq!(cubin("two", (8, 9)).as_deref(), Some("two"));
    assert_eq!((cubin("one", (9, 0)), cubin("one", (7, 5)), cubin("three", (8, 0))), (None, None, None));
    for cut in [whole.len() - 1, whole.len() - 24, 9, 0] {
        std::fs::write(&file, &whole[..cut]).unwrap();
        assert!(Archive::open(&file).is_none(), "{cut} bytes");
    }
}

#[test]
#[ignore = "the process that another starts"]
fn load_and_tell() {
    if std::env::var_os(LOOKS).is_none() {
        return;
    }
    unsafe extern "C" {
        fn cuModuleLoadData(module: *mut usize, image: *const c_char) -> c_int;
    }
    let found = find().is_ok();
    let load = |ptx: &CStr| {
        let mut module = 0;
        // SAFETY: a made-up function that writes a number, or one that ignores its arguments.
        let code = unsafe { cuModuleLoadData(&raw mut module, ptx.as_ptr()) };
        (code, char::from(module as u8))
    };
    println!("said: {found} {:?}", [c"one", c"two", c"three"].map(load));
}

#[test]
fn cubin_is_loaded_and_ptx_where_the_driver_refuses_it() {
    // The fake driver prints the first letter of its last image, and refuses images that begin
    // with X.
    let load =
        ("cuModuleLoadData", "(long *module, const char *image) { *module = *image; return *image == 'X' ? 209 : 0; }");
    let folder = folder();
    library(folder.path(), "libcuda.so.1", Of::Driver, &[&GPU[..], &[load][..]].concat());
    library(folder.path(), "libcublas.so.12", Of::Blas, &[]);
    let (kernels, program) = (folder.path().join("kernels"), folder.path().join("program"));
    let of = [("one", 90, "assembled"), ("two", 90, "X"), ("three", 80, "another's")];
    std::fs::write(&kernels, archive(&of)).unwrap();
    // By a process of its own: nobody else may have the program open for writing when it starts.
    let mut copy = Command::new("sh");
    copy.args(["-c", "cat \"$1\" \"$2\" > \"$3\" && chmod +x \"$3\"", "sh"]);
    copy.arg(std::env::current_exe().unwrap()).arg(&kernels).arg(&program);
    assert!(copy.status().unwrap().success());
    let libraries = folder.path().to_string_lossy().into_owned();
    let environment = [("LD_LIBRARY_PATH", libraries.as_str()), (LOOKS, "1")];
    let told = |[one, two, three]: [char; 3]| format!("true {:?}", [(0, one), (0, two), (0, three)]);
    assert_eq!(program_output(&program, "tests::load_and_tell", &environment), told(['a', 't', 't']));
    assert_eq!(
        test_output("tests::load_and_tell", &environment),
        told(['o', 't', 't']),
        "nothing follows this program"
    );
}

#[test]
fn missing_or_old_libraries_are_named() {
    let with = |name: &str, body: &'static str| {
        let mut special = GPU;
        let one = special.iter_mut().find(|(of, _)| *of == name).unwrap();
        one.1 = body;
        let folder = folder();
        library(folder.path(), "libcuda.so.1", Of::Driver, &special);
        found_in(folder.path())
    };
    let old = with("cuDriverGetVersion", "(int *v) { *v = 11070; return 0; }");
    assert!(old.contains("serves CUDA 11.7, 11.8 is needed (wasted: true)"), "{old}");
    let none = with("cuDeviceGetCount", "(int *n) { *n = 0; return 0; }");
    assert!(none.contains("shows no GPU (wasted: false)"), "{none}");
    let broken = with("cuDeviceGetCount", "(int *n) { return 999; }");
    assert!(broken.contains("shows no GPU (its error 999)"), "{broken}");
    // A driver for CUDA 10 supports none of the releases, wherever they are.
    let poor = folder();
    std::fs::write(poor.path().join("empty.c"), "int cuInit(int flags) { return 0; }").unwrap();
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-o"]).arg(poor.path().join("libcuda.so.1")).arg(poor.path().join("empty.c"));
    assert!(compile.status().unwrap().success());
    let said = found_in(poor.path());
    assert!(said.contains("libcuda.so.1 lacks cu") && said.contains("too old"), "{said}");
}
