use std::cell::RefCell;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;

use outliers_protocol::FailureKind;
use proptest::prelude::*;

use super::*;
use crate::checkpoint::safetensors::Header;

/// Path of a file written by PyTorch, see `make.py` there.
pub(crate) fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/checkpoint/torch/testdata").join(name)
}

/// The tensors of a file in memory.
fn read(file: &[u8]) -> Result<Vec<HeaderTensor>> {
    let read = |range: Range<u64>| {
        assert!(range.start <= range.end && range.end <= file.len() as u64, "{range:?} of {} bytes", file.len());
        Ok(file[range.start as usize..range.end as usize].to_vec())
    };
    Contents::read(file.len() as u64, &read)?.located(&read)
}

fn refused(file: &[u8]) -> WorkerError {
    let error = read(file).unwrap_err();
    assert!(error.hint_text().is_some(), "{error}");
    error
}

/// An archive of records in PyTorch's layout: each content begins at a multiple of 64.
fn zip(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut directory = Vec::new();
    for (name, content) in records {
        let header = file.len() as u32;
        let padding = (64 - (file.len() + 30 + name.len() + 4) % 64) % 64;
        file.extend([b"PK\x03\x04\x00\x00\x00\x00\x00\x00".as_slice(), &[0; 16]].concat());
        file.extend((name.len() as u16).to_le_bytes());
        file.extend((4 + padding as u16).to_le_bytes());
        file.extend(name.as_bytes());
        file.extend([b"FB".as_slice(), &(padding as u16).to_le_bytes(), &vec![b'Z'; padding]].concat());
        file.extend(*content);
        let len = (content.len() as u32).to_le_bytes();
        directory.extend([b"PK\x01\x02".as_slice(), &[0; 16], &len, &len].concat());
        directory.extend([&(name.len() as u16).to_le_bytes(), [0; 12].as_slice(), &header.to_le_bytes()].concat());
        directory.extend(name.as_bytes());
    }
    let (count, start) = ((records.len() as u16).to_le_bytes(), file.len() as u32);
    file.extend(&directory);
    file.extend([b"PK\x05\x06\x00\x00\x00\x00".as_slice(), &count, &count].concat());
    file.extend([(directory.len() as u32).to_le_bytes(), start.to_le_bytes()].concat());
    file.extend([0, 0]);
    file
}

fn text(text: &str) -> Vec<u8> {
    [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn int(value: i64) -> Vec<u8> {
    [b"\x8a\x08".as_slice(), &value.to_le_bytes()].concat()
}

fn ints(values: &[i64]) -> Vec<u8> {
    [b"(".as_slice(), &values.iter().copied().flat_map(int).collect::<Vec<_>>(), b"t"].concat()
}

/// Instructions that push a tensor of `values` floats in record `key`, viewed as `shape`.
fn tensor(key: &str, values: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let storage =
        [b"(".as_slice(), &text("storage"), b"ctorch\nFloatStorage\n", &text(key), &text("cpu"), &int(values)];
    let arguments = [b"tQ".as_slice(), &int(offset), &ints(shape), &ints(strides), b"\x89}t"];
    [b"ctorch._utils\n_rebuild_tensor_v2\n(".as_slice(), &storage.concat(), &arguments.concat(), b"R"].concat()
}

/// A pickled dictionary.
fn dictionary(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let entries = entries.iter().flat_map(|(name, value)| [text(name), value.clone()].concat());
    [b"\x80\x02}(".as_slice(), &entries.collect::<Vec<_>>(), b"u."].concat()
}

/// A file with six floats in one record.
fn file(pickle: &[u8]) -> Vec<u8> {
    zip(&[("m/data.pkl", pickle), ("m/data/0", &[7; 24])])
}

fn one(values: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    file(&dictionary(&[("a", tensor("0", values, offset, shape, strides))]))
}

/// Prefix of the fixture's tensors that are not contiguous.
const STRIDED: &str = "strided.";

#[test]
fn pytorch_tensors_have_the_reference_offsets() {
    let bytes = std::fs::read(testdata("tensors.bin")).unwrap();
    let expected = std::fs::read(testdata("tensors.safetensors")).unwrap();
    let header = Header::parse(&expected, expected.len() as u64).unwrap();
    let tensors = read_tensors(&testdata("tensors.bin")).unwrap();
    let (strided, plain): (Vec<_>, Vec<_>) = tensors.iter().partition(|tensor| tensor.name.starts_with(STRIDED));
    let names =
        |tensors: &[&HeaderTensor]| tensors.iter().map(|t| t.name.clone()).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(names(&plain), names(&header.tensors.iter().collect::<Vec<_>>()));
    assert_eq!(plain.len(), 18);
    for ours in plain {
        let theirs = header.tensor(&ours.name).unwrap();
        assert_eq!((&ours.dtype, &ours.shape, ours.len), (&theirs.dtype, &theirs.shape, theirs.len), "{}", ours.name);
        let slice = |file: &[u8], tensor: &HeaderTensor| file[tensor.offset as usize..][..tensor.len as usize].to_vec();
        assert_eq!(slice(&bytes, ours), slice(&expected, theirs), "{}", ours.name);
    }
    let find = |name: &str| tensors.iter().find(|tensor| tensor.name == name).unwrap();
    assert_eq!(find("tied").offset, find("f32").offset);
    assert_eq!(find("h.0.attn.bias").offset, find("h.1.attn.bias").offset);
    assert_eq!(find("scalar").shape, [0_u64; 0]);
    let said: Vec<_> =
        strided.iter().map(|t| (t.dtype.clone(), t.shape.clone(), t.strides.clone().unwrap(), t.len)).collect();
    assert_eq!(
        said,
        [
            (StoredDtype::F32, vec![4, 3], vec![1, 4], 48),
            (StoredDtype::F32, vec![2, 4], vec![0, 1], 32),
            (StoredDtype::F32, vec![3, 2], vec![4, 2], 24),
        ]
    );
}

/// Complex and quantised buffers, types without storages, tensors with attributes or changed
/// values, settings, an optimizer's state.
#[test]
fn other_pickled_values_do_not_hide_the_tensors() {
    for protocol in 2..=5 {
        let path = testdata(&format!("others-{protocol}.bin"));
        let tensors = read_tensors(&path).unwrap();
        let listed: Vec<_> =
            tensors.iter().map(|t| (t.name.as_str(), t.dtype.name(), t.shape.as_slice(), t.len)).collect();
        let expected: [(&str, &str, &[u64], u64); 12] = [
            ("values", "F32", &[4], 16),
            ("transposed", "F32", &[3, 2], 24),
            ("complex64", "C64", &[4], 32),
            ("complex32", "C32", &[4], 16),
            ("float8_e4m3fn", "F8_E4M3", &[4], 4),
            ("float8_e8m0fnu", "F8_E8M0", &[4], 4),
            ("uint16", "U16", &[4], 8),
            ("qint8", "QI8", &[4], 4),
            ("negated", "F32, negated or conjugated", &[4], 16),
            ("attribute", "F32", &[4], 16),
            ("parameter", "F32", &[4], 16),
            ("buffer", "F32", &[4], 16),
        ];
        assert_eq!(listed, expected, "protocol {protocol}");
        let file = std::fs::read(&path).unwrap();
        let bytes = |name: &str| {
            let tensor = tensors.iter().find(|tensor| tensor.name == name).unwrap();
            file[tensor.offset as usize..][..tensor.len as usize].to_vec()
        };
        let floats = |first: f32| (0..4).flat_map(|i| (first + i as f32).to_le_bytes()).collect::<Vec<_>>();
        for (name, first) in [("values", 0.0), ("attribute", 0.0), ("parameter", 1.0), ("buffer", 2.0)] {
            assert_eq!(bytes(name), floats(first), "protocol {protocol}: {name}");
        }
        assert_eq!(bytes("float8_e4m3fn"), [0, 0x38, 0x40, 0x44], "0, 1, 2 and 3");
    }
}

#[test]
fn nested_state_dict_is_refused_with_its_key() {
    let weights = dictionary(&[("a", tensor("0", 6, 0, &[6], &[1])), ("b", tensor("0", 6, 0, &[6], &[1]))]);
    let inner = weights[2..weights.len() - 1].to_vec();
    let step = ("global_step", tensor("0", 6, 0, &[1], &[1]));
    for key in ["state_dict", "model"] {
        let error = refused(&file(&dictionary(&[("epoch", int(3)), step.clone(), (key, inner.clone())])));
        assert!(error.message().contains(&format!("inside its entry {key:?}")), "{error}");
        assert!(error.hint_text().unwrap().contains(&format!("torch.save(loaded[{key:?}]")), "{error}");
    }
    let with_optimizer = [step, ("x", int(1)), ("y", tensor("0", 6, 0, &[6], &[1])), ("optimizer", inner)];
    let names: Vec<_> = read(&file(&dictionary(&with_optimizer))).unwrap().into_iter().map(|t| t.name).collect();
    assert_eq!(names, ["global_step", "y"]);
}

#[test]
fn newer_pickle_protocols_are_named() {
    let error = refused(&file(b"\x80\x06}."));
    assert_eq!(error.kind(), FailureKind::Unsupported);
    assert!(error.message().contains("pickle protocol 6"), "{error}");
}

/// A stride of zero can state any size for a record of any size.
#[test]
fn memoised_values_are_read_up_to_a_bound() {
    let gib = 1_i64 << 30;
    let expanded = |rows: i64| read(&one(6, 0, &[rows, 6], &[0, 1])).unwrap().remove(0);
    let largest = expanded(gib / 24);
    assert_eq!(
        (largest.dtype, largest.strides, largest.len),
        (StoredDtype::F32, Some(vec![0, 1]), (gib / 24) as u64 * 24)
    );
    let larger = expanded(gib / 24 + 1);
    assert_eq!((larger.dtype.name(), larger.strides, larger.len), ("F32 with strides [0, 1]", None, 24));
}

#[test]
fn non_checkpoint_files_are_named_by_their_kind() {
    for (file, says) in [
        (&b""[..], "it is empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", "Git LFS pointer"),
    ] {
        assert!(refused(file).message().contains(says));
    }
}

#[test]
fn preflight_knows_everything_except_offsets() {
    let bytes = std::fs::read(testdata("tensors.bin")).unwrap();
    let asked = RefCell::new(0);
    let read = |range: Range<u64>| {
        *asked.borrow_mut() += 1;
        Ok(bytes[range.start as usize..range.end as usize].to_vec())
    };
    let outline = Contents::read(bytes.len() as u64, &read).unwrap().outlined();
    assert_eq!(asked.into_inner(), 7, "both ends, the directory, and header and content of two records");
    let located = read_tensors(&testdata("tensors.bin")).unwrap();
    assert_eq!(outline.len(), located.len());
    for (near, exact) in outline.into_iter().zip(located) {
        let gap = exact.offset - near.offset;
        assert!((30..30 + 128).contains(&gap), "{}: {gap}", near.name);
        assert_eq!(HeaderTensor { offset: exact.offset, ..near }, exact);
    }
}

#[test]
fn only_tensors_are_unpickled_and_other_globals_are_named() {
    for (name, says) in [("system.bin", "\"posix.system\""), ("module.bin", "\"torch.nn.modules.linear.Linear\"")] {
        let error = read_tensors(&testdata(name)).unwrap_err();
        assert_eq!(error.kind(), FailureKind::Checkpoint);
        assert!(error.message().contains(says) && error.message().contains(name), "{error}");
        assert!(error.hint_text().unwrap().contains("nothing was executed"));
    }
    let error = refused(&file(b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00evilt\x52."));
    assert!(error.message().contains("\"os.system\""), "{error}");
    let error = refused(&file(b"\x80\x02ctorch\n\x1b[31mTensor\n."));
    assert!(error.message().contains("\\u{1b}"), "{error}");
}

#[test]
fn legacy_non_zip_format_is_refused_by_name() {
    let error = read_tensors(&testdata("legacy.bin")).unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unsupported);
    assert!(error.message().contains("before 1.6"), "{error}");
    assert!(error.hint_text().unwrap().contains("safetensors"));
}

#[test]
fn pickle_sizes_are_checked_against_the_archive_records() {
    assert_eq!(read(&one(6, 2, &[2, 2], &[2, 1])).unwrap()[0].len, 16);
    assert_eq!(read(&one(6, 6, &[0, 9], &[9, 1])).unwrap()[0].len, 0);
    let huge = i64::MAX;
    for (file, says) in [
        (one(7, 0, &[7], &[1]), "do not fill the 24 bytes"),
        (one(5, 0, &[5], &[1]), "do not fill the 24 bytes"),
        (one(huge, 0, &[6], &[1]), "do not fill the 24 bytes"),
        (one(6, 1, &[6], &[1]), "leaves its 6 values"),
        (one(6, 0, &[2, 2], &[4, 2]), "leaves its 6 values"),
        (one(6, huge, &[2], &[1]), "leaves its 6 values"),
        (one(6, 0, &[huge, huge], &[0, 0]), "overflows"),
        (one(6, 0, &[2, 2], &[huge, huge]), "leaves its 6 values"),
        (one(6, 0, &[2, 2], &[2]), "2 dimensions"),
        (one(6, 0, &[1; 17], &[1; 17]), "17 dimensions"),
        (one(6, -1, &[2], &[1]), "not one of a dictionary"),
        (one(6, 0, &[-2], &[1]), "not one of a dictionary"),
        (one(6, 0, &[2], &[-1]), "not one of a dictionary"),
        (one(-6, 0, &[2], &[1]), "not one of a dictionary"),
        (file(&dictionary(&[("a", tensor("1", 6, 0, &[6], &[1]))])), "no record \"m/data/1\""),
        (file(&dictionary(&[("a", tensor("../data.pkl", 6, 0, &[6], &[1]))])), "no record"),
        (file(&dictionary(&[("a", tensor(&"0".repeat(65), 6, 0, &[6], &[1]))])), "names a storage"),
    ] {
        let error = refused(&file);
        assert_eq!(error.kind(), FailureKind::Checkpoint);
        assert!(error.message().contains(says), "{error}");
    }
    let twice = tensor("0", 6, 0, &[6], &[1]);
    let error = refused(&file(&dictionary(&[("a", twice.clone()), ("a", twice)])));
    assert!(error.message().contains("\"a\" appears twice"), "{error}");
}

#[test]
fn pickles_without_a_state_dict_are_refused() {
    for (pickle, says) in [
        (b"".as_slice(), "not one of a dictionary"),
        (b".", "not one of a dictionary"),
        (b"N.", "not a dictionary"),
        (b"}.", "holds no tensors"),
        (b"}X\x01\x00\x00\x00aK\x01s.", "holds no tensors"),
        (b"}(X\x01\x00\x00\x00au.", "not one of a dictionary"),
        (b"X\xff\xff\xff\xffa.", "not one of a dictionary"),
        (b"X\x01\x00\x00\x00\xff.", "not UTF-8"),
        (b"h\x01.", "not one of a dictionary"),
        (b"t.", "not one of a dictionary"),
        (b"(Ns.", "not one of a dictionary"),
        (b"NNR.", "not one of a dictionary"),
        (b"NQ.", "not one of a dictionary"),
        (b"\x8a\x20aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.", "not a dictionary"),
        (b"\x8b\xff\xff\xff\xffa.", "not one of a dictionary"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffa.", "not one of a dictionary"),
        (b"NN\x93.", "not one of a dictionary"),
        (b"\x81.", "instruction 0x81"),
        (b"i__main__\nx\n.", "instruction 0x69"),
    ] {
        let error = refused(&file(pickle));
        assert!(error.message().contains(says), "{pickle:?}: {error}");
    }
}

/// A memoised tuple doubled 60 times, nesting a million deep, a million marks.
#[test]
fn pickle_bombs_are_bounded_by_their_bytes() {
    let doubling = [b"N\x85q\x00".as_slice(), &b"h\x00h\x00\x86q\x00".repeat(60), b"."].concat();
    let nesting = [b"N".as_slice(), &b"\x85".repeat(1 << 20), b"."].concat();
    let marks = [b"(".repeat(1 << 20), b".".to_vec()].concat();
    let dictionaries = [b"}".repeat(1 << 20), b".".to_vec()].concat();
    for bomb in [doubling, nesting, marks, dictionaries] {
        refused(&file(&bomb));
    }
    // One long shape, used by every tensor.
    let shape = [b"(".as_slice(), &b"K\x01".repeat(1 << 20), b"tq\x00"].concat();
    let error = refused(&file(&[shape, tensor("0", 6, 0, &[1], &[1])[..].to_vec(), b".".to_vec()].concat()));
    assert!(error.message().contains("not a dictionary"), "{error}");
    // As arguments of a hundred thousand calls, and one dictionary as a hundred thousand entries.
    let calls = [&b"("[..], &b"N".repeat(1 << 20), b"tq\x00ccollections\nCounter\nq\x01"].concat();
    let error = refused(&file(&[calls, b"h\x01h\x00R".repeat(100_000), b".".to_vec()].concat()));
    assert!(error.message().contains("not a dictionary"), "{error}");
    let entries = [b"}q\x00(".to_vec(), [text("x"), b"N".to_vec()].concat().repeat(100_000), b"u".to_vec()].concat();
    let many =
        [entries, b"}(".to_vec(), [text("y"), b"h\x00".to_vec()].concat().repeat(100_000), b"u.".to_vec()].concat();
    assert!(refused(&file(&many)).message().contains("holds no tensors"));
    let large = zip(&[("m/data.pkl", &vec![b'N'; MAX_PICKLE_BYTES as usize + 1])]);
    assert!(refused(&large).message().contains("over the limit"));
}

#[test]
fn invalid_or_contradictory_archives_are_refused() {
    let good = one(6, 0, &[6], &[1]);
    read(&good).unwrap();
    let end = good.len() - 22;
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let directory = u32::from_le_bytes(good[end + 16..end + 20].try_into().unwrap()) as usize;
    let second = directory + 46 + "m/data.pkl".len();
    for (file, says) in [
        (b"PK".to_vec(), "no zip archive"),
        (b"not an archive".repeat(9), "no zip archive"),
        (good[..good.len() - 1].to_vec(), "no zip archive"),
        (good[1..].to_vec(), "its directory"),
        (with(end + 16, &u32::MAX.to_le_bytes()), "does not fit"),
        (with(end + 12, &0_u32.to_le_bytes()), "has 0 entries, not 2"),
        (with(end + 10, &9_u16.to_le_bytes()), "has 2 entries, not 9"),
        (with(directory, b"XX"), "entry 0 of its directory is none"),
        (with(directory + 28, &u16::MAX.to_le_bytes()), "entry 0 of its directory is none"),
        (with(directory + 10, &8_u16.to_le_bytes()), "is compressed"),
        (with(second + 10, &8_u16.to_le_bytes()), "is compressed"),
        (with(second + 8, &1_u16.to_le_bytes()), "is compressed or encrypted"),
        (with(second + 20, &u32::MAX.to_le_bytes()), "entry 1 of its directory is none"),
        (with(second + 24, &(1_u32 << 30).to_le_bytes()), "it is truncated"),
        (with(second + 42, &(1_u32 << 30).to_le_bytes()), "it is truncated"),
        (with(second + 42, &1_u32.to_le_bytes()), "not where the directory says"),
        (with(28, &60_000_u16.to_le_bytes()), "reaches into the directory"),
        (zip(&[("m/data.pkl", b"."), ("m/data.pkl", b".")]), "two records are called"),
        (zip(&[("m/data.pkl", b"."), ("n/data.pkl", b".")]), "two files called data.pkl"),
        (zip(&[("data.pkl", b".")]), "without a data.pkl"),
        (zip(&[("m/data/0", b"")]), "without a data.pkl"),
        (zip(&[("m/data.pkl", b"."), ("m/byteorder", b"big")]), "most significant byte first"),
    ] {
        let error = refused(&file);
        assert!(error.message().contains(says), "{says}: {error}");
    }
}

/// GPT-J is one file of 24 GB: its offsets exceed the 32 bits of the original archive format.
#[test]
fn zip64_archives_are_read() {
    let start: u64 = 5 << 30;
    let small = one(6, 0, &[6], &[1]);
    let read_u32 = |at: usize| u32::from_le_bytes(small[at..at + 4].try_into().unwrap());
    let directory = read_u32(small.len() - 6) as usize;
    let second = directory + 46 + "m/data.pkl".len();
    let record = read_u32(second + 42) as usize;
    // The second record, the directory and the end, moved behind a sparse gap.
    let moved_record = start + record as u64;
    let mut tail = small[record..second].to_vec();
    let moved_directory = start + directory as u64;
    let mut entry = small[second..small.len() - 22].to_vec();
    entry[42..46].copy_from_slice(&u32::MAX.to_le_bytes());
    let wide = [[1, 0, 8, 0].as_slice(), &moved_record.to_le_bytes()].concat();
    entry[30..32].copy_from_slice(&(wide.len() as u16).to_le_bytes());
    tail.extend([entry, wide].concat());
    let end64 = start + record as u64 + tail.len() as u64;
    tail.extend([b"PK\x06\x06".as_slice(), &[0; 28], &2_u64.to_le_bytes()].concat());
    tail.extend([(end64 - moved_directory).to_le_bytes(), moved_directory.to_le_bytes()].concat());
    tail.extend([b"PK\x06\x07\x00\x00\x00\x00".as_slice(), &end64.to_le_bytes(), &1_u32.to_le_bytes()].concat());
    tail.extend([b"PK\x05\x06".as_slice(), &[0xff; 16], &[0; 2]].concat());

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pytorch_model.bin");
    let mut file = File::create(&path).unwrap();
    file.write_all(&small[..record]).unwrap();
    file.seek(SeekFrom::Start(moved_record)).unwrap();
    file.write_all(&tail).unwrap();
    let found = read_tensors(&path).unwrap();
    let near = read(&small).unwrap();
    assert_eq!(found[0].offset, near[0].offset + start);
    assert_eq!(found.len(), 1);
}

/// A view of row-major values, made non-contiguous by a permutation or by steps.
fn views() -> impl Strategy<Value = View<'static>> {
    let dims = prop::collection::vec((0_u64..5, 0_u64..20), 0..4);
    dims.prop_map(|dims| {
        let (shape, strides) = dims.into_iter().unzip();
        let storage = pickle::Storage { element: pickle::Element { name: "F32", size: 4 }, key: "0", values: 1000 };
        View { name: "x", storage, offset: 0, shape, strides, altered: false }
    })
}

/// Positions of all values in row-major order.
fn places(view: &View<'_>) -> Vec<u64> {
    let dims = view.shape.iter().zip(&view.strides);
    dims.fold(vec![0], |places, (dim, stride)| {
        places.iter().flat_map(|place| (0..*dim).map(move |i| place + i * stride)).collect()
    })
}

/// Bytes from the first value to the last, both included.
fn spread(tensor: &HeaderTensor) -> u64 {
    let Some(strides) = &tensor.strides else { return tensor.len };
    let last: u64 = tensor.shape.iter().zip(strides).map(|(dim, stride)| (dim - 1) * stride).sum();
    (last + 1) * tensor.dtype.size().unwrap()
}

proptest! {
    #[test]
    fn contiguous_strides_are_recognised(view in views()) {
        let places = places(&view);
        let one_after_another = places.iter().enumerate().all(|(i, place)| *place == i as u64);
        prop_assert_eq!(view.is_contiguous(), one_after_another);
        prop_assert_eq!(view.span(), Some(places.iter().max().map_or(0, |last| last + 1)));
    }

    /// Whatever the damage, the result is tensors inside the file or an error.
    #[test]
    fn damaged_files_are_refused_or_harmless(
        name in prop::sample::select(vec!["tensors.bin", "others-2.bin", "others-4.bin"]),
        at in 0_usize..5519, bytes in prop::collection::vec(any::<u8>(), 1..9)) {
        let mut file = std::fs::read(testdata(name)).unwrap();
        let end = (at + bytes.len()).min(file.len());
        file[at..end].copy_from_slice(&bytes[..end - at]);
        if let Ok(tensors) = read(&file) {
            for tensor in tensors {
                prop_assert!(tensor.offset + spread(&tensor) <= file.len() as u64);
            }
        }
    }

    #[test]
    fn random_pickle_programs_terminate(program in prop::collection::vec(
        prop::sample::select(b".(NKMJX)}tusaeqrhjQRbcCB\x85\x86\x87\x88\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x93\x94\x95\x01\x00\n0".to_vec()), 0..64)) {
        let _ = read(&file(&program));
    }
}
