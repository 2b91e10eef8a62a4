//! The same model in other files: every weight decoded, optionally changed, and written
//! unquantised under its published name.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use outliers_worker::checkpoint::Model;
use outliers_worker::checkpoint::safetensors::{StoredDtype, TensorSpec, Writer};
use outliers_worker::checkpoint::source::Checkpoint;
use outliers_worker::model::decoder::{DecoderSpec, Need};
use outliers_worker::pass::loader::{Loader, TensorPool};
use outliers_worker::pass::meter::{Meter, Thread};

/// Architecture of a fixture.
pub(crate) fn spec_of(model: &Path) -> DecoderSpec {
    let checkpoint = Checkpoint::open_folder(model).unwrap();
    Model::open(&checkpoint.config, &*checkpoint.weights, None).unwrap().spec
}

/// Writes the checkpoint `from` to the folder `to`: unquantised, each tensor `[out, in]` first
/// shown to `edit` with its layer. Matrices that a pass may
/// [keep](outliers_worker::checkpoint::StoredTensor::kept_as) in bf16 stay exact in it, so that
/// they are multiplied in the same way; all else is f32.
pub(crate) fn rewrite(from: &Path, to: &Path, mut edit: impl FnMut(usize, &Need, &mut [f32])) {
    let checkpoint = Checkpoint::open_folder(from).unwrap();
    let model = Model::open(&checkpoint.config, &*checkpoint.weights, None).unwrap();
    let (spare, meter) = (TensorPool::default(), Meter::default());
    let mut loader = Loader::new(&model, DType::F32, &Device::Cpu, &spare, meter.clock(Thread::Loader(0))).unwrap();
    let mut tensors: BTreeMap<String, (Vec<u64>, Vec<f32>, DType)> = BTreeMap::new();
    for (layer, need) in model.spec.needs() {
        let value =
            loader.tensor(layer, &need).unwrap().wait().unwrap().to_dtype(DType::F32).unwrap().contiguous().unwrap();
        let mut values: Vec<f32> = value.flatten_all().unwrap().to_vec1().unwrap();
        edit(layer, &need, &mut values);
        let mut shape: Vec<u64> = need.shape.iter().map(|&n| n as u64).collect();
        // By the family's table: the quantised form may be transposed.
        if model.names.input_major.contains(&need.role) {
            values = transposed(&values, need.shape[0], need.shape[1]);
            shape.reverse();
        }
        let dtype = model.stored(layer, &need).kept_as(DType::F32, need.is_matrix());
        assert!(dtype == DType::F32 || values.iter().all(|v| v.to_bits() & 0xffff == 0), "{need:?}: no bf16 any more");
        let name = model.name_of(layer, &need);
        if need.expert.is_some() && model.names.is_stacked(need.role) {
            let stack = tensors.entry(name).or_insert_with(|| ([&[0], &shape[..]].concat(), Vec::new(), dtype));
            stack.0[0] += 1;
            stack.1.extend(values);
        } else {
            assert!(tensors.insert(name, (shape, values, dtype)).is_none());
        }
    }
    let mut config = checkpoint.config.clone();
    config.as_object_mut().unwrap().remove("quantization_config");
    std::fs::create_dir_all(to).unwrap();
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    let stored = |dtype: DType| if dtype == DType::BF16 { StoredDtype::BF16 } else { StoredDtype::F32 };
    let specs: Vec<TensorSpec> =
        tensors.iter().map(|(name, (shape, _, dtype))| TensorSpec::new(name, stored(*dtype), shape)).collect();
    let writer = Writer::create(&to.join("model.safetensors"), &specs, &BTreeMap::new()).unwrap();
    for (name, (_, values, dtype)) in &tensors {
        let skipped = if *dtype == DType::BF16 { 2 } else { 0 };
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes().into_iter().skip(skipped)).collect();
        writer.write(name, 0, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}
