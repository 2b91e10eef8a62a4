use std::borrow::Cow;

use outliers_protocol::FailureKind;
use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;
use crate::checkpoint::safetensors::{TensorSpec, Writer};

/// Header text with its length prefix.
fn file_start(json: &str) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat()
}

fn parse(json: &str, data: u64) -> Result<Header> {
    let start = file_start(json);
    let len = start.len() as u64 + data;
    Header::parse(&start, len)
}

fn refused(json: &str, data: u64) -> String {
    let error = parse(json, data).unwrap_err();
    assert_eq!(error.kind(), FailureKind::Checkpoint);
    assert!(error.hint_text().is_some());
    error.message().to_owned()
}

#[test]
fn valid_header_is_parsed() {
    let header = parse(
        r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
            "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"e":{"dtype":"F32","shape":[0,9],"data_offsets":[4,4]}}"#,
        16,
    )
    .unwrap();
    assert_eq!(header.metadata["format"], "pt");
    let names: Vec<_> = header.tensors.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["a", "e", "b"]);
    let b = header.tensor("b").unwrap();
    assert_eq!((&b.dtype, &b.shape[..], b.len), (&StoredDtype::BF16, &[2, 3][..], 12));
}

#[test]
fn contradictory_headers_are_refused_with_a_reason() {
    let f32 = |shape: &str, offsets: &str| format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#);
    let one = |entry: String| format!(r#"{{"a":{entry}}}"#);
    let two = |a: String, b: String| format!(r#"{{"a":{a},"b":{b}}}"#);
    let cases = [
        (one(f32("[1]", "[0,4]")), 3, "truncated"),
        (one(f32("[1]", "[0,4]")), 5, "1 unclaimed bytes follow"),
        (one(f32("[1]", "[2,6]")), 6, "2 unclaimed bytes lie before"),
        (two(f32("[2]", "[0,8]"), f32("[1]", "[4,8]")), 8, "overlaps"),
        (two(f32("[2]", "[0,8]"), f32("[2]", "[0,8]")), 8, "overlaps"),
        (one(f32("[2]", "[0,4]")), 4, "does not fill"),
        (one(f32("[4611686018427387904,4]", "[0,0]")), 0, "overflows"),
        (one(f32("[4611686018427387904]", "[0,0]")), 0, "does not fill"),
        (one(f32("[1]", "[4,0]")), 4, "before they begin"),
        (one(f32("[-1]", "[0,4]")), 4, "invalid value"),
        (one(f32("[1]", "[0,4,8]")), 4, "trailing characters"),
        (r#"{"a":{"dtype":"F32","shape":[1]}}"#.to_owned(), 4, "missing field"),
        (r#"{"a":1,"a":2}"#.to_owned(), 0, "invalid type"),
        (format!(r#"{{"a":{0},"a":{0}}}"#, f32("[1]", "[0,4]")), 4, "appears twice"),
        (r#"{"__metadata__":{"a":1}}"#.to_owned(), 0, "expected a string"),
        ("[]".to_owned(), 0, "expected an object"),
        ("{} {}".to_owned(), 0, "trailing"),
        (format!("{}{}", "[".repeat(9000), "]".repeat(9000)), 0, "expected an object"),
    ];
    for (json, data, says) in cases {
        let message = refused(&json, data);
        assert!(message.contains(says), "{json}: {message}");
    }
}

#[test]
fn lengths_are_checked_before_reading() {
    for (start, file_len, says) in [
        (&[1, 0, 0][..], 3, "too short"),
        (&u64::MAX.to_le_bytes()[..], 1 << 40, "over the limit"),
        (&(MAX_HEADER_BYTES + 1).to_le_bytes()[..], 1 << 40, "over the limit"),
        (&1000_u64.to_le_bytes()[..], 100, "has only 100"),
        (&10_u64.to_le_bytes()[..], 100, "incomplete"),
    ] {
        let message = Header::parse(start, file_len).unwrap_err().message().to_owned();
        assert!(message.contains(says), "{message}");
    }
}

#[test]
fn escape_sequences_do_not_reach_the_message() {
    let message = refused(r#"{"a":{"dtype":"\u001b[31mF32","shape":"\u001b[2J","data_offsets":[0,4]}}"#, 4);
    assert!(!message.contains('\u{1b}'), "{message:?}");
}

#[test]
fn errors_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    assert_eq!(read_header(&path).unwrap_err().kind(), FailureKind::Storage);
    std::fs::write(&path, file_start(r#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}"#)).unwrap();
    let error = read_header(&path).unwrap_err();
    assert!(error.message().contains("model.safetensors: tensor \"a\""), "{error}");
}

/// A tensor for the reference library: dtype, shape, bytes.
#[derive(Clone, Debug)]
struct Sample(safetensors::Dtype, Vec<usize>, Vec<u8>);

impl safetensors::View for &Sample {
    fn dtype(&self) -> safetensors::Dtype {
        self.0
    }
    fn shape(&self) -> &[usize] {
        &self.1
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.2)
    }
    fn data_len(&self) -> usize {
        self.2.len()
    }
}

fn sample() -> impl Strategy<Value = Sample> {
    use safetensors::Dtype as D;
    let dtype = prop::sample::select(vec![
        (D::F64, 8),
        (D::F32, 4),
        (D::F16, 2),
        (D::BF16, 2),
        (D::F8_E4M3, 1),
        (D::F8_E8M0, 1),
        (D::I64, 8),
        (D::I32, 4),
        (D::U8, 1),
        (D::BOOL, 1),
    ]);
    (dtype, prop::collection::vec(0_usize..4, 0..4)).prop_flat_map(|((dtype, size), shape)| {
        let bytes = shape.iter().product::<usize>() * size;
        prop::collection::vec(any::<u8>(), bytes).prop_map(move |data| Sample(dtype, shape.clone(), data))
    })
}

fn samples() -> impl Strategy<Value = BTreeMap<String, Sample>> {
    prop::collection::btree_map("[a-z.0-9_\\PC]{1,12}", sample(), 0..6)
        .prop_filter("reserved", |tensors| !tensors.contains_key("__metadata__"))
}

/// The reference library's description of a tensor, and its bytes.
fn described<'a>(view: &safetensors::tensor::TensorView<'a>) -> (String, Vec<u64>, &'a [u8]) {
    (view.dtype().to_string(), view.shape().iter().map(|d| *d as u64).collect(), view.data())
}

proptest! {
    #[test]
    fn files_of_the_reference_library_are_read(tensors in samples()) {
        let bytes = safetensors::serialize(tensors.iter(), None).unwrap();
        let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
        prop_assert_eq!(header.tensors.len(), tensors.len());
        for (name, Sample(dtype, shape, data)) in &tensors {
            let tensor = header.tensor(name).unwrap();
            let shape: Vec<u64> = shape.iter().map(|d| *d as u64).collect();
            let dtype = dtype.to_string();
            prop_assert_eq!((tensor.dtype.name(), &tensor.shape), (dtype.as_str(), &shape));
            prop_assert_eq!(&bytes[tensor.offset as usize..][..tensor.len as usize], &data[..]);
        }
    }

    #[test]
    fn the_reference_library_reads_our_files(tensors in samples(), cut in 0.0..1.0_f64) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let specs: Vec<_> = tensors.iter().map(|(name, Sample(dtype, shape, _))| {
            let shape: Vec<u64> = shape.iter().map(|d| *d as u64).collect();
            TensorSpec::new(name, StoredDtype::from_name(&dtype.to_string()), &shape)
        }).collect();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let writer = Writer::create(&path, &specs, &metadata).unwrap();
        for (name, Sample(_, _, data)) in tensors.iter().rev() {
            let cut = (data.len() as f64 * cut) as usize;
            writer.write(name, cut as u64, &data[cut..]).unwrap();
            writer.write(name, 0, &data[..cut]).unwrap();
        }
        prop_assert!(!path.exists());
        writer.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let back = SafeTensors::deserialize(&bytes).unwrap();
        prop_assert_eq!(back.len(), tensors.len());
        for (name, Sample(dtype, shape, data)) in &tensors {
            let shape: Vec<u64> = shape.iter().map(|d| *d as u64).collect();
            let view = back.tensor(name).unwrap();
            prop_assert_eq!(described(&view), (dtype.to_string(), shape, &data[..]));
        }
        prop_assert_eq!(read_header(&path).unwrap().metadata, metadata);
        prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn mutated_headers_never_panic_or_give_wrong_ranges(
        tensors in samples(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        keep_whole in any::<bool>(),
    ) {
        let mut bytes = safetensors::serialize(tensors.iter(), None).unwrap();
        let header_len = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, value) in edits {
            let at = at.index(header_len);
            bytes[at] = value;
        }
        if !keep_whole {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(header) = Header::parse(&bytes, bytes.len() as u64) {
            for tensor in &header.tensors {
                prop_assert!(tensor.offset + tensor.len <= bytes.len() as u64);
                let count = element_count(&tensor.shape).unwrap();
                prop_assert!(tensor.dtype.size().is_none_or(|size| count * size == tensor.len));
            }
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), len in any::<u64>()) {
        let _ = Header::parse(&bytes, len);
    }
}

#[test]
fn incomplete_file_never_appears() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let specs = [TensorSpec::new("a", StoredDtype::F32, &[3, 2])];
    let writer = Writer::create(&path, &specs, &BTreeMap::new()).unwrap();
    writer.write_rows("a", 2, &[0; 8]).unwrap();
    assert!(writer.write_rows("a", 3, &[0; 8]).is_err());
    assert!(writer.write("b", 0, &[]).is_err());
    let error = writer.finish().unwrap_err();
    assert!(error.message().starts_with("16 bytes of"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
