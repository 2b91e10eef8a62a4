//! Tests with kernels as the compiler writes them.

use super::*;
use crate::memory::{Memory, Owner};

/// Runs the only kernel of `text` on `values`; returns the values afterwards.
fn after(text: &str, values: &[u32], count: u32, grid: Grid) -> Result<Vec<u32>, String> {
    let module = Module::new(text.to_owned());
    let memory = Memory::new();
    let at = memory.allocate(4 * values.len(), Owner::Gpu(0));
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    memory.reader().write(at, &bytes).unwrap();
    let mut parameters = at.to_le_bytes().to_vec();
    parameters.extend(count.to_le_bytes());
    let kernel = module.kernel("k").unwrap();
    assert_eq!(kernel.parameters, [(8, 0), (4, 8)]);
    run(&kernel, grid, &parameters, &memory)?;
    let mut bytes = vec![0; bytes.len()];
    memory.reader().read(at, &mut bytes).unwrap();
    Ok(bytes.as_chunks().0.iter().map(|value| u32::from_le_bytes(*value)).collect())
}

fn kernel(body: &str) -> String {
    format!(
        ".version 7.8\n.target sm_80\n.visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u32 k_param_1\n)\n{{\n\t.reg .pred %p<9>;\n\
        \t.reg .b32 %r<9>;\n\t.reg .f32 %f<9>;\n\t.reg .b64 %rd<9>;\n\tld.param.u64 %rd1, [k_param_0];\n\tld.param.u32 %r1, [k_param_1];\n{body}\n\tret;\n\n}}\n"
    )
}

const LINE: Grid = Grid { blocks: [2, 1, 1], threads: [64, 1, 1], shared: 0 };

/// Number of the thread in %r5, address of its value in %rd4.
const PLACE: &str = "mov.u32 %r2, %ctaid.x;\nmov.u32 %r3, %ntid.x;\nmov.u32 %r4, %tid.x;\nmad.lo.s32 %r5, %r2, %r3, %r4;\n\
    mul.wide.u32 %rd3, %r5, 4;\nadd.s64 %rd4, %rd1, %rd3;\n";

#[test]
fn threads_have_ids_and_branch() {
    let body = format!(
        "{PLACE}setp.ge.u32 %p1, %r5, %r1;\n@%p1 bra $L__BB0_2;\nld.global.f32 %f1, [%rd4];\n{{ // inline\nmul.f32 %f1, %f1, 0f40400000;}}\n\
        st.global.f32 [%rd4], %f1;\n$L__BB0_2:"
    );
    let values: Vec<u32> = (0..128).map(|n| (n as f32).to_bits()).collect();
    let got = after(&kernel(&body), &values, 100, LINE).unwrap();
    let expected: Vec<u32> = (0..128).map(|n| if n < 100 { n as f32 * 3.0 } else { n as f32 }.to_bits()).collect();
    assert_eq!(got, expected);
}

#[test]
fn warp_shuffles_and_block_barriers_work() {
    // Each warp sums by exchanges; the first thread adds the sums of both warps.
    let body = format!(
        ".shared .align 4 .b8 sums[8];\n{PLACE}ld.global.u32 %r6, [%rd4];\nmov.u32 %r7, 16;\n$L__BB0_1:\n\
        shfl.sync.bfly.b32 %r8|%p1, %r6, %r7, 31, -1;\nadd.s32 %r6, %r6, %r8;\nshr.u32 %r7, %r7, 1;\nsetp.ne.s32 %p2, %r7, 0;\n@%p2 bra $L__BB0_1;\n\
        shr.u32 %r2, %r4, 5;\nmov.u32 %r3, sums;\nshl.b32 %r2, %r2, 2;\nadd.s32 %r3, %r3, %r2;\nst.shared.u32 [%r3], %r6;\nbar.sync 0;\n\
        ld.shared.u32 %r2, [sums];\nld.shared.u32 %r3, [sums+4];\nadd.s32 %r2, %r2, %r3;\nst.global.u32 [%rd4], %r2;"
    );
    let values: Vec<u32> = (0..128).collect();
    let got = after(&kernel(&body), &values, 0, LINE).unwrap();
    assert_eq!((got[0], got[63], got[64]), ((0..64).sum(), (0..64).sum(), (64..128).sum()));
}

#[test]
fn shared_memory_atomics_count() {
    // The first thread clears the value; all add one and store their index if it is the largest.
    let body = format!(
        ".shared .align 4 .b8 counts[8];\n{PLACE}mov.u32 %r6, 0;\nst.shared.u32 [counts], %r6;\nst.shared.u32 [counts+4], %r6;\nbar.sync 0;\n\
        atom.shared.add.u32 %r7, [counts], 1;\natom.shared.max.u32 %r8, [counts+4], %r5;\nbar.sync 0;\n\
        ld.shared.u32 %r2, [counts];\nld.shared.u32 %r3, [counts+4];\nmad.lo.s32 %r2, %r2, 1000, %r3;\nst.global.u32 [%rd4], %r2;"
    );
    let got = after(&kernel(&body), &[0; 128], 0, LINE).unwrap();
    assert_eq!((got[0], got[63], got[64]), (64_063, 64_063, 64_127));
}

/// A warp multiplies 16 x 16 by 16 x 8 numbers, which it has copied to shared memory, and adds 1.
/// The second factor lies by rows, or by columns.
fn matrix_product(by_rows: bool, waits: bool) -> Vec<f32> {
    let (of_lane, load) = match by_rows {
        true => ("shl.b32 %r8, %r8, 4;", "x2.trans"),
        false => (
            "and.b32 %r9, %r8, 7;\nshl.b32 %r9, %r9, 5;\nshr.u32 %r8, %r8, 3;\nshl.b32 %r8, %r8, 4;\nadd.s32 %r8, %r8, %r9;",
            "x2",
        ),
    };
    let but = i32::from(!waits);
    let body = format!(
        ".extern .shared .align 16 .b8 tiles[];\n.shared .align 4 .b8 own[4];\nmov.u32 %r2, %tid.x;\nshl.b32 %r3, %r2, 4;\n\
        mov.u32 %r4, tiles;\nadd.s32 %r5, %r4, %r3;\ncvt.u64.u32 %rd2, %r3;\nadd.s64 %rd3, %rd1, %rd2;\n\
        setp.lt.u32 %p1, %r2, 16;\nselp.b32 %r6, 16, 0, %p1;\n\
        cp.async.cg.shared.global [%r5], [%rd3], 16;\ncp.async.cg.shared.global [%r5+512], [%rd3+512], 16, %r6;\n\
        cp.async.commit_group;\ncp.async.wait_group {but};\nbar.sync 0;\n\
        and.b32 %r7, %r2, 15;\nshl.b32 %r7, %r7, 5;\nshr.u32 %r8, %r2, 4;\nshl.b32 %r8, %r8, 4;\nadd.s32 %r7, %r7, %r8;\n\
        add.s32 %r7, %r7, %r4;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r7];\n\
        and.b32 %r8, %r2, 15;\n{of_lane}\nadd.s32 %r8, %r8, %r4;\n\
        ldmatrix.sync.aligned.m8n8.{load}.shared.b16 {{%r14, %r15}}, [%r8+512];\nmov.f32 %f5, 0f3F800000;\n\
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f1, %f2, %f3, %f4}}, {{%r10, %r11, %r12, %r13}}, \
        {{%r14, %r15}}, {{%f5, %f5, %f5, %f5}};\nmul.wide.u32 %rd4, %r2, 8;\nadd.s64 %rd5, %rd1, %rd4;\n\
        st.global.v2.f32 [%rd5+768], {{%f1, %f2}};\nst.global.v2.f32 [%rd5+1024], {{%f3, %f4}};"
    );
    let number = |value: i32| half::bf16::from_f32(value as f32).to_bits();
    let left = (0..16).flat_map(|row| (0..16).map(move |k| number(left(row, k))));
    let right = (0..128).map(|i| number(if by_rows { right(i / 8, i % 8) } else { right(i % 16, i / 16) }));
    let numbers: Vec<u16> = left.chain(right).collect();
    let words = numbers.as_chunks::<2>().0.iter().map(|[low, high]| u32::from(*low) | u32::from(*high) << 16);
    let values: Vec<u32> = words.chain([0; 128]).collect();
    let grid = Grid { blocks: [1; 3], threads: [32, 1, 1], shared: 1024 };
    let got = after(&kernel(&body), &values, 0, grid).unwrap();
    got[192..].iter().map(|bits| f32::from_bits(*bits)).collect()
}

fn left(row: i32, k: i32) -> i32 {
    (3 * row + 5 * k) % 7 - 3
}

fn right(k: i32, column: i32) -> i32 {
    (2 * k + 3 * column) % 5 - 2
}

#[test]
fn matrices_multiply_in_the_layouts_of_the_instructions() {
    let product = |i: i32| 1 + (0..16).map(|k| left(i / 8, k) * right(k, i % 8)).sum::<i32>();
    let expected: Vec<f32> = (0..128).map(|i| product(i) as f32).collect();
    assert_eq!(matrix_product(false, true), expected);
    assert_eq!(matrix_product(true, true), expected);
    assert_eq!(matrix_product(true, false), [1.0; 128], "nothing is there that was not waited for");
}

#[test]
fn conversions_round_as_instructed() {
    let one = |conversion: &str, value: u32| {
        let body = format!("ld.global.u32 %r2, [%rd1];\n{conversion}\nst.global.u32 [%rd1], %r3;");
        after(&kernel(&body), &[value], 0, Grid { blocks: [1; 3], threads: [1; 3], shared: 0 }).unwrap()[0]
    };
    let float = |value: f32| value.to_bits();
    assert_eq!(one("cvt.rzi.s32.f32 %r3, %r2;", float(-2.7)), (-2i32) as u32);
    assert_eq!(one("cvt.rni.s32.f32 %r3, %r2;", float(2.5)), 2);
    assert_eq!(one("cvt.rzi.u32.f32 %r3, %r2;", float(-5.0)), 0);
    assert_eq!(one("cvt.rzi.s32.f32 %r3, %r2;", float(1e30)), i32::MAX as u32);
    assert_eq!(one("cvt.rzi.s32.f32 %r3, %r2;", float(f32::NAN)), 0);
    assert_eq!(one("cvt.rn.f32.s32 %r3, %r2;", (-7i32) as u32), float(-7.0));
    assert_eq!(one("cvt.rn.f32.u32 %r3, %r2;", u32::MAX), float(u32::MAX as f32));
    assert_eq!(one("cvt.sat.f32.f32 %r3, %r2;", float(1.5)), float(1.0));
    assert_eq!(
        one("cvt.rn.bf16.f32 %r3, %r2;", float(1.0 + 1.0 / 256.0)),
        u32::from(half::bf16::ONE.to_bits()),
        "ties to even"
    );
    assert_eq!(one("cvt.rn.bf16.f32 %r3, %r2;", 0x3f80_8001), 0x3f81, "above a tie");
    assert_eq!(one("cvt.rn.bf16.f32 %r3, %r2;", 0x3f81_7fff), 0x3f81, "below a tie");
    assert_eq!(one("mov.b32 %r3, {0, %r2};", 0x3f80), float(1.0));
    assert_eq!(one("fma.rm.f32 %r3, %r2, 0f3F800000, 0f4B400001;", float(0.7)), float(12_582_913.0), "rounded down");
    assert_eq!(one("cvt.rn.bf16x2.f32 %r3, 0f40000000, %r2;", 0x3f80_8001), 0x4000_3f81, "the second is the lower");
    let (two, both) = (0x4000_3f80, 0x4040_4040);
    assert_eq!(
        one("{mov.b32 %r4, 0x40404040U;\nfma.rn.bf16x2 %r3, %r2, %r4, %r2;\n}", two),
        0x4100_4080,
        "1 x 3 + 1, 2 x 3 + 2"
    );
    assert_eq!(one("mov.b32 {%r3, _}, %r2;", both), 0x4040);
    assert_eq!(one("shr.s32 %r3, %r2, 1;", (-6i32) as u32), (-3i32) as u32);
    assert_eq!(one("copysign.f32 %r3, %r2, 0f40000000;", float(-9.0)), float(-2.0));
    assert_eq!(one("setp.geu.f32 %p1, %r2, 0f00000000;\nselp.b32 %r3, 1, 2, %p1;", float(f32::NAN)), 1);
    assert_eq!(one("setp.ge.f32 %p1, %r2, 0f00000000;\nselp.b32 %r3, 1, 2, %p1;", float(f32::NAN)), 2);
}

#[test]
fn errors_name_the_kernel() {
    let beyond = format!("{PLACE}st.global.u32 [%rd4], %r5;");
    let error = after(&kernel(&beyond), &[0; 100], 0, LINE).unwrap_err();
    assert!(error.contains("kernel k: 4 bytes at ") && error.contains("are not allocated"), "{error}");
    let error = after(&kernel("wmma.mma.sync %r1, %r2;"), &[0], 0, LINE).unwrap_err();
    assert_eq!(error, "kernel k: `wmma.mma.sync %r1, %r2` is not known");
    assert!(Module::new(kernel("")).kernel("other").is_none());
}
