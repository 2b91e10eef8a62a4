//! Tests of the allocator with vectors.

#![cfg(target_os = "linux")]

use std::thread;

use proptest::prelude::*;

#[global_allocator]
static HEAP: outliers_heap::Heap = outliers_heap::Heap;

const MIB: usize = 1 << 20;

/// Resident bytes of this process: proc_pid_status(5).
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("of every process");
    line.trim_end_matches("kB").trim().parse::<usize>().expect("a number of kB") << 10
}

/// Vectors are made, grown, cut and dropped, each filled with its own number. None may contain
/// another's number.
fn live(steps: &[(u8, usize, usize)]) {
    let mut vectors: Vec<(usize, Vec<usize>)> = Vec::new();
    for (number, &(kind, which, length)) in steps.iter().enumerate() {
        let existing = which % vectors.len().max(1);
        match kind {
            0 => vectors.push((number, vec![number; length])),
            1 => {
                let zeros = vec![0; length];
                assert!(zeros.iter().all(|&value| value == 0));
                vectors.push((0, zeros));
            }
            2 if !vectors.is_empty() => drop(vectors.swap_remove(existing)),
            3 if !vectors.is_empty() => {
                let (number, vector) = &mut vectors[existing];
                vector.resize(length, *number);
                vector.shrink_to_fit();
            }
            _ => {}
        }
        for (number, vector) in &vectors {
            assert!(vector.iter().all(|value| value == number));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn threads_do_not_share_blocks(steps in prop::collection::vec((0..4u8, 0..100usize, 1..MIB / 8), 1..30)) {
        thread::scope(|scope| {
            let [first, second] = [0, 1].map(|_| scope.spawn(|| live(&steps)));
            first.join().unwrap();
            second.join().unwrap();
        });
    }
}

/// Runs in its own process, so that nothing else allocates memory.
#[test]
fn resident_memory_never_exceeds_peak_use() {
    const ALONE: &str = "OUTLIERS_HEAP_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let test = std::env::current_exe().unwrap();
        let mut command = std::process::Command::new(test);
        let status = command.args(["--exact", "resident_memory_never_exceeds_peak_use"]).env(ALONE, "1").status();
        assert!(status.unwrap().success());
        return;
    }
    let before = resident();
    drop(vec![1u8; 64 * MIB]);
    assert!(resident() > before + 60 * MIB, "what is dropped is kept");
    for size in [8, 5, 1, 32, 3] {
        let count = 64 / size;
        let blocks: Vec<Vec<u8>> = (0..count).map(|_| vec![1; size * MIB]).collect();
        let taken = resident() - before;
        assert!(taken < 68 * MIB, "{count} blocks of {size} MiB take {} MiB", taken / MIB);
        drop(blocks);
    }
    drop(vec![1u8; 96 * MIB]);
    let taken = resident() - before;
    assert!(taken < 100 * MIB, "after 96 MiB were in use {} MiB are taken", taken / MIB);
}
