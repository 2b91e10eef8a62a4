//! Output of commands for people.

use std::collections::HashMap;
use std::time::Duration;

use outliers_protocol::{
    Feature, FeaturePeak, FileBytes, Inspection, LayerInspection, MICRO_BATCH_TOKENS, Phase, Progress, Reading,
    Results, Sided, WeightVerification,
};

use super::diagnostics::diagnostics;
pub(crate) use super::table::{Cell, facts, id, name, number, paragraphs, table, text};
use crate::calendar::rfc3339;
use crate::cli::settings::Span;
use crate::cloud::broker::{Capabilities, Instance, InstanceId, InstanceState, Offer};
use crate::cloud::estimate::{CROSSING, Estimate, Work};
use crate::cloud::market::{self, FilterStep};
use crate::model_name::short;
use crate::run::ledger::{RunRecord, now_ms};
use crate::run::reconcile::{Action, Leave};
use crate::run::{RunEvent, RunState};
use crate::survey::ModelOutcome;
use crate::text::{clean, counted};
use crate::ui::status::Status;
use crate::units::{Bytes, Usd, figure, grouped, in_percent, operations};

/// Maximum lines of long lists; the file, or `--json`, contains all.
pub(crate) const TOP: usize = 10;

fn percent(share: Option<f64>) -> Cell {
    number(share.map_or_else(|| "-".to_owned(), |share| format!("{share:.1}")))
}

/// Verdicts, perplexity, the strongest features and optional measurements.
///
/// `model` is its local name; results contain the one on the instance. Unverified weights are
/// reported below the verdicts.
pub(crate) fn results(model: &str, results: &Results, weights: Option<&WeightVerification>) -> String {
    let thresholds = results.thresholds;
    let mut out = format!(
        "{}: {} of {}, {}, {}, {}\n\
         |x| >= {}, in >= {} % of layers (or norm outputs) and >= {} % of positions\n",
        clean(short(model).as_bytes(), 200),
        counted(results.sequences, "sequence"),
        counted(results.tokens_per_sequence, "token"),
        counted(results.n_layers, "layer"),
        counted(results.n_sites, "norm output"),
        counted(results.hidden, "feature"),
        thresholds.magnitude,
        in_percent(thresholds.layer_fraction),
        in_percent(thresholds.position_fraction),
    );
    let mut verdicts = table(&["systematic outlier features", "count", "mean L%", "mean S%"]);
    for verdict in &results.verdicts {
        let count = match verdict.reading {
            Reading::MeanPerSequence => figure(verdict.count, 2),
            _ => grouped(verdict.count as u64),
        };
        verdicts.add_row([
            text(&verdict.label),
            number(count),
            percent(verdict.mean_layer_percent),
            percent(verdict.mean_sequence_percent),
        ]);
    }
    out += &format!("\n{verdicts}\n\n");
    for warning in weights.into_iter().flat_map(WeightVerification::warnings) {
        out += &format!("{}\n", clean(warning.as_bytes(), 500));
    }
    if let Some(perplexity) = results.perplexity {
        let tokens = counted(perplexity.predicted_tokens as usize, "predicted token");
        out += &format!("perplexity {} over {tokens}\n", figure(perplexity.perplexity, 4));
    }
    out += &features(results);
    paragraphs(&(out + &diagnostics(results)))
}

/// Features in the order of tables and heat maps: systematic ones first, then by magnitude.
pub(crate) fn strongest(results: &Results) -> Vec<&Feature> {
    let rank = |f: &Feature| (f.systematic_by_layers, f.systematic_by_sites);
    let mut features: Vec<&Feature> = results.features.iter().collect();
    features.sort_by(|a, b| rank(b).cmp(&rank(a)).then(b.max_abs.total_cmp(&a.max_abs)));
    features
}

fn features(results: &Results) -> String {
    let strongest = strongest(results);
    if strongest.is_empty() {
        return format!("no value reaches the threshold; the largest is {:.3}\n", results.max_abs);
    }
    let header = ["feature", "layers", "L%", "S%", "signs", "min", "max", "gain", "x / gain", "systematic by"];
    let mut table = table(&header);
    for feature in strongest.iter().take(TOP) {
        let signs = match feature.sided {
            Sided::Pos => "+",
            Sided::Neg => "-",
            Sided::Both => "+-",
        };
        let by = match (feature.systematic_by_layers, feature.systematic_by_sites) {
            (true, true) => "both",
            (true, false) => "layers",
            (false, true) => "norm outputs",
            (false, false) => "-",
        };
        // From the site of the largest magnitude, since a large gain enlarges small values.
        let peak = |of: fn(&FeaturePeak) -> Option<f32>| {
            number(feature.peak.as_ref().and_then(of).map_or_else(|| "-".to_owned(), |value| figure(value.into(), 2)))
        };
        table.add_row([
            number(feature.dim),
            number(feature.n_layers),
            percent(Some(feature.layer_fraction * 100.0)),
            percent(Some(feature.position_fraction * 100.0)),
            Cell::new(signs),
            number(figure(feature.min.into(), 2)),
            number(figure(feature.max.into(), 2)),
            peak(|peak| peak.gain),
            peak(|peak| peak.value_over_gain),
            Cell::new(by),
        ]);
    }
    let more = strongest.len().saturating_sub(TOP);
    let rest = match more {
        0 => String::new(),
        more => format!("and {} with outliers\n", counted(more, "more feature")),
    };
    format!("\n{table}\n{rest}")
}

/// Offers with the estimated time and cost of a run, and the maximum cost until the time limit, or
/// the agreed amount if it is less.
pub(crate) fn offers(offers: &[Offer], work: &Work, limit: Duration, agreed: Option<Usd>, most: usize) -> String {
    let mut table = table(&["broker", "what", "price", "takes", "costs", "at most"]);
    for offer in offers.iter().take(most) {
        let estimate = work.on(offer);
        table.add_row([
            name(&offer.broker),
            facts(&market::hardware(offer)),
            number(offer.price),
            number(format!("{:#}{}", Span(Duration::from_secs_f64(estimate.seconds)), mark(estimate.is_over(limit)))),
            number(estimate.rank()),
            number(agreed.into_iter().chain([offer.price.cost_up_to_cents(limit)]).min().unwrap_or_default()),
        ]);
    }
    let more = offers.len().saturating_sub(most);
    let mut rest = if more > 0 { format!("and {more} more\n") } else { String::new() };
    if offers.iter().take(most).any(|offer| work.on(offer).is_over(limit)) {
        rest += &format!("{OVER}: longer than the time limit of {}, which --max-duration raises\n", Span(limit));
    }
    format!("{table}\n{rest}")
}

/// Marks a run that exceeds its time limit.
const OVER: &str = "(!)";

fn mark(is_over: bool) -> String {
    if is_over { format!(" {OVER}") } else { String::new() }
}

pub(crate) fn steps(considered: usize, steps: &[FilterStep]) -> String {
    let removed = steps.iter().filter(|step| step.removed > 0);
    let removed: Vec<String> = removed.map(|step| format!("{} by {}", step.removed, step.option)).collect();
    match removed.is_empty() {
        true => String::new(),
        false => format!("of {} the filters removed {}\n", counted(considered, "offer"), removed.join(", ")),
    }
}

/// The needs of a run, after notes on its weights.
pub(crate) fn needs(inspection: &Inspection) -> String {
    let plan = &inspection.plan;
    let together = plan.micro_batch_tokens.map(|tokens| grouped(tokens as u64));
    let together = together.unwrap_or_else(|| {
        let planned = grouped(MICRO_BATCH_TOKENS as u64);
        format!("{planned} are planned; a GPU with more free memory takes more, and that is not known before it runs")
    });
    let rows = [
        (
            "parameters",
            format!("{}, {} active per token", grouped(inspection.parameters), grouped(inspection.active_parameters)),
        ),
        ("tokens", format!("{} of {}", counted(plan.sequences, "sequence"), grouped(plan.tokens_per_sequence as u64))),
        ("weights to read, once", Bytes(plan.bytes_to_read).to_string()),
        ("weights on the disk", Bytes(plan.disk_bytes).to_string()),
        (
            "host memory to verify all weights",
            if plan.hash_memory_bytes > 0 { Bytes(plan.hash_memory_bytes).to_string() } else { String::new() },
        ),
        ("tokens computed together", together),
        ("device memory, streamed", Bytes(plan.streamed_memory_bytes).to_string()),
        ("device memory, all resident", Bytes(plan.resident_memory_bytes).to_string()),
        (
            "host memory beside GPUs, at least",
            if plan.host_memory_bytes > 0 { Bytes(plan.host_memory_bytes).to_string() } else { String::new() },
        ),
        ("arithmetic", operations(plan.flops)),
    ];
    let mut table = table(&["a run needs", "amount"]);
    for (name, value) in rows.into_iter().filter(|(_, value)| !value.is_empty()) {
        table.add_row([Cell::new(name), Cell::new(value)]);
    }
    for FileBytes { name, bytes } in &plan.exports {
        let name = format!("{}, at most", clean(name.as_bytes(), 200));
        table.add_row([Cell::new(name), Cell::new(Bytes(*bytes).to_string())]);
    }
    let note = |note: &String| format!("note: {}\n", clean(note.as_bytes(), 2000));
    let notes: String = inspection.checkpoint_notes.iter().map(note).collect();
    format!("{notes}{table}\n")
}

/// Time and cost of a run, with a line for each part and its assumptions.
pub(crate) fn estimate(estimate: &Estimate) -> String {
    let span = |seconds: f64| Span(Duration::from_secs_f64(seconds)).to_string();
    let mut out = String::new();
    if estimate.start_seconds > 0.0 {
        out += &format!("start of the instance: {} (assumed)\n", span(estimate.start_seconds));
    }
    let rate = Bytes(estimate.read_bytes_per_second);
    out += &format!("reading: {} at {rate}/s\n", span(estimate.read_seconds));
    out += &match (estimate.compute_seconds, estimate.operations_per_second) {
        (Some(seconds), Some(rate)) => format!("computing: {} at {}/s\n", span(seconds), operations(rate)),
        _ => "computing: left out (give the device's peak with --tflops)\n".to_owned(),
    };
    if let (Some(crossing), Some(statistics), Some(launch)) =
        (estimate.crossing_seconds, estimate.statistics_seconds, estimate.launch_seconds)
    {
        out += &format!("to GPUs and between them: {} at {}/s\n", span(crossing), Bytes(CROSSING as u64));
        out += &format!("statistics on GPUs: {}, launches: {}\n", span(statistics), span(launch));
    }
    out += &format!("together: {} (reading and computing overlap)\n", span(estimate.seconds));
    if let (Some(price), Some(cost)) = (estimate.price, estimate.cost) {
        out += &format!("cost: {cost} at {price}\n");
    }
    out
}

pub(crate) fn inspection(inspection: &Inspection) -> String {
    let mut out = format!(
        "{} ({}), revision {}\nwidth {}, vocabulary {}, {}, {}, head {}, tokenizer {}\n",
        clean(inspection.model.as_bytes(), 200),
        clean(inspection.architecture.as_bytes(), 80),
        clean(inspection.revision.as_deref().unwrap_or("none").as_bytes(), 80),
        grouped(inspection.hidden as u64),
        grouped(inspection.vocab as u64),
        counted(inspection.layers.len(), "layer"),
        counted(inspection.sites.len(), "studied norm output"),
        if inspection.tied_head { "tied to the embedding" } else { "of its own" },
        clean(inspection.tokenizer.as_deref().unwrap_or("none: token ids only").as_bytes(), 80),
    );
    let dtypes: Vec<String> = inspection
        .stored_dtypes
        .iter()
        .map(|(dtype, bytes)| format!("{} {}", clean(dtype.as_bytes(), 20), Bytes(*bytes)))
        .collect();
    out += &format!("stored: {} in all ({})\n", Bytes(inspection.stored_bytes), dtypes.join(", "));
    if !inspection.unstudied_norms.is_empty() {
        let norms: Vec<String> = inspection.unstudied_norms.iter().map(|name| clean(name.as_bytes(), 100)).collect();
        out += &format!("norms that act and are not studied: {}\n", norms.join(", "));
    }
    let mut table =
        table(&["layers", "kind", "experts", "tensors", "parameters", "bytes", "norms before attention, before MLP"]);
    // Consecutive layers that differ only in their index share a line.
    let norms = |layer: &LayerInspection| {
        let of_layer = inspection.sites.iter().filter(|site| site.layer == layer.layer);
        let number = format!(".{}.", layer.layer);
        of_layer.map(|site| clean(site.tensor.replacen(&number, ".*.", 1).as_bytes(), 120)).collect::<Vec<_>>()
    };
    let alike = |a: &LayerInspection, b: &LayerInspection| {
        LayerInspection { layer: b.layer, ..a.clone() } == *b && norms(a) == norms(b)
    };
    for layers in inspection.layers.chunk_by(alike) {
        let [first, rest @ ..] = layers else { continue };
        let last = rest.last().map(|last| format!("-{}", last.layer)).unwrap_or_default();
        table.add_row([
            number(format!("{}{last}", first.layer)),
            text(&first.kind),
            number(first.experts),
            number(first.tensors),
            number(grouped(first.parameters)),
            number(Bytes(first.bytes)),
            Cell::new(norms(first).join("\n")),
        ]);
    }
    out += &format!("\n{table}\n\n");
    for ignored in &inspection.ignored {
        let bytes = Bytes(ignored.bytes);
        out += &format!(
            "{} ({bytes}) on disk left unread: {}\n",
            counted(ignored.tensors, "tensor"),
            clean(ignored.why.as_bytes(), 200)
        );
    }
    if !inspection.unexplained.is_empty() {
        let tensors = counted(inspection.unexplained.len(), "tensor");
        out += &format!("{tensors} on disk not explained by the architecture\n");
    }
    let config = &inspection.config;
    if !config.unknown.is_empty() {
        let keys = clean(config.unknown.join(", ").as_bytes(), 300);
        out += &format!("config.json has keys that {} does not know; they change nothing: {keys}\n", config.class);
    }
    if let Some(explained) = config.explain() {
        out += &format!("{}\n\n", clean(explained.as_bytes(), 600));
    }
    paragraphs(&(out + &needs(inspection)))
}

pub(crate) fn runs(runs: &[RunRecord], driven: &[bool], now_ms: u64) -> String {
    let mut table = table(&["run", "model", "broker", "state", "age", "cost", "how it ended"]);
    for (run, driven) in runs.iter().zip(driven) {
        let state = match (run.state.is_at_rest(), driven) {
            (false, false) => format!("{}, {}", run.state.word(), alone(run.is_detached())),
            _ => run.state.word().to_owned(),
        };
        let ending = run.state.ending().map(ToString::to_string).unwrap_or_default();
        table.add_row([
            id(&run.id),
            name(&short(&run.spec.model)),
            name(broker(run)),
            Cell::new(state),
            number(format!("{:#}", age(run.created_at_ms, now_ms))),
            number(run.cost(now_ms)),
            text(&ending),
        ]);
    }
    if runs.is_empty() { "no runs yet\n".to_owned() } else { format!("{table}\n") }
}

/// State of a run without a driver.
fn alone(detached: bool) -> &'static str {
    if detached { "detached" } else { "abandoned" }
}

/// One run with its events.
pub(crate) fn run(run: &RunRecord, driven: bool, now_ms: u64) -> String {
    let mut out = format!("run {} of {} on {}\n", run.id, clean(run.spec.model.as_bytes(), 200), broker(run));
    let state = match driven || run.state.is_at_rest() {
        true => "",
        false if run.is_detached() => " (detached: `outliers attach` fetches its results)",
        false => " (abandoned: the same command picks it up)",
    };
    out += &format!("state: {}{state}\n", run.state.word());
    if let Some(rental) = run.state.rental() {
        out += &format!("instance: {} at {}\n", rental.instance, rental.price);
        let left = run.ends_at().unwrap_or(rental.tag.deadline).saturating_mul(1000).saturating_sub(now_ms);
        out += &format!("time left: {}\n", Span(Duration::from_millis(left)));
    }
    out += &format!("cost: {}\n", run.cost(now_ms));
    if let Some(ending) = run.state.ending() {
        out += &format!("how it ended: {}\n", clean(ending.to_string().as_bytes(), 2000));
    }
    if let Some(results) = run.state.results() {
        let whole = if results.complete { "" } else { " (partial)" };
        out += &format!("results: {}{whole}\n", results.folder);
    }
    let mut table = table(&["after", "what happened"]);
    for entry in &run.events {
        table.add_row([number(age(run.created_at_ms, entry.at_ms)), Cell::new(happened(&entry.event))]);
    }
    format!("{out}{table}\n")
}

/// An event of a run in words.
fn happened(event: &RunEvent) -> &'static str {
    match event {
        RunEvent::Creating { .. } => "an instance was ordered",
        RunEvent::NotCreated { .. } => "no instance was created",
        RunEvent::Created { .. } => "the instance was rented",
        RunEvent::Reached { .. } => "its host answered",
        RunEvent::Metered { .. } => "the cloud said how long the instance has run",
        RunEvent::Repriced { .. } => "the instance bills more than before",
        RunEvent::Discarded { .. } => "the instance was given up",
        RunEvent::Launched => "the worker was started",
        RunEvent::WorkerEnded { .. } => "the worker ended",
        RunEvent::Restarted => "the worker was started again",
        RunEvent::Fetched { .. } => "the results were saved",
        RunEvent::NotFetched { .. } => "the results could not be saved",
        RunEvent::Stopped { .. } => "the run was stopped",
        RunEvent::Held => "the instance was kept",
        RunEvent::Terminate => "the cloud was told to end the instance",
        RunEvent::Gone => "the instance was gone",
        RunEvent::Vanished => "the instance went away by itself",
    }
}

/// What runs, what is finished, what it costs.
pub(crate) fn status(status: &Status) -> String {
    let mut under_way =
        table(&["run", "survey", "model", "state", "broker", "price", "cost", "at most", "done in", "deadline in"]);
    // If all are of one survey, the table of surveys names it.
    let first = status.under_way.first().and_then(|run| run.survey.as_ref());
    let is_named_below = status.under_way.iter().all(|run| run.survey.as_ref() == first)
        && status.surveys.iter().any(|survey| Some(&survey.index.survey) == first);
    for run in &status.under_way {
        let waits = run.waits.iter().map(|why| format!(", waits: {why}"));
        let waits = waits.chain(run.progress.iter().map(how_far)).collect::<String>();
        let state = match run.looked_after {
            true => format!("{}{waits}", run.state),
            false => format!("{}{waits}, {}", run.state, alone(run.detached)),
        };
        let in_time = |at: Option<u64>, passed: &str| match at {
            None => "-".to_owned(),
            Some(at) if at <= status.at => passed.to_owned(),
            Some(at) => format!("{:#}", Span(Duration::from_secs(at - status.at))),
        };
        under_way.add_row([
            id(&run.run),
            name(run.survey.as_deref().filter(|_| !is_named_below).unwrap_or("-")),
            name(&short(&run.model)),
            text(&state),
            name(run.broker.as_deref().unwrap_or("-")),
            number(run.price.map(|price| price.to_string()).unwrap_or_default()),
            number(run.cost),
            number(run.at_most),
            // An estimate that has passed is no deadline that has passed.
            number(in_time(run.expected, "late")),
            number(in_time(run.deadline, "overdue")),
        ]);
    }
    let mut surveys = table(&["survey", "complete", "failed", "open", "cost", "folder"]);
    for survey in &status.surveys {
        let count = |outcomes: &[ModelOutcome]| {
            number(survey.index.models.iter().filter(|line| outcomes.contains(&line.outcome)).count())
        };
        surveys.add_row([
            name(&survey.index.survey),
            count(&[ModelOutcome::Complete]),
            count(&[ModelOutcome::Partial, ModelOutcome::Failed]),
            count(&[ModelOutcome::Open]),
            number(survey.spent),
            text(&survey.folder.to_string_lossy()),
        ]);
    }
    let mut over = table(&["finished", "survey", "model", "ago", "cost", "how it ended"]);
    for run in status.over.iter().rev().take(TOP) {
        over.add_row([
            id(&run.run),
            name(run.survey.as_deref().unwrap_or("-")),
            name(&short(&run.model)),
            number(format!("{:#}", age(run.ended * 1000, status.at * 1000))),
            number(run.cost),
            text(&run.ending),
        ]);
    }
    let mut out = String::new();
    for (is_empty, table, nothing) in [
        (status.under_way.is_empty(), under_way, "nothing is under way\n\n"),
        (status.surveys.is_empty(), surveys, ""),
        (status.over.is_empty(), over, ""),
    ] {
        out += &if is_empty { nothing.to_owned() } else { format!("{}\n\n", table.without_empty_columns()) };
    }
    let more = status.over.len().saturating_sub(TOP);
    if more > 0 {
        out += &format!("and {more} more finished: outliers runs list\n");
    }
    for lost in &status.unreadable {
        out += &format!("run {}: its record is damaged: {}\n", lost.run, clean(lost.why.as_bytes(), 200));
    }
    let Status { spent, reserved, .. } = status;
    match status.under_way.is_empty() {
        true => out + &format!("spent {spent}\n"),
        false => out + &format!("spent {spent}; what is under way may still cost {reserved} until its time limits\n"),
    }
}

/// Progress of a worker, after the state of its run.
fn how_far(progress: &Progress) -> String {
    let Progress { phase, layer, layers, tokens_per_second, .. } = progress;
    match phase {
        Phase::Layers if *tokens_per_second > 0.0 => {
            format!(": {layer} of {}, {} tokens/s", counted(*layers, "layer"), grouped(*tokens_per_second as u64))
        }
        Phase::Layers => format!(": {layer} of {}", counted(*layers, "layer")),
        other => format!(": {}", super::phase(*other).to_lowercase()),
    }
}

/// The broker of a run, or its possible brokers.
fn broker(run: &RunRecord) -> &str {
    run.state.offer().map_or(&run.spec.brokers, |offer| &offer.broker)
}

/// Instances, what is made of each in words, and when they end at the latest, in Unix seconds.
pub(crate) fn instances(listed: &[&Instance], words: &[String], deadlines: &[Option<u64>]) -> String {
    let mut table = table(&["broker", "instance", "run", "state", "hardware", "price", "deadline in", "what it is"]);
    for ((instance, words), deadline) in listed.iter().zip(words).zip(deadlines) {
        table.add_row([
            name(&instance.broker),
            id(if instance.id.0.is_empty() { "?" } else { &instance.id.0 }),
            id(&instance.tag().map(|tag| tag.run).unwrap_or_default()),
            // `instances show` has the address, for which there is no room here.
            text(&match instance.state {
                InstanceState::Ready(_) => "ready".to_owned(),
                _ => state(instance),
            }),
            name(&instance.hardware),
            number(instance.price.map(|price| price.to_string()).unwrap_or_default()),
            number(deadline.map(|at| format!("{:#}", until(at))).unwrap_or_default()),
            text(words),
        ]);
    }
    format!("{table}\n")
}

fn state(instance: &Instance) -> String {
    match &instance.state {
        InstanceState::Booting => "booting".to_owned(),
        InstanceState::Queued(why) => format!("waiting: {why}"),
        InstanceState::Ready(endpoint) => format!("ready at {endpoint}"),
        InstanceState::Failed(why) => format!("failed: {why}"),
        InstanceState::Stopped => "stopped".to_owned(),
        InstanceState::Terminating => "terminating".to_owned(),
        InstanceState::Unknown(word) => format!("unknown: {word}"),
        InstanceState::Unreadable(why) => format!("unreadable: {why}"),
    }
}

/// The time from now until then, in Unix seconds.
fn until(at: u64) -> Span {
    Span(Duration::from_secs(at.saturating_sub(now_ms() / 1000)))
}

/// One instance, with what ends it if everybody forgets it; `deadline` in Unix seconds.
pub(crate) fn instance(
    instance: &Instance,
    words: &str,
    run: Option<&RunRecord>,
    can: Capabilities,
    deadline: Option<u64>,
) -> String {
    let deadline = deadline.map_or_else(
        || "none of ours".to_owned(),
        |at| {
            let by = if can.server_deadline { "kept by the cloud itself" } else { "the cloud does not keep it" };
            format!("in {} ({by})", until(at))
        },
    );
    let mut table = table(&["instance", &clean(instance.id.0.as_bytes(), 100)]);
    for (name, value) in [
        ("broker", instance.broker.clone()),
        ("name", instance.name.clone()),
        ("what it is", words.to_owned()),
        ("run", run.map(|run| format!("{} of {}, {}", run.id, run.spec.model, run.state.word())).unwrap_or_default()),
        ("state", state(instance)),
        ("hardware", instance.hardware.clone()),
        ("price", instance.price.map(|price| price.to_string()).unwrap_or_default()),
        ("deadline", deadline),
    ] {
        table.add_row([Cell::new(name), text(&value)]);
    }
    format!("{table}\n")
}

/// Descriptions of instances by their actions.
pub(crate) fn what_they_are<'a>(listed: &[Instance], actions: impl IntoIterator<Item = &'a Action>) -> Vec<String> {
    let (mut of_instances, mut of_runs) = (HashMap::<&InstanceId, String>::new(), HashMap::<&str, String>::new());
    for action in actions {
        match action {
            Action::Finish { run, why } => {
                of_runs.entry(run).or_insert_with(|| format!("to be ended: {}", super::finish(*why)));
            }
            Action::Adopt { instance, .. } => {
                of_instances.entry(instance).or_insert_with(|| "of an abandoned run".to_owned());
            }
            Action::Terminate { instance, why } => {
                of_instances.entry(instance).or_insert_with(|| format!("stray: {}", super::stray(*why)));
            }
            Action::LeaveAlone { instance, why } => {
                of_instances.entry(instance).or_insert_with(|| left_alone(*why).to_owned());
            }
            Action::MarkGone { .. } => {}
        }
    }
    let words = |instance: &Instance| {
        let of_run = || of_runs.get(instance.tag()?.run.as_str());
        of_instances.get(&instance.id).or_else(of_run).cloned().unwrap_or_default()
    };
    listed.iter().map(words).collect()
}

fn left_alone(why: Leave) -> &'static str {
    match why {
        Leave::NotOurs => "not ours",
        Leave::OtherOwner => "of another ledger",
        Leave::Driven => "of a run under way",
        Leave::Held => "kept",
        Leave::Unreadable => "unknown: its entry in the cloud's list cannot be read",
        Leave::Superseded => "of a run that has another instance, or none, as far as is known here",
        Leave::RunUnknown => "of a run that is not known here",
        Leave::RecordUnreadable => "of a run whose record cannot be read",
    }
}

/// Results' folder and cost of a finished run, and the instance if it is kept.
pub(crate) fn epilogue(run: &RunRecord, cost: Usd) -> String {
    let mut out = String::new();
    if let Some(results) = run.state.results() {
        out += &format!("files: {}\n", results.folder);
    }
    let price = if run.spec.brokers == crate::cloud::broker::local::NAME { " (made up: this machine)" } else { "" };
    out += &format!("run {}, cost {cost}{price}\n", run.id);
    if let RunState::Held { rental, .. } = &run.state {
        out += &format!(
            "its instance is kept and bills {} until {}\nto end it: outliers instances terminate {}\n",
            rental.price,
            run.ends_at().map(rfc3339).unwrap_or_default(),
            rental.instance,
        );
    }
    out
}

fn age(since_ms: u64, now_ms: u64) -> Span {
    Span(Duration::from_millis(now_ms.saturating_sub(since_ms)))
}

#[cfg(test)]
mod tests {
    use outliers_protocol::{Axis, Perplexity, Thresholds, Verdict};

    use super::*;
    use crate::cloud::broker::SshEndpoint;
    use crate::units::UsdPerHour;

    #[test]
    fn estimate_states_its_rates_and_exclusions() {
        let work = Work { read: Bytes(1), operations: 3e14, read_rate: Bytes(1), efficiency: 0.5, ..Work::default() };
        let words = |rate| estimate(&work.at(Duration::ZERO, Bytes(0), rate, None));
        assert!(words(Some(1e-300)).contains("together"), "no division ends the program");
        assert!(words(None).contains("left out"), "{}", words(None));
        let (slow, quick) = (words(Some(2.4e10)), words(Some(1.2e11)));
        assert!(slow.contains("at 24.0 x 10^9 operations/s"), "{slow}");
        assert!(quick.contains("at 0.12 x 10^12 operations/s"), "{quick}");
        assert!(!quick.contains("GPUs"), "{quick}");
        let gpu = work.with_gpus(work.at(Duration::ZERO, Bytes(0), Some(1.2e11), None), 1);
        assert!(estimate(&gpu).contains("statistics on GPUs: "));
    }

    #[test]
    fn plan_says_what_counts_where_the_gpu_is_not_known() {
        let mut seen = crate::run::output::tests::inspection();
        seen.plan.micro_batch_tokens = None;
        let said = needs(&seen);
        assert!(said.contains("4,096 are planned") && said.contains("not known before it runs"), "{said}");
        seen.plan.micro_batch_tokens = Some(512);
        let said = needs(&seen);
        assert!(said.contains("512") && !said.contains("planned"), "{said}");
    }

    #[test]
    fn history_of_a_run_is_told_in_words() {
        let record = crate::run::ledger::tests::rented();
        let shown = run(&record, true, record.created_at_ms);
        assert!(shown.contains("an instance was ordered") && shown.contains("the instance was rented"), "{shown}");
    }

    #[test]
    fn survey_of_all_active_runs_is_named_once() {
        let home = tempfile::tempdir().unwrap();
        let mut shown = crate::ui::status::tests::status(home.path());
        let header = |of: &Status| status(of).lines().next().unwrap_or_default().to_owned();
        assert!(!header(&shown).contains("survey"), "{}", header(&shown));
        shown.under_way[0].survey = None;
        assert!(header(&shown).contains("survey"), "{}", header(&shown));
    }

    #[test]
    fn passed_estimate_is_not_shown_as_a_passed_deadline() {
        let home = tempfile::tempdir().unwrap();
        let mut late = crate::ui::status::tests::status(home.path());
        assert!(late.under_way[0].expected.is_some_and(|at| at <= late.at));
        assert!(status(&late).contains(" late ") && !status(&late).contains("overdue"), "{}", status(&late));
        late.under_way[0].deadline = Some(late.at);
        assert!(status(&late).contains("overdue"), "{}", status(&late));
    }

    #[test]
    fn ages_of_runs_are_rounded_to_minutes() {
        let run = crate::run::ledger::tests::rented();
        let shown = runs(std::slice::from_ref(&run), &[true], run.created_at_ms + 680_000);
        assert!(shown.contains(" 11 min ") && !shown.contains(" 20 s"), "{shown}");
    }

    #[test]
    fn instance_table_has_no_addresses() {
        let instance = crate::run::reconcile::tests::instance("i-1", "plain");
        let state = InstanceState::Ready(SshEndpoint { host: "203.0.113.7".into(), port: 22, user: "root".into() });
        let shown = instances(&[&Instance { state, ..instance }], &["not ours".to_owned()], &[None]);
        assert!(shown.contains(" ready ") && !shown.contains("203.0.113.7"), "{shown}");
    }

    #[test]
    fn instance_table_scans_the_actions_once() {
        let instance = |i: usize| crate::run::reconcile::tests::instance(&format!("i-{i}"), "plain");
        let listed: Vec<Instance> = (0..300).map(instance).collect();
        let actions = crate::run::reconcile::by_tag(&listed);
        let looks = std::cell::Cell::new(0);
        let words = what_they_are(&listed, actions.iter().inspect(|_| looks.set(looks.get() + 1)));
        assert_eq!((looks.get(), words.len()), (300, 300), "not once per instance");
        assert!(words.iter().all(|words| words == "not ours"));
    }

    #[test]
    fn very_long_name_does_not_widen_the_table() {
        let plain = crate::run::reconcile::tests::instance("i-1", "plain");
        let mut evil = crate::run::reconcile::tests::instance(&"x".repeat(100_000), "evil");
        evil.hardware = "漢".repeat(100_000);
        let shown = instances(&[&plain, &evil], &["not ours".to_owned(), "not ours".to_owned()], &[None, None]);
        assert!(shown.lines().all(|line| line.chars().count() < 500), "{shown}");
        assert!(shown.len() < 5000, "{} bytes", shown.len());
        let wide = {
            let mut wide = table(&["a", "b"]);
            wide.add_row([Cell::new("y".repeat(1000)), Cell::new("z")]);
            wide.to_string()
        };
        assert!(wide.lines().count() > 4 && wide.lines().all(|line| line.chars().count() <= 220), "{wide}");
    }

    #[test]
    fn hostile_names_are_sanitised() {
        let verdict = |label: &str, count| Verdict {
            reading: Reading::Unique,
            axis: Axis::Layers,
            label: label.into(),
            count,
            mean_layer_percent: Some(33.333),
            mean_sequence_percent: None,
        };
        let evil = Results {
            schema: 1,
            model: "evil\u{1b}[2Jmodel".into(),
            thresholds: Thresholds::default(),
            n_layers: 4,
            n_sites: 8,
            unstudied_norms: Vec::new(),
            hidden: 16,
            sequences: 2,
            tokens_per_sequence: 8,
            verdicts: vec![verdict("a\u{1b}]0;title\u{7}b", 3.0), verdict("c", 0.0)],
            features: Vec::new(),
            per_sequence: Vec::new(),
            sites: Vec::new(),
            total_occurrences: 0,
            max_abs: 1.5,
            perplexity: Some(Perplexity { perplexity: 12.5, mean_nll: 2.5257, predicted_tokens: 14 }),
            other_sites: Vec::new(),
            massive_activations: None,
            top_records: Vec::new(),
            routers: Vec::new(),
            super_experts: None,
            ablation: Vec::new(),
            quantization_error: None,
            residual_sinks: None,
            spike_life: None,
            attention_sinks: None,
        };
        let mut weights = WeightVerification { verified_files: 3, ..WeightVerification::default() };
        weights.leave_out("no\u{1b}[2J memory", vec!["a.safetensors".into()]);
        let shown = results(&evil.model, &evil, Some(&weights));
        assert!(shown.contains("weights unverified: 1 of 4 files (no"), "{shown}");
        assert!(!results(&evil.model, &evil, None).contains("unverified"));
        assert!(shown.chars().all(|c| !c.is_control() || c == '\n'), "{shown}");
        for expected in ["evilmodel", "ab", "33.3", "12.5000", "1.500"] {
            assert!(shown.contains(expected), "{expected} in {shown}");
        }
        let perplexity = Perplexity { perplexity: 1.23456e71, mean_nll: 163.7, predicted_tokens: 2040 };
        let thresholds = Thresholds { layer_fraction: 0.125, position_fraction: 0.005, ..Thresholds::default() };
        let long = results("/a/b/tiny", &Results { thresholds, perplexity: Some(perplexity), ..evil }, None);
        assert!(long.starts_with("tiny: 2 sequences of 8 tokens, 4 layers, 8 norm outputs, 16 features\n"), "{long}");
        assert!(
            long.contains("\n|x| >= 6, in >= 12.5 % of layers (or norm outputs) and >= 0.5 % of positions\n"),
            "{long}"
        );
        assert!(long.contains("\nperplexity 1.2346e71 over 2,040 predicted tokens\n"), "{long}");
    }

    #[test]
    fn offer_shows_price_and_cloud_once() {
        let offer = Offer::new("vast", "a".into(), 1, UsdPerHour::from_dollars(1.5)).with_gpu("H100 SXM", None);
        let shown = offers(&[offer], &Work::default(), Duration::from_secs(3600), None, TOP);
        let row = shown.lines().nth(2).unwrap();
        assert_eq!((row.matches("$1.50/h").count(), row.matches("vast").count()), (1, 1), "{shown}");
    }
}
