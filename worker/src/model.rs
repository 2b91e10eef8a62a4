//! A checkpoint that has been compared, tensor by tensor, with what its architecture expects. No weight byte is read for that.

use std::collections::{BTreeMap, BTreeSet};

use outliers_protocol::FailureKind;
use serde_json::Value;

use crate::arch::{self, Family};
use crate::decoder::{DecoderSpec, Need, Unit};
use crate::dtype;
use crate::error::{Result, WorkerError};
use crate::source::{TensorEntry, WeightSource};

/// Problems listed in one error; the rest are counted.
const LISTED: usize = 5;

/// A model whose every tensor is known to be there, in the right shape and in a dtype that can be decoded.
pub struct Model<'a> {
    /// Names and configuration reader.
    pub family: &'static Family,
    /// What to compute.
    pub spec: DecoderSpec,
    /// Where the bytes are.
    pub source: &'a dyn WeightSource,
    /// Tensors on disk that are known and left unread.
    pub ignored: Vec<String>,
    /// Tensors on disk that the architecture does not explain.
    pub unexplained: Vec<String>,
}

impl<'a> Model<'a> {
    /// Reads the configuration and checks the headers against it. `layers`: only the first so many.
    ///
    /// # Errors
    /// Unsupported architectures and switches; missing tensors, wrong shapes and dtypes by name; more layers asked for than there are.
    pub fn open(config: &Value, source: &'a dyn WeightSource, layers: Option<usize>) -> Result<Self> {
        let (family, spec) = arch::read(config)?;
        let mut model = Self { family, spec, source, ignored: Vec::new(), unexplained: Vec::new() };
        model.check()?;
        if let Some(layers) = layers {
            model.keep_layers(layers)?;
        }
        Ok(model)
    }

    fn keep_layers(&mut self, layers: usize) -> Result<()> {
        let there = self.spec.layers.len();
        if layers == 0 || layers > there {
            return Err(WorkerError::job(format!("--layers {layers}: the model has layers 1 to {there}")));
        }
        self.spec.layers.truncate(layers);
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        let mut expected = BTreeSet::new();
        let mut problems = Vec::new();
        for (layer, need) in self.spec.needs() {
            let name = self.family.names.of(layer, &need);
            problems.extend(problem(&name, &need, self.source.entry(&name)));
            expected.insert(name);
        }
        let extra = self.source.names().filter(|name| !expected.contains(*name)).map(str::to_owned);
        let tied_copy = |name: &str| self.spec.tied_head && name == self.tied_head_name();
        (self.ignored, self.unexplained) = extra.partition(|name| self.family.names.ignores(name) || tied_copy(name));
        if problems.is_empty() {
            return Ok(());
        }
        let more = problems.len().saturating_sub(LISTED);
        let kind = if problems.iter().all(|p| p.dtype) { FailureKind::Unsupported } else { FailureKind::Checkpoint };
        let listed: Vec<String> = problems.into_iter().take(LISTED).map(|p| p.what).collect();
        let rest = if more > 0 { format!("; and {more} more") } else { String::new() };
        Err(WorkerError::new(
            kind,
            format!("the checkpoint is not what its config.json says: {}{rest}", listed.join("; ")),
        ))
    }

    /// Some repositories store the head although it is tied.
    fn tied_head_name(&self) -> String {
        self.family.names.of(0, &Need { role: crate::decoder::Role::Head, expert: None, shape: Vec::new() })
    }

    /// Published name and place of a checked tensor.
    pub fn entry(&self, layer: usize, need: &Need) -> (String, &TensorEntry) {
        let name = self.family.names.of(layer, need);
        let entry = self.source.entry(&name).expect("checked when the model was opened");
        (name, entry)
    }

    /// Stored bytes of some tensors of a layer.
    pub fn stored_bytes<'n>(&self, layer: usize, needs: impl IntoIterator<Item = &'n Need>) -> u64 {
        needs.into_iter().map(|need| self.entry(layer, need).1.len).sum()
    }

    /// Stored bytes of a streaming unit.
    pub fn unit_bytes(&self, unit: &Unit) -> u64 {
        self.stored_bytes(unit.layer, &unit.needs)
    }

    /// Bytes per stored dtype of the tensors used.
    pub fn stored_dtypes(&self) -> BTreeMap<String, u64> {
        let mut dtypes = BTreeMap::new();
        for (layer, need) in self.spec.needs() {
            let (_, entry) = self.entry(layer, &need);
            *dtypes.entry(entry.dtype.to_string()).or_default() += entry.len;
        }
        dtypes
    }

    /// Values in the tensors used.
    pub fn parameters(&self) -> u64 {
        self.spec.needs().iter().map(|(_, need)| need.elements()).sum()
    }
}

struct Problem {
    what: String,
    /// Nothing is wrong but the dtype.
    dtype: bool,
}

fn problem(name: &str, need: &Need, entry: Option<&TensorEntry>) -> Option<Problem> {
    let Some(entry) = entry else {
        return Some(Problem { what: format!("tensor {name} is missing"), dtype: false });
    };
    if !entry.shape.iter().copied().eq(need.shape.iter().map(|&n| n as u64)) {
        let what = format!("tensor {name} has shape {:?}, expected {:?}", entry.shape, need.shape);
        return Some(Problem { what, dtype: false });
    }
    let what = || format!("tensor {name} is stored as {}, which cannot be decoded", entry.dtype);
    (!dtype::can_decode(&entry.dtype)).then(|| Problem { what: what(), dtype: true })
}
