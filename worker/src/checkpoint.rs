//! Checks a checkpoint tensor by tensor against its architecture. No weights are read.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use candle_core::DType;
use outliers_protocol::{ConfigReading, FailureKind, IgnoredTensors};
use serde_json::Value;

use crate::checkpoint::safetensors::{StoredDtype, shown};
use crate::checkpoint::source::{TensorEntry, WeightSource};
use crate::error::{Result, WorkerError, listed};
use crate::model::arch::{self, Architecture, Family, Names, Nvfp4Layout, Quantisation};
use crate::model::decoder::{DecoderSpec, Need, Role};

pub mod dtype;
pub mod hub;
pub mod placeholder;
pub mod safetensors;
pub mod source;
pub mod torch;

/// Maximum problems listed in one error; the others are counted.
const LISTED: usize = 5;
/// Inputs that share an exponent in MXFP4, two per byte.
pub(crate) const MXFP4_BLOCK: usize = 32;
/// Inputs that share a scale in NVFP4, two per byte.
pub(crate) const NVFP4_BLOCK: usize = 16;

/// A model whose tensors all exist in the right shape and a supported dtype.
pub struct Model<'a> {
    /// Its family.
    pub family: &'static Family,
    /// Names of its tensors.
    pub names: &'static Names,
    /// The architecture to compute.
    pub spec: DecoderSpec,
    /// Source of the bytes.
    pub source: &'a dyn WeightSource,
    /// Known stored tensors that are not read, by reason.
    pub ignored: Vec<IgnoredTensors>,
    /// Stored tensors that the architecture does not explain.
    pub unexplained: Vec<String>,
    /// Keys that config.json omits, and keys of it that are unknown.
    pub config: ConfigReading,
    /// Differences between the stored tensors and config.json.
    notes: Vec<String>,
    quantisation: Option<Quantisation>,
    /// Value of `{base}` in this checkpoint's names.
    base: &'static str,
    /// Role of the embedding: [`Role::Head`] if it is tied and only the head is stored.
    embedding: Role,
}

/// Location and format of a needed tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor<'a> {
    /// Its values.
    pub values: TensorRange<'a>,
    /// The scales of its values, for quantised formats.
    pub scales: Option<TensorRange<'a>>,
    /// Additional tensor: the shape for [`Format::Int4`], the global scale for [`Format::Nvfp4`].
    pub beside: Option<TensorRange<'a>>,
    /// Format of values and scales.
    pub format: Format,
    /// Whether the tensor is stored as `[in, out]` instead of `[out, in]`.
    pub input_major: bool,
}

/// A byte range of a stored tensor: all of it, or one expert's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorRange<'a> {
    /// The stored tensor.
    pub entry: &'a TensorEntry,
    /// Byte range within the tensor.
    pub range: Range<u64>,
}

/// Format of a tensor's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Floats of the entry's dtype.
    Plain,
    /// FP8 e4m3 with a scale per tile.
    Fp8Blocks {
        /// Rows and columns of a tile.
        block: [usize; 2],
    },
    /// e2m1 with an exponent per 32 inputs.
    Mxfp4,
    /// 4-bit integers with a scale per group of inputs.
    Int4 {
        /// Inputs per group.
        group: usize,
    },
    /// e2m1 with an e4m3 scale per 16 inputs and an f32 scale per tensor.
    Nvfp4 {
        /// Whether the f32 divides the scales instead of multiplying them.
        divided: bool,
    },
}

impl<'a> StoredTensor<'a> {
    /// The dtype of such a matrix in a pass in `compute`:
    /// [bf16](crate::kernels::product::takes_bf16) if products take bf16 weights and the
    /// conversion is exact.
    pub fn kept_as(&self, compute: DType, takes_bf16: bool) -> DType {
        let is_bf16 = self.format == Format::Mxfp4 || self.values.entry.dtype == StoredDtype::BF16;
        if takes_bf16 && is_bf16 { DType::BF16 } else { compute }
    }

    /// All byte ranges.
    pub fn pieces(&self) -> impl Iterator<Item = &TensorRange<'a>> {
        std::iter::once(&self.values).chain(&self.scales).chain(&self.beside)
    }

    /// Total bytes.
    pub fn bytes(&self) -> u64 {
        self.pieces().map(|piece| piece.range.end - piece.range.start).sum()
    }
}

impl<'a> Model<'a> {
    /// Reads the configuration and checks the headers against it. `layers` limits the model to its
    /// first layers.
    ///
    /// # Errors
    /// Unsupported architectures and settings; missing tensors, wrong shapes and dtypes, by name;
    /// `layers` exceeds the model's.
    pub fn open(config: &Value, source: &'a dyn WeightSource, layers: Option<usize>) -> Result<Self> {
        let architecture = arch::read(config)?.as_stored(|name| source.entry(name).is_some());
        let Architecture { family, names, spec, quantisation, reading: config } = architecture;
        // Every family has this norm, with or without tied embeddings.
        let has = |base: &&&str| source.entry(&names.of(base, 0, Role::MixerNorm, None)).is_some();
        let base = names.bases.iter().find(has).unwrap_or(&names.bases[0]);
        let (ignored, unexplained, notes) = Default::default();
        let embedding = Role::Embedding;
        let mut model =
            Self { family, names, spec, source, ignored, unexplained, config, notes, quantisation, base, embedding };
        model.settle_head();
        model.check()?;
        if let Some(layers) = layers {
            model.keep_layers(layers)?;
        }
        Ok(model)
    }

    /// Decides which tensor is the head if it is tied. As in transformers, stored tensors have
    /// priority: a head stored beside the embedding is used, and a head stored without it is the
    /// embedding.
    fn settle_head(&mut self) {
        if !self.spec.head.tied {
            return;
        }
        let entry = |role| self.source.entry(&self.name(0, role));
        match (entry(Role::Embedding), entry(Role::Head)) {
            (Some(embedding), Some(head)) if !embedding.shares_bytes(head) => {
                (self.spec.head.tied, self.spec.head.stored) = (false, true);
                let words = "config.json ties the head to the embedding, but a head of its own is stored: it is the one that is used";
                self.notes.push(words.to_owned());
            }
            (None, Some(_)) => {
                self.embedding = Role::Head;
                self.notes.push("the embedding is not stored: the head to which it is tied is used".to_owned());
            }
            _ => {}
        }
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
        let mut used = BTreeSet::new();
        let mut problems: Vec<TensorProblem> = Vec::new();
        for (layer, need) in self.spec.needs() {
            match self.locate(layer, &need) {
                Ok(stored) => used
                    .extend(stored.pieces().map(|piece| piece.entry).map(|entry: &'a TensorEntry| entry.name.as_str())),
                // All experts of a stacked tensor report the same problem.
                Err(problem) if problems.contains(&problem) => {}
                Err(problem) => problems.push(problem),
            }
        }
        if problems.is_empty() {
            (self.ignored, self.unexplained) = self.left_over(&used);
            return Ok(());
        }
        let more = problems.len().saturating_sub(LISTED);
        let kind = if problems.iter().all(|p| p.dtype) { FailureKind::Unsupported } else { FailureKind::Checkpoint };
        let listed: Vec<String> = problems.into_iter().take(LISTED).map(|p| p.what).collect();
        let rest = if more > 0 { format!("; and {more} more") } else { String::new() };
        let message = format!("the checkpoint is not what its config.json says: {}{rest}", listed.join("; "));
        let error = WorkerError::new(kind, message);
        Err(match self.config.explain() {
            Some(explained) => error.hint(explained),
            None => error,
        })
    }

    /// Stored tensors that are not used: ignored by reason, and unexplained.
    fn left_over(&self, used: &BTreeSet<&str>) -> (Vec<IgnoredTensors>, Vec<String>) {
        let mut ignored: BTreeMap<&str, IgnoredTensors> = BTreeMap::new();
        let mut unexplained = Vec::new();
        // PyTorch files name a tied tensor twice.
        let tied_copy = self.spec.head.tied.then(|| self.name(0, Role::Head));
        for name in self.source.names().filter(|name| !used.contains(name)) {
            let tied = tied_copy.as_deref() == Some(name);
            let known = self.names.ignores(name, self.base, self.spec.layers.len());
            let Some(why) = tied.then_some("a copy of the embedding, to which the head is tied").or(known) else {
                unexplained.push(name.to_owned());
                continue;
            };
            let example = || IgnoredTensors { why: why.to_owned(), tensors: 0, bytes: 0, example: name.to_owned() };
            let group = ignored.entry(why).or_insert_with(example);
            group.tensors += 1;
            group.bytes += self.source.entry(name).map_or(0, |entry| entry.len);
        }
        (ignored.into_values().collect(), unexplained)
    }

    /// Differences from config.json and from the index of the weights.
    pub fn checkpoint_notes(&self) -> Vec<String> {
        self.source.notes().iter().chain(&self.notes).cloned().collect()
    }

    /// Notes on the checkpoint for readers of the results, in addition to those of the source.
    pub fn warnings(&self) -> Vec<String> {
        let about = |what: &str, names: &[String]| {
            (!names.is_empty()).then(|| format!("{what}: {}", listed(names.iter().map(|name| shown(name)))))
        };
        let tensors =
            about("tensors on disk that the architecture does not explain are left unread", &self.unexplained);
        let keys = about("keys of config.json that are not known change nothing here", &self.config.unknown);
        self.notes.iter().cloned().chain(tensors).chain(keys).collect()
    }

    /// Gains of norms whose outputs are not studied, with `{layer}` for the layer.
    pub fn unstudied_norms(&self) -> Vec<String> {
        self.spec.unstudied_norms().into_iter().map(|role| self.names.pattern(self.base, role)).collect()
    }

    /// Published name of a tensor outside the experts.
    pub fn name(&self, layer: usize, role: Role) -> String {
        self.names.of(self.base, layer, role, None)
    }

    /// Published name of a needed tensor, without the suffix of its quantisation. Stacked experts
    /// share one.
    pub fn name_of(&self, layer: usize, need: &Need) -> String {
        self.names.of(self.base, layer, need.role, need.expert)
    }

    /// Location of a tensor, found when the model was opened.
    pub fn stored(&self, layer: usize, need: &Need) -> StoredTensor<'a> {
        self.locate(layer, need)
            .unwrap_or_else(|problem| unreachable!("checked when the model was opened: {}", problem.what))
    }

    fn locate(&self, layer: usize, need: &Need) -> Located<StoredTensor<'a>> {
        let names = self.names;
        let role = if need.role == Role::Embedding { self.embedding } else { need.role };
        let name = names.of(self.base, layer, role, need.expert);
        let stack = need.expert.filter(|_| names.is_stacked(need.role)).map(|e| (e, self.spec.layers[layer].experts()));
        let is_packed = self.quantisation == Some(Quantisation::Mxfp4)
            && matches!(need.role, Role::ExpertGateUp | Role::ExpertDown)
            // A model saved again as plain floats may keep the setting of its quantisation.
            && (self.source.entry(&name).is_none() || self.source.entry(&format!("{name}_blocks")).is_some());
        if is_packed {
            return self.locate_mxfp4(&name, &need.shape, stack);
        }
        if let (None, [rows, inputs]) = (stack, &need.shape[..])
            && let Some(packed) = self.locate_packed(&name, [*rows, *inputs])
        {
            return packed;
        }
        let input_major = names.input_major.contains(&need.role);
        let mut shape = need.shape.clone();
        if input_major {
            shape.reverse();
        }
        let values = self.piece(&name, &shape, stack)?;
        let stored =
            |scales, format| StoredTensor { values: values.clone(), scales, beside: None, format, input_major };
        match (&values.entry.dtype, self.quantisation) {
            (StoredDtype::F8E4M3, Some(Quantisation::Fp8Blocks { block })) if shape.len() == 2 => {
                let tiles = [shape[0].div_ceil(block[0]), shape[1].div_ceil(block[1])];
                let scales = self.piece(&format!("{name}_scale_inv"), &tiles, stack)?;
                if !dtype::can_scale(&scales.entry.dtype) {
                    return Err(TensorProblem::dtype(scales.entry));
                }
                Ok(stored(Some(scales), Format::Fp8Blocks { block }))
            }
            _ => decodable(values.entry).map(|()| stored(None, Format::Plain)),
        }
    }

    fn locate_mxfp4(&self, name: &str, shape: &[usize], stack: Option<(usize, usize)>) -> Located<StoredTensor<'a>> {
        let [rows, inputs] = shape else { return Err(TensorProblem::shape(format!("tensor {name} is not a matrix"))) };
        if !inputs.is_multiple_of(MXFP4_BLOCK) {
            let what =
                format!("tensor {name}_blocks cannot be MXFP4: {inputs} inputs are not a multiple of {MXFP4_BLOCK}");
            return Err(TensorProblem::shape(what));
        }
        let blocks = inputs / MXFP4_BLOCK;
        let values = self.piece(&format!("{name}_blocks"), &[*rows, blocks, MXFP4_BLOCK / 2], stack)?;
        let scales = self.piece(&format!("{name}_scales"), &[*rows, blocks], stack)?;
        for piece in [&values, &scales] {
            if piece.entry.dtype != StoredDtype::U8 {
                return Err(TensorProblem::dtype(piece.entry));
            }
        }
        Ok(StoredTensor { values, scales: Some(scales), beside: None, format: Format::Mxfp4, input_major: false })
    }

    /// The location of a 4-bit matrix. `None` if it is stored as plain floats.
    fn locate_packed(&self, name: &str, shape: [usize; 2]) -> Option<Located<StoredTensor<'a>>> {
        let packed = format!("{name}_packed");
        let has_packed = self.source.entry(&packed).is_some();
        let is_packed = || self.source.entry(name).is_some_and(|entry| entry.dtype == StoredDtype::U8);
        Some(match self.quantisation? {
            Quantisation::Int4 { group } if has_packed => self.locate_int4(name, &packed, shape, group),
            Quantisation::Nvfp4(Nvfp4Layout::CompressedTensors) if has_packed => {
                self.locate_nvfp4(name, &packed, shape, ("_global_scale", true))
            }
            Quantisation::Nvfp4(Nvfp4Layout::ModelOpt) if is_packed() => {
                self.locate_nvfp4(name, name, shape, ("_scale_2", false))
            }
            _ => return None,
        })
    }

    fn locate_int4(
        &self,
        name: &str,
        packed: &str,
        [rows, inputs]: [usize; 2],
        group: usize,
    ) -> Located<StoredTensor<'a>> {
        whole_groups(packed, inputs, group)?;
        let values = self.piece_of(packed, &[rows, inputs / 8], &[StoredDtype::I32])?;
        let scales = self.piece(&format!("{name}_scale"), &[rows, inputs / group], None)?;
        decodable(scales.entry)?;
        let beside = self.piece_of(&format!("{name}_shape"), &[2], &[StoredDtype::I32, StoredDtype::I64])?;
        let format = Format::Int4 { group };
        Ok(StoredTensor { values, scales: Some(scales), beside: Some(beside), format, input_major: false })
    }

    fn locate_nvfp4(
        &self,
        name: &str,
        codes: &str,
        [rows, inputs]: [usize; 2],
        (number, divided): (&str, bool),
    ) -> Located<StoredTensor<'a>> {
        whole_groups(codes, inputs, NVFP4_BLOCK)?;
        let values = self.piece_of(codes, &[rows, inputs / 2], &[StoredDtype::U8])?;
        let scales = self.piece_of(&format!("{name}_scale"), &[rows, inputs / NVFP4_BLOCK], &[StoredDtype::F8E4M3])?;
        let number = format!("{name}{number}");
        // Of rank 0, or of one value.
        let is_scalar = self.source.entry(&number).is_some_and(|entry| entry.shape.is_empty());
        let one: &[usize] = if is_scalar { &[] } else { &[1] };
        let beside = self.piece_of(&number, one, &[StoredDtype::F32])?;
        let format = Format::Nvfp4 { divided };
        Ok(StoredTensor { values, scales: Some(scales), beside: Some(beside), format, input_major: false })
    }

    /// Byte range of a stored tensor of one of these dtypes.
    fn piece_of(&self, name: &str, shape: &[usize], dtypes: &[StoredDtype]) -> Located<TensorRange<'a>> {
        let piece = self.piece(name, shape, None)?;
        if dtypes.contains(&piece.entry.dtype) { Ok(piece) } else { Err(TensorProblem::dtype(piece.entry)) }
    }

    /// Byte range of a stored tensor of `shape`, or of slice `stack.0` of a tensor with `stack.1`
    /// slices of that shape.
    fn piece(&self, name: &str, shape: &[usize], stack: Option<(usize, usize)>) -> Located<TensorRange<'a>> {
        let source = self.source;
        let entry = source.entry(name).ok_or_else(|| TensorProblem::shape(format!("tensor {name} is missing")))?;
        let whole: Vec<u64> = stack.map(|(_, experts)| experts).iter().chain(shape).map(|&n| n as u64).collect();
        if entry.shape != whole {
            return Err(TensorProblem::shape(format!("tensor {name} has shape {:?}, expected {whole:?}", entry.shape)));
        }
        let (index, parts) = stack.map_or((0, 1), |(expert, experts)| (expert as u64, experts as u64));
        let part = entry.len / parts;
        Ok(TensorRange { entry, range: index * part..(index + 1) * part })
    }

    /// Bytes of some tensors of a layer in a pass in `compute`, if products take bf16 weights or
    /// not.
    pub fn kept_bytes(&self, layer: usize, needs: &[Need], compute: DType, takes_bf16: bool) -> u64 {
        let bytes = |need: &Need| {
            let dtype = self.stored(layer, need).kept_as(compute, takes_bf16 && need.is_matrix());
            need.elements() * dtype.size_in_bytes() as u64
        };
        needs.iter().map(bytes).sum()
    }

    /// Stored bytes of some tensors of a layer.
    pub fn stored_bytes<'n>(&self, layer: usize, needs: impl IntoIterator<Item = &'n Need>) -> u64 {
        needs.into_iter().map(|need| self.stored(layer, need).bytes()).sum()
    }

    /// Bytes per stored dtype of the tensors used.
    pub fn stored_dtypes(&self) -> BTreeMap<String, u64> {
        let mut dtypes = BTreeMap::new();
        for (layer, need) in self.spec.needs() {
            for piece in self.stored(layer, &need).pieces() {
                *dtypes.entry(piece.entry.dtype.to_string()).or_default() += piece.range.end - piece.range.start;
            }
        }
        dtypes
    }

    /// Number of values of the used tensors, without quantisation scales.
    pub fn parameters(&self) -> u64 {
        let counts = |need: &&Need| need.role != Role::Head || !self.spec.head.stored;
        self.spec.needs().iter().map(|(_, need)| need).filter(counts).map(Need::elements).sum()
    }
}

/// What was found, or what is wrong with a stored tensor.
type Located<T> = std::result::Result<T, TensorProblem>;

#[derive(Debug, PartialEq, Eq)]
struct TensorProblem {
    what: String,
    /// Whether only the dtype is wrong.
    dtype: bool,
}

impl TensorProblem {
    fn shape(what: String) -> Self {
        Self { what, dtype: false }
    }

    fn dtype(entry: &TensorEntry) -> Self {
        Self {
            what: format!("tensor {} is stored as {}, which cannot be decoded", entry.name, entry.dtype),
            dtype: true,
        }
    }
}

/// Refuses a packed matrix with rows that are not whole groups.
fn whole_groups(name: &str, inputs: usize, group: usize) -> Located<()> {
    if inputs.is_multiple_of(group) {
        return Ok(());
    }
    Err(TensorProblem::shape(format!("tensor {name} cannot be packed: {inputs} inputs are not a multiple of {group}")))
}

fn decodable(entry: &TensorEntry) -> Located<()> {
    if dtype::can_decode(&entry.dtype) { Ok(()) } else { Err(TensorProblem::dtype(entry)) }
}
