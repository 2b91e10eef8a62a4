//! Runs a command and returns its exit code.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use outliers_protocol::{ByteSize, Failure, FailureKind, Inspection, SCHEMA, VersionInfo, Weights};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;

use crate::checkpoint::Model;
use crate::checkpoint::hub::{Hub, HubOptions, Token};
use crate::commands::bench::run::RunTable;
use crate::commands::cli::{Bench, Cli, Command, HubArgs, JobArgs, read_job};
use crate::commands::{bench, demo};
use crate::device;
use crate::device::gpu;
use crate::error::{Result, WorkerError};
use crate::files::read_text;
use crate::kernels::fused;
use crate::kernels::product::Arithmetic;
use crate::model::arch;
use crate::model::decoder::MaxSequenceLength;
use crate::pass::ablation::Arms;
use crate::pass::budget::StreamBudget;
use crate::run::export;
use crate::run::inspect::{self, PlannedRun};
use crate::{corpus, run};

/// Maximum bytes of a token file.
const MAX_TOKEN: u64 = 64 << 10;

/// Parses the arguments, runs the command and prints its result.
///
/// Exit codes: 0 success, 1 failure, 2 wrong arguments or job.
pub fn main_impl() -> ExitCode {
    let cli = Cli::parse();
    start_log(cli.verbose);
    let json = cli.json;
    if cli.composed {
        fused::compose_all();
    }
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(error, json),
    }
}

/// `HF_TOKEN`, else the token file of `hf auth login`. Never an argument, since all users of a
/// machine see arguments.
fn token(hub: &HubArgs) -> Option<Token> {
    let named = std::env::var("HF_TOKEN").ok();
    let file = || read_text(&hub.home()?.join("token"), MAX_TOKEN).ok();
    Token::new(&named.or_else(file)?)
}

fn open_hub(args: &HubArgs) -> Result<Hub> {
    let (endpoint, requests) = (args.hf_endpoint.clone(), args.hub_requests);
    Hub::new(HubOptions { endpoint, token: token(args), requests, ..HubOptions::new(args.cache()?) })
}

fn start_log(verbose: bool) {
    let level = if verbose { tracing::Level::DEBUG } else { tracing::Level::INFO };
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(colour)
        .with_writer(std::io::stderr)
        .init();
}

fn report(error: WorkerError, json: bool) -> ExitCode {
    eprintln!("error: {}", error.message());
    if let Some(hint) = error.hint_text() {
        eprintln!("hint: {hint}");
    }
    let usage = error.kind() == FailureKind::Job;
    if json {
        print_json(&Failure::from(error));
    }
    ExitCode::from(if usage { 2 } else { 1 })
}

fn print_json(document: &impl Serialize) {
    println!("{}", serde_json::to_string_pretty(document).expect("documents are plain data"));
}

/// Prints a result as JSON, or by `in_words`.
fn print_result<T: Serialize>(result: &T, json: bool, in_words: impl FnOnce(&T)) {
    if json { print_json(result) } else { in_words(result) }
}

fn print_table(table: &(impl Serialize + std::fmt::Display), json: bool) {
    print_result(table, json, |table| print!("{table}"));
}

fn dispatch(cli: Cli) -> Result<()> {
    let hub = open_hub(&cli.hub)?;
    match cli.command {
        Command::Run { job, options, output, save_every } => {
            let job = match job {
                Some(path) => read_job(&path)?,
                None => options.job()?,
            };
            let results = run::run(&job, &output, &hub, Duration::from_secs(save_every), true)?;
            print_result(&results, cli.json, print_verdicts);
        }
        Command::Inspect { options, check_text, memory_limit } => {
            if let Some(ByteSize(bytes)) = memory_limit {
                limit_memory(bytes)?;
            }
            print_result(&inspect_command(*options, check_text, &hub)?, cli.json, print_inspection);
        }
        Command::DemoModel { output, seed } => {
            print_json(&demo::make(&output, seed)?);
        }
        Command::Bench { what } => match what {
            Bench::Memory { hidden, layers } => print_table(&bench::memory(hidden, &layers)?, cli.json),
            Bench::Run { options } => print_table(&bench_run(*options, &hub)?, cli.json),
            Bench::Attention { lengths, heads, repetitions, device } => {
                let placed = device::open(&[device])?;
                print_table(
                    &bench::attention::attention(&lengths, heads, repetitions.rounds, &placed[0].device)?,
                    cli.json,
                );
            }
            Bench::Decode { values, repetitions, device } => {
                let placed = device::open(&[device])?;
                print_table(&bench::decode::decode(values, repetitions.rounds, &placed[0].device)?, cli.json);
            }
        },
        Command::Devices => print_table(&device::list(), cli.json),
        Command::Version => version(cli.json),
    }
    Ok(())
}

/// Limits this process's memory to `bytes`. It aborts if it exceeds them.
fn limit_memory(bytes: u64) -> Result<()> {
    let allowed = getrlimit(Resource::Data).maximum.map_or(bytes, |allowed| allowed.min(bytes));
    let limit = Rlimit { current: Some(allowed), maximum: Some(allowed) };
    setrlimit(Resource::Data, limit).map_err(|error| WorkerError::internal(format!("no memory limit: {error}")))
}

fn inspect_command(options: JobArgs, check_text: bool, hub: &Hub) -> Result<Inspection> {
    let job = options.job()?;
    let devices = device::open(&job.devices)?;
    let checkpoint = run::metadata(&job, hub)?;
    let model = Model::open(&checkpoint.config, &*checkpoint.weights, job.layers)?;
    export::check(&job, model.family.architecture)?;
    let (vocab, longest) = (model.spec.vocab, model.spec.longest());
    let (sequences, tokens) = if check_text {
        let text = corpus::load(&job.corpus, Some(&checkpoint.folder), vocab, longest, hub)?;
        (text.sequences, text.tokens)
    } else {
        let most = longest.map_or(usize::MAX, MaxSequenceLength::tokens);
        let tokens = job.corpus.sequence_length.unwrap_or(corpus::DEFAULT_TOKENS.min(most));
        if let Some(selected @ MaxSequenceLength::SelectedKeys(_)) = longest {
            corpus::fits(tokens, selected)?;
        }
        (job.corpus.num_sequences.unwrap_or(corpus::DEFAULT_SEQUENCES), tokens)
    };
    let arms = Arms::of(job.ablation.as_ref(), model.spec.hidden, tokens)?.count();
    let budget = StreamBudget::planned(job.stream_budget_bytes);
    let mut run = PlannedRun::new(&job, &model.spec, [sequences, tokens], arms, &devices, budget);
    if job.devices.is_empty() {
        // A plan without `--devices` is for GPUs.
        run.arithmetic = Arithmetic::default();
    }
    let mut inspection = inspect::inspect(&job, &checkpoint, &model, run);
    // A plan without `--devices`, on a machine without GPUs, is for another machine.
    if !job.devices.is_empty() || device::has_gpu(&devices) {
        let chosen = inspect::micro_batch_tokens(job.micro_batch_tokens, &model, run, &devices);
        inspection.plan.micro_batch_tokens = Some(chosen);
    }
    Ok(inspection)
}

fn bench_run(options: JobArgs, hub: &Hub) -> Result<RunTable> {
    let mut job = options.job()?;
    if job.trace.is_some() || job.ablation.is_some() {
        let error = WorkerError::job("bench run supports neither --trace nor --ablate");
        return Err(error.hint("`outliers-worker run` does"));
    }
    job.weights.get_or_insert(Weights::Synthetic { seed: 1 });
    let sequences = job.corpus.num_sequences.unwrap_or(4);
    let tokens = job.corpus.sequence_length.unwrap_or(512);
    if sequences == 0 || tokens == 0 {
        return Err(WorkerError::job("a run needs at least one sequence and one token"));
    }
    bench::run::run(&job, sequences, tokens, hub)
}

fn version(json: bool) {
    let info = VersionInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        schema: SCHEMA,
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        cuda: cfg!(feature = "cuda"),
        oldest_cuda: gpu::oldest_driver(),
        architectures: arch::known().map(str::to_owned).collect(),
    };
    if json {
        return print_json(&info);
    }
    println!("outliers-worker {} (schema {}, {}, cuda: {})", info.version, info.schema, info.target, info.cuda);
    println!("architectures: {}", info.architectures.join(", "));
}

fn print_verdicts(results: &outliers_protocol::Results) {
    let ending = if results.sequences == 1 { "" } else { "s" };
    println!("{}: {} sequence{ending} of {} tokens", results.model, results.sequences, results.tokens_per_sequence);
    for v in &results.verdicts {
        let percent = |p: Option<f64>| p.map_or_else(|| "-".to_owned(), |p| format!("{p:.1} %"));
        let shares = (percent(v.mean_layer_percent), percent(v.mean_sequence_percent));
        println!("{:>10.2}  {:<54} layers {:>7}  positions {:>7}", v.count, v.label, shares.0, shares.1);
    }
    if let Some(p) = results.perplexity {
        println!("{:>10.3}  perplexity over {} predicted tokens", p.perplexity, p.predicted_tokens);
    }
    for arm in &results.ablation {
        let attention = arm.attention.map_or_else(String::new, |share| format!(", of attention {share:.4}"));
        let (perplexity, top, without) = (arm.perplexity.perplexity, arm.top_probability, arm.removed.label());
        println!("{perplexity:>10.3}  perplexity, largest probability {top:.4}{attention}, without {without}");
    }
    if let Some(massive) = &results.massive_activations {
        let layers = massive.onset_layer.map_or_else(String::new, |onset| format!(", from layer {onset} on"));
        println!("{:>10}  tokens with massive activations{layers}: {}", massive.tokens, massive.rule);
    }
    if let Some(experts) = &results.super_experts {
        println!("{:>10}  super-expert candidates: {}", experts.candidates.len(), experts.rule);
    }
}

fn print_inspection(i: &Inspection) {
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    println!("{} ({}), revision {}", i.model, i.architecture, i.revision.as_deref().unwrap_or("none"));
    println!("{} parameters, {} of them active per token", i.parameters, i.active_parameters);
    println!(
        "{} layers of width {}, {} studied norm outputs, vocabulary {}",
        i.layers.len(),
        i.hidden,
        i.sites.len(),
        i.vocab
    );
    let dtypes: Vec<String> = i.stored_dtypes.iter().map(|(d, b)| format!("{d} {:.3} GiB", gib(*b))).collect();
    println!("stored: {}", dtypes.join(", "));
    for layer in &i.layers {
        println!(
            "  layer {:>3}: {:>10.4} GiB in {:>4} tensors  {}",
            layer.layer,
            gib(layer.bytes),
            layer.tensors,
            layer.kind
        );
    }
    let p = &i.plan;
    println!(
        "{} sequences x {} tokens: {:.3} PFLOP, {:.3} GiB to read, {:.3} GiB of device memory streamed, {:.3} GiB resident",
        p.sequences,
        p.tokens_per_sequence,
        p.flops / 1e15,
        gib(p.bytes_to_read),
        gib(p.streamed_memory_bytes),
        gib(p.resident_memory_bytes)
    );
    if p.host_memory_bytes > 0 {
        println!("{:.3} GiB of memory of the host beside a GPU", gib(p.host_memory_bytes));
    }
    match p.micro_batch_tokens {
        Some(tokens) => println!("{tokens} tokens are computed together"),
        None => println!("the micro-batch is the largest that fits on the GPU"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
