//! Names and maximum sizes of a run's result files.

use outliers_protocol::{FileBytes, Inspection, JobSpec, SiteKind, files};
use serde::Serialize;

use crate::units::Bytes;

/// Bytes of a line of a document: indentation, a name and a value.
const LINE: f64 = 96.0;
/// Bytes of a line of a list of numbers.
const ITEM: f64 = 40.0;
/// Fixed bytes of a document or a header.
const BASE: f64 = (1 << 20) as f64;
/// Bytes in the results per layer, per norm output and per expert.
const LAYER: f64 = 32_768.0;
const SITE: f64 = 8192.0;
const EXPERT: f64 = 1024.0;
/// Bytes in the results per layer and per sequence for each optional measurement.
const MEASURED: f64 = 131_072.0;
/// Bytes of an event of a time line, and events per tensor and per step of a sequence.
const EVENT: f64 = 192.0;
const EVENTS: f64 = 16.0;
/// Limit for the log and the progress file. No more of them is fetched.
const WORDS: u64 = 24 << 20;
/// Limit for a file without a planned size.
const UNKNOWN: u64 = 256 << 30;

/// The result files of `job`, besides log and progress, each with its maximum size.
pub fn planned(job: &JobSpec, inspection: &Inspection) -> Vec<FileBytes> {
    let figures = OutputSizes::of(job, inspection);
    let most = |name: &str| match name {
        files::JOB => BASE + 4.0 * length(job),
        files::RESULTS => figures.results(),
        // Its text may contain the name of every document.
        files::METADATA => 4.0 * (BASE + length(job) + length(inspection)) + ITEM * figures.tokens,
        files::STATISTICS => figures.statistics(),
        name if job.trace.as_deref() == Some(name) => figures.trace(),
        name if exports(job).any(|export| export == name) => exported(inspection, name),
        _ => figures.activations(),
    };
    // Larger estimates are limited to the maximum number.
    names(job).map(|name| FileBytes { name: name.to_owned(), bytes: most(name) as u64 }).collect()
}

/// The result files of a job without an inspection.
pub fn unplanned(job: &JobSpec) -> Vec<FileBytes> {
    names(job).map(|name| FileBytes { name: name.to_owned(), bytes: UNKNOWN }).collect()
}

/// Maximum total of these files, with log and progress.
pub fn bytes(files: &[FileBytes]) -> Bytes {
    Bytes(files.iter().fold(WORDS, |sum, file| sum.saturating_add(file.bytes)))
}

fn names(job: &JobSpec) -> impl Iterator<Item = &str> {
    let asked_for = [&job.save_activations, &job.trace].into_iter().filter_map(|name| name.as_deref());
    [files::JOB, files::RESULTS, files::METADATA, files::STATISTICS].into_iter().chain(asked_for).chain(exports(job))
}

/// Files for other programs.
fn exports(job: &JobSpec) -> impl Iterator<Item = &str> {
    job.export.iter().flat_map(|export| export.files()).copied()
}

/// Size by the inspection, which contains every matrix.
fn exported(inspection: &Inspection, name: &str) -> f64 {
    let planned = inspection.plan.exports.iter().find(|file| file.name == name);
    planned.map_or(UNKNOWN, |file| file.bytes) as f64
}

/// Bytes of a serialised document.
fn length(document: &impl Serialize) -> f64 {
    serde_json::to_vec_pretty(document).map_or(0.0, |text| text.len() as f64)
}

/// Quantities that determine the sizes.
struct OutputSizes {
    hidden: f64,
    vocab: f64,
    layers: f64,
    /// Number of studied norm outputs.
    sites: f64,
    /// Number of kinds of other sites that are saved with the activations.
    kinds: f64,
    /// Number of routed experts in all layers.
    experts: f64,
    tensors: f64,
    /// Number of optional measurements.
    measurements: f64,
    sequences: f64,
    /// Number of tokens in all sequences.
    tokens: f64,
}

impl OutputSizes {
    fn of(job: &JobSpec, inspection: &Inspection) -> Self {
        let (plan, layers) = (&inspection.plan, &inspection.layers);
        let is_saved = |kind: &&SiteKind| !matches!(kind, SiteKind::Norms | SiteKind::ExpertOut);
        Self {
            hidden: inspection.hidden as f64,
            vocab: inspection.vocab as f64,
            layers: layers.len() as f64,
            sites: inspection.sites.len() as f64,
            kinds: job.kinds().iter().filter(is_saved).count() as f64,
            experts: layers.iter().map(|layer| layer.experts as f64).sum(),
            tensors: layers.iter().map(|layer| layer.tensors as f64).sum(),
            measurements: job.measure.len() as f64,
            sequences: plan.sequences as f64,
            tokens: plan.sequences as f64 * plan.tokens_per_sequence as f64,
        }
    }

    /// Upper bound: every feature is systematic, with its positions in every sequence.
    fn results(&self) -> f64 {
        let within = self.sequences * (5.0 * LINE + 8.0 * self.sites);
        let feature = 40.0 * LINE + (2.0 * self.layers + self.sites) * ITEM + within;
        let parts = LAYER * self.layers + SITE * self.sites + EXPERT * self.experts + 8.0 * LINE * self.sequences;
        let measured = MEASURED * (self.layers + self.sequences / 100.0) + ITEM * self.layers * self.sequences;
        let parts = parts + self.measurements * measured;
        2.0 * BASE + self.hidden * feature + parts
    }

    /// Eight numbers and a gain per norm output and feature, three numbers per sequence and
    /// feature, seven per expert.
    fn statistics(&self) -> f64 {
        let features = self.hidden * (60.0 * self.sites + 24.0 * self.sequences);
        BASE + features + 52.0 * self.experts + 2048.0 * self.layers
    }

    /// Hidden states at every site and after the final norm, logits, and at most all experts of
    /// the routers.
    fn activations(&self) -> f64 {
        let states = 4.0 * self.hidden * (self.sites + self.kinds * self.layers + 1.0);
        BASE + self.tokens * (states + 4.0 * self.vocab + 12.0 * self.experts + 12.0) + 4096.0 * self.layers
    }

    fn trace(&self) -> f64 {
        let steps = self.sequences * (4.0 * self.layers + self.experts + self.vocab / 1024.0 + 16.0);
        BASE + EVENT * EVENTS * (self.tensors + steps)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use outliers_protocol::{Export, Measurement, ModelSource};
    use serde_json::json;

    use super::*;

    /// Two layers of a mixture, four norm outputs of 64 features, eight sequences of 32 tokens.
    pub(crate) fn inspection() -> Inspection {
        let layer = |layer: usize| json!({ "layer": layer, "kind": "", "experts": 4, "tensors": 20, "parameters": 1, "bytes": 1 });
        let site = |layer: usize, point: &str| json!({ "layer": layer, "point": point, "tensor": "" });
        let sites = [0, 1].map(|at| [site(at, "before_attention"), site(at, "before_mlp")]).concat();
        let document = json!({
            "schema": 1, "model": "m", "revision": null, "architecture": "", "model_type": "", "hidden": 64,
            "vocab": 100, "max_positions": null, "tied_head": false, "parameters": 1, "active_parameters": 1,
            "stored_bytes": 1, "stored_dtypes": {}, "embedding_bytes": 1, "head_bytes": 1,
            "layers": [layer(0), layer(1)], "sites": sites,
            "ignored": [], "unexplained": [], "files": [], "tokenizer": null,
            "config": { "rules": 1, "class": "", "defaults": {}, "nulls": [], "unknown": [] },
            "plan": {
                "sequences": 8, "tokens_per_sequence": 32, "compute_bytes_per_value": 4, "flops": 1.0,
                "streamed_memory_bytes": 1, "resident_memory_bytes": 1, "hidden_state_bytes": 1, "disk_bytes": 1,
                "bytes_to_read": 1,
            },
        });
        serde_json::from_value(document).unwrap()
    }

    fn job() -> JobSpec {
        JobSpec::new(ModelSource::Hub { id: "a/b".into(), revision: "main".into() })
    }

    #[test]
    fn planned_files_are_those_of_the_job_with_size_bounds() {
        let names = |files: &[FileBytes]| files.iter().map(|file| file.name.clone()).collect::<Vec<_>>();
        let usual = [files::JOB, files::RESULTS, files::METADATA, files::STATISTICS];
        assert_eq!(names(&planned(&job(), &inspection())), usual);
        let all = JobSpec { save_activations: Some("a".into()), trace: Some("t".into()), ..job() };
        let files = planned(&all, &inspection());
        assert_eq!(names(&files)[4..], ["a", "t"]);
        assert_eq!(names(&unplanned(&all)), names(&files));
        let exports = JobSpec { export: Export::ALL.into(), ..job() };
        let mut inspection = inspection();
        inspection.plan.exports = vec![FileBytes { name: files::IMATRIX.into(), bytes: 1234 }];
        let exported = planned(&exports, &inspection);
        assert_eq!(names(&exported)[4..], [files::IMATRIX, files::ACT_SCALES, files::INPUT_SCALES, files::REAP]);
        assert_eq!(exported[4].bytes, 1234, "the plan knows");
        let most = |name: &str| files.iter().find(|file| file.name == name).unwrap().bytes;
        // The numbers alone, without headers.
        assert!(most(files::STATISTICS) >= 64 * (4 * 60 + 8 * 24) + 2 * 4 * 52);
        assert!(most("a") >= 8 * 32 * 4 * (64 * 5 + 100));
        assert!(files.iter().all(|file| file.bytes < 16 << 20), "bounds that are none: {files:?}");
        assert!(bytes(&files) > Bytes(WORDS));
    }

    #[test]
    fn size_bounds_are_monotonic_and_saturate() {
        let sum = |inspection: &Inspection, job: &JobSpec| bytes(&planned(job, inspection));
        let all = JobSpec { save_activations: Some("a".into()), trace: Some("t".into()), ..job() };
        let (small, mut large) = (inspection(), inspection());
        large.plan.sequences = usize::MAX;
        large.plan.tokens_per_sequence = usize::MAX;
        assert!(sum(&small, &job()) < sum(&small, &all) && sum(&small, &all) < sum(&large, &all));
        assert_eq!(sum(&large, &all), Bytes(u64::MAX));
        let mut sites = all.clone();
        sites.sites.extend(SiteKind::ALL);
        assert!(sum(&small, &all) < sum(&small, &sites));
        let measure = JobSpec { measure: Measurement::ALL.into(), ..all.clone() };
        assert!(sum(&small, &all) < sum(&small, &measure));
    }

    /// Compares the bounds with results of real runs: no file exceeds its bound, and the bounds
    /// are not arbitrarily large.
    #[test]
    fn real_results_are_within_their_bounds() {
        for name in ["dense", "mixture"] {
            let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/results")).join(name);
            let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
            let results: outliers_protocol::Results = serde_json::from_slice(&read(files::RESULTS)).unwrap();
            let job: JobSpec = serde_json::from_slice(&read(files::JOB)).unwrap();
            let mut inspection = inspection();
            inspection.hidden = results.hidden;
            inspection.plan.sequences = results.sequences;
            inspection.plan.tokens_per_sequence = results.tokens_per_sequence;
            let (layer, site) = (inspection.layers[0].clone(), inspection.sites[0].clone());
            let experts = results.routers.first().map_or(0, |router| router.experts);
            inspection.layers = vec![outliers_protocol::LayerInspection { experts, ..layer }; results.n_layers];
            inspection.sites = vec![site; results.n_sites];
            for file in planned(&job, &inspection) {
                let (is, most) = (read(&file.name).len() as u64, file.bytes);
                assert!(is <= most && most < 10_000 * is.max(1), "{name}/{}: {is} of {most}", file.name);
            }
        }
    }
}
