//! Activation scales: the largest |x| per column of every matrix's input, under the checkpoint's
//! module names as in SmoothQuant's programs, and per matrix the FP8 and NVFP4 scales of its whole
//! input.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::{FinishedPass, Layer, Matrix, UnroutedExpert, matrices};
use crate::checkpoint::Model;
use crate::checkpoint::safetensors::{StoredDtype, TensorSpec, Writer};
use crate::error::{Result, WorkerError};
use crate::files::write_atomic;
use crate::model::decoder::Need;

/// Largest numbers of E4M3 and E2M1.
const E4M3: f64 = 448.0;
const E2M1: f64 = 6.0;

/// Module name of a matrix, of one expert or outside experts.
fn module(model: &Model<'_>, matrix: &Matrix, expert: Option<usize>) -> String {
    let name = model.name_of(matrix.layer, &Need { role: matrix.role, expert, shape: Vec::new() });
    name.strip_suffix(".weight").unwrap_or(&name).to_owned()
}

/// Largest |x| per column of a matrix's input; zeros if no token entered.
fn largest(layers: &BTreeMap<usize, Layer>, matrix: &Matrix, expert: usize) -> Vec<f32> {
    let seen = layers.get(&matrix.layer).and_then(|layer| layer.inputs.get(&matrix.place(expert)));
    seen.filter(|seen| seen.rows > 0).map_or_else(|| vec![0.0; matrix.columns], |seen| seen.largest.clone())
}

/// Scales of a whole input; null if no token entered or all values were 0.
fn scales(largest: f32) -> Value {
    let most = f64::from(largest);
    if most == 0.0 {
        return Value::Null;
    }
    json!({ "absmax": most, "fp8_input_scale": most / E4M3, "nvfp4_input_scale": most / (E4M3 * E2M1) })
}

/// Writes both files.
///
/// # Errors
/// Storage.
pub(super) fn write(
    [act_scales, input_scales]: [&Path; 2],
    layers: &BTreeMap<usize, Layer>,
    pass: &FinishedPass<'_>,
    never_hit: &[UnroutedExpert],
) -> Result<()> {
    let model = pass.model;
    let matrices = matrices(&model.spec);
    // Every expert is listed, also where the checkpoint stores all experts as one tensor.
    let mut modules = Vec::new();
    for matrix in &matrices {
        if matrix.experts.is_some() && !model.names.is_stacked(matrix.role) {
            let of = |expert| (module(model, matrix, Some(expert)), matrix, expert..expert + 1);
            modules.extend((0..matrix.count()).map(of));
        } else {
            modules.push((module(model, matrix, matrix.experts.map(|_| 0)), matrix, 0..matrix.count()));
        }
    }
    let stacked = |experts: usize| (experts > 1).then_some(experts as u64);
    let specs: Vec<TensorSpec> = modules
        .iter()
        .map(|(name, matrix, experts)| {
            let shape: Vec<u64> = stacked(experts.len()).into_iter().chain([matrix.columns as u64]).collect();
            TensorSpec::new(name.as_str(), StoredDtype::F32, &shape)
        })
        .collect();
    let writer = Writer::create(act_scales, &specs, &BTreeMap::new())?;
    let mut tensors = BTreeMap::new();
    for (name, matrix, experts) in modules {
        let mut of_each = Vec::with_capacity(experts.len());
        for (at, expert) in experts.enumerate() {
            let values = largest(layers, matrix, expert);
            of_each.push(scales(values.iter().copied().fold(0.0, f32::max)));
            writer.write(&name, (at * values.len() * size_of::<f32>()) as u64, bytemuck::cast_slice(&values))?;
        }
        let one = of_each.len() == 1;
        tensors.insert(name, if one { of_each.remove(0) } else { Value::Array(of_each) });
    }
    writer.finish()?;
    let document = json!({
        "schema": 1,
        "model": pass.results.model,
        "formulas": {
            "absmax": "largest |x| of the input over all tokens",
            "fp8_input_scale": "absmax / 448: x / scale fits E4M3",
            "nvfp4_input_scale": "absmax / (448 x 6): x / scale fits E4M3 times E2M1; compressed-tensors' \
                                  input_global_scale is its reciprocal",
        },
        "tensors": tensors,
        "experts_never_hit": never_hit,
    });
    let text = serde_json::to_vec_pretty(&document)
        .map_err(|error| WorkerError::internal(format!("scales cannot be written as JSON: {error}")))?;
    write_atomic(input_scales, &text)
}
