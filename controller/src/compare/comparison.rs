//! Makes one list of figures of many results, with definitions and sources.

use outliers_protocol::{Axis, Metadata, Reading, Results, SCHEMA, Verdict};
use serde::Serialize;

use super::bootstrap::{Estimate, SequenceTotals, interval, mean, middle, samples};
use super::difference::{Difference, differences};
use super::folder::{Content, ResultFolder, Run};
use super::predecessor::{Imported, Outliers};
use super::published::{self, Known, PublishedTable};
use super::samples::resampled;
use crate::model_name::short;
use crate::units::in_percent;

/// Results with their figures, and published figures of the same models.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Comparison {
    pub(crate) schema: u32,
    /// The results, in the order of their runs.
    pub(crate) models: Vec<Compared>,
    /// Every count of every model under each reading, with published counts.
    pub(crate) figures: Vec<Figure>,
    /// Differences between models, and from the reader's expectations.
    pub(crate) differences: Vec<Difference>,
    pub(crate) published: &'static [PublishedTable],
}

/// One result.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Compared {
    /// Its number in tables and plots, from 1.
    pub(crate) number: usize,
    /// The model's name, with the folder if two results have the same one.
    pub(crate) label: String,
    /// The model as named in the result.
    pub(crate) model: String,
    pub(crate) folder: String,
    pub(crate) standing: ResultKind,
    /// Parameters, from the catalogue, else the number in the tensors that the run used.
    pub(crate) parameters: Option<u64>,
    /// Active parameters per token, from the same source; `None` if it has none.
    pub(crate) active_parameters: Option<u64>,
    /// Whether the model is post-trained; `None` for models outside the catalogue.
    pub(crate) post_trained: Option<bool>,
    pub(crate) catalogue: Option<&'static Known>,
    pub(crate) sequences: Option<usize>,
    pub(crate) tokens_per_sequence: Option<usize>,
    /// Perplexity on its own text by its own tokenizer.
    pub(crate) perplexity: Option<Estimate>,
    pub(crate) job_sha256: Option<String>,
    /// Provenance of the numbers.
    pub(crate) provenance: Option<Box<Metadata>>,
    /// All counts; not printed, since `results.json` contains them.
    #[serde(skip)]
    pub(crate) run: Option<Box<Run>>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "standing", content = "why")]
pub(crate) enum ResultKind {
    Complete,
    /// A complete run of the predecessor, under its own definitions.
    Imported {
        definition: String,
    },
    /// Unusable, for this reason. It has no figures.
    Unusable(String),
}

/// Source of a count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CountedBy {
    /// The result itself.
    Ours,
    Imported,
    /// A published table, by its name.
    Published(&'static str),
}

impl CountedBy {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Ours => "this run",
            Self::Imported => "imported, the predecessor",
            Self::Published("paper") => "published, the paper",
            Self::Published("predecessor") => "published, the predecessor",
            Self::Published(name) => name,
        }
    }
}

/// One count.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    pub(crate) number: usize,
    pub(crate) model: String,
    pub(crate) source: CountedBy,
    /// How sequences are pooled.
    pub(crate) reading: Reading,
    /// The total of which the share of layers is taken.
    pub(crate) axis: Axis,
    /// Both as text.
    pub(crate) counted_as: String,
    /// Systematic outlier features.
    pub(crate) count: Estimate,
    /// Mean percentage of layers (or norm outputs) over the counted features.
    pub(crate) layers: Option<Estimate>,
    /// Mean percentage of sequence positions over the counted features.
    pub(crate) positions: Option<Estimate>,
}

fn reading(reading: Reading, axis: Axis) -> &'static str {
    match (reading, axis) {
        (Reading::Unique, Axis::Layers) => "unique, by layers (the paper's)",
        (Reading::Unique, Axis::Sites) => "unique, by norm outputs",
        (Reading::MeanPerSequence, Axis::Layers) => "mean per sequence, by layers",
        (Reading::MeanPerSequence, Axis::Sites) => "mean per sequence, by norm outputs",
        (Reading::SumOverSequences, Axis::Layers) => "sum over sequences, by layers",
        (Reading::SumOverSequences, Axis::Sites) => "sum over sequences, by norm outputs (the predecessor's)",
    }
}

impl Comparison {
    /// Compares results, numbered by the time of their runs or imports, so that an additional
    /// result changes no other number. Unusable results come last.
    pub(crate) fn of(mut folders: Vec<ResultFolder>) -> Self {
        folders.sort_by_key(|folder| match &folder.content {
            Ok(Content::Run(run)) => (0, run.metadata.finished_at_ms),
            Ok(Content::Imported(imported)) => (0, imported.imported_at_ms),
            Err(_) => (1, 0),
        });
        let mut models: Vec<Compared> = Vec::new();
        let mut figures = Vec::new();
        for (folder, number) in folders.into_iter().zip(1..) {
            let path = folder.path.display().to_string();
            let (model, own) = match folder.content {
                Ok(Content::Run(run)) => of_run(number, path, run),
                Ok(Content::Imported(imported)) => of_imported(number, path, &imported),
                Err(flaw) => (Compared::unusable(number, path, flaw.to_string()), Vec::new()),
            };
            figures.extend(own);
            if !model.is_unusable() {
                figures.extend(published_of(&model));
            }
            models.push(model);
        }
        tell_apart(&mut models);
        for figure in &mut figures {
            figure.model.clone_from(&models[figure.number - 1].label);
        }
        let differences = differences(&models);
        Self { schema: SCHEMA, models, figures, differences, published: published::tables() }
    }

    /// Keeps only these results, named by number, label, the model's name or its last part, or
    /// folder. Numbers do not change.
    ///
    /// # Errors
    /// A name that matches none.
    pub(crate) fn only(mut self, names: &[String]) -> Result<Self, String> {
        let is_it = |model: &Compared, name: &str| {
            let last = model.model.rsplit('/').next().unwrap_or_default();
            let folder = model.folder.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            let number = model.number.to_string();
            let called: [&str; 5] = [&number, &model.label, &model.model, last, folder];
            called.iter().any(|called| called.eq_ignore_ascii_case(name))
        };
        if let Some(name) = names.iter().find(|name| !self.models.iter().any(|model| is_it(model, name))) {
            let known: Vec<&str> = self.models.iter().map(|model| model.label.as_str()).collect();
            return Err(format!("`{name}` is none of {}", known.join(", ")));
        }
        self.models.retain(|model| names.iter().any(|name| is_it(model, name)));
        let kept: Vec<usize> = self.models.iter().map(|model| model.number).collect();
        self.figures.retain(|figure| kept.contains(&figure.number));
        self.differences = differences(&self.models);
        Ok(self)
    }

    /// Summary paragraph: the number of features, models, thresholds, and comparable published
    /// counts.
    pub(crate) fn answer(&self) -> String {
        let counted = |model: &Compared| {
            let figure = self.own(model, Reading::Unique, Axis::Layers)?;
            let published: Vec<String> = self
                .figures_of(model)
                .filter(|other| matches!(other.source, CountedBy::Published(_)))
                .filter(|other| (other.reading, other.axis) == (Reading::Unique, Axis::Layers))
                .map(|other| format!("; {}: {}", other.source.name(), other.count.value))
                .collect();
            Some(format!("{} ({}{})", figure.count.value, model.label, published.concat()))
        };
        let counts: Vec<String> = self.models.iter().filter_map(counted).collect();
        let mut thresholds: Vec<String> = Vec::new();
        for of in self.models.iter().filter_map(|model| Some(model.results()?.thresholds)) {
            let (layers, positions) = (in_percent(of.layer_fraction), in_percent(of.position_fraction));
            let words = format!(
                "|x| >= {} in at least {layers} % of layers and at least {positions} % of positions",
                of.magnitude
            );
            if !thresholds.contains(&words) {
                thresholds.push(words);
            }
        }
        if counts.is_empty() {
            return "No result here has a count of systematic outlier features by layers.".to_owned();
        }
        let beside: Vec<&str> = self.published.iter().map(|table| table.title.as_str()).collect();
        format!(
            "Systematic outlier features, unique and by layers: {}. Thresholds: {}. Beside them: {}.",
            counts.join(", "),
            thresholds.join("; "),
            beside.join("; ")
        )
    }

    pub(crate) fn figures_of(&self, model: &Compared) -> impl Iterator<Item = &Figure> {
        self.figures.iter().filter(move |figure| figure.number == model.number)
    }

    /// Figure of a model's own result under a reading.
    pub(crate) fn own(&self, model: &Compared, reading: Reading, axis: Axis) -> Option<&Figure> {
        let own = |figure: &&Figure| !matches!(figure.source, CountedBy::Published(_));
        self.figures_of(model).filter(own).find(|figure| (figure.reading, figure.axis) == (reading, axis))
    }
}

impl Compared {
    fn new(number: usize, folder: String, model: &str, standing: ResultKind) -> Self {
        let known = published::known(model);
        Self {
            number,
            label: short(model),
            model: model.to_owned(),
            folder,
            standing,
            parameters: known.map(|known| known.parameters),
            active_parameters: known.map(Known::active),
            post_trained: known.map(|known| known.post_trained),
            catalogue: known,
            sequences: None,
            tokens_per_sequence: None,
            perplexity: None,
            job_sha256: None,
            provenance: None,
            run: None,
        }
    }

    fn unusable(number: usize, folder: String, why: String) -> Self {
        let name = folder.clone();
        Self::new(number, folder, &name, ResultKind::Unusable(why))
    }

    pub(crate) fn is_unusable(&self) -> bool {
        matches!(self.standing, ResultKind::Unusable(_))
    }

    /// Share of the parameters that are active per token, from 0 to 1.
    pub(crate) fn active_share(&self) -> Option<f64> {
        Some(self.active_parameters? as f64 / self.parameters? as f64)
    }

    /// The counts, unless the result is imported.
    pub(crate) fn results(&self) -> Option<&Results> {
        self.run.as_ref().map(|run| &run.results)
    }
}

/// Adds to equal labels the folder's name, or its part besides the model's name.
fn tell_apart(models: &mut [Compared]) {
    let labels: Vec<String> = models.iter().map(|model| model.label.clone()).collect();
    for model in models {
        if labels.iter().filter(|label| **label == model.label).count() > 1 {
            let folder = short(&format!("./{}", model.folder));
            let besides = folder.strip_prefix(&model.label.replace('/', "--")).map(|rest| rest.trim_start_matches('-'));
            let besides = besides.filter(|rest| !rest.is_empty()).unwrap_or(&folder);
            model.label = format!("{} ({besides})", model.label);
        }
    }
}

fn of_run(number: usize, folder: String, run: Box<Run>) -> (Compared, Vec<Figure>) {
    let results = &run.results;
    let mut model = Compared::new(number, folder, &results.model, ResultKind::Complete);
    // Both numbers come from one source: a run may have used only the first layers, and a ratio of
    // two sources would be meaningless.
    if model.parameters.is_none() {
        let used = &run.metadata.model;
        (model.parameters, model.active_parameters) = (Some(used.parameters), used.active_parameters);
    }
    model.sequences = Some(results.sequences);
    model.tokens_per_sequence = Some(results.tokens_per_sequence);
    model.perplexity = results.perplexity.map(|perplexity| {
        let losses: Option<Vec<f64>> = results.per_sequence.iter().map(|sequence| sequence.mean_nll).collect();
        Estimate { value: perplexity.perplexity, interval: losses.and_then(|losses| perplexity_interval(&losses)) }
    });
    model.job_sha256 = Some(run.job_sha256.clone());
    let drawn = BootstrapSamples::of(resampled(results), run.tallies.as_ref().map(|[layers, sites]| [layers, sites]));
    let figures = results.verdicts.iter().map(|verdict| figure(&model, CountedBy::Ours, verdict, &drawn)).collect();
    model.provenance = Some(Box::new(run.metadata.clone()));
    model.run = Some(run);
    (model, figures)
}

fn of_imported(number: usize, folder: String, imported: &Imported) -> (Compared, Vec<Figure>) {
    let standing = ResultKind::Imported { definition: imported.definition.clone() };
    let mut model = Compared::new(number, folder, &imported.model, standing);
    let outliers = imported.outliers.as_ref();
    model.sequences = outliers.map(|outliers| outliers.sequences);
    model.tokens_per_sequence = outliers.map(|outliers| outliers.tokens_per_sequence);
    model.perplexity = imported.perplexity.as_ref().map(|perplexity| Estimate {
        value: perplexity.perplexity,
        interval: perplexity_interval(&perplexity.batches),
    });
    let of = |outliers: &Outliers| {
        let verdicts = outliers.verdicts();
        let drawn = BootstrapSamples::of(Default::default(), Some([&outliers.batches; 2]));
        verdicts.iter().map(|verdict| figure(&model, CountedBy::Imported, verdict, &drawn)).collect()
    };
    let figures = outliers.map(of).unwrap_or_default();
    (model, figures)
}

/// Sequences have equal length, so the mean of their means is that of the corpus.
fn perplexity_interval(losses: &[f64]) -> Option<[f64; 2]> {
    interval(losses, |sample| mean(sample.iter().map(|loss| **loss)).map(f64::exp))
}

/// Totals of samples of the sequences, by layers and by norm outputs; empty if there is nothing to
/// sample.
struct BootstrapSamples {
    /// All sequences of a sample together.
    unique: [Vec<SequenceTotals>; 2],
    /// Totals within each sequence.
    within: [Vec<SequenceTotals>; 2],
    sequences: usize,
}

impl BootstrapSamples {
    /// `within`: totals of systematic features within each sequence.
    fn of(unique: [Vec<SequenceTotals>; 2], within: Option<[&Vec<SequenceTotals>; 2]>) -> Self {
        let sum =
            |sequences: &Vec<SequenceTotals>| samples(sequences, |sample| SequenceTotals::sum(sample.iter().copied()));
        let sequences = within.map_or(0, |[sequences, _]| sequences.len());
        Self { unique, within: within.map(|within| within.map(sum)).unwrap_or_default(), sequences }
    }

    fn under(&self, reading: Reading, axis: Axis) -> &[SequenceTotals] {
        let [layers, sites] = if reading == Reading::Unique { &self.unique } else { &self.within };
        match axis {
            Axis::Layers => layers,
            Axis::Sites => sites,
        }
    }
}

/// A verdict with its intervals over samples.
fn figure(model: &Compared, source: CountedBy, verdict: &Verdict, drawn: &BootstrapSamples) -> Figure {
    let divisor = if verdict.reading == Reading::MeanPerSequence { drawn.sequences as f64 } else { 1.0 };
    let drawn = drawn.under(verdict.reading, verdict.axis);
    let count = |tally: &SequenceTotals| Some(tally.features as f64 / divisor);
    let percent = |value: Option<f64>, of: fn(&SequenceTotals) -> f64| {
        let share = |tally: &SequenceTotals| (tally.features > 0).then(|| 100.0 * of(tally) / tally.features as f64);
        value.map(|value| Estimate { value, interval: middle(drawn.iter().map(share)) })
    };
    Figure {
        number: model.number,
        model: model.label.clone(),
        reading: verdict.reading,
        axis: verdict.axis,
        counted_as: match source {
            // In some imported runs a sequence is a batch of several.
            CountedBy::Imported => verdict.label.clone(),
            CountedBy::Ours | CountedBy::Published(_) => reading(verdict.reading, verdict.axis).to_owned(),
        },
        source,
        count: Estimate { value: verdict.count, interval: middle(drawn.iter().map(count)) },
        layers: percent(verdict.mean_layer_percent, |tally| tally.layer_share),
        positions: percent(verdict.mean_sequence_percent, |tally| tally.position_share),
    }
}

fn published_of(model: &Compared) -> Vec<Figure> {
    let figure = |(table, row): (&'static PublishedTable, &'static published::PublishedRow)| Figure {
        number: model.number,
        model: model.label.clone(),
        source: CountedBy::Published(&table.name),
        reading: table.reading,
        axis: table.axis,
        counted_as: reading(table.reading, table.axis).to_owned(),
        count: Estimate::without_interval(row.count),
        layers: Some(Estimate::without_interval(row.layers)),
        positions: Some(Estimate::without_interval(row.positions)),
    };
    published::of_model(&model.model).map(figure).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use outliers_protocol::files;
    use serde_json::json;

    use super::super::fixture::{change, copy, rename};
    use super::super::folder::read_all;
    use super::*;

    fn compared(home: &Path) -> Comparison {
        Comparison::of(read_all(&[home.to_owned()], true).unwrap())
    }

    #[test]
    fn run_has_six_own_figures_and_the_published_ones() {
        let home = tempfile::tempdir().unwrap();
        rename(&copy("mixture", &home.path().join("a")), "allenai/OLMoE-1B-7B-0125");
        rename(&copy("dense", &home.path().join("b")), "openai-community/gpt2");
        let compared = compared(home.path());
        let of = |number: usize| compared.figures_of(&compared.models[number - 1]);
        assert_eq!((of(1).count(), of(2).count()), (7, 7));
        let theirs: Vec<_> = of(1).chain(of(2)).filter(|f| f.source != CountedBy::Ours).collect();
        let names: Vec<_> = theirs.iter().map(|f| (f.source.name(), f.count.value, f.reading)).collect();
        assert_eq!(
            names,
            [
                ("published, the predecessor", 49.0, Reading::SumOverSequences),
                ("published, the paper", 1.0, Reading::Unique),
            ]
        );
        let sparse = &compared.models[0];
        assert!((sparse.active_share().unwrap() - 0.185).abs() < 0.001);
        assert_eq!(compared.models[1].active_share(), Some(1.0), "a dense model");
    }

    #[test]
    fn sizes_come_from_the_catalogue_or_else_the_tensors() {
        let home = tempfile::tempdir().unwrap();
        let with_active = |folder: &Path| {
            change(folder, files::METADATA, |metadata| metadata["model"]["active_parameters"] = json!(150_000));
        };
        with_active(&copy("mixture", &home.path().join("a")));
        rename(&copy("mixture", &home.path().join("b")), "allenai/OLMoE-1B-7B-0125");
        with_active(&home.path().join("b"));
        rename(&copy("mixture", &home.path().join("c")), "somebody/of-before");
        change(&home.path().join("c"), files::METADATA, |metadata| {
            metadata["model"].as_object_mut().unwrap().remove("active_parameters");
        });
        let sizes = compared(home.path()).models.into_iter().map(|model| (model.parameters, model.active_parameters));
        assert_eq!(
            sizes.collect::<Vec<_>>(),
            [(Some(200_128), Some(150_000)), (Some(6_919_161_856), Some(1_282_000_000)), (Some(200_128), None)]
        );
    }

    #[test]
    fn figures_lie_in_their_intervals_and_sum_is_mean_times_count() {
        let home = tempfile::tempdir().unwrap();
        copy("dense", &home.path().join("a"));
        let compared = compared(home.path());
        let model = &compared.models[0];
        for axis in [Axis::Layers, Axis::Sites] {
            let of = |reading| compared.own(model, reading, axis).unwrap();
            let unique = of(Reading::Unique).count;
            assert!(
                unique.interval.is_some_and(|[low, high]| low <= unique.value && unique.value <= high),
                "{unique:?}"
            );
            let (mean, sum) = (of(Reading::MeanPerSequence).count, of(Reading::SumOverSequences).count);
            assert_eq!(sum, mean.scaled(6.0));
            let [low, high] = mean.interval.unwrap();
            assert!(low < mean.value && mean.value < high, "{mean:?}");
            for share in [of(Reading::SumOverSequences).layers, of(Reading::SumOverSequences).positions] {
                let share = share.unwrap();
                assert!(
                    share.interval.is_some_and(|[low, high]| low <= share.value && share.value <= high),
                    "{share:?}"
                );
            }
        }
        let perplexity = model.perplexity.unwrap();
        assert!(perplexity.interval.is_some_and(|[low, high]| low < perplexity.value && perplexity.value < high));
    }

    #[test]
    fn figures_equal_an_independent_computation() {
        #[derive(serde::Deserialize)]
        struct Independent {
            reading: Reading,
            axis: Axis,
            count: f64,
            layers: f64,
            positions: f64,
        }
        for name in ["mixture", "dense"] {
            let home = tempfile::tempdir().unwrap();
            copy(name, &home.path().join("a"));
            let compared = compared(home.path());
            let reference = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/results"));
            let text = std::fs::read(reference.join(format!("{name}-reference.json"))).unwrap();
            let expected: Vec<Independent> = serde_json::from_slice(&text).unwrap();
            assert_eq!(expected.len(), compared.figures.len());
            for expected in expected {
                let figure = compared.own(&compared.models[0], expected.reading, expected.axis).unwrap();
                let ours = [figure.count.value, figure.layers.unwrap().value, figure.positions.unwrap().value];
                for (ours, theirs) in ours.into_iter().zip([expected.count, expected.layers, expected.positions]) {
                    assert!((ours - theirs).abs() < 1e-9, "{name}, {}: {ours} {theirs}", figure.counted_as);
                }
            }
        }
    }

    #[test]
    fn equal_names_are_disambiguated_and_paths_shortened() {
        let home = tempfile::tempdir().unwrap();
        copy("dense", &home.path().join("a"));
        copy("dense", &home.path().join("tests--gpt2-b"));
        rename(&copy("mixture", &home.path().join("c")), "/very/long/way/to/olmoe/model/");
        let labels: Vec<_> = compared(home.path()).models.into_iter().map(|model| model.label).collect();
        assert_eq!(labels, ["olmoe", "tests/gpt2 (a)", "tests/gpt2 (b)"], "in the order in which they were done");
    }

    #[test]
    fn numbers_are_stable_when_runs_are_added_or_removed() {
        let home = tempfile::tempdir().unwrap();
        rename(&copy("mixture", &home.path().join("z")), "a/first");
        assert_eq!(compared(home.path()).models[0].number, 1);
        rename(&copy("dense", &home.path().join("a")), "b/second");
        let numbers = |compared: &Comparison| {
            compared.models.iter().map(|model| (model.number, model.label.clone())).collect::<Vec<_>>()
        };
        let both = compared(home.path());
        assert_eq!(numbers(&both), [(1, "a/first".to_owned()), (2, "b/second".to_owned())]);
        for name in ["2", "b/second", "Second", "a"] {
            let only = compared(home.path()).only(&[name.to_owned()]).unwrap();
            assert_eq!(numbers(&only), [(2, "b/second".to_owned())], "{name}");
            assert!(only.figures.iter().all(|figure| figure.number == 2) && !only.figures.is_empty());
        }
        assert!(compared(home.path()).only(&["3".to_owned()]).unwrap_err().contains("a/first, b/second"));
    }

    #[test]
    fn order_of_runs_changes_no_number() {
        let home = tempfile::tempdir().unwrap();
        rename(&copy("mixture", &home.path().join("b")), "a/short");
        let long = copy("dense", &home.path().join("a"));
        rename(&long, "a/long");
        change(&long, files::METADATA, |metadata| metadata["started_at_ms"] = json!(1));
        let models = compared(home.path()).models;
        assert_eq!(models.iter().map(|model| model.label.as_str()).collect::<Vec<_>>(), ["a/short", "a/long"]);
    }

    #[test]
    fn summary_states_count_model_thresholds_and_reference() {
        let home = tempfile::tempdir().unwrap();
        rename(&copy("dense", &home.path().join("a")), "openai-community/gpt2");
        let mut compared = compared(home.path());
        let answer = compared.answer();
        for said in ["3 (openai-community/gpt2", "; published, the paper: 1)", "|x| >= 6 in at least 25 %"] {
            assert!(answer.contains(said), "{said}: {answer}");
        }
        assert!(answer.contains("at least 6 % of positions") && answer.contains("Beside them: "), "{answer}");
        compared.models[0].run.as_mut().unwrap().results.thresholds.position_fraction = 0.005;
        assert!(compared.answer().contains("at least 0.5 % of positions"), "{}", compared.answer());
    }

    #[test]
    fn unusable_result_is_listed_without_figures() {
        let home = tempfile::tempdir().unwrap();
        let folder = copy("dense", &home.path().join("a"));
        std::fs::write(folder.join("results.json"), "{}").unwrap();
        let compared = compared(home.path());
        assert!(compared.figures.is_empty());
        assert!(matches!(&compared.models[0].standing, ResultKind::Unusable(why) if why.contains("damaged")));
    }
}
